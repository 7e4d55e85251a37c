use serde_json::json;

use super::*;
use crate::fixtures;
use crate::model_files::ModelFiles;

fn llama() -> Map<String, Value> {
    let config = json!({"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1});
    config.as_object().expect("an object").clone()
}

#[test]
fn fixtures_keep_their_updates() {
    for case in &fixtures::low_rank() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        let path = dir.path().join("x.gguf");
        GgufLora
            .write(
                &adapter,
                &path,
                &LoraOptions::default(),
                Some(base.config()),
            )
            .expect("written");
        let read = Adapter::read_for(&path, base.config()).expect("our own output");
        fixtures::assert_deltas(case, &read);
        assert_eq!(read.check_against(&base).expect("plain names"), []);
        for site in &read.sites {
            assert_eq!(
                read.config.scaling_for(&site.name).expect("plain names"),
                site.scaling
            );
        }
    }
}

/// The base goes by the keys that gguf-py has for it; a repository by its address, too.
#[test]
fn the_base_is_named() {
    let case = fixtures::low_rank().into_iter().next().expect("a case");
    let base = ModelFiles::open(&case.model_dir).expect("a model");
    let dir = tempfile::tempdir().expect("temporary directory");
    let written = |name: Option<&str>| {
        let mut adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        adapter.config.base_model_name_or_path = name.map(str::to_owned);
        let path = dir.path().join("x.gguf");
        let options = LoraOptions {
            overwrite: true,
            ..LoraOptions::default()
        };
        GgufLora
            .write(&adapter, &path, &options, Some(base.config()))
            .expect("written");
        let read = Adapter::read_for(&path, base.config()).expect("our own output");
        assert_eq!(
            read.config.base_model_name_or_path.as_deref(),
            name.filter(|name| !name.is_empty())
        );
        let file = GgufFile::open(&path).expect("our own output");
        file.text(BASE_URL).map(str::to_owned)
    };
    let url = "https://huggingface.co/org/some-model_1.5";
    assert_eq!(written(Some("org/some-model_1.5")).as_deref(), Some(url));
    assert_eq!(written(Some("/models/some model")), None);
    assert_eq!(written(Some("")), None);
    assert_eq!(written(None), None);
}

#[test]
fn rows_of_q_are_reordered_as_llama_cpp_stores_them() {
    let base = Base::from_config(&llama()).expect("known");
    let rows: Vec<f32> = (0u8..8).map(f32::from).collect();
    let b = Tensor::from_f32(&[8, 1], rows).expect("sized");
    let there = base
        .reorder("model.layers.0.self_attn.q_proj", &b, true)
        .expect("even heads");
    // Two heads of four rows: halves (0, 1 | 2, 3) become pairs (0, 2), (1, 3).
    assert_eq!(
        there.to_f32().expect("float"),
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    );
    assert_eq!(
        base.reorder("model.layers.0.self_attn.q_proj", &there, false)
            .expect("even heads"),
        b
    );
    assert_eq!(
        base.reorder("model.layers.0.self_attn.v_proj", &b, true)
            .expect("untouched"),
        b
    );
    assert!(
        base.reorder(
            "model.layers.0.self_attn.k_proj",
            &Tensor::from_f32(&[3, 1], vec![0.0; 3]).expect("sized"),
            true
        )
        .is_err()
    );
}

#[test]
fn sites_without_a_gguf_name_are_all_reported() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.gguf");
    let mut adapter = fixtures::small_adapter(1, false);
    for site in &mut adapter.sites {
        site.name = site.name.replace("self_attn", "attention");
    }
    let error = GgufLora
        .write(&adapter, &path, &LoraOptions::default(), Some(&llama()))
        .expect_err("unknown names");
    assert_eq!(error.problems().len(), 4);
    assert!(!path.exists());
    assert!(
        GgufLora
            .write(&adapter, &path, &LoraOptions::default(), Some(&Map::new()))
            .is_err()
    );
}

#[test]
fn every_key_is_read_named_or_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.gguf");
    let read = |key: &str, value: Entry| {
        let text = |text: &str| Entry::Text(text.into());
        let metadata = [
            ("general.architecture", text("llama")),
            ("general.type", text("adapter")),
            ("general.name", text("mine")),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Entry::F32(8.0)),
            ("adapter.lora.task_name", text("triage")),
            (key, value),
        ];
        let tensor = |shape: &[usize; 2]| Tensor::from_f32(shape, vec![0.5; 8]).expect("sized");
        let tensors = [
            ("blk.0.attn_v.weight.lora_a".to_owned(), tensor(&[2, 4])),
            ("blk.0.attn_v.weight.lora_b".to_owned(), tensor(&[4, 2])),
        ];
        write_gguf(&path, &metadata, &tensors).expect("written");
        Adapter::read_for(&path, &llama())
    };
    let plain = read("general.license", Entry::Text("mit".into())).expect("harmless");
    assert_eq!(plain.notes, [""; 0]);
    let prefix = Entry::Text("Q: ".into());
    let noted = read("adapter.lora.prompt_prefix", prefix).expect("noted");
    assert!(noted.notes[0].contains("\"Q: \""), "{:?}", noted.notes);
    let template = Entry::Text("{{ x }}".into());
    let noted = read("tokenizer.chat_template", template).expect("noted");
    assert!(noted.notes[0].starts_with("tokenizer.chat_template: "));
    let refused = read("adapter.lora.scale", Entry::F32(2.0)).expect_err("refused");
    assert_eq!(refused.problems()[0].at, "adapter.lora.scale");
}

#[test]
fn files_that_are_no_lora_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.gguf");
    let tensor = Tensor::from_f32(&[2, 2], vec![0.0; 4]).expect("sized");
    write_gguf(
        &path,
        &[("general.type", Entry::Text("model".into()))],
        &[
            ("token_embd.weight".into(), tensor.clone()),
            ("blk.0.attn_v.weight.lora_a".into(), tensor),
        ],
    )
    .expect("written");
    let error = Adapter::read_for(&path, &llama()).expect_err("a model");
    let codes: Vec<&str> = error
        .problems()
        .iter()
        .map(|problem| problem.code)
        .collect();
    assert_eq!(
        codes,
        [
            "gguf-metadata",
            "gguf-metadata",
            "gguf-metadata",
            "gguf-metadata",
            "unknown-tensor",
            "incomplete-site"
        ]
    );
}
