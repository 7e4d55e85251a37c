//! `train --dry-run` and `init`: what is told before a run starts.

use std::path::Path;

use serde_json::Value;

use crate::cli::{run, run_toml, tiny};
use crate::training::write_rows;

fn dry_run(config: &Path, more: &[&str]) -> Value {
    let mut arguments = vec![
        "train",
        "-c",
        config.to_str().unwrap(),
        "--dry-run",
        "--json",
    ];
    arguments.extend(more);
    let run = run(&arguments);
    assert_eq!(run.code, 0, "{}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap()
}

#[test]
fn a_dry_run_tells_what_training_then_does() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "");
    let told = dry_run(
        &config,
        &[
            "--set",
            "train.num_train_epochs=2",
            "--set",
            "train.per_device_train_batch_size=2",
            "--set",
            "data.packing=false",
        ],
    );
    assert_eq!(
        (&told["total_steps"], &told["steps_per_epoch"]),
        (&6.into(), &3.into())
    );
    assert!(!dir.path().join("out").exists());
    let trained = run(&["train", "-c", config.to_str().unwrap()]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    let told = dry_run(&config, &[]);
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("out/run.json")).unwrap())
            .unwrap();
    for key in ["sites", "trainable_parameters", "total_steps"] {
        assert_eq!(told[key], record[key], "{key}");
    }
    assert_eq!(told["train"]["tokens"]["total"], record["train"]["tokens"]);
    let parts: u64 = ["weights", "adapter", "activations", "working", "process"]
        .iter()
        .map(|part| told["memory"][part].as_u64().unwrap())
        .sum();
    assert!(told["memory_estimate_bytes"].as_u64().unwrap() >= parts);
    assert_eq!(told["advice"].as_array().unwrap().len(), 0);
}

#[test]
fn init_writes_what_train_accepts() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, config) = (dir.path().join("rows.jsonl"), dir.path().join("run.toml"));
    write_rows(&rows);
    let (rows, config) = (rows.to_str().unwrap(), config.to_str().unwrap());
    let out = dir.path().join("out");
    let model = tiny();
    let arguments = [
        "init",
        "-m",
        &model,
        "--data",
        rows,
        "--valid",
        rows,
        "-o",
        config,
        "--output-dir",
        out.to_str().unwrap(),
    ];
    let made = run(&arguments);
    assert_eq!(made.code, 0, "{}", made.stderr);
    assert!(made.stdout.contains("--dry-run"), "{}", made.stdout);
    let text = std::fs::read_to_string(config).unwrap();
    assert!(text.contains("format = \"prompt_completion\""), "{text}");
    let told = dry_run(Path::new(config), &[]);
    let longest = told["train"]["tokens"]["max"].as_u64().unwrap();
    let limit: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("max_seq_length = "))
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        limit >= longest && limit < longest + 64,
        "{limit} {longest}"
    );
    assert_eq!(told["train"]["n_dropped"], 0);

    let again = run(&arguments);
    assert_eq!(again.code, 2, "{}", again.stderr);
    assert!(again.stderr.contains("--force"), "{}", again.stderr);
    assert_eq!(run(&[&arguments[..], &["--force"]].concat()).code, 0);
    let missing = run(&[
        "init",
        "-m",
        &model,
        "--data",
        "nowhere.jsonl",
        "-o",
        dir.path().join("x.toml").to_str().unwrap(),
    ]);
    assert_eq!(missing.code, 3, "{}", missing.stderr);
    assert!(!dir.path().join("x.toml").exists());
}

/// The estimate is within 20 % of the peak on models of real size (docs/fine-tune.md); on one that a test can afford, where the
/// program itself and the allocator's mood weigh more, within 25 %.
#[cfg(target_os = "linux")]
#[test]
fn the_memory_estimate_is_near_the_peak() {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16000, "tie_word_embeddings": true,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    for flags in [
        &[][..],
        &["--dtype", "bf16"],
        &["--gradient-checkpointing"],
        &["--method", "lora"],
        &["--rank", "64"],
    ] {
        let model = dir.path().to_str().unwrap();
        let bench = [
            "bench",
            "train",
            "-m",
            model,
            "--random-weights",
            "--batch",
            "6",
            "--seq",
            "128",
            "--steps",
            "2",
            "--json",
        ];
        let found = run(&[&bench[..], flags].concat());
        assert_eq!(found.code, 0, "{}", found.stderr);
        let found: Value = serde_json::from_str(&found.stdout).unwrap();
        let gb = |key: &str| found[key].as_f64().unwrap();
        let ratio = gb("estimate_gb") / gb("peak_gb");
        assert!(
            (0.75..1.25).contains(&ratio),
            "{flags:?}: {ratio} of {found}"
        );
    }
}
