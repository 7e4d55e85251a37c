//! Tests of keys, named templates and block formats of GGUF files: read as llama.cpp does, known as harmless, or
//! refused by name.

use super::*;

/// The GGUF file of a test case, and a temporary directory for the output.
fn case(name: &str) -> (tempfile::TempDir, PathBuf) {
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/cases"),
        PathBuf::from,
    );
    let dir = tempfile::tempdir().expect("temporary directory");
    (dir, root.join("formats").join(name).join("model.gguf"))
}

fn imported_case(name: &str) -> Result<(Value, ImportReport)> {
    let (dir, file) = case(name);
    let out = dir.path().join("out");
    let report = import_gguf(&file, &out, &ImportOptions::default(), &mut |_, _| {})?;
    Ok((json(&out.join("config.json")), report))
}

#[test]
fn a_factor_without_a_type_is_linear_as_in_llama_cpp() {
    let (config, report) = imported_case("gguf-factor-no-type").expect("imports");
    let expected = serde_json::json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(config["rope_scaling"], expected);
    assert!(
        report
            .notes
            .iter()
            .any(|note| note.contains("read as linear")),
        "{:?}",
        report.notes
    );
    let (config, report) = imported_case("gguf-ok").expect("imports");
    assert_eq!(config["rope_scaling"], Value::Null);
    assert!(!report.tie_word_embeddings);
}

#[test]
fn every_spelling_of_a_linear_factor_is_read() {
    let linear = |factor: f64| serde_json::json!({"rope_type": "linear", "factor": factor});
    let factor = ("rope.scaling.factor", Meta::F32(2.5));
    let kind = |kind: &str| ("rope.scaling.type", Meta::Text(kind.into()));
    let old = ("rope.scale_linear", Meta::F32(8.0));
    for (keys, expected) in [
        (vec![factor.clone(), kind("linear")], linear(2.5)),
        (vec![factor.clone(), kind("none")], Value::Null),
        (vec![kind("linear")], Value::Null),
        (vec![old.clone()], linear(8.0)),
        (vec![factor.clone(), old], linear(2.5)),
        (vec![("rope.scaling.factor", Meta::F32(0.0))], Value::Null),
        (vec![("rope.scaling.factor", Meta::F32(1.0))], Value::Null),
    ] {
        for architecture in ["llama", "qwen2"] {
            let mut file = GgufBuilder::model(architecture);
            for (key, value) in &keys {
                file.set(&format!("{architecture}.{key}"), value.clone());
            }
            let (_dir, out, _) = imported(&file);
            assert_eq!(
                json(&out.join("config.json"))["rope_scaling"],
                expected,
                "{keys:?}"
            );
        }
    }
    let mut file = GgufBuilder::model("llama");
    file.set("llama.rope.scaling.factor", Meta::F32(-2.0));
    assert_eq!(
        refused(&file),
        [("rope_scaling".into(), "llama.rope.scaling.factor".into())]
    );
    let mut both = GgufBuilder::model("llama");
    both.set("llama.rope.scaling.factor", Meta::F32(2.0));
    both.set("llama.rope.freq_base", Meta::F32(1e8));
    both.tensor("rope_freqs.weight", &[2], vec![1.0, 8.0]);
    assert_eq!(
        refused(&both),
        [("rope_scaling".into(), "rope_freqs.weight".into())]
    );
}

#[test]
fn every_key_of_the_architecture_is_known_neutral_or_refused() {
    let own = |key: &str, value: Meta| {
        let mut file = GgufBuilder::model("llama");
        file.set(&format!("llama.{key}"), value);
        file
    };
    for (key, value) in [
        ("attn_logit_softcapping", Meta::F32(50.0)),
        ("final_logit_softcapping", Meta::F32(30.0)),
        ("attention.clamp_kqv", Meta::F32(8.0)),
        ("attention.causal", Meta::Bool(false)),
        ("attention.scale", Meta::F32(0.25)),
        ("use_parallel_residual", Meta::Bool(true)),
        ("logit_scale", Meta::F32(0.5)),
        ("rope.scaling.attn_factor", Meta::F32(1.2)),
        ("rope.scaling.yarn_ext_factor", Meta::F32(1.0)),
        ("rope.dimension_sections", Meta::Integers(vec![1, 1])),
        ("leading_dense_block_count", Meta::U32(1)),
        ("pooling_type", Meta::U32(3)),
        ("tensor_data_layout", Meta::Text("reversed".into())),
        ("a_key_of_2027", Meta::F32(0.5)),
    ] {
        assert_eq!(
            refused(&own(key, value)),
            [("unsupported".to_owned(), format!("llama.{key}"))]
        );
    }
    for (key, value) in [
        ("attn_logit_softcapping", Meta::F32(0.0)),
        ("attention.causal", Meta::Bool(true)),
        ("attention.scale", Meta::F32(0.5)),
        ("logit_scale", Meta::F32(1.0)),
        ("use_parallel_residual", Meta::Bool(false)),
        ("rope.dimension_sections", Meta::Integers(vec![0, 0])),
        ("rope.scaling.original_context_length", Meta::U32(32)),
        ("rope.scaling.finetuned", Meta::Bool(true)),
        (
            "tensor_data_layout",
            Meta::Text("Meta AI original pth".into()),
        ),
        ("vocab_size", Meta::U32(260)),
    ] {
        imported(&own(key, value));
    }
    let (_dir, out, report) = imported(&own("vocab_size", Meta::U32(256)));
    assert_eq!(json(&out.join("config.json"))["vocab_size"], 260);
    let is_said = |note: &String| note.contains("llama.vocab_size is 256");
    assert!(report.notes.iter().any(is_said), "{:?}", report.notes);
}

#[test]
fn keys_about_the_file_are_harmless_and_others_are_named() {
    let mut file = GgufBuilder::model("llama");
    file.set("general.license", Meta::Text("mit".into()));
    file.set("quantize.imatrix.entries_count", Meta::U32(7));
    file.set("split.count", Meta::U32(0));
    let (_dir, _, report) = imported(&file);
    assert!(
        report.notes.iter().all(|note| !note.contains("left out")),
        "{:?}",
        report.notes
    );
    file.set("mradermacher.quantized_by", Meta::Text("x".into()));
    file.set("general.sampling.temp", Meta::F32(0.7));
    let (_dir, _, report) = imported(&file);
    let expected = "keys left out: mradermacher.quantized_by, general.sampling.temp";
    assert!(
        report.notes.iter().any(|note| note == expected),
        "{:?}",
        report.notes
    );
    file.set("clip.has_vision_encoder", Meta::Bool(true));
    assert_eq!(
        refused(&file),
        [("type".into(), "clip.has_vision_encoder".into())]
    );
}

#[test]
fn keys_that_change_tokens_are_read_or_refused() {
    for (key, value) in [
        ("tokenizer.ggml.add_space_prefix", Meta::Bool(true)),
        ("tokenizer.ggml.remove_extra_whitespaces", Meta::Bool(true)),
        ("tokenizer.ggml.add_sep_token", Meta::Bool(true)),
        ("tokenizer.ggml.add_bos_token", Meta::U32(1)),
        ("tokenizer.ggml.normalizer.lowercase", Meta::Bool(true)),
        ("tokenizer.rwkv.world", Meta::Text("x".into())),
    ] {
        let mut file = GgufBuilder::model("llama");
        file.set(key, value);
        assert_eq!(refused(&file), [("tokenizer".to_owned(), key.to_owned())]);
    }
    let mut file = GgufBuilder::model("llama");
    for (key, value) in [
        ("tokenizer.ggml.add_space_prefix", Meta::Bool(false)),
        ("tokenizer.ggml.fim_pre_token_id", Meta::U32(1)),
        ("tokenizer.ggml.token_type_count", Meta::U32(1)),
        ("tokenizer.ggml.add_sep_token", Meta::Bool(false)),
    ] {
        file.set(key, value);
    }
    imported(&file);
}

#[test]
fn named_templates_are_written_where_transformers_looks() {
    let mut file = GgufBuilder::model("llama");
    file.set(
        "tokenizer.chat_templates",
        Meta::Texts(vec!["tool_use".into()]),
    );
    file.set(
        "tokenizer.chat_template.tool_use",
        Meta::Text("{{ tools }}".into()),
    );
    let (_dir, out, report) = imported(&file);
    let path = "additional_chat_templates/tool_use.jinja";
    assert_eq!(
        fs::read_to_string(out.join(path)).expect("written"),
        "{{ tools }}"
    );
    assert!(
        report.files.iter().any(|file| file == path),
        "{:?}",
        report.files
    );
    file.set(
        "tokenizer.chat_template.../x",
        Meta::Text("{{ tools }}".into()),
    );
    assert_eq!(
        refused(&file),
        [("tokenizer".into(), "tokenizer.chat_template.../x".into())]
    );
    let mut other = GgufBuilder::model("llama");
    other.set(
        "tokenizer.chat_template.default",
        Meta::Text("{{ other }}".into()),
    );
    assert_eq!(
        refused(&other),
        [("tokenizer".into(), "tokenizer.chat_template.default".into())]
    );
    other
        .metadata
        .retain(|(key, _)| key != "tokenizer.chat_template");
    let (_dir, out, _) = imported(&other);
    assert_eq!(
        fs::read_to_string(out.join("chat_template.jinja")).expect("written"),
        "{{ other }}"
    );
}

#[test]
fn block_formats_that_are_not_read_are_named_once() {
    for (name, block, more) in [("gguf-iq4nl", "IQ4_NL", 7), ("gguf-nvfp4", "NVFP4", 7)] {
        let error = imported_case(name).expect_err("not read");
        let problems = error.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        let text = problems[0].to_string();
        for part in [
            block,
            &format!("{more} more tensors"),
            "llama-quantize",
            "token_embd.weight",
        ] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        assert!(error.to_string().contains("model.gguf"), "{error}");
    }
}
