//! Bases that are not what their config.json says are refused alike by every command that takes one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use monteclora_converters::{DType, ModelFiles, Tensor, write_safetensors};
use serde_json::{Map, Value, json};

use crate::cli::{own_adapter, run, run_toml, tiny};

type Tensors = BTreeMap<String, Tensor>;

/// The small base in `dir`, with its config.json and tensors changed.
fn base(dir: &Path, edit: impl FnOnce(&mut Map<String, Value>, &mut Tensors)) -> PathBuf {
    let from = ModelFiles::open(tiny()).unwrap();
    let made = dir.join("base");
    std::fs::create_dir(&made).unwrap();
    for entry in std::fs::read_dir(from.dir()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, made.join(path.file_name().unwrap())).unwrap();
    }
    let mut config = from.config().clone();
    let names = from.names().map(str::to_owned);
    let mut tensors: Tensors = names
        .map(|name| (name.clone(), from.get(&name).unwrap()))
        .collect();
    edit(&mut config, &mut tensors);
    std::fs::write(made.join("config.json"), Value::Object(config).to_string()).unwrap();
    write_safetensors(made.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
    made
}

/// What every command that takes a base says of this one, each with its exit code.
fn said_of(dir: &Path, base: &Path) -> Vec<(&'static str, i32, String)> {
    let model = base.to_str().unwrap();
    let adapter = own_adapter("plain-lora");
    let config = run_toml(dir, "", "", "");
    let config = config.to_str().unwrap();
    let rows = dir.join("rows.jsonl");
    let rows = rows.to_str().unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    let (written, merged, gguf) = (at("new.toml"), at("merged"), at("adapter.gguf"));
    let set = format!("model.model_id={model:?}");
    let commands: [(&str, Vec<&str>); 8] = [
        (
            "dry run",
            vec!["train", "-c", config, "--dry-run", "--set", &set],
        ),
        ("train", vec!["train", "-c", config, "--set", &set]),
        (
            "init",
            vec!["init", "-m", model, "--data", rows, "-o", &written],
        ),
        ("validate", vec!["validate", &adapter, "-m", model]),
        (
            "merge",
            vec!["merge", "-m", model, "-a", &adapter, "-o", &merged],
        ),
        (
            "convert",
            vec![
                "convert", &adapter, "--to", "gguf", "-m", model, "-o", &gguf,
            ],
        ),
        ("eval", vec!["eval", "-m", model, "--data", rows]),
        (
            "predict",
            vec!["predict", "-m", model, "--prompt", "a", "--max-tokens", "2"],
        ),
    ];
    let said = commands.into_iter().map(|(name, arguments)| {
        let done = run(&arguments);
        (name, done.code, done.stdout + &done.stderr)
    });
    said.collect()
}

fn refused(parts: &[&str], edit: impl FnOnce(&mut Map<String, Value>, &mut Tensors)) {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), edit);
    for (command, code, said) in said_of(dir.path(), &base) {
        assert_eq!(code, 4, "{command}: {said}");
        for part in parts {
            assert!(said.contains(part), "{command}: {part} is not in: {said}");
        }
    }
    assert!(!dir.path().join("merged").exists() && !dir.path().join("out").exists());
}

#[test]
fn every_command_refuses_a_base_whose_headers_are_wrong() {
    let embedding = "model.embed_tokens.weight";
    refused(&[embedding, "[264, 64]", "[259, 64]"], |_, tensors| {
        let mut values = tensors[embedding].to_f32().unwrap();
        values.resize(264 * 64, 0.0);
        tensors.insert(
            embedding.to_owned(),
            Tensor::from_f32(&[264, 64], values).unwrap(),
        );
    });
    refused(&["num_key_value_heads", "which means 4"], |config, _| {
        config.remove("num_key_value_heads");
    });
    refused(&["lm_head.weight", "missing"], |_, tensors| {
        tensors.remove("lm_head.weight");
    });
    refused(&["base_model.model.", "merge_and_unload"], |_, tensors| {
        let old = std::mem::take(tensors).into_iter();
        tensors.extend(old.map(|(name, tensor)| (format!("base_model.model.{name}"), tensor)));
    });
    refused(&["lm_head.weight", "tie_word_embeddings"], |config, _| {
        config.insert("tie_word_embeddings".to_owned(), json!(true));
    });
    refused(
        &["F8_E4M3", "model.safetensors", "full-precision"],
        |_, tensors| {
            let weights = tensors
                .iter_mut()
                .filter(|(name, _)| name.ends_with("_proj.weight"));
            for (_, tensor) in weights {
                let bytes = vec![0; tensor.n_elements()];
                *tensor = Tensor::from_bytes(DType::F8E4M3, tensor.shape(), bytes).unwrap();
            }
        },
    );
}

/// What may be wrong is said, and nothing else changes.
#[test]
fn what_is_left_unread_of_a_base_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path(), |config, tensors| {
        config.insert("frobnicate".to_owned(), json!(7));
        let buffer = Tensor::from_f32(&[8], vec![0.0; 8]).unwrap();
        tensors.insert(
            "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
            buffer,
        );
    });
    for (command, code, said) in said_of(dir.path(), &base) {
        assert_eq!(code, 0, "{command}: {said}");
        for part in ["frobnicate", "rotary_emb.inv_freq"] {
            assert_eq!(said.matches(part).count(), 1, "{command}: {part}: {said}");
        }
    }
}
