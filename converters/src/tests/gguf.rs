//! GGUF both ways on every recorded model: what llama.cpp's converters write of it comes back, and adapters are written as they write them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::adapter::Adapter;
use crate::architecture::{self, ModelShape};
use crate::error::{Error, Result};
use crate::fixtures;
use crate::formats::gguf_lora::GgufLora;
use crate::formats::{Format, lora::LoraOptions};
use crate::gguf_base::{ImportOptions, ImportReport, Tools, import_gguf};
use crate::llama_cpp::{Config, convert, module_name, n_heads, permute, permutes};
use crate::model_files::ModelFiles;
use crate::tensors::gguf::GgufFile;
use crate::tensors::safetensors_file::SafetensorsFile;

/// Directories of recorded models of families that llama.cpp has, with their config.json.
fn models() -> Vec<(PathBuf, Map<String, Value>)> {
    let dirs: BTreeSet<PathBuf> = fixtures::usable()
        .into_iter()
        .map(|case| case.model_dir)
        .collect();
    let models: Vec<_> = dirs
        .into_iter()
        .map(|dir| {
            let config = ModelFiles::read_config(&dir).expect("a model");
            (dir, config)
        })
        .filter(|(_, config)| !config.contains_key("text_config") && llama_cpp_has(config))
        .collect();
    assert!(!models.is_empty());
    models
}

/// The decoder's part of a config.json, which is all that llama.cpp takes.
fn decoder(config: &Map<String, Value>) -> &Map<String, Value> {
    let inside = config.get("text_config").and_then(Value::as_object);
    inside.unwrap_or(config)
}

/// Whether the family has a GGUF architecture; such a family must be in `llama_cpp.rs`, from llama.cpp's own sources.
fn llama_cpp_has(config: &Map<String, Value>) -> bool {
    let family = architecture::family(config).expect("a known family");
    let has = !family.gguf.architecture.is_empty();
    let is_written = Config::new(decoder(config)).is_some();
    assert_eq!(
        has, is_written,
        "{} in tests/llama_cpp.rs",
        family.model_type
    );
    has
}

pub(crate) fn import(file: &Path, out: &Path) -> Result<ImportReport> {
    let tools = Tools {
        check_tokenizer: &|_| Vec::new(),
    };
    import_gguf(file, out, &ImportOptions::default(), &tools, &mut |_, _| {})
}

/// A model as GGUF can hold it: what llama.cpp fixes in code, or its converter does not write, is as llama.cpp has it. The error is why
/// it can hold nothing of the kind.
fn as_gguf_holds_it(
    config: &Map<String, Value>,
) -> std::result::Result<Map<String, Value>, String> {
    let mut held = config.clone();
    let known = Config::new(config).expect("filtered");
    let n_layers = known.needed("num_hidden_layers") as usize;
    let kinds = |full: &dyn Fn(usize) -> bool| -> Value {
        let kinds = (0..n_layers).map(|layer| match full(layer) {
            true => "full_attention",
            false => "sliding_attention",
        });
        kinds.collect()
    };
    let mut set = |key: &str, value: Value| held.insert(key.to_owned(), value);
    match known.model_type {
        "gemma2" => {
            // Every other layer has a window; scores are scaled by the size of heads in models of other than 46 layers.
            set("layer_types", kinds(&|layer| layer % 2 == 1));
            set("query_pre_attn_scalar", known.needed("head_dim").into());
            set(
                "rope_parameters",
                json!({"rope_theta": 10000.0, "rope_type": "default"}),
            );
        }
        "gemma3_text" => {
            // As Gemma 2, but five of six layers.
            set("layer_types", kinds(&|layer| layer % 6 == 5));
            set("query_pre_attn_scalar", known.needed("head_dim").into());
        }
        "smollm3" => {
            let marks = (0..n_layers).map(|layer| u8::from(layer % 4 != 3));
            set("no_rope_layers", marks.collect());
        }
        "qwen3_moe" => {
            let step = config.get("decoder_sparse_step").and_then(Value::as_u64);
            let dense = config.get("mlp_only_layers").and_then(Value::as_array);
            if step.is_some_and(|step| step != 1) || dense.is_some_and(|dense| !dense.is_empty()) {
                return Err("llama.cpp has experts in every layer".to_owned());
            }
            set("norm_topk_prob", true.into());
        }
        _ => {}
    }
    // No other class writes its window.
    if !["gemma2", "gemma3_text", "olmo3", "phi3"].contains(&known.model_type) {
        set("sliding_window", Value::Null);
        set("use_sliding_window", false.into());
        held.shift_remove("layer_types");
    }
    let parameters = held
        .get_mut("rope_parameters")
        .and_then(Value::as_object_mut);
    if let Some(parameters) = parameters {
        match parameters.get_mut("full_attention") {
            Some(full) => hold_rope(full.as_object_mut().expect("an object"), known.model_type),
            None => hold_rope(parameters, known.model_type),
        }
    }
    Ok(held)
}

/// YaRN has whole bounds and at most one of two scales, and a base that grows is not written.
fn hold_rope(fields: &mut Map<String, Value>, model_type: &str) {
    fields.shift_remove("truncate");
    if fields.contains_key("mscale_all_dim") && model_type == "ministral3" {
        fields.insert("mscale".to_owned(), 1.0.into());
    } else {
        fields.shift_remove("mscale");
        fields.shift_remove("mscale_all_dim");
    }
    if fields
        .get("rope_type")
        .is_some_and(|kind| kind == "dynamic")
    {
        fields.shift_remove("factor");
        fields.insert("rope_type".to_owned(), "default".into());
    }
}

/// Asserts that both compute the same from the same tensors; numbers that GGUF holds as float32 are compared as such.
fn assert_same_computation(ours: &ModelShape, theirs: &ModelShape, name: &str) {
    let sizes = |shape: &ModelShape| {
        (
            [
                shape.vocab_size,
                shape.hidden_size,
                shape.intermediate_size,
                shape.num_hidden_layers,
                shape.num_attention_heads,
                shape.num_key_value_heads,
                shape.head_dim,
                shape.max_position_embeddings,
            ],
            shape.tie_word_embeddings,
            shape.activation,
            shape.experts,
            shape.tensors(),
        )
    };
    assert_eq!(sizes(ours), sizes(theirs), "{name}");
    let numbers = |shape: &ModelShape| {
        let factors = shape.multipliers;
        let scale = (shape.head_dim as f64).powf(-0.5);
        [
            Some(shape.rms_norm_eps),
            shape.score_cap,
            shape.logit_cap,
            Some(factors.embedding),
            Some(factors.attention.unwrap_or(scale)),
            Some(factors.residual),
            Some(factors.logits_divisor),
        ]
        .map(|number| number.map(|number| number as f32))
    };
    assert_eq!(numbers(ours), numbers(theirs), "{name}");
    assert_eq!(ours.family.rotary.pairs, theirs.family.rotary.pairs);
    assert_eq!(
        ours.family.gguf.architecture,
        theirs.family.gguf.architecture
    );
    for (layer, (one, other)) in ours.layers.iter().zip(&theirs.layers).enumerate() {
        let place = format!("{name} layer {layer}");
        assert_eq!(one.window, other.window, "{place}");
        assert_eq!(one.has_experts, other.has_experts, "{place}");
        let [one, other] = [(ours, one), (theirs, other)].map(|(shape, layer)| {
            layer.rope.map(|rope| {
                let rope = &shape.ropes[rope];
                let beta = rope
                    .query_scaling
                    .map(|growth| (growth.beta as f32, growth.original_max_position_embeddings));
                let longer = rope.threshold().map_or(1, |threshold| threshold + 1);
                (
                    (rope.dim, rope.threshold(), beta),
                    rope.attention_factor(),
                    rope.inverse_frequencies.clone(),
                    rope.frequencies(longer).into_owned(),
                )
            })
        });
        let (Some(one), Some(other)) = (&one, &other) else {
            assert_eq!(one, other, "{place}");
            continue;
        };
        assert_eq!(one.0, other.0, "{place}");
        assert!((one.1 - other.1).abs() <= 1e-6 * other.1, "{place}");
        for (one, other) in [(&one.2, &other.2), (&one.3, &other.3)] {
            assert_eq!(one.len(), other.len(), "{place}");
            let mut both = one.iter().zip(other);
            let is_near = |(x, y): (&f32, &f32)| (x - y).abs() <= 1e-6 * y;
            assert!(both.all(is_near), "{place}: {one:?}, {other:?}");
        }
    }
}

#[test]
fn what_llama_cpp_writes_of_a_model_comes_back() {
    for (dir, config) in models() {
        let name = dir.display().to_string();
        let known = Config::new(&config).expect("filtered");
        let checkpoint = SafetensorsFile::open(dir.join("model.safetensors")).expect("weights");
        let temporary = tempfile::tempdir().expect("temporary directory");
        let (file, out) = (
            temporary.path().join("x.gguf"),
            temporary.path().join("out"),
        );
        convert(&known, &checkpoint).write(&file);
        let held = match as_gguf_holds_it(&config) {
            Ok(held) => held,
            Err(reason) => {
                let error = import(&file, &out).expect_err(&reason);
                assert!(matches!(error, Error::Problems(_)), "{name}: {error}");
                continue;
            }
        };
        let report = import(&file, &out).unwrap_or_else(|error| panic!("{name}: {error}"));
        let theirs = ModelShape::from_config(&held).expect("a good model");
        let ours = ModelShape::read(&out).expect("our own output");
        assert_same_computation(&ours, &theirs, &format!("{name}: {:?}", report.notes));

        let found = SafetensorsFile::open(out.join("model.safetensors")).expect("written");
        let names =
            |file: &SafetensorsFile| file.names().map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(names(&found), names(&checkpoint), "{name}");
        for tensor in names(&checkpoint) {
            let [found, wanted] =
                [&found, &checkpoint].map(|file| file.get(&tensor).expect("listed"));
            assert_eq!(found.shape(), wanted.shape(), "{name} {tensor}");
            let is_shifted = ours.family.norm_offset != 0.0 && tensor.ends_with("norm.weight");
            let [found, wanted] = [found, wanted].map(|tensor| tensor.to_f32().expect("float"));
            for (found, wanted) in found.iter().zip(&wanted) {
                // One rounding of the sum.
                let bound = f32::EPSILON / 2.0 * (1.0 + wanted).abs().max(1.0);
                let is_kept = match is_shifted {
                    true => (found - wanted).abs() <= bound,
                    false => found.to_bits() == wanted.to_bits(),
                };
                assert!(is_kept, "{name} {tensor}: {found}, {wanted}");
            }
        }
    }
}

#[test]
fn adapters_are_written_as_llama_cpp_stores_them() {
    for case in &fixtures::low_rank() {
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        if !llama_cpp_has(base.config()) {
            continue;
        }
        let config = Config::new(decoder(base.config())).expect("written");
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        let plain = adapter.to_lora(None).expect("a mean").0;
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.gguf");
        GgufLora
            .write(
                &adapter,
                &path,
                &LoraOptions::default(),
                Some(base.config()),
            )
            .expect("written");
        let file = GgufFile::open(&path).expect("written");
        assert_eq!(
            file.text("general.architecture"),
            crate::llama_cpp::architecture(config.model_type)
        );
        assert_eq!(file.names().count(), 2 * plain.sites.len());
        for site in &plain.sites {
            let module = site.name.replace(".language_model.", ".");
            let (name, _) = module_name(config.model_type, &module);
            let stored = |part: &str, values: &[f32]| {
                let name = format!("{name}.weight.{part}");
                let tensor = file.tensor(&name).unwrap_or_else(|| panic!("no {name}"));
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                assert!(tensor.bytes == bytes, "{} {name}", case.name);
            };
            let [a, b] = [&site.lora_a, &site.lora_b].map(|tensor| tensor.to_f32().expect("float"));
            stored("lora_a", &a);
            let n_heads = || n_heads(&config, &module);
            let heads = permutes(config.model_type).then(n_heads).flatten();
            match heads {
                Some(n_heads) => stored("lora_b", &permute(&b, site.lora_b.shape()[0], n_heads)),
                None => stored("lora_b", &b),
            }
        }
    }
}
