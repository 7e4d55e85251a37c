//! Runs of several processes that mpirun starts.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use monteclora_converters::Adapter;
use serde_json::Value;

use crate::fixtures::{largest_difference, own};
use crate::training::write_rows;

const PROGRAM: &str = env!("CARGO_BIN_EXE_monteclora");

/// A run.toml on the tiny model in a directory of its own.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new(train: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rows = dir.path().join("rows.jsonl");
        write_rows(&rows);
        let text = format!(
            "seed = 5\n[model]\nmodel_id = {:?}\n[data]\ntrain = {rows:?}\nvalid = {rows:?}\nmax_seq_length = 120\n\
             [lora]\nr = 4\nlora_dropout = 0.1\n[train]\noutput_dir = {:?}\nper_device_train_batch_size = 1\n\
             learning_rate = 1e-3\nlogging_steps = 1\neval_steps = 2\n{train}\n",
            own().join("models/tiny-llama"),
            dir.path().join("out"),
        );
        std::fs::write(dir.path().join("run.toml"), text).unwrap();
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `mpirun -n N monteclora train -c run.toml ARGUMENTS` into the directory `out`.
    fn train(&self, n_ranks: usize, out: &str, arguments: &[&str]) -> Command {
        let mut command = ranks(n_ranks);
        command
            .arg(PROGRAM)
            .args(["train", "-c"])
            .arg(self.at("run.toml"));
        command.args([
            "--set",
            &format!("train.output_dir={:?}", self.at(out).display().to_string()),
        ]);
        command.args(arguments);
        command
    }

    fn values(&self, out: &str) -> Vec<f32> {
        let adapter = Adapter::read_dir(&self.at(out)).unwrap();
        let tensors = adapter
            .sites
            .iter()
            .flat_map(|site| [&site.lora_a, &site.lora_b]);
        tensors
            .flat_map(|tensor| tensor.to_f32().unwrap())
            .collect()
    }

    fn bytes(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.at(out).join("adapter_model.safetensors")).unwrap()
    }

    /// The metrics of a run, without what depends on time.
    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.at(out).join("metrics.jsonl")).unwrap();
        let mut lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        for line in &mut lines {
            let line = line.as_object_mut().unwrap();
            for key in [
                "wall_s",
                "seconds",
                "tokens_per_second",
                "peak_memory_bytes",
            ] {
                line.remove(key);
            }
        }
        lines
    }
}

/// `mpirun -n N`, whatever the machine's cores, and as any user.
fn ranks(n_ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-n"])
        .arg(n_ranks.to_string())
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        // Ranks that wait leave the core to those that work.
        .env("OMPI_MCA_mpi_yield_when_idle", "1")
        .env_remove("RUST_LOG");
    command
}

fn succeed(command: &mut Command) -> Output {
    let output = command
        .output()
        .expect("mpirun is installed where the feature mpi is built");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn n_ranks_are_one_rank_with_n_times_the_accumulation() {
    for packing in ["true", "false"] {
        let case = Case::new("max_steps = 3");
        let packing = format!("data.packing={packing}");
        for n_ranks in [2, 3] {
            let accumulation = format!("train.gradient_accumulation_steps={n_ranks}");
            let (alone, many, again) = (
                format!("a{n_ranks}"),
                format!("m{n_ranks}"),
                format!("r{n_ranks}"),
            );
            succeed(&mut case.train(1, &alone, &["--set", &packing, "--set", &accumulation]));
            let said = succeed(&mut case.train(n_ranks, &many, &["--set", &packing]));
            succeed(&mut case.train(n_ranks, &again, &["--set", &packing]));
            let distance = largest_difference(&case.values(&alone), &case.values(&many));
            assert!(distance < 2e-5, "{packing}, {n_ranks} ranks: {distance}");
            assert_eq!(case.bytes(&many), case.bytes(&again));
            let (of_one, of_many) = (case.metrics(&alone), case.metrics(&many));
            assert_eq!(of_one.len(), of_many.len());
            for (one, other) in of_one.iter().zip(&of_many) {
                for key in [
                    "type",
                    "step",
                    "tokens",
                    "trained_tokens",
                    "epoch",
                    "rows",
                    "event",
                ] {
                    assert_eq!(one[key], other[key], "{key}");
                }
                for key in ["loss", "token_accuracy"] {
                    let [one, other] =
                        [one, other].map(|line| line[key].as_f64().unwrap_or_default());
                    assert!((one - other).abs() < 1e-5, "{key}: {one} {other}");
                }
            }
            // Rank 0 speaks for all.
            let said = stderr(&said);
            assert_eq!(said.matches("step 2/3  loss").count(), 1, "{said}");
        }
    }
}

/// Scores, a fit and predictions of two ranks are those of one, to the last digit.
#[test]
fn scores_do_not_depend_on_the_ranks() {
    let case = Case::new("max_steps = 2");
    let rows: String = (0..21)
        .map(|n| format!("{}\n", serde_json::json!({"prompt": "is it? ".repeat(n % 6 + 1), "choices": [" yes", " no, never"], "answer": n % 2})))
        .collect();
    std::fs::write(case.at("choices.jsonl"), rows).unwrap();
    let (model, rows) = (own().join("models/tiny-llama"), case.at("choices.jsonl"));
    let adapter = own().join("adapters/monteclora");
    let run = |n_ranks: usize, words: &[&str]| -> Value {
        let mut command = match n_ranks {
            1 => Command::new(PROGRAM),
            n => {
                let mut command = ranks(n);
                command.arg(PROGRAM);
                command
            }
        };
        command
            .args(words)
            .arg("-m")
            .arg(&model)
            .arg("-a")
            .arg(&adapter);
        command
            .arg("--data")
            .arg(&rows)
            .args(["--json", "--batch-size", "2"]);
        let output = succeed(&mut command);
        let mut found: Value = serde_json::from_slice(&output.stdout).unwrap();
        found.as_object_mut().unwrap().remove("seconds");
        found
    };
    let (one, two) = (case.at("rows-1"), case.at("rows-2"));
    let per_row = |path: &Path| path.display().to_string();
    assert_eq!(
        run(
            1,
            &[
                "eval",
                "--posterior-samples",
                "3",
                "--per-row",
                &per_row(&one)
            ]
        ),
        run(
            2,
            &[
                "eval",
                "--posterior-samples",
                "3",
                "--per-row",
                &per_row(&two)
            ]
        ),
    );
    assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    assert_eq!(run(1, &["predict"]), run(3, &["predict"]));
    let (one, two) = (case.at("fit-1"), case.at("fit-2"));
    let fit = |n_ranks, out: &Path| {
        run(
            n_ranks,
            &[
                "fit",
                "--draws",
                "2",
                "--geometry",
                "rows",
                "-o",
                &per_row(out),
            ],
        )
    };
    let (of_one, of_two) = (fit(1, &one), fit(2, &two));
    assert_eq!(
        (&of_one["sigma"], &of_one["evaluations"]),
        (&of_two["sigma"], &of_two["evaluations"])
    );
    let weights = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights(&one), weights(&two));
}

/// Starts a run that would take long, and returns it when its first checkpoint is there.
fn begun(case: &Case, n_ranks: usize, out: &str) -> std::process::Child {
    let mut command = case.train(n_ranks, out, &["--set", "train.save_steps=2"]);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(120);
    while !case.at(out).join("checkpoint-2").is_dir() {
        assert!(Instant::now() < until, "no checkpoint");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// The processes that mpirun started.
fn children(parent: u32) -> Vec<u32> {
    let found = Command::new("pgrep")
        .args(["-P", &parent.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8(found.stdout).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn sigterm_saves_once_and_the_run_continues_on_other_ranks() {
    let case =
        Case::new("max_steps = 4000\nlr_scheduler_type = \"constant\"\nsave_total_limit = 0");
    let mut child = begun(&case, 2, "out");
    signal(child.id(), "-TERM");
    let said = BufReader::new(child.stderr.take().unwrap());
    let said: Vec<String> = said.lines().map(|line| line.unwrap()).collect();
    child.wait().unwrap();
    let said = said.join("\n");
    assert_eq!(
        said.matches("error: interrupted at step").count(),
        1,
        "{said}"
    );
    assert!(
        said.contains("continue with: mpirun -n 2 ") && said.contains("--resume auto"),
        "{said}"
    );
    let (last, _) = monteclora::train::checkpoints(&case.at("out"))
        .unwrap()
        .pop()
        .unwrap();
    let length = format!("train.max_steps={}", last + 2);
    let resumed = |n_ranks, from: &str, to: &str| {
        let status = Command::new("cp")
            .arg("-r")
            .args([case.at(from), case.at(to)])
            .status();
        assert!(status.unwrap().success());
        succeed(&mut case.train(n_ranks, to, &["--set", &length, "--resume", "auto"]));
    };
    for n_ranks in [1, 2, 3] {
        resumed(n_ranks, "out", &format!("on{n_ranks}"));
        let record = std::fs::read(case.at(&format!("on{n_ranks}")).join("run.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(record["micro_batches_per_step"], 2);
        assert_eq!(record["finished_step"], last + 2);
        let distance =
            largest_difference(&case.values("on1"), &case.values(&format!("on{n_ranks}")));
        assert!(distance < 2e-5, "{n_ranks} ranks: {distance}");
    }
    resumed(2, "out", "again");
    assert_eq!(case.bytes("on2"), case.bytes("again"));
}

#[test]
fn a_killed_rank_ends_all_and_the_last_checkpoint_is_intact() {
    let case = Case::new("max_steps = 4000");
    let mut child = begun(&case, 2, "out");
    signal(children(child.id())[1], "-KILL");
    let status = child.wait().unwrap();
    assert_ne!(status.code(), Some(0));
    let length = "train.max_steps=4000";
    let mut command = case.train(
        1,
        "out",
        &["--resume", "auto", "--set", length, "--dry-run"],
    );
    succeed(&mut command);
    let (last, dir) = monteclora::train::checkpoints(&case.at("out"))
        .unwrap()
        .pop()
        .unwrap();
    assert!(last >= 2);
    Adapter::read_dir(&dir).unwrap();
}

/// A rank with other rows, with a file that is missing, or with another configuration ends all, with its message and exit code.
#[test]
fn a_rank_that_differs_ends_all() {
    let case = Case::new("max_steps = 2");
    let rows = std::fs::read_to_string(case.at("rows.jsonl")).unwrap();
    std::fs::write(
        case.at("other.jsonl"),
        rows.lines()
            .skip(1)
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    )
    .unwrap();
    let other = format!(
        "data.train={:?}",
        case.at("other.jsonl").display().to_string()
    );
    let missing = format!(
        "data.train={:?}",
        case.at("missing.jsonl").display().to_string()
    );
    for (key, code, expected) in [
        (other.as_str(), 3, "data.train has another content"),
        (missing.as_str(), 3, "missing.jsonl"),
        (
            "train.learning_rate=0.5",
            2,
            "train.learning_rate is 0.001 on rank 0, 0.5 there",
        ),
    ] {
        let mut command = case.train(1, "out", &[]);
        // The second rank has a key of its own.
        command
            .arg(":")
            .args(["-n", "1"])
            .arg(PROGRAM)
            .args(["train", "-c"])
            .arg(case.at("run.toml"))
            .args(["--set", key]);
        let output = command.output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(expected), "{said}");
        // Nothing was begun.
        assert!(!case.at("out").exists());
    }
}

#[test]
fn commands_that_are_one_process_say_so() {
    let output = ranks(2)
        .arg(PROGRAM)
        .arg("inspect")
        .arg(own().join("adapters/monteclora"))
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("this command runs as one process"), "{said}");
    let output = ranks(2)
        .arg(PROGRAM)
        .args(["train", "--no-such-flag"])
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(said.matches("--no-such-flag").count(), 1, "{said}");
}

/// Ranks with other rows, other options or other commands are told so, and none of them waits for the others for ever.
#[test]
fn ranks_with_other_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, n: usize| {
        let row = |n: usize| serde_json::json!({"prompt": "is it? ".repeat(n % 3 + 1), "choices": [" yes", " no"], "answer": 0});
        let rows: String = (0..n).map(|n| format!("{}\n", row(n))).collect();
        std::fs::write(dir.path().join(name), rows).unwrap();
        dir.path().join(name).display().to_string()
    };
    let (rows, others) = (write("rows.jsonl", 9), write("others.jsonl", 3));
    let (model, adapter) = (
        own().join("models/tiny-llama"),
        own().join("adapters/monteclora"),
    );
    let (model, adapter) = (model.display().to_string(), adapter.display().to_string());
    let eval = |rows: &str| -> Vec<String> {
        [
            "eval", "-m", &model, "-a", &adapter, "--json", "--data", rows,
        ]
        .map(str::to_owned)
        .into()
    };
    let refused = |first: Vec<String>, second: Vec<String>, part: &str| {
        let mut command = ranks(1);
        command
            .arg(PROGRAM)
            .args(first)
            .args([":", "-n", "1", PROGRAM])
            .args(second);
        let output = command.output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(part) && output.stdout.is_empty(), "{said}");
    };
    refused(eval(&rows), eval(&others), "the rows");
    let mut seed = eval(&rows);
    seed.extend(["--batch-size", "3"].map(str::to_owned));
    refused(eval(&rows), seed, "the options");
    refused(
        eval(&rows),
        vec!["--version".to_owned()],
        "all ranks must do the same",
    );
    let train = |more: &[&str]| -> Vec<String> {
        let words = ["train", "-m", &model, "--data", &rows, "-o", "out"];
        words
            .iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect()
    };
    refused(
        train(&[]),
        train(&["--dry-run"]),
        "all ranks must do the same",
    );
    refused(train(&[]), eval(&rows), "all ranks must do the same");
}
