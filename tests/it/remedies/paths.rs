//! Remedies around paths: what is given for an adapter, what lies beside it, and what is written over.

use std::collections::BTreeMap;

use monteclora_converters::{Tensor, write_safetensors};
use serde_json::{Value, json};

use super::adapters::{changed, scratch};
use super::{Remedy, Run, data, told};
use crate::cli::{copy, json as answer, ok, own_adapter, run, text, tiny};

pub(super) const REMEDIES: [Remedy; 10] = [
    (
        "convert it with `monteclora convert`",
        Run(an_adapter_is_not_imported),
    ),
    (
        "exists; choose another file or pass --force",
        Run(one_file_is_replaced),
    ),
    (
        "for the order of the rows of q and k); give the base with -m",
        Run(one_file_is_replaced),
    ),
    (
        "choose another directory or pass --force",
        Run(a_directory_is_replaced),
    ),
    (
        "were not compared with a base (give one with -m)",
        Run(models_are_given_with_m),
    ),
    (
        "holds a model, not an adapter: give it with -m",
        Run(models_are_given_with_m),
    ),
    (
        "that is no LoRA: a model is given with -m",
        Run(models_are_given_with_m),
    ),
    (
        "give an adapter; a model is given with -m",
        Run(models_are_given_with_m),
    ),
    (
        "monteclora merge makes a model with the adapter's",
        Run(a_tokenizer_of_the_adapter_is_merged),
    ),
    (
        "sound? `monteclora inspect` tells",
        Run(numbers_that_are_none_are_looked_for),
    ),
];

fn an_adapter_is_not_imported() {
    let dir = scratch();
    let (gguf, base) = (dir.path().join("a.gguf"), tiny());
    ok(&[
        "convert",
        &own_adapter("plain-lora"),
        "-o",
        text(&gguf),
        "--to",
        "gguf",
        "-m",
        &base,
    ]);
    let refused = run(&[
        "import-gguf",
        text(&gguf),
        "-o",
        text(&dir.path().join("x")),
    ]);
    assert!(
        refused
            .stderr
            .contains("convert it with `monteclora convert`"),
        "{}",
        refused.stderr
    );
    let out = dir.path().join("lora");
    ok(&[
        "convert",
        text(&gguf),
        "-o",
        text(&out),
        "--to",
        "lora",
        "-m",
        &base,
    ]);
}

fn one_file_is_replaced() {
    let dir = scratch();
    let (gguf, plain, base) = (dir.path().join("a.gguf"), own_adapter("plain-lora"), tiny());
    let arguments = ["convert", &plain, "-o", text(&gguf), "--to", "gguf"];
    told(&arguments, "give the base with -m");
    let arguments = [&arguments[..], &["-m", &base]].concat();
    ok(&arguments);
    told(&arguments, "pass --force");
    ok(&[&arguments[..], &["--force"]].concat());
}

fn a_directory_is_replaced() {
    let dir = scratch();
    let (file, out) = (data("gguf/qwen2.gguf"), dir.path().join("out"));
    let arguments = ["import-gguf", text(&file), "-o", text(&out)];
    ok(&arguments);
    told(&arguments, "pass --force");
    ok(&[&arguments[..], &["--force"]].concat());
}

fn models_are_given_with_m() {
    let dir = scratch();
    let (base, plain) = (tiny(), own_adapter("plain-lora"));
    let gguf = dir.path().join("qwen2.gguf");
    std::fs::copy(data("gguf/qwen2.gguf"), &gguf).unwrap();
    let weights = format!("{base}/model.safetensors");
    for (path, expected) in [
        (base.as_str(), "a model, not an adapter: give it with -m"),
        (
            text(dir.path()),
            "that is no LoRA: a model is given with -m",
        ),
        (&weights, "give an adapter; a model is given with -m"),
    ] {
        let refused = run(&["validate", path]);
        let said = refused.stdout + &refused.stderr;
        assert!(refused.code != 0 && said.contains(expected), "{said}");
    }
    let alone = ok(&["validate", &plain]);
    assert!(
        alone.stdout.contains("give one with -m"),
        "{}",
        alone.stdout
    );
    assert!(
        ok(&["validate", &plain, "-m", &base])
            .stdout
            .contains("it fits")
    );
    let mut command = crate::cli::monteclora();
    let cache = dir.path().join("cache");
    command.env("MONTECLORA_CACHE", &cache);
    let asked = [
        "predict",
        "-m",
        text(&gguf),
        "--prompt",
        "x",
        "--max-tokens",
        "1",
    ];
    let done = crate::cli::outcome(command.args(asked));
    assert_eq!(done.code, 0, "{}", done.stderr);
}

#[test]
fn trained_weights_are_moved_away() {
    let dir = scratch();
    let path = changed(dir.path(), "scored", |_, _| ());
    let head = [(
        "score.weight".to_owned(),
        Tensor::from_f32(&[1, 2], vec![1.0; 2]).unwrap(),
    )];
    write_safetensors(path.join("score.safetensors"), head, &BTreeMap::new()).unwrap();
    assert!(
        run(&["validate", text(&path)])
            .stdout
            .contains("move the file out of the directory")
    );
    std::fs::rename(
        path.join("score.safetensors"),
        dir.path().join("score.safetensors"),
    )
    .unwrap();
    ok(&["validate", text(&path)]);
    copy(&path, &dir.path().join("copy"));
    ok(&["collapse", text(&path), "-o", text(&dir.path().join("out"))]);
}

fn a_tokenizer_of_the_adapter_is_merged() {
    let dir = scratch();
    let path = changed(dir.path(), "own", |_, _| ());
    let base = tiny();
    let tokenizer = std::fs::read_to_string(format!("{base}/tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    tokenizer["added_tokens"][0]["content"] = json!("<other>");
    std::fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let asked = ok(&[
        "predict",
        "-m",
        &base,
        "-a",
        text(&path),
        "--prompt",
        "x",
        "--max-tokens",
        "1",
    ]);
    assert!(
        asked.stderr.contains("monteclora merge makes a model"),
        "{}",
        asked.stderr
    );
    let out = dir.path().join("merged");
    ok(&["merge", "-m", &base, "-a", text(&path), "-o", text(&out)]);
    let merged = std::fs::read_to_string(out.join("tokenizer.json")).unwrap();
    assert!(merged.contains("<other>"));
}

fn numbers_that_are_none_are_looked_for() {
    let dir = scratch();
    let path = changed(dir.path(), "large", |_, tensors| {
        for tensor in tensors.values_mut() {
            let values = vec![1e30; tensor.n_elements()];
            *tensor = Tensor::from_f32(tensor.shape(), values).unwrap();
        }
    });
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    told(
        &[
            "eval",
            "-m",
            &tiny(),
            "-a",
            text(&path),
            "--data",
            text(&rows),
        ],
        "`monteclora inspect` tells",
    );
    let found = answer(&["inspect", text(&path)]);
    assert!(
        found["sites"][0]["norm_a"].as_f64().unwrap() > 1e30,
        "{found}"
    );
}
