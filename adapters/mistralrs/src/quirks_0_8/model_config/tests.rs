//! Properties of the rewriting: both generations of files agree, nothing is lost silently, and every offending key is
//! named.

use monteclora_converters::architecture::{FAMILIES, Family, RotaryLayers, Windows};

use super::*;

fn config(family: &str, changes: Value) -> Map<String, Value> {
    let known = Family::named(family).expect("registered");
    let mut config = json!({
        "model_type": family,
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        known.activation_key: known.defaults.activation.name(),
        "head_dim": 16, "sliding_window": if matches!(known.windows, Windows::AllBut(..)) { json!(100) } else { Value::Null },
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    });
    if matches!(known.rotary.layers, RotaryLayers::ByWindow { .. }) {
        config["rope_parameters"] = json!({"full_attention": {"rope_theta": 50000.0}, "sliding_attention": {"rope_theta": 10000.0}});
    }
    for (key, value) in changes.as_object().expect("an object of changes") {
        config[key] = value.clone();
    }
    match config {
        Value::Object(map) => map,
        _ => unreachable!("built as an object"),
    }
}

fn refused(family: &str, changes: Value, key: &str) {
    let problems = normalise_config(&config(family, changes)).expect_err("must be refused");
    assert!(
        problems
            .iter()
            .any(|problem| problem.at == format!("config.json: {key}")),
        "{key} is not named in {problems:?}"
    );
}

#[test]
fn both_generations_of_rope_keys_give_the_same_config() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let mut five = scaling.clone();
    five["rope_theta"] = json!(50000.0);
    let new = normalise_config(&config("llama", json!({"rope_parameters": five})));
    let old = normalise_config(&config(
        "llama",
        json!({"rope_parameters": null, "rope_theta": 50000.0, "rope_scaling": scaling}),
    ));
    let (new, old) = (new.expect("transformers 5"), old.expect("transformers 4"));
    assert_eq!(new.json, old.json);
    assert_eq!(new.json["rope_theta"], 50000.0);
    assert_eq!(new.json["rope_scaling"], scaling);
}

#[test]
fn normalising_is_idempotent() {
    for family in FAMILIES
        .iter()
        .filter(|family| family.runtime_keys.is_some())
    {
        let once = normalise_config(&config(family.model_type, json!({}))).expect("plain config");
        let map = once.json.as_object().expect("an object");
        let mut again = map.clone();
        // The output omits keys that its own defaults restore, and its own window is the limit.
        let is_needed = matches!(family.windows, Windows::AllBut(..));
        let window = if is_needed { json!(100) } else { Value::Null };
        again.insert("sliding_window".to_owned(), window);
        let twice = normalise_config(&again).expect("own output");
        assert_eq!(once.json, twice.json, "{}", family.model_type);
    }
}

#[test]
fn what_an_architecture_cannot_represent_is_named() {
    refused("llama", json!({"attention_bias": true}), "attention_bias");
    refused("llama", json!({"mlp_bias": true}), "mlp_bias");
    refused("llama", json!({"head_dim": 32}), "head_dim");
    refused("qwen2", json!({"head_dim": 32}), "head_dim");
    refused("qwen3", json!({"attention_bias": true}), "attention_bias");
    for family in ["mistral", "qwen2", "qwen3"] {
        let yarn =
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}});
        refused(family, yarn, "rope_scaling");
    }
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    refused("llama", dynamic, "rope_scaling");
    let untied = json!({"tie_word_embeddings": false});
    refused("gemma2", untied, "tie_word_embeddings");
    refused(
        "gemma2",
        json!({"query_pre_attn_scalar": 20.5}),
        "query_pre_attn_scalar",
    );
    let irregular =
        json!({"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]});
    refused("gemma3_text", irregular, "layer_types");
    refused("smollm3", json!({"attention_bias": true}), "attention_bias");
    for family in ["granite", "olmo2", "olmo3", "ministral3"] {
        let beta = json!({"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}});
        let changes = if family == "ministral3" {
            beta
        } else {
            json!({})
        };
        refused(family, changes, "model_type");
    }
    refused("llama", json!({"hidden_act": "xielu"}), "hidden_act");
    refused(
        "llama",
        json!({"quantization_config": {"quant_method": "gptq"}}),
        "quantization_config",
    );
    refused(
        "llama",
        json!({"num_key_value_heads": 3}),
        "num_key_value_heads",
    );
    refused("llama", json!({"hidden_size": null}), "hidden_size");
    refused("llama", json!({"rms_norm_eps": "small"}), "rms_norm_eps");
    let gemma = json!({"architectures": ["Gemma3ForCausalLM"]});
    refused("llama", gemma, "architectures");
}

#[test]
fn every_offender_is_listed() {
    let changes = json!({"attention_bias": true, "mlp_bias": true, "head_dim": 8});
    let problems =
        normalise_config(&config("llama", changes)).expect_err("three reasons to refuse");
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn absent_keys_get_the_values_transformers_assumes() {
    let mut qwen3 = config("qwen3", json!({}));
    for key in ["head_dim", "rms_norm_eps", "hidden_act", "rope_parameters"] {
        qwen3.remove(key);
    }
    let json = normalise_config(&qwen3).expect("defaults exist").json;
    assert_eq!(json["head_dim"], 128);
    assert_eq!(json["rms_norm_eps"], 1e-6);
    assert_eq!(json["rope_theta"], 10_000.0);
    assert_eq!(json["use_sliding_window"], false);
    assert_eq!(json["max_window_layers"], 3);
}

#[test]
fn an_active_window_limits_the_context_and_an_idle_one_does_not() {
    let length = |family: &str, changes| {
        normalise_config(&config(family, changes))
            .expect("representable")
            .max_sequence_length
    };
    assert_eq!(length("mistral", json!({"sliding_window": 100})), 100);
    assert_eq!(length("mistral", json!({})), 512);
    let idle = json!({"sliding_window": 100, "use_sliding_window": false});
    assert_eq!(length("qwen2", idle), 512);
    let late = json!({"sliding_window": 100, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(length("qwen2", late), 512);
    let active = json!({"sliding_window": 100, "use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(length("qwen3", active), 100);
    let typed = json!({"sliding_window": 100, "layer_types": ["full_attention", "sliding_attention", "full_attention"]});
    assert_eq!(length("qwen2", typed), 100);
}

/// On a CPU, where its caches are restored, mistral.rs gets the window minus 1 and takes prompts longer than the
/// window.
#[test]
fn windows_are_told_less_one_where_caches_are_restored() {
    let windowed = json!({"sliding_window": 100});
    for (family, restored) in [
        ("mistral", true),
        ("gemma2", true),
        ("gemma3_text", true),
        ("qwen3", false),
    ] {
        let mut changes = windowed.clone();
        if family == "qwen3" {
            changes["use_sliding_window"] = true.into();
            changes["max_window_layers"] = 0.into();
        }
        let found = normalise(&config(family, changes), true).expect("representable");
        assert_eq!(found.restores_caches, restored, "{family}");
        assert_eq!(
            found.max_sequence_length,
            if restored { 512 } else { 100 },
            "{family}"
        );
        assert_eq!(
            found.json["sliding_window"] == 99,
            restored,
            "{family}: {}",
            found.json
        );
    }
    let plain = normalise(&config("mistral", json!({})), true).expect("representable");
    assert!(!plain.restores_caches && plain.json.get("sliding_window").is_none());
}
