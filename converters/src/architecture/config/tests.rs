//! Laws of reading: both generations of keys agree, transformers' defaults hold, every offender is named.

use serde_json::json;

use super::*;
use crate::architecture::FAMILIES;

fn config(model_type: &str, changes: Value) -> Map<String, Value> {
    let mut config = json!({"model_type": model_type, "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5});
    for (key, value) in changes.as_object().expect("an object of changes") {
        config[key] = value.clone();
    }
    config.as_object().expect("an object").clone()
}

fn read(model_type: &str, changes: Value) -> ModelShape {
    ModelShape::from_config(&config(model_type, changes)).expect("readable")
}

fn windows(shape: &ModelShape) -> Vec<Option<usize>> {
    shape.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn both_generations_of_rope_keys_are_read() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(500.0);
    let old = read(
        "llama",
        json!({"rope_theta": 500.0, "rope_scaling": scaling}),
    );
    let new = read("llama", json!({"rope_parameters": parameters}));
    assert_eq!(old, new);
    assert_ne!(old.ropes, read("llama", json!({})).ropes);
    let older = json!({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}});
    let newer = json!({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500}});
    assert_eq!(read("qwen2", older), read("qwen2", newer));
}

#[test]
fn what_is_not_understood_is_refused_by_key_and_all_at_once() {
    let wrong = [
        ("hidden_act", json!("xielu")),
        ("quantization_config", json!({"quant_method": "gptq"})),
        (
            "rope_scaling.rope_type",
            json!({"rope_type": "yarn", "factor": 2.0}),
        ),
        ("rope_scaling.factor", json!({"rope_type": "linear"})),
        ("num_hidden_layers", json!(-3)),
        ("hidden_size", json!(null)),
        ("rms_norm_eps", json!("small")),
        ("head_dim", json!(3)),
        ("partial_rotary_factor", json!(0.5)),
        ("num_key_value_heads", json!(3)),
        ("attention_bias", json!("yes")),
    ];
    let mut all = json!({});
    for (key, value) in wrong {
        let written = key.split('.').next().unwrap_or_default();
        let problems =
            ModelShape::from_config(&config("llama", json!({written: value}))).expect_err(key);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].at, format!("config.json: {key}"));
        if written != "rope_scaling" {
            all[written] = value;
        }
    }
    let n_wrong = all.as_object().map_or(0, Map::len);
    let problems = ModelShape::from_config(&config("llama", all)).expect_err("all wrong");
    assert_eq!(problems.len(), n_wrong, "{problems:?}");
    for (key, name) in [
        ("model_type", json!("gpt2")),
        ("architectures", json!(["Gemma3ForCausalLM"])),
    ] {
        let mut unknown = config("llama", json!({key: name}));
        if key != "model_type" {
            unknown.remove("model_type");
        }
        let problems = ModelShape::from_config(&unknown).expect_err("unknown");
        assert_eq!(problems[0].at, format!("config.json: {key}"));
        assert!(problems[0].fix.contains("ama"), "{problems:?}");
    }
}

/// The values of transformers' configuration classes, version 5.17.
#[test]
fn absent_keys_mean_what_transformers_assumes() {
    let optional = [
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "model_type",
    ];
    for (class, heads, head_dim, positions, window) in [
        ("LlamaForCausalLM", 64, 8, 2048, None),
        ("MistralForCausalLM", 8, 8, 131_072, Some(4096)),
        ("Qwen2ForCausalLM", 32, 8, 32_768, None),
        ("Qwen3ForCausalLM", 32, 128, 32_768, None),
    ] {
        let changes =
            json!({"architectures": [class], "num_attention_heads": 64, "hidden_size": 512});
        let mut silent = config("", changes);
        silent.retain(|key, _| !optional.contains(&key.as_str()));
        let shape = ModelShape::from_config(&silent).expect("defaults exist");
        assert_eq!(shape.family.class_name, class);
        assert_eq!(
            (shape.num_key_value_heads, shape.head_dim),
            (heads, head_dim),
            "{class}"
        );
        assert_eq!(shape.max_position_embeddings, positions, "{class}");
        assert_eq!(windows(&shape), [window, window], "{class}");
        assert_eq!(
            (shape.rms_norm_eps, shape.tie_word_embeddings),
            (1e-6, false)
        );
        assert_eq!(
            (shape.activation, shape.ropes[0].theta),
            (Activation::Silu, 10_000.0)
        );
        for key in ["num_key_value_heads", "head_dim", "sliding_window"] {
            silent.insert(key.to_owned(), Value::Null);
        }
        let shape = ModelShape::from_config(&silent).expect("null is a value");
        assert_eq!(
            (shape.num_key_value_heads, shape.head_dim),
            (64, 8),
            "{class}"
        );
        assert_eq!(windows(&shape), [None, None], "{class}");
    }
}

#[test]
fn windows_follow_the_family() {
    let seen = |family, changes| windows(&read(family, changes));
    assert_eq!(
        seen("mistral", json!({"sliding_window": 7})),
        [Some(7), Some(7)]
    );
    assert_eq!(seen("llama", json!({"sliding_window": 7})), [None, None]);
    assert_eq!(seen("qwen2", json!({"sliding_window": 7})), [None, None]);
    let upper = |first| json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": first});
    assert_eq!(seen("qwen2", upper(1)), [None, Some(7)]);
    assert_eq!(seen("qwen2", upper(0)), [Some(7), Some(7)]);
    assert_eq!(seen("qwen3", upper(2)), [None, None]);
    let silent = json!({"use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(seen("qwen3", silent), [None, Some(4096)]);
    let kinds = json!(["sliding_attention", "full_attention"]);
    assert_eq!(
        seen("qwen3", json!({"sliding_window": 5, "layer_types": kinds})),
        [Some(5), None]
    );
    for wrong in [
        json!({"layer_types": kinds}),
        json!({"layer_types": ["full_attention"]}),
        json!({"layer_types": ["chunked_attention", "full_attention"]}),
    ] {
        let problems = ModelShape::from_config(&config("qwen2", wrong)).expect_err("wrong");
        assert_eq!(problems[0].at, "config.json: layer_types");
    }
}

#[test]
fn modules_and_tensors_follow_from_the_sizes() {
    let shape = read(
        "qwen3",
        json!({"attention_bias": true, "tie_word_embeddings": true}),
    );
    let modules: Vec<_> = shape.modules().collect();
    assert_eq!(modules.len(), 2 * 7 + 1);
    let key = &modules[1];
    assert_eq!(key.name, "model.layers.0.self_attn.k_proj");
    assert_eq!(
        (key.in_features, key.out_features, key.has_bias),
        (8, 4, true)
    );
    assert_eq!(key.gguf_name(), "blk.0.attn_k");
    assert_eq!(modules[14].gguf_name(), "output");
    let tensors = shape.tensors();
    // Embedding and last norm; in each block four norms, seven weights and four biases; the head is the embedding.
    assert_eq!(tensors.len(), 2 + 2 * (4 + 7 + 4));
    let norm = tensors
        .iter()
        .find(|t| t.gguf_name == "blk.1.attn_k_norm.weight");
    let norm = norm.expect("there");
    assert_eq!(norm.name, "model.layers.1.self_attn.k_norm.weight");
    assert_eq!(norm.shape, [4]);
    assert!(tensors.iter().all(|tensor| !tensor.interleaved));
    let llama = read("llama", json!({})).tensors();
    let interleaved: Vec<_> = llama.iter().filter(|t| t.interleaved).collect();
    assert_eq!(interleaved.len(), 4);
    assert!(llama.iter().any(|tensor| tensor.name == "lm_head.weight"));
}

#[test]
fn every_family_is_found_by_its_names() {
    assert!(!FAMILIES.is_empty());
    for family in FAMILIES {
        assert_eq!(Family::named(family.model_type), Some(*family));
        let by_class = json!({"architectures": [family.class_name]});
        let found = super::family(by_class.as_object().expect("an object"));
        assert_eq!(found.expect("its own class"), *family);
        assert!(Family::of_gguf(family.gguf.architecture).any(|found| found == *family));
        for projection in family.projections {
            assert_eq!(family.projection(projection.gguf_name), Some(projection));
        }
    }
}

/// What follows from a bad value is not reported beside it.
#[test]
fn one_report_for_one_cause() {
    for (model_type, changes, at) in [
        ("llama", json!({"head_dim": "x"}), "head_dim"),
        ("llama", json!({"head_dim": 0}), "head_dim"),
        (
            "llama",
            json!({"num_attention_heads": null}),
            "num_attention_heads",
        ),
        (
            "qwen2",
            json!({"hidden_size": null, "head_dim": null}),
            "hidden_size",
        ),
        (
            "qwen3",
            json!({"num_hidden_layers": -1, "layer_types": ["full_attention", "full_attention"]}),
            "num_hidden_layers",
        ),
        (
            "llama",
            json!({"model_type": 0, "architectures": ["LlamaForCausalLM"]}),
            "model_type",
        ),
    ] {
        let problems = ModelShape::from_config(&config(model_type, changes)).expect_err(at);
        let found: Vec<&str> = problems.iter().map(|problem| problem.at.as_str()).collect();
        assert_eq!(found, [format!("config.json: {at}")], "{problems:?}");
    }
}

#[test]
fn a_refusal_shows_the_value_and_what_is_accepted() {
    let changes = json!({"hidden_act": 3, "partial_rotary_factor": 1.5});
    let problems = ModelShape::from_config(&config("llama", changes)).expect_err("both");
    let text: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert!(
        text.iter()
            .any(|t| t.ends_with("activation `3` is not supported; only silu is")),
        "{text:?}"
    );
    assert!(
        text.iter()
            .any(|t| t.ends_with("1.5 is not supported; only 1.0 is")),
        "{text:?}"
    );
}
