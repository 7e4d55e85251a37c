//! Bases that are not what their config.json says, made from a small one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_write::write_safetensors;
use crate::tensors::tensor::Tensor;

type Tensors = BTreeMap<String, Tensor>;

const EMBEDDING: &str = "model.embed_tokens.weight";

fn tiny_llama() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    dir.join("../tests/data/fixtures/models/tiny-llama")
}

/// The small base with changes to its config.json (null takes a key away) and its tensors.
fn changed(changes: Value, edit: impl FnOnce(&mut Tensors)) -> (tempfile::TempDir, ModelFiles) {
    let base = ModelFiles::open(tiny_llama()).expect("opens");
    let mut config = base.config().clone();
    for (key, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => config.shift_remove(key),
            value => config.insert(key.clone(), value.clone()),
        };
    }
    let mut tensors: Tensors = base
        .names()
        .map(|name| (name.to_owned(), base.get(name).expect("there")))
        .collect();
    edit(&mut tensors);
    let dir = tempfile::tempdir().expect("a directory");
    let text = Value::Object(config).to_string();
    std::fs::write(dir.path().join("config.json"), text).expect("written");
    let file = dir.path().join("model.safetensors");
    write_safetensors(file, tensors, &Default::default()).expect("written");
    let files = ModelFiles::open(dir.path()).expect("opens");
    (dir, files)
}

/// The problems, as code and text.
fn refused(changes: Value, edit: impl FnOnce(&mut Tensors)) -> Vec<(&'static str, String)> {
    let (_dir, files) = changed(changes, edit);
    let error = files.check().expect_err("refused");
    let text = |problem: &Problem| (problem.code, problem.to_string());
    match error.problems() {
        [] => vec![(error.code(), error.to_string())],
        problems => problems.iter().map(text).collect(),
    }
}

fn one(changes: Value, edit: impl FnOnce(&mut Tensors), code: &str, parts: &[&str]) {
    let found = refused(changes, edit);
    assert_eq!(found.len(), 1, "{found:?}");
    let (found, text) = &found[0];
    assert_eq!(*found, code, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}

fn nothing(_: &mut Tensors) {}

fn padded(tensors: &mut Tensors, name: &str, n_rows: usize) {
    let tensor = &tensors[name];
    let columns = tensor.shape()[1];
    let longer = tensor.padded(n_rows, columns).expect("larger");
    let longer = Tensor::from_f32(&[n_rows, columns], longer.to_f32().expect("floats"));
    tensors.insert(name.to_owned(), longer.expect("sized"));
}

fn renamed(tensors: &mut Tensors, name: impl Fn(&str) -> String) {
    let old = std::mem::take(tensors);
    tensors.extend(old.into_iter().map(|(old, tensor)| (name(&old), tensor)));
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::from_f32(shape, vec![0.0; shape.iter().product()]).expect("sized")
}

#[test]
fn a_whole_base_passes() {
    let (_dir, files) = changed(json!({}), nothing);
    assert_eq!(files.check().expect("whole"), []);
}

/// The kinds of which `training/base-dry-run` and `training/base-fp8` speak.
#[test]
fn the_cases_of_bases_are_refused_by_name() {
    // The head says that it is not vocab_size that is wrong.
    let embedding = |tensors: &mut Tensors| padded(tensors, EMBEDDING, 264);
    one(
        json!({}),
        embedding,
        "shape",
        &[EMBEDDING, "[264, 64]", "[259, 64]", "model.safetensors"],
    );
    one(
        json!({"num_key_value_heads": null}),
        nothing,
        "shape",
        &[
            "config.json: num_key_value_heads",
            "which means 4",
            "5 more tensors",
            "\"num_key_value_heads\": 2",
        ],
    );
    let headless = |tensors: &mut Tensors| drop(tensors.remove(HEAD));
    one(
        json!({}),
        headless,
        "missing-tensor",
        &[HEAD, "missing", "\"tie_word_embeddings\": true"],
    );
    let peft = |tensors: &mut Tensors| renamed(tensors, |name| format!("base_model.model.{name}"));
    one(
        json!({}),
        peft,
        "tensor-names",
        &[
            "base_model.model.lm_head.weight",
            "all 30 tensors",
            "merge_and_unload",
        ],
    );
    let eight_bit = |tensors: &mut Tensors| {
        for (name, tensor) in tensors
            .iter_mut()
            .filter(|(name, _)| name.ends_with("_proj.weight"))
        {
            let bytes = vec![0; tensor.n_elements()];
            *tensor = Tensor::from_bytes(DType::F8E4M3, tensor.shape(), bytes).expect(name);
        }
    };
    one(
        json!({}),
        eight_bit,
        "quantised-base",
        &[
            "F8_E4M3",
            "8-bit floating point",
            "20 more",
            "mlp.down_proj.weight",
            "`model.safetensors`",
            "full-precision",
        ],
    );
}

/// The case `training/config-tied-with-head`, and a copy of the embedding, which is none.
#[test]
fn a_stored_head_of_a_tied_base_is_the_embedding_or_refused() {
    let tied = json!({"tie_word_embeddings": true});
    one(
        tied.clone(),
        nothing,
        "tied-head",
        &[HEAD, EMBEDDING, "\"tie_word_embeddings\": false", "remove"],
    );
    for dtype in [DType::F32, DType::BF16] {
        let (_dir, files) = changed(tied.clone(), |tensors| {
            let rounded = tensors[EMBEDDING].to_dtype(DType::BF16).expect("floats");
            tensors.insert(HEAD.to_owned(), rounded.to_dtype(dtype).expect("floats"));
            tensors.insert(EMBEDDING.to_owned(), rounded);
        });
        assert_eq!(files.check().expect("a copy"), []);
    }
    let longer = |tensors: &mut Tensors| padded(tensors, HEAD, 260);
    one(tied, longer, "tied-head", &["[260, 64]", "[259, 64]"]);
}

#[test]
fn names_of_wrappers_are_recognised() {
    type Rename = fn(&str) -> String;
    let wrappers: [(&str, Rename, &str); 6] = [
        (
            "_orig_mod",
            |name| format!("_orig_mod.{name}"),
            "torch.compile",
        ),
        ("module", |name| format!("module.{name}"), "DataParallel"),
        (
            "fsdp",
            |name| name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
            "FSDP",
        ),
        (
            "base_layer",
            |name| name.replace("q_proj.", "q_proj.base_layer."),
            "merge_and_unload",
        ),
        (
            "multimodal",
            |name| format!("language_model.{name}"),
            "other media",
        ),
        (
            "no head",
            |name| name.replace("model.", ""),
            "AutoModelForCausalLM",
        ),
    ];
    for (what, rename, said) in wrappers {
        one(
            json!({}),
            |tensors| renamed(tensors, rename),
            "tensor-names",
            &[said, "should be `"],
        );
        // Names that nobody knows are missing ones and unread ones, and so not called wrapped.
        let unknown = refused(json!({}), |tensors| {
            renamed(tensors, |name| name.replace("self_attn", what));
        });
        assert!(
            unknown.iter().all(|(code, _)| *code != "tensor-names"),
            "{unknown:?}"
        );
    }
}

#[test]
fn what_would_not_be_read_is_refused_once_for_all_layers() {
    let add = |names: &'static [(&str, usize)]| {
        move |tensors: &mut Tensors| {
            for layer in 0..3 {
                for (name, size) in names {
                    let name = format!("model.layers.{layer}.{name}");
                    tensors.insert(name, zeros(&[*size]));
                }
            }
        }
    };
    let norms = add(&[("self_attn.q_norm.weight", 16)]);
    one(
        json!({}),
        norms,
        "unread-tensor",
        &["q_norm.weight", "2 more layers", "LlamaForCausalLM"],
    );
    let biases = add(&[("self_attn.q_proj.bias", 64)]);
    one(
        json!({}),
        biases,
        "unread-tensor",
        &["q_proj.bias", "3 biases", "set \"attention_bias\": true"],
    );
    let buffers = add(&[("self_attn.rotary_emb.inv_freq", 8)]);
    let (_dir, files) = changed(json!({}), buffers);
    let warnings = files.check().expect("buffers are computed anew");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].message.contains("2 more buffers"),
        "{warnings:?}"
    );
    let adapter = |tensors: &mut Tensors| {
        tensors.insert(
            "model.layers.0.mlp.up_proj.lora_A.weight".to_owned(),
            zeros(&[4, 64]),
        );
    };
    one(json!({}), adapter, "unread-tensor", &["lora_A", "merge"]);
}

#[test]
fn layers_that_do_not_go_with_the_configuration_are_one_report() {
    let at = "config.json: num_hidden_layers";
    one(
        json!({"num_hidden_layers": 2}),
        nothing,
        "layers",
        &[at, "is 2", "9 tensors", "layers 2"],
    );
    one(
        json!({"num_hidden_layers": 5}),
        nothing,
        "layers",
        &[at, "is 5", "layers 3, 4"],
    );
    let one_missing =
        |tensors: &mut Tensors| drop(tensors.remove("model.layers.1.mlp.up_proj.weight"));
    one(
        json!({}),
        one_missing,
        "missing-tensor",
        &["model.layers.1.mlp.up_proj.weight"],
    );
    one(
        json!({"attention_bias": true}),
        nothing,
        "missing-tensor",
        &["config.json: attention_bias", "12 biases", "k_proj.bias"],
    );
}

#[test]
fn a_size_that_all_tensors_contradict_is_one_report() {
    let both = |tensors: &mut Tensors| {
        padded(tensors, EMBEDDING, 264);
        padded(tensors, HEAD, 264);
    };
    one(
        json!({}),
        both,
        "shape",
        &[
            "config.json: vocab_size",
            "is 259",
            "1 more tensors are of 264",
        ],
    );
    for (key, wrong, right) in [
        ("hidden_size", 96, 64),
        ("intermediate_size", 100, 128),
        ("num_key_value_heads", 1, 2),
        ("num_attention_heads", 8, 4),
        ("head_dim", 32, 16),
        ("vocab_size", 260, 259),
    ] {
        let fix = format!("set \"{key}\": {right} in config.json");
        one(
            json!({key: wrong}),
            nothing,
            "shape",
            &[&format!("config.json: {key}: is {wrong}"), &fix],
        );
    }
}

#[test]
fn quantised_weights_are_told_by_what_lies_beside_them() {
    for (name, method) in [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.scales", "MLX"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
        ("model.layers.0.mlp.up_proj.weight_scale", "FP8"),
    ] {
        let add = |tensors: &mut Tensors| drop(tensors.insert(name.to_owned(), zeros(&[4])));
        one(
            json!({}),
            add,
            "quantised-base",
            &[name, method, "model.safetensors"],
        );
    }
    let config = json!({"quantization": {"group_size": 64, "bits": 4}});
    one(
        config,
        nothing,
        "quantised-base",
        &["MLX, 4 bits", "stored as they are", "remove `quantization`"],
    );
    for (other, what) in [
        (json!({"group_size": 64, "bits": 3}), "3 bits"),
        (
            json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}),
            "mode mxfp4",
        ),
        (
            json!({"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 6}}),
            "6 bits in `lm_head`",
        ),
    ] {
        let expected = format!("MLX, {} bits: {what}", other["bits"]);
        let config = json!({"quantization": other});
        one(
            config,
            nothing,
            "quantised-base",
            &[&expected, "affine 4 or 8 bits"],
        );
    }
}

/// What a class of a family that is not known holds is not known either, but its types are.
#[test]
fn of_an_unknown_family_only_types_are_checked() {
    let (_dir, files) = changed(
        json!({"model_type": "new", "num_hidden_layers": 7}),
        nothing,
    );
    assert_eq!(files.check().expect("not known"), []);
}

/// The case `training/base-lfs-pointer`, and its kind: a page, an empty file, a cut one, an index of files that are not there.
#[test]
fn what_stands_in_place_of_weights_is_named() {
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/cases"),
        PathBuf::from,
    );
    let pointer = std::fs::read(root.join("training/base-lfs-pointer/model.safetensors"));
    let weights = std::fs::read(tiny_llama().join("model.safetensors")).expect("read");
    let opened = |name: &str, bytes: &[u8]| {
        let (dir, _) = changed(json!({}), nothing);
        if name.ends_with(".index.json") {
            std::fs::remove_file(dir.path().join("model.safetensors")).expect("there");
        }
        std::fs::write(dir.path().join(name), bytes).expect("written");
        ModelFiles::open(dir.path())
            .expect_err("no weights")
            .to_string()
    };
    let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    for (name, bytes, parts) in [
        (
            "model.safetensors",
            pointer.expect("a case").as_slice(),
            ["Git LFS pointer", "git lfs pull"],
        ),
        (
            "model.safetensors",
            b"<!DOCTYPE html><html>Sign in</html>",
            ["HTML page", "hf download"],
        ),
        ("model.safetensors", b"", ["empty file", "fetch"]),
        (
            "model.safetensors",
            &weights[..weights.len() / 2],
            ["cut short", "model.safetensors"],
        ),
        (
            "model.safetensors.index.json",
            index,
            ["2 shards", "model-00001-of-00002.safetensors"],
        ),
        (
            "config.json",
            b"version https://git-lfs.github.com/spec/v1\noid x\nsize 7\n",
            ["config.json", "Git LFS pointer"],
        ),
    ] {
        let said = opened(name, bytes);
        for part in parts {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
    }
}

#[test]
fn weights_that_lie_beside_the_base_are_named() {
    let (dir, files) = changed(json!({}), nothing);
    for name in [
        "model-00002-of-00002.safetensors",
        "consolidated.safetensors",
    ] {
        std::fs::write(dir.path().join(name), "").expect("written");
    }
    let warnings = files.check().expect("whole");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].at, "model-00002-of-00002.safetensors");
    std::fs::write(dir.path().join("adapter_config.json"), "{}").expect("written");
    let warnings = files.check().expect("whole");
    assert!(
        warnings[0].message.contains("transformers loads"),
        "{warnings:?}"
    );

    let index = r#"{"weight_map": {"a": "model-00001-of-00001.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).expect("written");
    let error = ModelFiles::open(dir.path()).expect_err("two sets");
    assert_eq!(error.code(), "two-sets", "{error}");
}
