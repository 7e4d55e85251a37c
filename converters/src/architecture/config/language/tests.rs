//! Configurations of multimodal models: which keys count, and where problems with the others are reported.

use serde_json::json;

use super::*;
use crate::architecture::{ModelShape, RopeKind, heads, unread};

fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// As published, with sizes left out.
fn gemma() -> Map<String, Value> {
    object(json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255_999, "eoi_token_index": 256_000,
        "eos_token_id": [1, 106], "image_token_index": 262_144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}
    }))
}

fn ministral() -> Map<String, Value> {
    object(json!({
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": false, "projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1,
        "text_config": {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 9216, "max_position_embeddings": 262_144, "model_type": "ministral3",
            "num_attention_heads": 32, "num_hidden_layers": 26, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16_384, "rope_theta": 1_000_000.0,
                "rope_type": "yarn", "type": "yarn", "max_position_embeddings": 262_144},
            "sliding_window": null, "tie_word_embeddings": true, "use_cache": true, "vocab_size": 131_072},
        "vision_config": {"head_dim": 64, "model_type": "pixtral"}
    }))
}

fn shape(config: &Map<String, Value>) -> ModelShape {
    ModelShape::from_config(config).expect("readable")
}

#[test]
fn the_decoder_is_read_from_text_config() {
    let read = shape(&gemma());
    assert_eq!(read.family.model_type, "gemma3_text");
    assert_eq!(read.class_name(), "Gemma3ForConditionalGeneration");
    let sizes = (read.vocab_size, read.hidden_size, read.head_dim);
    assert_eq!(sizes, (262_208, 2560, 256));
    assert_eq!((read.num_attention_heads, read.num_key_value_heads), (8, 4));
    assert_eq!(heads(&gemma()).expect("both"), (8, 4));
    let windows: Vec<_> = read.layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows.len(), 34);
    assert_eq!((windows[4], windows[5]), (Some(1024), None));
    assert_eq!(read.ropes[0].kind, RopeKind::Linear { factor: 8.0 });
    assert_eq!(read.ropes[1].theta, 10_000.0);
    assert!(read.tie_word_embeddings);

    let read = shape(&ministral());
    assert_eq!(read.family.model_type, "ministral3");
    assert_eq!((read.num_hidden_layers, read.vocab_size), (26, 131_072));
    assert_eq!(read.ropes[0].kind.name(), "yarn");
    for config in [gemma(), ministral()] {
        assert_eq!(unread(&config), []);
    }
}

#[test]
fn names_are_those_in_memory() {
    let read = shape(&ministral());
    let modules = read.linear_modules();
    assert_eq!(
        modules[0].name,
        "model.language_model.layers.0.self_attn.q_proj"
    );
    assert_eq!(modules.last().expect("the head").name, "lm_head");
    let names: Vec<String> = read.tensors().into_iter().map(|t| t.name).collect();
    for name in [
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
    ] {
        assert!(names.iter().any(|found| found == name), "{name}");
    }
    let wrapper = read.wrapper.expect("a wrapper");
    for (stored, name) in [
        (
            "language_model.model.norm.weight",
            "model.language_model.norm.weight",
        ),
        ("language_model.lm_head.weight", "lm_head.weight"),
        (
            "vision_tower.ln_pre.weight",
            "model.vision_tower.ln_pre.weight",
        ),
    ] {
        assert_eq!(wrapper.in_memory(stored), name);
        assert_eq!(wrapper.in_memory(name), name, "both are read");
        assert_eq!(wrapper.on_disk(name), stored);
    }
}

/// Without a `model_type`, the class identifies the model. Without the language model's `model_type`, transformers
/// assumes Mistral.
#[test]
fn the_model_is_known_by_its_class_too() {
    let mut config = ministral();
    config.shift_remove("model_type");
    assert_eq!(shape(&config), shape(&ministral()));
    let mut config = ministral();
    let inside = config["text_config"].as_object_mut().expect("an object");
    inside.shift_remove("model_type");
    inside.shift_remove("rope_parameters");
    assert_eq!(shape(&config).family.model_type, "mistral");
}

#[test]
fn tying_counts_beside_text_config() {
    let tied = |outside: Option<bool>, inside: Option<bool>| {
        let mut config = ministral();
        config.extend(outside.map(|tied| ("tie_word_embeddings".to_owned(), tied.into())));
        match inside {
            Some(tied) => config["text_config"]["tie_word_embeddings"] = tied.into(),
            None => {
                _ = config["text_config"]
                    .as_object_mut()
                    .expect("one")
                    .shift_remove("tie_word_embeddings")
            }
        }
        shape(&config).tie_word_embeddings
    };
    assert!(!tied(Some(false), Some(true)));
    assert!(tied(Some(true), Some(false)));
    assert!(tied(None, None));
    assert!(
        !tied(None, Some(false)),
        "published weights have a head then"
    );
}

#[test]
fn what_is_wrong_is_found_where_it_stands() {
    let refused = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut config = ministral();
        change(&mut config);
        let problems = ModelShape::from_config(&config).expect_err("wrong");
        let shown = problems.iter().map(|problem| format!("{problem}"));
        (problems[0].at.clone(), shown.collect::<String>())
    };
    let inside = |key: &'static str, value: Value| {
        refused(&move |config: &mut Map<String, Value>| config["text_config"][key] = value.clone())
    };
    let (at, _) = inside("hidden_size", json!(-1));
    assert_eq!(at, "config.json: text_config.hidden_size");
    let (at, text) = inside("model_type", json!("qwen3"));
    assert_eq!(at, "config.json: text_config.model_type");
    assert!(
        text.contains("`qwen3`") && text.contains("supported are mistral, ministral3"),
        "{text}"
    );
    let (at, _) = inside("clip_qkv", json!(8.0));
    assert_eq!(at, "config.json: text_config.clip_qkv");
    let (at, text) = refused(&|config| {
        config.insert(
            "quantization_config".to_owned(),
            json!({"quant_method": "fp8"}),
        );
    });
    assert_eq!(at, "config.json: quantization_config", "{text}");
    let (at, _) = refused(&|config| config["text_config"] = json!(3));
    assert_eq!(at, "config.json: text_config");
    let (at, text) = refused(&|config| config["model_type"] = json!("llava"));
    assert_eq!(at, "config.json: model_type");
    assert!(
        text.contains("language model in mistral3, gemma3"),
        "{text}"
    );
}

#[test]
fn what_the_wrapper_does_not_read_is_named() {
    let mut config = gemma();
    config["text_config"]["final_logit_softcapping"] = json!(30.0);
    config["text_config"]["frobnicate"] = json!(1);
    config.insert("hidden_size".to_owned(), json!(7));
    assert_eq!(shape(&config).logit_cap, None);
    let warnings = unread(&config);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(
        warnings[0].at,
        "config.json: text_config.frobnicate, text_config.final_logit_softcapping, hidden_size"
    );
    let alone = object(config["text_config"].clone());
    assert_eq!(
        shape(&alone).logit_cap,
        Some(30.0),
        "its own class reads it"
    );
}
