//! The way of a newcomer: flags in place of files, bases that adapters name, a conversation, help.

use std::path::Path;

use serde_json::Value;

use crate::cli::{
    copy, json as output, monteclora, ok, outcome, own_adapter, run, run_toml, text, tiny,
};

/// A run by flags is the run of the file that says the same, and its adapter names the base that it needs.
#[test]
fn a_run_needs_a_model_and_data_and_its_adapter_names_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let train = "learning_rate = 1e-2\nper_device_train_batch_size = 2";
    let config = run_toml(dir.path(), "", "", train);
    // Without a file the rows decide about packing; here both are told.
    ok(&["train", "-c", text(&config), "--set", "data.packing=false"]);
    // The run is found in the directory above it, as `quickstart` lays it out.
    ok(&["report", text(dir.path())]);
    assert!(Path::new(&at("out/report.html")).is_file());
    let (base, data, flags) = (tiny(), at("rows.jsonl"), at("flags"));
    let said = ok(&[
        "train",
        "--model",
        &base,
        "--data",
        &data,
        "--output-dir",
        &flags,
        "--rank",
        "4",
        "--lr",
        "0.01",
        "--iters",
        "3",
        "--per-device-train-batch-size",
        "2",
        "--set",
        "data.packing=false",
    ]);
    assert!(
        said.stderr
            .contains("chosen for these rows and this machine"),
        "{}",
        said.stderr
    );
    let adapter = |out: &str| std::fs::read(Path::new(out).join("adapter_model.safetensors"));
    assert!(adapter(&flags).unwrap() == adapter(&at("out")).unwrap());
    for command in ["report", "eval", "chat", "serve"] {
        let next = format!(" {command} ");
        assert!(said.stdout.contains(&next), "{}", said.stdout);
    }
    let asked = ["--prompt", "what is red", "--max-tokens", "3"];
    let with = output(&[&["predict", "-m", &base, "-a", &flags][..], &asked].concat());
    let without = output(&[&["predict", "-a", &flags][..], &asked].concat());
    assert_eq!(with, without);
    assert_eq!(without["answers"][0]["question"], "what is red");
    ok(&["eval", "-a", &flags, "--data", &data, "--limit", "2"]);
    let flag = [
        "train",
        "-m",
        &base,
        "--data",
        &data,
        "--logging-steps",
        "1",
    ];
    let refused = run(&flag);
    let remedy = "write --set train.logging_steps=VALUE";
    assert!(
        refused.code == 2 && refused.stderr.contains(remedy),
        "{}",
        refused.stderr
    );
    let set = "train.logging_steps=1";
    let flag = [
        "train",
        "-m",
        &base,
        "--data",
        &data,
        "--dry-run",
        "--set",
        set,
    ];
    ok(&[&flag[..], &["--output-dir", &at("set")]].concat());
    // No number is too large to be told of.
    let seed = [
        "--seed",
        "18446744073709551615",
        "--output-dir",
        &at("none"),
    ];
    let refused = run(&[&["train", "-m", &base, "--data", &data][..], &seed].concat());
    assert!(
        refused.code == 2 && refused.stderr.contains("seed"),
        "{}",
        refused.stderr
    );
    let alone = run(&["train"]);
    assert!(
        alone.code == 2 && alone.stderr.contains("which run?"),
        "{}",
        alone.stderr
    );
    let missing = run(&["train", "--data", &data]);
    assert!(
        missing.code == 2 && missing.stderr.contains("model_id"),
        "{}",
        missing.stderr
    );
}

/// A file of another trainer is told from a run.toml, with the command that writes one.
#[test]
fn a_yaml_file_is_answered_with_the_way_to_a_toml_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "");
    let yaml = dir.path().join("lora.yml");
    std::fs::write(&yaml, "base_model: org/name\nadapter: lora\n").unwrap();
    let refused = run(&["train", "-c", text(&yaml)]);
    assert_eq!(refused.code, 2);
    let remedy = "`monteclora init -m MODEL --data FILE` writes a file";
    assert!(refused.stderr.contains(remedy), "{}", refused.stderr);
    let written = dir.path().join("written.toml");
    let rows = dir.path().join("rows.jsonl");
    ok(&[
        "init",
        "-m",
        &tiny(),
        "--data",
        text(&rows),
        "-o",
        text(&written),
    ]);
    ok(&["train", "-c", text(&written), "--dry-run"]);
    assert!(config.is_file());
}

/// Flags that only a question has are refused for rows of a file, and taken with a question.
#[test]
fn flags_of_a_question_are_refused_for_rows() {
    let dir = tempfile::tempdir().unwrap();
    run_toml(dir.path(), "", "", "");
    let rows = dir.path().join("rows.jsonl").display().to_string();
    let with = ["-m", &tiny(), "--temperature", "0.5", "--max-tokens", "2"];
    let refused = run(&[&["predict", "--data", &rows][..], &with].concat());
    assert!(
        refused.code == 2 && refused.stderr.contains("ask with --prompt"),
        "{}",
        refused.stderr
    );
    ok(&[&["predict", "--prompt", "what is red"][..], &with].concat());
}

/// Where nobody names the base, what names it is said; a base is asked without an adapter.
#[test]
fn a_base_that_nobody_names_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let nameless = dir.path().join("nameless");
    copy(own_adapter("all-linear").as_ref(), &nameless);
    let path = nameless.join("adapter_config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut config = config;
    config["base_model_name_or_path"] = Value::Null;
    std::fs::write(&path, config.to_string()).unwrap();
    let asked = ["--prompt", "a", "--max-tokens", "2"];
    let refused = run(&[&["predict", "-a", text(&nameless)][..], &asked].concat());
    assert!(
        refused.code == 2 && refused.stderr.contains("names no base model"),
        "{}",
        refused.stderr
    );
    ok(&[
        &["predict", "-m", &tiny(), "-a", text(&nameless)][..],
        &asked,
    ]
    .concat());
    let refused = run(&[&["predict"][..], &asked].concat());
    assert!(
        refused.code == 2 && refused.stderr.contains("which base model?"),
        "{}",
        refused.stderr
    );
    ok(&[&["predict", "-m", &tiny()][..], &asked].concat());
    // What is no adapter is told from one that names nothing.
    let refused = run(&[&["predict", "-a", &tiny()][..], &asked].concat());
    assert!(
        refused
            .stderr
            .contains("is a model, not an adapter; give it with -m"),
        "{}",
        refused.stderr
    );
    let refused = run(&[&["predict", "-a", "nothing-there"][..], &asked].concat());
    assert!(
        refused.stderr.contains("no such adapter"),
        "{}",
        refused.stderr
    );
}

/// A conversation of a pipe: questions and commands, the same answers as `predict`'s, how sure they are on stderr.
#[test]
fn a_conversation_goes_on_and_changes_its_adapter() {
    let adapter = own_adapter("all-linear");
    let talk = |lines: &str, more: &[&str]| {
        let mut command = monteclora();
        let first = ["chat", "-m", &tiny(), "-a", &adapter, "--max-tokens", "3"];
        outcome(command.args(first).args(more).write_stdin(lines))
    };
    let said = talk(
        "what is red\n/adapter none\n/clear\nwhat is red\n/quit\nnot asked\n",
        &[],
    );
    assert_eq!(said.code, 0, "{}", said.stderr);
    let answer = |more: &[&str]| -> String {
        let first = [
            "predict",
            "-m",
            &tiny(),
            "--prompt",
            "what is red",
            "--max-tokens",
            "3",
        ];
        let found = output(&[&first, more].concat());
        found["answers"][0]["text"].as_str().unwrap().to_owned()
    };
    let expected = [answer(&["-a", &adapter]), answer(&[])];
    assert_eq!(said.stdout, format!("{}\n{}\n", expected[0], expected[1]));
    assert_eq!(
        said.stderr.matches("% per token").count(),
        2,
        "{}",
        said.stderr
    );
    // The conversation so far is part of the second question.
    let twice = talk("what is red\nwhat is red\n", &["--no-confidence"]);
    let first = format!("{}\n", expected[0]);
    let second = twice.stdout.strip_prefix(&first);
    assert!(
        second.is_some_and(|second| !second.is_empty() && second != first),
        "{}",
        twice.stdout
    );
    assert!(!twice.stderr.contains("per token"));
    let system = talk("what is red\n", &["--system", "Answer in French."]);
    assert_ne!(system.stdout, format!("{}\n", expected[0]));
    let drawn = |seed: &str| talk("what is red\n", &["--temperature", "2", "--seed", seed]).stdout;
    assert_eq!(drawn("1"), drawn("1"));
    assert!((2..9).any(|seed| drawn(&seed.to_string()) != drawn("1")));
    let refused = talk("/temperature hot\n", &[]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
}

/// What people type who come from elsewhere is answered with what to type; pages and help are there.
#[test]
fn commands_are_found() {
    for (typed, expected) in [
        ("finetune", "monteclora train"),
        ("generate", "monteclora predict"),
        ("export", "monteclora convert"),
    ] {
        let refused = run(&[typed]);
        assert!(
            refused.code == 2 && refused.stderr.contains(expected),
            "{}",
            refused.stderr
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let man = dir.path().join("man1");
    ok(&["man", text(&man)]);
    let pages: Vec<String> = std::fs::read_dir(&man)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in [
        "monteclora.1",
        "monteclora-train.1",
        "monteclora-data-check.1",
    ] {
        assert!(pages.iter().any(|found| found == page), "{pages:?}");
    }
    let help = ok(&["fuse", "--help"]).stdout;
    assert!(help.contains("Example:"), "{help}");
}
