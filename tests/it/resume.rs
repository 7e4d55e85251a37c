//! Runs that end before their time, continue, or must not: the command on the tiny model, killed, interrupted and out of disk.

mod output_dir;

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use monteclora::config::RunConfig;
use monteclora_converters::Adapter;
use serde_json::Value;

use crate::fixtures::own;
use crate::training::write_rows;

/// A run.toml on the tiny model in a directory of its own.
struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    /// Everything that makes exact continuation hard: dropout, accumulation, packing, ragged rows, a metrics window that
    /// no checkpoint falls on, evaluation and best model.
    fn new(train: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rows = dir.path().join("rows.jsonl");
        write_rows(&rows);
        std::fs::copy(&rows, dir.path().join("valid.jsonl")).unwrap();
        let text = format!(
            "seed = 5\n[model]\nmodel_id = {:?}\n[data]\ntrain = {rows:?}\nvalid = {:?}\nmax_seq_length = 120\n\
             [lora]\nr = 4\nlora_dropout = 0.1\n[train]\noutput_dir = {:?}\nper_device_train_batch_size = 1\n\
             gradient_accumulation_steps = 2\nlearning_rate = 5e-3\nlogging_steps = 3\neval_steps = 5\n{train}\n",
            own().join("models/tiny-llama"),
            dir.path().join("valid.jsonl"),
            dir.path().join("out"),
        );
        std::fs::write(dir.path().join("run.toml"), text).unwrap();
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_monteclora"));
        command
            .env_remove("RUST_LOG")
            .args(["train", "-c"])
            .arg(self.at("run.toml"))
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn succeed(&self, arguments: &[&str]) -> Output {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output
    }

    fn fail(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        stderr(&output)
    }

    fn checkpoints(&self) -> Vec<u64> {
        let mut steps: Vec<u64> = names(&self.at("out"))
            .iter()
            .filter_map(|name| name.strip_prefix("checkpoint-")?.parse().ok())
            .collect();
        steps.sort_unstable();
        steps
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

/// Lines of the metrics without what a clock or a memory gauge says, and without the events, which tell of the stops.
fn curve(dir: &Path) -> Vec<Value> {
    std::fs::read_to_string(dir.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["type"] != "event")
        .map(|mut line| {
            for key in [
                "wall_s",
                "seconds",
                "tokens_per_second",
                "peak_memory_bytes",
            ] {
                line.as_object_mut().unwrap().remove(key);
            }
            line
        })
        .collect()
}

fn same_result(one: &Path, other: &Path) {
    assert_eq!(weights(one), weights(other));
    assert_eq!(weights(&one.join("best")), weights(&other.join("best")));
    assert_eq!(curve(one), curve(other));
}

/// Kills without warning, as the kernel does when memory is short.
fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Killed three times while something is half written and at four times that nothing decides, a run ends with the files of
/// one that was left alone.
#[test]
fn killed_runs_continue_to_the_same_bytes() {
    let case = Case::new("max_steps = 60\nsave_steps = 2\nsave_total_limit = 2");
    let whole = case.at("whole");
    case.succeed(&["--set", &format!("train.output_dir={whole:?}")]);
    let out = case.at("out");
    for attempt in 0u64..7 {
        let mut child = case
            .command(&["--resume", "auto"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let before = case.checkpoints().pop();
        let began = Instant::now();
        let half_written = || names(&out).iter().any(|name| name.starts_with(".partial-"));
        while case.checkpoints().pop() == before || (attempt < 3 && !half_written()) {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint");
        }
        if attempt >= 3 {
            // Some milliseconds, different every time.
            std::thread::sleep(Duration::from_micros(attempt * attempt * 977 % 9000));
        }
        kill(child);
    }
    case.succeed(&["--resume", "auto"]);
    same_result(&whole, &out);
    assert!(
        names(&out).iter().all(|name| !name.starts_with('.')),
        "{:?}",
        names(&out)
    );
    assert_eq!(case.checkpoints(), [58, 60]);
}

/// Checkpoints of which a part is missing are passed over with a warning.
#[test]
fn torn_checkpoints_are_skipped() {
    let case = Case::new("max_steps = 8\nsave_steps = 2\nsave_total_limit = 0");
    case.succeed(&[]);
    let out = case.at("out");
    let expected = weights(&out);
    assert_eq!(case.checkpoints(), [2, 4, 6, 8]);
    std::fs::remove_file(out.join("checkpoint-8/trainer_state.json")).unwrap();
    let moments = out.join("checkpoint-6/optimizer.safetensors");
    let length = std::fs::metadata(&moments).unwrap().len();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&moments)
        .unwrap();
    file.set_len(length / 2).unwrap();
    // Named, it is refused and nothing is discarded.
    let torn = out.join("checkpoint-6").display().to_string();
    let named = case.fail(4, &["--resume", &torn, "--force"]);
    assert!(named.contains("optimizer.safetensors"), "{named}");
    assert_eq!(case.checkpoints(), [2, 4, 6, 8]);
    let resumed = case.succeed(&["--resume", "auto"]);
    let said = stderr(&resumed);
    for step in [6, 8] {
        let warning = format!("checkpoint-{step}` is not a complete checkpoint");
        assert!(said.contains(&warning), "{said}");
    }
    assert!(said.contains("continuing at step 4 of 8"), "{said}");
    assert_eq!(weights(&out), expected);
}

#[test]
fn a_finished_run_says_so_and_can_be_prolonged() {
    let case = Case::new("max_steps = 4\nsave_steps = 100");
    // Nothing to resume: from the beginning.
    let first = case.succeed(&["--resume", "auto"]);
    assert!(
        stderr(&first).contains("nothing to resume"),
        "{}",
        stderr(&first)
    );
    let expected = weights(&case.at("out"));
    let again = case.succeed(&["--resume", "auto"]);
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(said.contains("finished") && said.contains('4'), "{said}");
    assert_eq!(weights(&case.at("out")), expected);

    let longer = case.succeed(&["--resume", "auto", "--set", "train.max_steps=6"]);
    assert!(stderr(&longer).contains("step 6/6"), "{}", stderr(&longer));
    let shorter = case.fail(2, &["--resume", "auto", "--set", "train.max_steps=3"]);
    assert!(
        shorter.contains("max_steps") && shorter.contains("step 6"),
        "{shorter}"
    );
}

#[test]
fn what_changed_since_the_checkpoint_is_named() {
    let case = Case::new("max_steps = 6\nsave_steps = 2\nsave_total_limit = 0");
    case.succeed(&["--set", "train.max_steps=4"]);
    let resume = |set: &[&'static str]| {
        let mut arguments = vec!["--resume", "auto", "--set", "train.max_steps=6"];
        arguments.extend(set);
        arguments
    };
    let said = case.fail(
        2,
        &resume(&["--set", "train.learning_rate=1e-4", "--set", "lora.r=8"]),
    );
    for line in [
        "train.learning_rate: 0.005 at the checkpoint, 0.0001 now",
        "lora.r: 4 at the checkpoint, 8 now",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let rows = std::fs::read_to_string(case.at("rows.jsonl")).unwrap();
    std::fs::write(case.at("rows.jsonl"), rows.replace("rose", "nose")).unwrap();
    let said = case.fail(3, &resume(&[]));
    assert!(said.contains("data.train: the content changed"), "{said}");
    std::fs::remove_file(case.at("rows.jsonl")).unwrap();
    let said = case.fail(3, &resume(&[]));
    assert!(said.contains("rows.jsonl"), "{said}");
    std::fs::write(case.at("rows.jsonl"), rows).unwrap();
    assert_eq!(case.checkpoints(), [2, 4]);

    // An older one by name: its successors would be mixed with what follows it.
    let older = case.at("out/checkpoint-2").display().to_string();
    let by_name = ["--resume", older.as_str(), "--set", "train.max_steps=6"];
    let said = case.fail(2, &by_name);
    assert!(
        said.contains("checkpoint-4") && said.contains("--force"),
        "{said}"
    );
    case.succeed(&[&by_name[..], &["--force", "--set", "train.logging_steps=1"]].concat());
    assert_eq!(case.checkpoints(), [2, 4, 6]);
}

#[cfg(unix)]
#[test]
fn a_terminated_run_saves_and_a_second_signal_quits() {
    let case = Case::new("max_steps = 400\nsave_steps = 1000");
    for signals in [1, 2] {
        let mut child = case
            .command(&["--resume", "auto"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.by_ref().any(|line| line.unwrap().contains("tok/s")));
        for _ in 0..signals {
            let pid = child.id().to_string();
            let sent = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
            assert!(sent.success());
        }
        let said: Vec<String> = lines.map_while(Result::ok).collect();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
        if signals == 1 {
            let last = said.last().unwrap();
            assert!(last.contains("--resume auto"), "{last}");
        }
    }
    assert!(!case.checkpoints().is_empty());
    assert!(!case.at("out/adapter_model.safetensors").exists());
}

/// A file size limit stands for a full disk: the write fails in the middle of the optimiser's file.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let case = Case::new("max_steps = 12\nsave_steps = 4\nsave_total_limit = 1");
    let whole = case.at("whole");
    case.succeed(&["--set", &format!("train.output_dir={whole:?}")]);
    case.succeed(&["--set", "train.max_steps=4"]);
    let size = |name: &str| std::fs::metadata(case.at("out").join(name)).unwrap().len();
    let adapter = size("checkpoint-4/adapter_model.safetensors");
    assert!(adapter + 2048 < size("checkpoint-4/optimizer.safetensors"));
    let limited = format!(
        "trap '' XFSZ; ulimit -f {}; exec \"$0\" train -c \"$1\" --resume auto",
        adapter / 1024 + 1
    );
    let output = Command::new("bash")
        .args(["-c", &limited, env!("CARGO_BIN_EXE_monteclora")])
        .arg(case.at("run.toml"))
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("optimizer.safetensors") && said.contains("checkpoint-4`, is intact"),
        "{said}"
    );
    assert_eq!(case.checkpoints(), [4]);
    case.succeed(&["--resume", "auto"]);
    assert_eq!(case.checkpoints(), [12]);
}

#[test]
fn an_output_that_cannot_be_written_is_said_before_anything_else() {
    let case = Case::new("max_steps = 2");
    let below_a_file = format!("train.output_dir={:?}", case.at("rows.jsonl").join("out"));
    let said = case.fail(2, &["--set", &below_a_file]);
    assert!(
        said.contains("output_dir") && said.contains("rows.jsonl"),
        "{said}"
    );
}

/// Rows are read when they are needed: a file cut short under the run ends it, and the run goes on when it is back.
#[test]
fn a_data_file_that_vanishes_ends_the_run() {
    let case = Case::new("max_steps = 400\nsave_steps = 1");
    let rows = std::fs::read(case.at("rows.jsonl")).unwrap();
    let mut child = case.command(&[]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(
        lines
            .by_ref()
            .any(|line| line.unwrap().contains("checkpoint written"))
    );
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(case.at("rows.jsonl"))
        .unwrap();
    file.set_len(0).unwrap();
    let said: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{said:?}");
    let said = said.join("\n");
    assert!(
        said.contains("rows.jsonl:") && said.contains("is intact"),
        "{said}"
    );
    std::fs::write(case.at("rows.jsonl"), rows).unwrap();
    let step = case.checkpoints().pop().unwrap();
    let further = format!("train.max_steps={}", step + 1);
    case.succeed(&["--resume", "auto", "--set", &further]);
}

#[test]
fn numbers_that_run_away_stop_the_run() {
    let case = Case::new("max_steps = 9\nsave_steps = 1\nwarmup_ratio = 0\nmax_grad_norm = 0");
    let said = case.fail(5, &["--set", "train.learning_rate=1e25"]);
    assert!(
        said.contains("step ") && said.contains("not finite") && said.contains("model.layers."),
        "{said}"
    );
    let out = case.at("out");
    assert!(!out.join("adapter_model.safetensors").exists());
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(record["finished_step"], Value::Null);
}

/// Without improvement the run ends, what it leaves is the best adapter, and neither that nor the newest checkpoint is
/// ever removed.
#[test]
fn early_stopping_leaves_the_best() {
    let case = Case::new(
        "max_steps = 400\nsave_steps = 1\nsave_total_limit = 1\nearly_stopping_patience = 2",
    );
    let rate = [
        "--set",
        "train.learning_rate=0.3",
        "--set",
        "train.eval_steps=1",
    ];
    case.succeed(&rate);
    let out = case.at("out");
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let events: Vec<&str> = lines
        .iter()
        .filter_map(|line| line["event"].as_str())
        .collect();
    assert_eq!(events[events.len() - 2..], ["early_stop", "finished"]);
    let losses: Vec<f64> = lines
        .iter()
        .filter(|line| line["type"] == "eval")
        .map(|line| line["loss"].as_f64().unwrap())
        .collect();
    let (last, rest) = (losses.len(), &losses[..losses.len() - 2]);
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(rest.last().copied(), Some(best), "{losses:?}");
    assert_eq!(case.checkpoints(), [last as u64]);
    assert_eq!(weights(&out), weights(&out.join("best")));
    assert_ne!(
        weights(&out),
        weights(&out.join(format!("checkpoint-{last}")))
    );
    let again = case.succeed(&[&rate[..], &["--resume", "auto"]].concat());
    assert!(String::from_utf8_lossy(&again.stdout).contains("finished"));
}

#[test]
fn files_do_not_depend_on_the_number_of_threads() {
    let case = Case::new("max_steps = 6\nsave_steps = 3");
    let run = |threads: &str, precision: &str| {
        let out = case.at(&format!("{threads}-{precision}"));
        let directory = format!("train.output_dir={out:?}");
        let output = case
            .command(&["--set", &directory, "--set", precision])
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        out
    };
    for precision in ["train.bf16=false", "train.bf16=true"] {
        let one = run("1", precision);
        for threads in ["2", "4"] {
            let other = run(threads, precision);
            same_result(&one, &other);
            let moments =
                |dir: &Path| std::fs::read(dir.join("checkpoint-6/optimizer.safetensors"));
            assert_eq!(moments(&one).unwrap(), moments(&other).unwrap());
        }
    }
}

/// Keys that say again what the adapter has are no contradiction, and the record has those that were not given.
#[test]
fn keys_of_the_adapter_may_be_given_again() {
    let case = Case::new("max_steps = 1");
    let first = format!("train.output_dir={:?}", case.at("first"));
    let targets = "lora.target_modules=[\"q_proj\", \"v_proj\"]";
    let (layers, excluded) = (
        "lora.layers_to_transform=[0, 1]",
        "lora.exclude_modules=[\"model.layers.0.self_attn.v_proj\"]",
    );
    let settings = [
        "--set",
        "lora.method=lora",
        "--set",
        layers,
        "--set",
        excluded,
    ];
    case.succeed(&[&settings[..], &["--set", &first, "--set", targets]].concat());
    let from = format!("lora.init_from={:?}", case.at("first"));
    let again: [&[&str]; 3] = [&[], &["--set", layers], &["--set", excluded]];
    for (index, given) in again.into_iter().enumerate() {
        let out = case.at(&format!("out-{index}"));
        let at = format!("train.output_dir={out:?}");
        let flags = ["--set", &from, "--set", "lora.method=lora", "--set", &at];
        case.succeed(&[&flags, given].concat());
        let record = std::fs::read_to_string(out.join("run.json")).unwrap();
        let record: Value = serde_json::from_str(&record).unwrap();
        let lora = &record["config"]["lora"];
        let excluded = serde_json::json!(["model.layers.0.self_attn.v_proj"]);
        assert_eq!(lora["exclude_modules"], excluded, "{given:?}");
        let sites = Adapter::read(&out).unwrap().sites;
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        let expected = [
            "0.self_attn.q_proj",
            "1.self_attn.q_proj",
            "1.self_attn.v_proj",
        ];
        let expected = expected.map(|name| format!("model.layers.{name}"));
        assert_eq!(names, expected, "{given:?}");
    }
    let other = "lora.exclude_modules=[\"model.layers.1.self_attn.v_proj\"]";
    let said = case.fail(2, &["--set", &from, "--set", other]);
    assert!(said.contains("lora.exclude_modules: 3 sites"), "{said}");
}

/// From plain LoRA a posterior is begun; from MonteCLoRA it is taken over; what contradicts the adapter is refused by name.
#[test]
fn runs_start_from_an_adapter() {
    let case = Case::new("max_steps = 2");
    let first = format!("train.output_dir={:?}", case.at("plain"));
    case.succeed(&[
        "--set",
        "lora.method=lora",
        "--set",
        &first,
        "--set",
        "lora.r=4",
    ]);
    let plain = case.at("plain").display().to_string();
    let from = |dir: &str| format!("lora.init_from={dir:?}");
    let said = case.fail(
        2,
        &[
            "--set",
            &from(&plain),
            "--set",
            "lora.r=8",
            "--set",
            "lora.target_modules=[\"q_proj\"]",
        ],
    );
    assert!(
        said.contains("lora.r: 8, the adapter has 4") && said.contains("lora.target_modules"),
        "{said}"
    );
    case.succeed(&[
        "--set",
        &from(&plain),
        "--set",
        "lora.monteclora.num_samples=3",
    ]);
    let adapter = Adapter::read(&case.at("out")).unwrap();
    assert_eq!(adapter.format, "peft-monteclora");
    let before = Adapter::read(Path::new(&plain)).unwrap();
    for (site, old) in adapter.sites.iter().zip(&before.sites) {
        let moved = crate::fixtures::largest_difference(
            &site.lora_a.to_f32().unwrap(),
            &old.lora_a.to_f32().unwrap(),
        );
        assert!(moved > 0.0 && moved < 0.05, "{}: {moved}", site.name);
        assert_eq!(
            site.posterior
                .as_ref()
                .unwrap()
                .log_concentration
                .n_elements(),
            3
        );
    }
    let trained = case.at("out").display().to_string();
    let second = format!("train.output_dir={:?}", case.at("second"));
    let start = ["--set", &from(&trained), "--set", &second];
    let said = case.fail(
        2,
        &[&start[..], &["--set", "lora.monteclora.num_samples=4"]].concat(),
    );
    assert!(said.contains("num_samples: 4, the adapter has 3"), "{said}");
    case.succeed(&start);
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(case.at("second/run.json")).unwrap())
            .unwrap();
    assert_eq!(record["config"]["lora"]["monteclora"]["num_samples"], 3);
}

/// The shipped run.toml, with a tiny model in place of the Hub's and two steps in place of an epoch.
#[test]
fn every_shipped_training_configuration_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let mut ran = 0;
    for name in names(&root.join("examples")) {
        let path = root.join("examples").join(&name);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if !name.ends_with(".toml") || !text.contains("[train]") {
            continue;
        }
        RunConfig::load(&path, &[]).unwrap();
        let out = dir.path().join(&name);
        let output = Command::new(env!("CARGO_BIN_EXE_monteclora"))
            .current_dir(root)
            .args(["train", "-c"])
            .arg(&path)
            .args([
                "--set",
                &format!("model.model_id={:?}", own().join("models/tiny-llama")),
                "--set",
                &format!("train.output_dir={out:?}"),
                "--set",
                "train.max_steps=2",
                "--set",
                "train.per_device_train_batch_size=1",
                "--set",
                "data.max_seq_length=512",
            ])
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        assert!(Adapter::read(&out).unwrap().has_effect().unwrap());
        ran += 1;
    }
    assert!(ran > 0);
}

/// A chat template that writes the time writes that of the first start, whenever the run goes on.
#[test]
fn a_template_with_a_date_keeps_it() {
    let case = Case::new("max_steps = 2\nsave_steps = 2");
    let template = case.at("dated.jinja");
    let text = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    std::fs::write(&template, text).unwrap();
    let template = format!("model.chat_template={template:?}");
    case.succeed(&["--set", &template]);
    let record = |name: &str| -> Value {
        let text = std::fs::read_to_string(case.at("out").join(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let first = record("run.json")["template_time"].clone();
    assert!(
        first
            .as_u64()
            .is_some_and(|seconds| seconds > 1_700_000_000),
        "{first}"
    );
    let mut ends = Vec::new();
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(1100));
        let _ = std::fs::remove_dir_all(case.at("out/checkpoint-4"));
        let more = [
            "--set",
            &template,
            "--set",
            "train.max_steps=4",
            "--resume",
            "auto",
        ];
        case.succeed(&more);
        assert_eq!(record("run.json")["template_time"], first);
        ends.push(std::fs::read(case.at("out/adapter_model.safetensors")).unwrap());
    }
    assert!(ends[0] == ends[1]);
}
