//! Tests of whole imports, on small GGUF files that the tests write.

mod gguf_file;
mod keys;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;
use tokenizers::Tokenizer;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor};
use monteclora_converters::architecture::Llama3Scaling;
use monteclora_converters::{BLOCK_FORMATS, BlockFormat, DType, Error};

use super::*;
use gguf_file::{GgufBuilder, Meta};

fn import(file: &GgufBuilder, dir: &Path, options: &ImportOptions) -> Result<ImportReport> {
    import_gguf(&file.write(dir), &dir.join("out"), options, &mut |_, _| {})
}

fn imported(file: &GgufBuilder) -> (tempfile::TempDir, PathBuf, ImportReport) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let report = import(file, dir.path(), &ImportOptions::default()).expect("the model is fine");
    let out = dir.path().join("out");
    (dir, out, report)
}

/// Codes of the problems an import is refused with.
fn refused(file: &GgufBuilder) -> Vec<(String, String)> {
    let dir = tempfile::tempdir().expect("temporary directory");
    match import(file, dir.path(), &ImportOptions::default()) {
        Err(Error::Problems(problems)) => {
            let left: Vec<_> = fs::read_dir(dir.path()).expect("readable").collect();
            assert_eq!(left.len(), 1, "only the source is left");
            problems
                .list
                .into_iter()
                .map(|problem| (problem.code.to_owned(), problem.at))
                .collect()
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON")
}

fn weights(out: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(out).expect("readable") {
        let path = entry.expect("readable").path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            let bytes = fs::read(&path).expect("readable");
            let file = SafeTensors::deserialize(&bytes).expect("well formed");
            for (name, view) in file.tensors() {
                let values = match view.dtype() {
                    safetensors::Dtype::F32 => view
                        .data()
                        .as_chunks::<4>()
                        .0
                        .iter()
                        .map(|value| f32::from_le_bytes(*value))
                        .collect(),
                    safetensors::Dtype::BF16 => {
                        let halves = view.data().as_chunks::<2>().0.iter();
                        halves
                            .map(|value| half::bf16::from_le_bytes(*value).to_f32())
                            .collect()
                    }
                    other => panic!("unexpected {other:?}"),
                };
                found.insert(name, (view.shape().to_vec(), values));
            }
        }
    }
    found
}

/// llama.cpp's permutation of the rows of a query or key matrix.
fn permute(rows: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let row = |idx: usize| &rows[idx * columns..(idx + 1) * columns];
    let mut permuted = Vec::new();
    for head in 0..rows.len() / columns / head_dim {
        for idx in 0..head_dim / 2 {
            permuted.extend_from_slice(row(head * head_dim + idx));
            permuted.extend_from_slice(row(head * head_dim + head_dim / 2 + idx));
        }
    }
    permuted
}

#[test]
fn values_survive_and_queries_and_keys_are_put_back() {
    let file = GgufBuilder::model("llama");
    let mut permuted = file.clone();
    for layer in 0..2 {
        for (kind, rows) in [("attn_q", 8), ("attn_k", 4)] {
            let name = format!("blk.{layer}.{kind}.weight");
            permuted.tensor(&name, &[rows, 8], permute(file.values(&name), 8, 4));
        }
    }
    assert_ne!(
        permuted.values("blk.0.attn_q.weight"),
        file.values("blk.0.attn_q.weight")
    );
    let (_dir, out, report) = imported(&permuted);
    let found = weights(&out);
    assert_eq!((report.n_tensors, found.len()), (20, 20));
    let total: usize = found.values().map(|(_, values)| values.len()).sum();
    assert_eq!(report.n_parameters, total as u64);
    for (name, source) in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        (
            "model.layers.1.self_attn.q_proj.weight",
            "blk.1.attn_q.weight",
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            "blk.0.attn_k.weight",
        ),
        (
            "model.layers.0.self_attn.v_proj.weight",
            "blk.0.attn_v.weight",
        ),
        (
            "model.layers.1.mlp.down_proj.weight",
            "blk.1.ffn_down.weight",
        ),
        (
            "model.layers.1.post_attention_layernorm.weight",
            "blk.1.ffn_norm.weight",
        ),
    ] {
        assert_eq!(found[name].1, file.values(source), "{name}");
    }
    assert_eq!(found["model.layers.0.mlp.down_proj.weight"].0, [8, 12]);
}

#[test]
fn llama_biases_are_put_back_as_well() {
    let mut file = GgufBuilder::model("llama");
    for layer in 0..2 {
        for (kind, size) in [
            ("attn_q", 8),
            ("attn_k", 4),
            ("attn_v", 4),
            ("attn_output", 8),
        ] {
            file.tensor(
                &format!("blk.{layer}.{kind}.bias"),
                &[size],
                (0..size).map(|idx| idx as f32).collect(),
            );
        }
    }
    let (_dir, out, _) = imported(&file);
    let found = weights(&out);
    assert_eq!(
        found["model.layers.0.self_attn.q_proj.bias"].1,
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    );
    assert_eq!(
        found["model.layers.0.self_attn.v_proj.bias"].1,
        [0.0, 1.0, 2.0, 3.0]
    );
    assert_eq!(json(&out.join("config.json"))["attention_bias"], true);
}

#[test]
fn qwen_rows_stay_as_they_are() {
    for (architecture, n_tensors) in [("qwen2", 26), ("qwen3", 24)] {
        let file = GgufBuilder::model(architecture);
        let (_dir, out, report) = imported(&file);
        assert_eq!(report.n_tensors, n_tensors);
        let found = weights(&out);
        assert_eq!(
            found["model.layers.0.self_attn.q_proj.weight"].1,
            file.values("blk.0.attn_q.weight")
        );
        let config = json(&out.join("config.json"));
        assert_eq!(config["use_sliding_window"], false);
        assert_eq!(config["max_window_layers"], 2);
    }
}

#[test]
fn the_configuration_has_what_both_runtimes_need() {
    let mut file = GgufBuilder::model("llama");
    let (_dir, out, report) = imported(&file);
    let config = json(&out.join("config.json"));
    assert_eq!(config["rope_theta"], 100_000.0);
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(config["vocab_size"], 260);
    assert_eq!(config["model_type"], "llama");
    assert_eq!(config.get("head_dim"), None);
    assert!(report.tie_word_embeddings);
    // The end-of-turn token of the chat template ends an answer, as does the end-of-text token.
    assert_eq!(
        json(&out.join("generation_config.json"))["eos_token_id"],
        serde_json::json!([0, 1])
    );

    file.tensor("output.weight", &[260, 8], vec![0.5; 260 * 8]);
    let (_dir, out, report) = imported(&file);
    assert!(!report.tie_word_embeddings);
    assert_eq!(json(&out.join("config.json"))["tie_word_embeddings"], false);
    assert!(weights(&out).contains_key("lm_head.weight"));
}

#[test]
fn a_head_size_of_its_own_makes_it_a_mistral_model() {
    let mut file = GgufBuilder::model("llama");
    file.set("llama.attention.key_length", Meta::U32(2));
    file.set("llama.attention.value_length", Meta::U32(2));
    for layer in 0..2 {
        for (kind, shape) in [
            ("attn_q", [4, 8]),
            ("attn_k", [2, 8]),
            ("attn_v", [2, 8]),
            ("attn_output", [8, 4]),
        ] {
            file.tensor(
                &format!("blk.{layer}.{kind}.weight"),
                &shape,
                vec![0.1; shape[0] * shape[1]],
            );
        }
    }
    let (_dir, out, _) = imported(&file);
    let config = json(&out.join("config.json"));
    assert_eq!(
        (&config["model_type"], &config["head_dim"]),
        (&"mistral".into(), &2.into())
    );
    assert_eq!(config["sliding_window"], Value::Null);
}

#[test]
fn llama3_scaling_is_recovered_and_other_scaling_refused() {
    let scaling = Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let mut file = GgufBuilder::model("llama");
    let factors = scaling
        .factors(4, 100_000.0)
        .into_iter()
        .map(|factor| factor as f32)
        .collect();
    file.tensor("rope_freqs.weight", &[2], factors);
    file.set("llama.rope.freq_base", Meta::F32(1e8));
    let wanted: Vec<f32> = scaling
        .factors(4, 1e8)
        .into_iter()
        .map(|factor| factor as f32)
        .collect();
    assert_eq!(wanted, [1.0, 8.0]);
    file.tensor("rope_freqs.weight", &[2], wanted);
    let (_dir, out, _) = imported(&file);
    let config = json(&out.join("config.json"));
    assert_eq!(config["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(config["rope_scaling"]["factor"], 8.0);

    file.tensor("rope_freqs.weight", &[2], vec![3.0, 8.0]);
    assert_eq!(
        refused(&file),
        [("rope_scaling".into(), "rope_freqs.weight".into())]
    );
    let mut other = GgufBuilder::model("qwen3");
    other.set("qwen3.rope.scaling.type", Meta::Text("ntk".into()));
    assert_eq!(
        refused(&other),
        [("rope_scaling".into(), "qwen3.rope.scaling.type".into())]
    );
}

#[test]
fn text_comes_back_and_special_tokens_keep_their_numbers() {
    let (_dir, out, _) = imported(&GgufBuilder::model("llama"));
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).expect("loads");
    let text = "<|start|>he said: the  4\n\n5\t\u{6771}\u{4eac} \u{1f642} e\u{301}\r\n<|im_end|>";
    let ids = tokenizer.encode(text, true).expect("encodes");
    assert_eq!(ids.get_ids()[0], 0);
    assert_eq!(ids.get_ids().last(), Some(&1));
    assert_eq!(ids.get_ids()[1], 258, "h and e are merged");
    assert!(ids.get_ids().contains(&259) || text.find(" he").is_none());
    assert_eq!(
        tokenizer.decode(ids.get_ids(), false).expect("decodes"),
        text
    );
    let config = json(&out.join("tokenizer_config.json"));
    assert_eq!(config["eos_token"], "<|start|>");
    assert_eq!(config["pad_token"], "<|im_end|>");
    let template = fs::read_to_string(out.join("chat_template.jinja")).expect("written");
    assert_eq!(template, "{{ messages }}<|im_end|>");
}

#[test]
fn every_known_pre_tokenizer_loads_and_digits_split_as_its_models_do() {
    for (name, n_tokens) in [
        ("gpt-2", 1),
        ("smollm", 5),
        ("llama-bpe", 2),
        ("qwen2", 5),
        ("tekken", 5),
        ("dbrx", 2),
        ("smaug-bpe", 2),
        ("glm4", 2),
        ("chatglm-bpe", 2),
        ("gpt-4o", 2),
        ("llama4", 2),
    ] {
        let mut file = GgufBuilder::model("llama");
        file.set("tokenizer.ggml.pre", Meta::Text(name.into()));
        let (_dir, out, _) = imported(&file);
        let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).expect("loads");
        let pre_tokenizer =
            tokenizers::TokenizerImpl::get_pre_tokenizer(&tokenizer).expect("there");
        let mut words = tokenizers::PreTokenizedString::from("12345");
        tokenizers::PreTokenizer::pre_tokenize(pre_tokenizer, &mut words).expect("splits");
        let splits = words.get_splits(
            tokenizers::OffsetReferential::Original,
            tokenizers::OffsetType::Byte,
        );
        assert_eq!(splits.len(), n_tokens, "{name}");
    }
}

#[test]
fn a_sentencepiece_vocabulary_falls_back_to_bytes() {
    let mut file = GgufBuilder::model("llama");
    file.sentencepiece_vocabulary();
    let (_dir, out, _) = imported(&file);
    let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).expect("loads");
    let ids = tokenizer.encode("a a\n\u{1f642}", true).expect("encodes");
    let bytes: Vec<u32> = "\n\u{1f642}"
        .bytes()
        .map(|byte| u32::from(byte) + 2)
        .collect();
    assert_eq!(ids.get_ids()[..5], [1, 258, 259, 258, 259]);
    assert_eq!(ids.get_ids()[5..], bytes);
    assert_eq!(
        tokenizer
            .decode(&ids.get_ids()[1..], false)
            .expect("decodes"),
        "a a\n\u{1f642}"
    );
}

#[test]
fn what_cannot_be_represented_is_refused_by_name() {
    let mut mixture = GgufBuilder::model("qwen2");
    mixture.set("qwen2.expert_count", Meta::U32(8));
    assert_eq!(
        refused(&mixture),
        [("unsupported".into(), "qwen2.expert_count".into())]
    );

    let mut other = GgufBuilder::model("llama");
    other.set("general.architecture", Meta::Text("mamba".into()));
    assert_eq!(
        refused(&other),
        [("architecture".into(), "general.architecture".into())]
    );

    let mut splitter = GgufBuilder::model("llama");
    splitter.set("tokenizer.ggml.pre", Meta::Text("viking".into()));
    assert_eq!(
        refused(&splitter),
        [("tokenizer".into(), "tokenizer.ggml.pre".into())]
    );

    let mut adapter = GgufBuilder::model("llama");
    adapter.set("general.type", Meta::Text("adapter".into()));
    assert_eq!(refused(&adapter), [("type".into(), "general.type".into())]);

    let mut heads = GgufBuilder::model("llama");
    heads.set("llama.attention.head_count_kv", Meta::Integers(vec![1, 1]));
    assert_eq!(
        refused(&heads),
        [("metadata".into(), "llama.attention.head_count_kv".into())]
    );
}

#[test]
fn every_missing_superfluous_and_misshapen_tensor_is_listed() {
    let mut file = GgufBuilder::model("llama");
    file.tensors
        .retain(|(name, _, _)| name != "blk.1.attn_v.weight");
    file.tensor("blk.0.ffn_up.weight", &[8, 12], vec![0.0; 96]);
    file.tensor("blk.0.ffn_gate_inp.weight", &[4], vec![0.0; 4]);
    let mut found = refused(&file);
    found.sort();
    let expected = [
        ("missing", "blk.1.attn_v.weight"),
        ("shape", "blk.0.ffn_up.weight"),
        ("unknown_tensor", "blk.0.ffn_gate_inp.weight"),
    ];
    assert_eq!(
        found,
        expected.map(|(code, location)| (code.to_owned(), location.to_owned()))
    );
}

#[test]
fn a_weight_that_is_not_finite_leaves_no_directory() {
    let mut file = GgufBuilder::model("llama");
    file.tensor(
        "blk.0.attn_norm.weight",
        &[8],
        [vec![f32::NAN], vec![1.0; 7]].concat(),
    );
    let dir = tempfile::tempdir().expect("temporary directory");
    let error = import(&file, dir.path(), &ImportOptions::default()).expect_err("not finite");
    let text = error.to_string();
    assert!(
        text.contains("blk.0.attn_norm.weight: the value in row 0"),
        "{text}"
    );
    assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
}

#[test]
fn a_destination_is_replaced_only_when_asked() {
    let file = GgufBuilder::model("llama");
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("out");
    fs::create_dir(&out).expect("writable");
    import(&file, dir.path(), &ImportOptions::default()).expect("an empty directory may be filled");
    fs::write(out.join("mine"), "x").expect("writable");
    let error = import(&file, dir.path(), &ImportOptions::default()).expect_err("not empty");
    assert_eq!(error.code(), "exists");
    assert!(out.join("mine").exists());
    let force = ImportOptions {
        force: true,
        ..ImportOptions::default()
    };
    import(&file, dir.path(), &force).expect("allowed");
    assert!(!out.join("mine").exists() && out.join("config.json").exists());
    assert_eq!(
        fs::read_dir(dir.path()).expect("readable").count(),
        2,
        "the source and the model"
    );
}

#[test]
fn shards_together_are_the_single_file_and_bfloat16_is_rounded() {
    let file = GgufBuilder::model("llama");
    let (_dir, whole, _) = imported(&file);
    let dir = tempfile::tempdir().expect("temporary directory");
    let options = ImportOptions {
        max_shard_bytes: 1000,
        ..ImportOptions::default()
    };
    let mut seen = Vec::new();
    let out = dir.path().join("out");
    import_gguf(
        &file.write(dir.path()),
        &out,
        &options,
        &mut |done, total| seen.push((done, total)),
    )
    .expect("imports");
    assert_eq!(weights(&out), weights(&whole));
    let index = json(&out.join("model.safetensors.index.json"));
    let total = seen.last().map(|(_, total)| *total);
    assert_eq!(index["metadata"]["total_size"].as_u64(), total);
    assert_eq!(seen.last().map(|(done, _)| *done), total);
    for (name, shard) in index["weight_map"].as_object().expect("a map") {
        let bytes = fs::read(out.join(shard.as_str().expect("a name"))).expect("readable");
        SafeTensors::deserialize(&bytes)
            .expect("well formed")
            .tensor(name)
            .expect("in its shard");
    }

    let dir = tempfile::tempdir().expect("temporary directory");
    let options = ImportOptions {
        dtype: DType::BF16,
        ..ImportOptions::default()
    };
    import(&file, dir.path(), &options).expect("imports");
    assert_eq!(
        json(&dir.path().join("out/config.json"))["torch_dtype"],
        "bfloat16"
    );
    let rounded = weights(&dir.path().join("out"));
    for (name, (_, values)) in weights(&whole) {
        for (value, found) in values.iter().zip(&rounded[&name].1) {
            assert_eq!(half::bf16::from_f32(*value).to_f32(), *found, "{name}");
        }
    }
}

#[test]
fn a_hostile_header_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("hostile.gguf");
    let mut bytes = GgufBuilder::model("llama").bytes();
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, &bytes).expect("writable");
    let error = import_gguf(
        &path,
        &dir.path().join("out"),
        &ImportOptions::default(),
        &mut |_, _| {},
    );
    assert_eq!(error.expect_err("hostile").code(), "malformed");
    let absent = import_gguf(
        &dir.path().join("no"),
        &dir.path().join("out"),
        &ImportOptions::default(),
        &mut |_, _| {},
    );
    assert!(absent.expect_err("absent").is_not_found());
    for (key, value) in [
        ("llama.block_count", u32::MAX),
        ("llama.embedding_length", u32::MAX),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.key_length", 1),
        ("llama.feed_forward_length", u32::MAX),
        ("tokenizer.ggml.bos_token_id", 260),
    ] {
        let mut file = GgufBuilder::model("llama");
        file.set(key, Meta::U32(value));
        assert!(!refused(&file).is_empty(), "{key}");
    }
}

/// candle's name of a format.
fn of_candle(format: &BlockFormat) -> GgmlDType {
    use GgmlDType::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    [
        F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K,
    ]
    .into_iter()
    .find(|dtype| format!("{dtype:?}") == format.name)
    .expect("candle has it")
}

#[test]
fn every_block_format_decodes_what_candle_quantised_as_candle_does() {
    let values: Vec<f32> = (0..4096)
        .map(|idx| (idx as f32 * 0.37).sin() * (1.0 + idx as f32 / 900.0))
        .collect();
    let tensor = candle_core::Tensor::new(values.as_slice(), &Device::Cpu).expect("plain values");
    for format in &BLOCK_FORMATS {
        let quantised = QTensor::quantize(&tensor, of_candle(format)).expect("whole blocks");
        let bytes = quantised.data().expect("on the processor");
        let mut found = vec![f32::NAN; values.len()];
        (format.decode)(&bytes, &mut found);
        let theirs = quantised.dequantize(&Device::Cpu).expect("decodes");
        let theirs = theirs.to_vec1::<f32>().expect("plain values");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&theirs), "{}", format.name);
        let far = values.iter().zip(&found).map(|(a, b)| (a - b).abs());
        let worst = far.fold(0.0, f32::max);
        assert!(worst < 2.5, "{}: {worst}", format.name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn changed_header_bytes_never_panic(at in 0usize..9000, value in any::<u8>()) {
        let mut bytes = GgufBuilder::model("llama").bytes();
        let at = at % bytes.len();
        bytes[at] = value;
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("changed.gguf");
        fs::write(&path, bytes).expect("writable");
        let out = dir.path().join("out");
        let imported = import_gguf(&path, &out, &ImportOptions::default(), &mut |_, _| {});
        prop_assert_eq!(imported.is_ok(), out.exists());
    }
}
