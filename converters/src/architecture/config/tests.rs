//! Properties of reading: both generations of keys agree, transformers' defaults hold, and every bad key is named.

use serde_json::json;

use super::*;
use crate::architecture::{FAMILIES, RopeKind};

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
            json!({"rope_type": "proportional", "factor": 2.0}),
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
        ("architectures", json!(["FalconForCausalLM"])),
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

/// Consequences of a bad value are not reported.
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

/// transformers 5.17 reads `rope_scaling` in place of `rope_parameters` where it is not empty.
#[test]
fn both_rope_objects_are_read_and_must_agree() {
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let plain = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
    let expected = read("llama", json!({"rope_scaling": linear}));
    for parameters in [
        plain(10_000.0),
        json!({}),
        json!({"rope_type": "linear", "factor": 4}),
    ] {
        let both = json!({"rope_parameters": parameters, "rope_scaling": linear});
        assert_eq!(read("llama", both), expected, "{parameters}");
    }
    let empty = json!({"rope_parameters": plain(500.0), "rope_scaling": {}});
    assert_eq!(read("llama", empty).ropes[0].theta, 500.0);
    let same = json!({"rope_parameters": plain(500.0), "rope_theta": 500});
    assert_eq!(read("llama", same).ropes[0].theta, 500.0);

    let refused = |changes: Value, at: &str, parts: &[&str]| {
        let problems = ModelShape::from_config(&config("llama", changes)).expect_err(at);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].at, format!("config.json: {at}"), "{problems:?}");
        for part in parts {
            assert!(problems[0].message.contains(part), "{problems:?}");
        }
    };
    let lost = json!({"rope_parameters": plain(500_000.0), "rope_scaling": linear});
    refused(
        lost,
        "rope_scaling",
        &["rope_theta 500000.0", "rope_theta 10000"],
    );
    let other =
        json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": linear});
    refused(other, "rope_scaling", &["factor 2.0"]);
    let other = json!({"rope_parameters": plain(10_000.0), "rope_scaling": {"rope_type": "proportional", "factor": 4.0}});
    refused(other, "rope_scaling.rope_type", &["proportional"]);
    let beside = json!({"rope_parameters": plain(500.0), "rope_theta": 10_000.0});
    refused(beside, "rope_theta", &["10000", "500"]);
    let types = json!({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}});
    let problems = ModelShape::from_config(&config("llama", types)).expect_err("two types");
    assert_eq!(problems[0].at, "config.json: rope_scaling.type");
    refused(
        json!({"rope_scaling": {"factor": 2.0}}),
        "rope_scaling.factor",
        &["2.0", "without a rope_type"],
    );
    let layers =
        json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}});
    refused(layers, "rope_parameters.full_attention", &["not read"]);
    let sections = json!({"rope_scaling": {"type": "default", "mrope_section": [1, 1]}});
    refused(sections, "rope_scaling.mrope_section", &["not read"]);
}

#[test]
fn llama3s_first_length_is_where_transformers_looks_for_it() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    let length = |changes: Value| {
        let mut all = changes;
        all["rope_scaling"] = scaling.clone();
        match &read("llama", all).ropes[0].kind {
            RopeKind::Llama3(scaling) => scaling.original_max_position_embeddings,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(length(json!({"max_position_embeddings": 640})), 640);
    assert_eq!(length(json!({"original_max_position_embeddings": 64})), 64);
}

/// The case `training/config-rope-both`.
#[test]
fn a_scaling_added_by_hand_is_not_dropped() {
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(
        || std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/cases"),
        Into::into,
    );
    let shape = ModelShape::read(root.join("training/config-rope-both")).expect("both agree");
    match &shape.ropes[0].kind {
        RopeKind::Yarn(scaling) => assert_eq!(scaling.factor, 4.0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn keys_that_change_numbers_are_refused_and_unknown_ones_named() {
    let says = |changes: Value| ModelShape::from_config(&config("llama", changes));
    for (key, value) in [
        ("logits_scaling", json!(8.0)),
        ("embedding_multiplier", json!(12.0)),
        ("attn_logit_softcapping", json!(50.0)),
        ("no_rope_layers", json!([1, 0])),
        ("num_local_experts", json!(4)),
        ("clip_qkv", json!(6)),
        ("is_causal", json!(false)),
    ] {
        let problems = says(json!({key: value})).expect_err(key);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].at, format!("config.json: {key}"));
    }
    let neutral = json!({"logits_scaling": 1, "attention_multiplier": 0.5, "query_pre_attn_scalar": 4, "clip_qkv": null,
        "num_local_experts": 0, "no_rope_layers": [1, 1], "rope_interleaved": false, "is_causal": true});
    assert_eq!(
        says(neutral).expect("they say nothing"),
        read("llama", json!({}))
    );

    let warnings = |family: &str, changes: Value| unread(&config(family, changes));
    assert_eq!(
        warnings(
            "llama",
            json!({"torch_dtype": "bfloat16", "pretraining_tp": 2, "attention_dropout": 0.0})
        ),
        []
    );
    let found = warnings(
        "llama",
        json!({"frobnicate": 3, "sliding_window": 7, "unset": null}),
    );
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].at, "config.json: frobnicate, sliding_window");
    assert_eq!(warnings("mistral", json!({"sliding_window": 7})), []);
    let found = warnings(
        "llama",
        json!({"attention_dropout": 0.1, "architectures": ["LlamaModel"]}),
    );
    let at: Vec<&str> = found.iter().map(|warning| warning.at.as_str()).collect();
    assert_eq!(
        at,
        [
            "config.json: architectures",
            "config.json: attention_dropout"
        ]
    );
}

/// Published configurations: nothing in them is refused or reported as unread.
#[test]
fn published_configurations_are_read_without_a_word() {
    let smollm = json!({"_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.041, "is_llama_config": true, "mlp_bias": false,
        "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100_000,
        "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": true});
    let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": 21, "sliding_window": 32_768, "tie_word_embeddings": true,
        "use_mrope": false, "use_sliding_window": false, "rope_theta": 1_000_000.0});
    for (family, published) in [("llama", smollm), ("qwen2", qwen)] {
        assert_eq!(unread(&config(family, published.clone())), [], "{family}");
        read(family, published);
    }
    let dirs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/fixtures/models");
    let mut n_models = 0;
    for dir in std::fs::read_dir(dirs).expect("a folder") {
        let files = ModelFiles::open(dir.expect("an entry").path()).expect("opens");
        assert_eq!(files.check().expect("whole"), [], "{:?}", files.dir());
        n_models += 1;
    }
    assert!(n_models > 0);
}

/// transformers does not scale by a `type` if layers have types. It requires YaRN's factor, and infers it if it is
/// null.
#[test]
fn scalings_that_transformers_would_not_apply_are_refused() {
    let refused = |family: &str, changes: Value, at: &str| {
        let problems = ModelShape::from_config(&config(family, changes)).expect_err(at);
        let found = problems
            .iter()
            .any(|problem| problem.at == format!("config.json: {at}"));
        assert!(found, "{problems:?}");
    };
    let old = json!({"rope_scaling": {"type": "linear", "factor": 4.0}, "hidden_act": null, "sliding_window": 8});
    refused("gemma3_text", old, "rope_scaling.type");
    let yarn = |factor: Value| json!({"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64}, "max_position_embeddings": 256});
    let mut absent = yarn(json!(2.0));
    absent["rope_scaling"]
        .as_object_mut()
        .expect("an object")
        .remove("factor");
    refused("llama", absent, "rope_scaling.factor");
    match &read("llama", yarn(Value::Null)).ropes[0].kind {
        RopeKind::Yarn(scaling) => assert_eq!(scaling.factor, 4.0),
        other => panic!("{other:?}"),
    }
}
