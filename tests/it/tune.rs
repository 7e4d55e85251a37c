//! `tune`: studies of the tiny model, ended in the middle, continued, refused and shown.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use monteclora::tune::{Log, Outcome, Trial};
use serde_json::Value;

use crate::cli::{json as output, ok, run, run_toml, text};
use crate::training::write_rows;

/// A run.toml with validation rows, and a space.
struct Case {
    dir: tempfile::TempDir,
    config: PathBuf,
}

const SPACE: &str = r#"
[parameters]
"train.learning_rate" = { type = "log", low = 1e-4, high = 1e-1 }
"lora.r" = { type = "integer", low = 2, high = 8 }
"lora.method" = { type = "categorical", values = ["lora", "monteclora"] }
"#;

impl Case {
    fn new(space: &str, train: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let valid = dir.path().join("valid.jsonl");
        write_rows(&valid);
        let train =
            format!("per_device_train_batch_size = 2\neval_steps = 5\nsave_steps = 5\n{train}\n");
        let config = run_toml(dir.path(), "", "", &train);
        let whole = std::fs::read_to_string(&config).unwrap();
        let whole = whole.replace("[lora]\n", &format!("valid = {valid:?}\n[lora]\n"));
        std::fs::write(&config, whole).unwrap();
        std::fs::write(dir.path().join("space.toml"), space).unwrap();
        Self { dir, config }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let mut arguments: Vec<String> = ["tune", "-c", text(&self.config), "--space"]
            .map(str::to_owned)
            .into();
        arguments.extend([self.at("space.toml"), "-o".into(), self.at(out)]);
        arguments.extend(["--set", "train.max_steps=30"].map(str::to_owned));
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        arguments
    }

    fn tune(&self, out: &str, more: &[&str]) -> Value {
        let arguments = self.arguments(out, more);
        output(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn trials(&self, out: &str) -> Vec<Trial> {
        let n_values = monteclora::tune::Space::read(Path::new(&self.at("space.toml")));
        let n_values = n_values.unwrap().parameters.len();
        Log::trials_in(&Path::new(&self.at(out)).join("trials.jsonl"), n_values).unwrap()
    }
}

/// Values and objectives, without the time that trials took.
fn found(trials: &[Trial]) -> Vec<(Vec<Value>, Option<f64>, Vec<u64>)> {
    let of = |trial: &Trial| {
        let rungs = trial.rungs.keys().copied().collect();
        (trial.values.clone(), trial.objective(), rungs)
    };
    trials.iter().map(of).collect()
}

/// A study finds the best settings, stops poor trials early, and shows and writes what it found.
#[test]
fn a_study_finds_settings_and_stops_poor_trials() {
    let case = Case::new(SPACE, "");
    let said = case.tune("study", &["--trials", "9"]);
    assert_eq!(said["trials"], 9);
    let trials = case.trials("study");
    let stopped = trials
        .iter()
        .filter(|trial| matches!(trial.outcome, Some(Outcome::Stopped { .. })));
    let n_stopped = stopped.count();
    assert!(n_stopped >= 2, "{trials:?}");
    assert_eq!(said["finished"].as_u64().unwrap() as usize, 9 - n_stopped);
    assert!(
        trials.iter().all(|trial| trial.rungs.contains_key(&10)),
        "{trials:?}"
    );
    let best = trials
        .iter()
        .filter_map(Trial::objective)
        .fold(f64::INFINITY, f64::min);
    assert_eq!(said["best"]["value"], best);
    // A trial is an ordinary run, and the best one is what the study says of it.
    let trial = said["best"]["trial"].as_str().unwrap();
    let dir = case.at(&format!("study/{trial}"));
    let scores = output(&[
        "eval",
        "-a",
        &dir,
        "--data",
        &case.at("valid.jsonl"),
        "--no-base",
    ]);
    assert_eq!(scores["mean"]["loss"], best);
    let toml = case.at("study/best.toml");
    ok(&["train", "-c", &toml, "--dry-run"]);
    let settings = std::fs::read_to_string(&toml).unwrap();
    assert!(settings.contains(trial), "{settings}");
    ok(&["report", &case.at("study")]);
    let page = std::fs::read_to_string(case.at("study/report.html")).unwrap();
    for part in [
        "trial-0008",
        "stopped at step 10",
        "train.learning_rate",
        "importance",
        trial,
    ] {
        assert!(page.contains(part), "{part}");
    }
    // It goes on with more trials, and not as another study.
    let more = case.tune("study", &["--trials", "10"]);
    assert_eq!(more["trials"], 10);
    assert_eq!(found(&case.trials("study")[..9]), found(&trials));
    let other = case.arguments("study", &["--seed", "3"]);
    let refused = run(&other.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.contains("--seed differ"),
        "{}",
        refused.stderr
    );
}

/// A study that is killed, with its trials or without, goes on to what an undisturbed one finds.
#[test]
fn a_killed_study_goes_on_to_the_same_end() {
    for strategy in ["tpe", "mads", "random"] {
        let case = Case::new(SPACE, "");
        let more = [
            "--trials",
            "4",
            "--no-early-stopping",
            "--strategy",
            strategy,
        ];
        case.tune("whole", &more);
        let whole = found(&case.trials("whole"));
        assert!(whole.iter().all(|(_, objective, _)| objective.is_some()));
        for signal in ["-KILL", "-TERM"] {
            let arguments = case.arguments("killed", &more);
            let mut child = Command::new(env!("CARGO_BIN_EXE_monteclora"))
                .args(&arguments)
                .arg("--json")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let log = Path::new(&case.at("killed")).join("trials.jsonl");
            let began = Instant::now();
            let n_ended = || {
                let trials = Log::trials_in(&log, 3).unwrap_or_default();
                trials
                    .iter()
                    .filter(|trial| trial.outcome.is_some())
                    .count()
            };
            let before = n_ended();
            while n_ended() == before && began.elapsed() < Duration::from_secs(120) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let pid = child.id().to_string();
            Command::new("kill").args([signal, &pid]).status().unwrap();
            let status = child.wait().unwrap();
            if signal == "-TERM" && status.code() != Some(0) {
                assert_eq!(status.code(), Some(130));
            }
        }
        case.tune("killed", &more);
        let trials = case.trials("killed");
        assert_eq!(found(&trials), whole, "{strategy}: {trials:?}");
    }
}

/// Trials side by side are the trials of a study; what fails is told, and a study in which everything fails ends.
#[test]
fn trials_run_side_by_side_and_failures_are_told() {
    let case = Case::new(SPACE, "");
    let said = case.tune(
        "two",
        &[
            "--trials",
            "4",
            "--jobs",
            "2",
            "--strategy",
            "random",
            "--no-early-stopping",
        ],
    );
    assert_eq!(said["finished"], 4);
    let space = "[parameters]\n\"train.learning_rate\" = { type = \"categorical\", values = [1e-3, 1e30] }\n";
    let case = Case::new(space, "");
    let said = case.tune("some", &["--trials", "2", "--strategy", "mads"]);
    assert_eq!(said["finished"], 1, "{said}");
    let trials = case.trials("some");
    let reason = trials.iter().find_map(|trial| match &trial.outcome {
        Some(Outcome::Failed { reason }) => Some(reason.clone()),
        _ => None,
    });
    assert!(
        reason
            .as_ref()
            .is_some_and(|reason| reason.contains("train ended with exit code 5")),
        "{reason:?}"
    );
    let none = "[parameters]\n\"train.learning_rate\" = { type = \"categorical\", values = [1e29, 1e30] }\n";
    std::fs::write(case.at("space.toml"), none).unwrap();
    for more in [&["--trials", "9"][..], &["--trials", "2", "--json"]] {
        let arguments = case.arguments(if more.len() > 2 { "two" } else { "none" }, more);
        let failed = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(failed.code, 1, "{}", failed.stderr);
    }
}

/// What cannot be searched is refused before anything runs.
#[test]
fn what_cannot_be_searched_is_refused() {
    let case = Case::new(
        "[parameters]\n\"train.lerning_rate\" = { type = \"float\", low = 0.1, high = 0.2 }\n",
        "",
    );
    let refused = |more: &[&str], part: &str| {
        let arguments = case.arguments("out", more);
        let found = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(found.code, 2, "{}", found.stderr);
        assert!(found.stderr.contains(part), "{}", found.stderr);
        assert!(!Path::new(&case.at("out")).exists());
    };
    refused(&[], "lerning_rate");
    std::fs::write(case.at("space.toml"), SPACE).unwrap();
    refused(&["--objective", "speed"], "expected one of loss");
    refused(&["--trials", "0"], "--trials");
    let wide =
        "[parameters]\n\"train.learning_rate\" = { type = \"float\", low = -1.0, high = 1.0 }\n";
    std::fs::write(case.at("space.toml"), wide).unwrap();
    refused(&[], "space.toml: \"train.learning_rate\":");
    for (values, part) in [
        (
            "\"lora.method\" = { type = \"categorical\", values = [\"lora\", \"lorra\", \"dora\"] }",
            "lorra",
        ),
        (
            "\"lora.r\" = { type = \"categorical\", values = [4, -1, 8] }",
            "lora.r",
        ),
        (
            "\"lora.target_modules\" = { type = \"categorical\", values = [[\"q_proj\"], [\"nothing_like_it\"]] }",
            "nothing_like_it",
        ),
        (
            "\"lora.r\" = [4, 8]",
            "{ type = \"categorical\", values = [4, 8] }",
        ),
        (
            "lora.r = { type = \"integer\", low = 1, high = 4 }",
            "write \"lora.r\"",
        ),
    ] {
        std::fs::write(case.at("space.toml"), format!("[parameters]\n{values}\n")).unwrap();
        refused(&[], part);
    }
    std::fs::write(case.at("space.toml"), SPACE).unwrap();
    let arguments = case.arguments("out", &["--data", &case.at("nope.jsonl")]);
    let found = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(found.code, 3, "{}", found.stderr);
    refused(&["--limit", "0"], "--limit");
    refused(&["--objective", "accuracy"], "rows with choices");
}

/// A log from which lines were cut is refused, and so is a study whose rows changed.
#[test]
fn a_changed_study_is_refused() {
    let case = Case::new(SPACE, "");
    case.tune("out", &["--trials", "2"]);
    let log = PathBuf::from(case.at("out")).join("trials.jsonl");
    let whole = std::fs::read_to_string(&log).unwrap();
    let refused = |part: &str| {
        let arguments = case.arguments("out", &["--trials", "3"]);
        let found = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(found.code, 2, "{}", found.stderr);
        assert!(found.stderr.contains(part), "{}", found.stderr);
    };
    let is_second = |line: &&str| line.contains("started") && line.contains("\"trial\":1");
    let cut: Vec<&str> = whole.lines().filter(|line| !is_second(line)).collect();
    assert!(cut.len() < whole.lines().count(), "{whole}");
    std::fs::write(&log, cut.join("\n") + "\n").unwrap();
    refused("trial 1 has not begun");
    let short = whole.replacen("\"values\":[", "\"values\":[1,", 1);
    std::fs::write(&log, short).unwrap();
    refused("4 values, and the space has 3 parameters");
    std::fs::write(&log, &whole).unwrap();
    let config = std::fs::read_to_string(&case.config).unwrap();
    let rows = config
        .lines()
        .find_map(|line| line.strip_prefix("train = "));
    let rows: String =
        toml::from_str::<toml::Table>(&format!("x = {}", rows.unwrap())).unwrap()["x"]
            .as_str()
            .unwrap()
            .to_owned();
    let text = std::fs::read_to_string(&rows).unwrap();
    std::fs::write(&rows, text.lines().next().unwrap().to_owned() + "\n").unwrap();
    refused("the training rows differ");
}

/// The format that `init` writes is no hindrance.
#[test]
fn a_format_that_is_detected_may_be_written() {
    let case = Case::new(SPACE, "");
    let config = std::fs::read_to_string(&case.config).unwrap();
    let with = |format: &str| config.replace("[lora]\n", &format!("format = {format:?}\n[lora]\n"));
    let valid = PathBuf::from(case.at("valid.jsonl"));
    let row: Value = serde_json::from_str(
        std::fs::read_to_string(valid)
            .unwrap()
            .lines()
            .next()
            .unwrap(),
    )
    .unwrap();
    let format = if row.get("text").is_some() {
        "text"
    } else {
        "prompt_completion"
    };
    std::fs::write(&case.config, with(format)).unwrap();
    assert_eq!(case.tune("out", &["--trials", "1"])["finished"], 1);
}

/// The remedy for a run.toml without validation rows: rows on the command line.
#[test]
fn a_run_without_validation_rows_is_searched_with_data() {
    let case = Case::new(SPACE, "");
    let whole = std::fs::read_to_string(&case.config).unwrap();
    let without: Vec<&str> = whole
        .lines()
        .filter(|line| !line.starts_with("valid"))
        .collect();
    std::fs::write(&case.config, without.join("\n")).unwrap();
    let arguments = case.arguments("out", &["--trials", "2"]);
    let refused = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.contains("or give --data"),
        "{}",
        refused.stderr
    );
    let said = case.tune("out", &["--trials", "2", "--data", &case.at("valid.jsonl")]);
    assert_eq!(said["finished"], 2);
    // A study is one of these rows.
    let rows = std::fs::read_to_string(case.at("valid.jsonl")).unwrap();
    std::fs::write(case.at("others.jsonl"), rows.repeat(2)).unwrap();
    let other = case.arguments(
        "out",
        &["--trials", "2", "--data", &case.at("others.jsonl")],
    );
    let refused = run(&other.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(
        refused.stderr.contains("the rows of the objective differ"),
        "{}",
        refused.stderr
    );
}
