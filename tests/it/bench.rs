//! `bench generate` on a small random model.

use serde_json::{Value, json};

use crate::cli::{ok, run};

#[test]
fn generation_is_measured_for_texts_of_any_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let model = dir.path().to_str().unwrap();
    let bench = [
        "bench",
        "generate",
        "-m",
        model,
        "--random-weights",
        "--runs",
        "1",
        "--json",
    ];
    for flags in [
        &["--tokens", "2", "--prompt", "1"][..],
        &["--tokens", "40", "--batch", "5", "--ragged"],
        &["--tokens", "3", "--batch", "40"],
    ] {
        let found: Value = serde_json::from_str(&ok(&[&bench[..], flags].concat()).stdout).unwrap();
        for key in ["tokens_per_second", "prompt_tokens_per_second"] {
            let speed = found[key].as_f64().unwrap();
            assert!(speed.is_finite() && speed > 0.0, "{flags:?}: {found}");
        }
        assert_eq!(found["tokens"].to_string(), flags[1]);
    }
    let too_many = usize::MAX.to_string();
    let commands: [&[&str]; 4] = [
        &["bench", "matmul", "--size", &too_many],
        &[
            "bench",
            "train",
            "-m",
            model,
            "--random-weights",
            "--rank",
            &too_many,
        ],
        &[
            "bench",
            "train",
            "-m",
            model,
            "--random-weights",
            "--seq",
            &too_many,
        ],
        &[
            "bench",
            "generate",
            "-m",
            model,
            "--random-weights",
            "--prompt",
            &too_many,
        ],
    ];
    for command in commands {
        let refused = run(command);
        assert_eq!(refused.code, 2, "{command:?}: {}", refused.stderr);
    }
    let refused = run(&[&bench[..], &["--tokens", "1"]].concat());
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("--tokens of at least 2"),
        "{}",
        refused.stderr
    );
}
