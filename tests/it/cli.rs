//! The command as a user calls it: exit codes, messages, files.

use std::path::{Path, PathBuf};

use assert_cmd::Command;

use crate::fixtures::{adapters, must_be_refused, own, supported_architectures, with_own};
use crate::training::write_rows;

pub(crate) fn monteclora() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_monteclora"));
    command.env_remove("RUST_LOG");
    command
}

/// What a command left behind.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn run(arguments: &[&str]) -> Run {
    outcome(monteclora().args(arguments))
}

pub(crate) fn outcome(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A command that succeeds.
pub(crate) fn ok(arguments: &[&str]) -> Run {
    let done = run(arguments);
    assert_eq!(
        done.code, 0,
        "{arguments:?}: {}{}",
        done.stdout, done.stderr
    );
    done
}

/// What a command that succeeds prints with `--json`.
pub(crate) fn json(arguments: &[&str]) -> serde_json::Value {
    let done = ok(&[arguments, &["--json"]].concat());
    serde_json::from_str(&done.stdout).unwrap()
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Copies the files of a directory into one that may be new.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

pub(crate) fn tiny() -> String {
    own().join("models/tiny-llama").display().to_string()
}

pub(crate) fn own_adapter(name: &str) -> String {
    own().join("adapters").join(name).display().to_string()
}

/// A run.toml on the tiny model with `rows` and extra lines in `[lora]` and `[train]`.
pub(crate) fn run_toml(dir: &Path, rows: &str, lora: &str, train: &str) -> PathBuf {
    let data = dir.join("rows.jsonl");
    if rows.is_empty() {
        write_rows(&data);
    } else {
        std::fs::write(&data, rows).unwrap();
    }
    let path = dir.join("run.toml");
    let text = format!(
        "[model]\nmodel_id = {:?}\n[data]\ntrain = {data:?}\n[lora]\nr = 4\n{lora}\n[train]\noutput_dir = {:?}\nmax_steps = 3\n{train}\n",
        tiny(),
        dir.join("out")
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn train(path: &Path) -> Run {
    run(&["train", "-c", path.to_str().unwrap()])
}

/// A finished run of the tiny model in `out`, with its rows and run.toml beside it.
struct Trained {
    dir: tempfile::TempDir,
    config: PathBuf,
}

impl Trained {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = run_toml(dir.path(), "", "", "learning_rate = 1e-2");
        let trained = train(&config);
        assert_eq!(trained.code, 0, "{}", trained.stderr);
        Self { dir, config }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// A process that was started as one of several, and cannot join the others, does not run alone.
#[test]
fn a_process_that_cannot_join_the_others_says_so() {
    let found = outcome(monteclora().arg("doctor").env("OMPI_COMM_WORLD_SIZE", "2"));
    assert_eq!(found.code, 2, "{}", found.stderr);
    let said = "started as one of 2 processes";
    assert!(found.stderr.contains(said), "{}", found.stderr);
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "learning_rate = 1e-2");
    let dry = ok(&["train", "-c", config.to_str().unwrap(), "--dry-run"]);
    assert!(
        dry.stdout.contains("21 (") && dry.stdout.contains("nothing was written"),
        "{}",
        dry.stdout
    );
    assert!(!dir.path().join("out").exists());
}

#[test]
fn a_run_records_its_configuration_and_is_not_written_over() {
    let trained = Trained::new();
    let record = std::fs::read_to_string(trained.at("out/run.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["config"]["lora"]["monteclora"]["objective"], "exact");
    assert_eq!(record["config"]["seed"], 42);

    let again = train(&trained.config);
    assert_eq!(again.code, 2);
    let advised = [
        "train.output_dir=DIR",
        "--resume auto",
        "--force discards it",
    ];
    for advice in advised {
        assert!(again.stderr.contains(advice), "{}", again.stderr);
    }
    // Of an interrupted run the first advice continues it; the one that discards it comes last.
    let out = std::path::PathBuf::from(trained.at("out"));
    let config = trained.config.to_str().unwrap();
    let interrupted = |has_checkpoint: bool| {
        let mut unfinished = record.clone();
        unfinished["finished_step"] = serde_json::Value::Null;
        std::fs::write(out.join("run.json"), unfinished.to_string()).unwrap();
        if !has_checkpoint {
            let _ = std::fs::remove_dir_all(out.join("checkpoint-3"));
        }
        let refused = train(&trained.config);
        assert_eq!(refused.code, 2);
        refused.stderr
    };
    let said = interrupted(true);
    let (resume, force) = (
        said.find("--resume auto continues it from step 3"),
        said.find("--force"),
    );
    assert!(resume.is_some() && resume < force, "{said}");
    ok(&["train", "-c", config, "--resume", "auto"]);
    let said = interrupted(false);
    assert!(
        said.contains("before its first checkpoint") && !said.contains("--force"),
        "{said}"
    );
    ok(&["train", "-c", config, "--resume", "auto"]);
    let other = format!("train.output_dir={:?}", trained.at("other"));
    ok(&["train", "-c", config, "--set", &other]);
}

#[test]
fn a_collapsed_run_is_two_files_that_runtimes_take() {
    let trained = Trained::new();
    let lora = trained.at("lora");
    ok(&["collapse", &trained.at("out"), "-o", &lora]);
    let mut files: Vec<_> = std::fs::read_dir(&lora)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    files.sort();
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ];
    assert_eq!(files, expected);
    let card = std::fs::read_to_string(Path::new(&lora).join("README.md")).unwrap();
    assert!(
        card.contains("A LoRA adapter") && card.contains("library_name: peft"),
        "{card}"
    );
    let runtimes = ["--for", "mistralrs", "--for", "peft", "--json"];
    ok(&[&["validate", &lora, "-m", &tiny()], &runtimes[..]].concat());
}

#[test]
fn draws_of_a_run_differ() {
    let trained = Trained::new();
    let (out, draws) = (trained.at("out"), trained.at("draws"));
    ok(&["sample", &out, "-k", "2", "--seed", "7", "-o", &draws]);
    let weights = |name: &str| {
        std::fs::read(
            Path::new(&draws)
                .join(name)
                .join("adapter_model.safetensors"),
        )
        .unwrap()
    };
    assert_ne!(weights("draw-0000"), weights("draw-0001"));
}

#[test]
fn inspect_shows_the_posterior_of_a_run() {
    let trained = Trained::new();
    let summary = json(&["inspect", &trained.at("out")]);
    assert_eq!(summary["format"], "peft-monteclora");
    assert_eq!(summary["n_sites"], 21);
    assert!(summary["sites"][0]["noise_to_signal"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_trained_adapter_scores_better_and_its_merged_model_as_well() {
    let trained = Trained::new();
    let (out, rows, merged) = (
        trained.at("out"),
        trained.at("rows.jsonl"),
        trained.at("merged"),
    );
    let loss = |scores: &serde_json::Value, of: &str| scores[of]["loss"].as_f64().unwrap();
    let scores = json(&["eval", "-m", &tiny(), "-a", &out, "--data", &rows]);
    assert!(loss(&scores, "mean") < loss(&scores, "base"));

    ok(&["merge", "-m", &tiny(), "-a", &out, "-o", &merged]);
    let alone = json(&["eval", "-m", &merged, "--data", &rows]);
    let difference = loss(&alone, "base") - loss(&scores, "mean");
    assert!(difference.abs() < 1e-4, "{difference}");
}

/// Every recorded adapter goes through every format and comes back with the same update.
#[test]
fn convert_round_trips() {
    use monteclora_converters::Adapter;
    let cases = with_own(adapters(), &["must-refuse-modules-to-save"]);
    for case in cases.into_iter().chain(supported_architectures()) {
        let dir = tempfile::tempdir().unwrap();
        let (model, source) = (
            case.model.display().to_string(),
            case.dir.display().to_string(),
        );
        let at = |name: &str| {
            dir.path()
                .join(format!("{}-{name}", case.name))
                .display()
                .to_string()
        };
        if case.must_be_refused() {
            assert_eq!(
                run(&["convert", &source, "-o", &at("lora"), "--to", "lora"]).code,
                4,
                "{}",
                case.name
            );
            continue;
        }
        // Those of PEFT's directory are tried in tests/it/methods.rs.
        if case.was_refused() || !case.is_low_rank() {
            continue;
        }
        let gguf = at("adapter.gguf");
        for arguments in [
            vec!["convert", &source, "-o", &at("peft"), "--to", "peft"],
            vec!["convert", &source, "-o", &at("lora"), "--to", "lora"],
            vec!["convert", &source, "-o", &at("mlx"), "--to", "mlx"],
            vec![
                "convert", &source, "-o", &gguf, "--to", "gguf", "-m", &model,
            ],
            vec!["convert", &at("mlx"), "-o", &at("from-mlx"), "--to", "lora"],
            vec![
                "convert",
                &gguf,
                "-o",
                &at("from-gguf"),
                "--to",
                "lora",
                "-m",
                &model,
            ],
        ] {
            let converted = run(&arguments);
            assert_eq!(converted.code, 0, "{arguments:?}: {}", converted.stderr);
        }
        let original = Adapter::read(&case.dir).unwrap();
        for name in ["peft", "lora", "mlx", "from-mlx", "from-gguf"] {
            let converted = Adapter::read(Path::new(&at(name))).unwrap();
            assert_eq!(
                converted.sites.len(),
                original.sites.len(),
                "{}: {name}",
                case.name
            );
            for (a, b) in original.sites.iter().zip(&converted.sites) {
                let difference = crate::fixtures::largest_difference(
                    &a.delta_f32().unwrap(),
                    &b.delta_f32().unwrap(),
                );
                assert!(
                    difference <= 1e-5,
                    "{}: {name}: {}: {difference}",
                    case.name,
                    a.name
                );
            }
        }
    }
}

#[test]
fn wrong_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = run(&["train", "-c", "no-such.toml"]);
    assert_eq!(missing.code, 2);
    assert!(
        missing.stderr.contains("no-such.toml"),
        "{}",
        missing.stderr
    );

    let misspelt = train(&run_toml(dir.path(), "", "lora_alfa = 8", ""));
    assert_eq!(misspelt.code, 2);
    assert!(
        misspelt.stderr.contains("lora_alfa") && misspelt.stderr.contains("lora_alpha"),
        "{}",
        misspelt.stderr
    );

    let target = train(&run_toml(
        dir.path(),
        "",
        "target_modules = [\"q_prok\", \"v_proj\"]",
        "",
    ));
    assert_eq!(target.code, 2);
    assert!(
        target.stderr.contains("q_prok") && target.stderr.contains("q_proj"),
        "{}",
        target.stderr
    );

    let sample = run(&["quickstart", "--model", "gemma3"]);
    assert_eq!(sample.code, 2);
    for name in ["smollm2", "gemma3-270m"] {
        assert!(sample.stderr.contains(name), "{}", sample.stderr);
    }
    let both = run(&["quickstart", "--model", "smollm2", "-m", "./nowhere"]);
    assert_eq!(both.code, 2);
    assert!(
        both.stderr.contains("cannot be used with"),
        "{}",
        both.stderr
    );

    let model = run(&["eval", "-m", "./nowhere", "--data", "x.jsonl"]);
    assert_eq!(model.code, 2, "{}", model.stderr);
    let adapter = run(&["collapse", "./nowhere", "-o", "x"]);
    assert_eq!(adapter.code, 2, "{}", adapter.stderr);
}

#[test]
fn bad_rows_are_listed_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let missing = run_toml(dir.path(), "", "", "");
    std::fs::remove_file(dir.path().join("rows.jsonl")).unwrap();
    let missing = train(&missing);
    assert_eq!(missing.code, 3, "{}", missing.stderr);
    assert!(missing.stderr.contains("rows.jsonl"), "{}", missing.stderr);

    let role = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n\
                {\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"asistant\", \"content\": \"b\"}]}\n";
    let role = train(&run_toml(dir.path(), role, "", ""));
    assert_eq!(role.code, 3, "{}", role.stderr);
    let message = "rows.jsonl:2: messages[1].role: unknown role \"asistant\"; expected system, user, assistant or tool";
    assert!(role.stderr.contains(message), "{}", role.stderr);

    let empty = "{\"messages\": [{\"role\": \"user\", \"content\": \"nobody answers\"}]}\n";
    let empty = train(&run_toml(dir.path(), empty, "", ""));
    assert_eq!(empty.code, 3, "{}", empty.stderr);
    assert!(empty.stderr.contains("rows.jsonl:1"), "{}", empty.stderr);
    assert!(!dir.path().join("out").exists());
}

#[test]
fn adapters_that_do_not_fit_or_are_not_understood_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows);
    let rows = rows.display().to_string();
    let out = dir.path().join("x").display().to_string();
    for case in must_be_refused() {
        let (model, adapter) = (
            case.model.display().to_string(),
            case.dir.display().to_string(),
        );
        for arguments in [
            vec!["eval", "-m", &model, "-a", &adapter, "--data", &rows],
            vec!["collapse", &adapter, "-o", &out],
            vec!["merge", "-m", &model, "-a", &adapter, "-o", &out],
            vec!["validate", &adapter],
        ] {
            let refused = run(&arguments);
            assert_eq!(refused.code, 4, "{arguments:?}: {}", refused.stderr);
            assert!(!Path::new(&out).exists(), "{arguments:?}");
        }
    }
    // A base of other sizes.
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        std::fs::copy(own().join("models/tiny-llama").join(name), other.join(name)).unwrap();
    }
    let foreign = own_adapter("monteclora");
    let narrow = dir.path().join("narrow");
    shrink(Path::new(&foreign), &narrow);
    let misfit = run(&[
        "eval",
        "-m",
        other.to_str().unwrap(),
        "-a",
        narrow.to_str().unwrap(),
        "--data",
        &rows,
    ]);
    assert_eq!(misfit.code, 4, "{}", misfit.stderr);
    assert!(misfit.stderr.contains("q_proj"), "{}", misfit.stderr);
}

/// Copies an adapter with one input less at every site.
fn shrink(from: &Path, to: &Path) {
    use monteclora_converters::{Adapter, Tensor};
    let mut adapter = Adapter::read(from).unwrap();
    for site in &mut adapter.sites {
        let (rank, n_in) = (site.rank, site.in_features());
        let values = site.lora_a.to_f32().unwrap();
        let cut = values
            .chunks_exact(n_in)
            .flat_map(|row| row[1..].to_vec())
            .collect();
        site.lora_a = Tensor::from_f32(&[rank, n_in - 1], cut).unwrap();
    }
    adapter.write_peft(to, false).unwrap();
}

#[test]
fn an_adapter_that_changes_nothing_is_not_exported() {
    use monteclora_converters::{Adapter, Tensor};
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::read(Path::new(&own_adapter("plain-lora"))).unwrap();
    for site in &mut adapter.sites {
        site.lora_b =
            Tensor::from_f32(site.lora_b.shape(), vec![0.0; site.lora_b.n_elements()]).unwrap();
    }
    let path = dir.path().join("zero");
    adapter.write_peft(&path, false).unwrap();
    let out = dir.path().join("out");
    let arguments = [
        "collapse",
        path.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ];
    let refused = run(&arguments);
    assert_eq!(refused.code, 4);
    assert!(
        refused.stderr.contains("changes nothing") && refused.stderr.contains("--force"),
        "{}",
        refused.stderr
    );
    assert_eq!(run(&[&arguments[..], &["--force"]].concat()).code, 0);
}

/// An interrupted run leaves a checkpoint, says so with 130, and continues to the same bytes as an undisturbed one.
#[cfg(unix)]
#[test]
fn an_interrupted_run_continues() {
    use std::io::BufRead;
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "logging_steps = 1\nsave_steps = 1000");
    let config = config.to_str().unwrap();
    let steps = ["--set", "train.max_steps=400"];
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_monteclora"))
        .args(["train", "-c", config])
        .args(steps)
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let seen = lines
        .by_ref()
        .any(|line| line.unwrap().contains("step 3/400"));
    assert!(seen);
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    lines.for_each(drop);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let resumed = run(&[&["train", "-c", config, "--resume", "auto"], &steps[..]].concat());
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    let other = dir.path().join("whole").display().to_string();
    let whole = run(&[
        &[
            "train",
            "-c",
            config,
            "--set",
            &format!("train.output_dir={other:?}"),
        ],
        &steps[..],
    ]
    .concat());
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let weights = |d: &Path| std::fs::read(d.join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights(&dir.path().join("out")), weights(Path::new(&other)));
}

#[test]
fn the_shipped_run_toml_is_valid_and_says_the_defaults() {
    use monteclora::config::RunConfig;
    let shipped = RunConfig::load(
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/run.toml")),
        &[],
    )
    .unwrap();
    let least = "[model]\nmodel_id = \"m\"\n[data]\ntrain = \"t\"\nvalid = \"v\"\n[train]\noutput_dir = \"out\"\n";
    let mut least = RunConfig::from_toml(least, "least", &[]).unwrap();
    (least.model.model_id, least.data.train) =
        (shipped.model.model_id.clone(), shipped.data.train.clone());
    (least.data.valid, least.data.max_seq_length) = (shipped.data.valid.clone(), Some(1024));
    assert_eq!(shipped, least);
}

/// Every key of the reference stands in examples/run.toml, in its section, commented out or not; and every line that is commented out
/// is one that can be put in.
#[test]
fn the_shipped_run_toml_has_every_key() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let example = std::fs::read_to_string(root.join("examples/run.toml")).unwrap();
    let reference = std::fs::read_to_string(root.join("docs/configuration.md")).unwrap();
    let keys_of = |text: &str,
                   head: &dyn Fn(&str) -> Option<String>,
                   key: &dyn Fn(&str) -> Option<String>| {
        let (mut section, mut found) = (String::new(), std::collections::BTreeSet::new());
        for line in text.lines() {
            match head(line) {
                Some(next) => section = next,
                None => found.extend(key(line).map(|key| format!("{section}.{key}"))),
            }
        }
        found
    };
    let in_brackets = |line: &str| {
        let line = line.strip_prefix("## ").unwrap_or(line);
        let name = line.strip_prefix('[')?.strip_suffix(']')?;
        Some(name.to_owned())
    };
    let expected = keys_of(&reference, &in_brackets, &|line| {
        let (key, _) = line.strip_prefix("| `")?.split_once("` |")?;
        Some(key.to_owned())
    });
    let found = keys_of(&example, &in_brackets, &|line| {
        let (key, _) = line.strip_prefix("# ").unwrap_or(line).split_once(" = ")?;
        (!key.contains(' ')).then(|| key.to_owned())
    });
    assert!(expected.len() > 40, "{expected:?}");
    assert_eq!(found, expected);
}

#[test]
fn completions_and_doctor_print() {
    assert!(run(&["completions", "bash"]).stdout.contains("monteclora"));
    let doctor = run(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&doctor.stdout).unwrap();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
}
