//! config.json and generation_config.json, in the keys that mistral.rs 0.8.1 and transformers both read.

use serde_json::{Value, json};

use super::architecture::{Architecture, Family};
use super::output::Directory;
use super::tokenizer::Vocabulary;
use super::{ImportDType, ImportError};

/// Writes both files.
pub(super) fn write(
    directory: &Directory,
    architecture: &Architecture,
    vocabulary: &Vocabulary,
    dtype: ImportDType,
) -> Result<(), ImportError> {
    directory.write_json("config.json", &model(architecture, vocabulary, dtype))?;
    directory.write_json("generation_config.json", &generation(vocabulary))
}

fn model(architecture: &Architecture, vocabulary: &Vocabulary, dtype: ImportDType) -> Value {
    let family = architecture.family;
    // transformers >= 5 converts a top-level rope_theta and rope_scaling; mistral.rs knows nothing else.
    let mut config = json!({
        "architectures": [family.class()],
        "model_type": family.model_type(),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": architecture.n_layers,
        "num_attention_heads": architecture.n_heads,
        "num_key_value_heads": architecture.n_kv_heads,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.context_length,
        "rms_norm_eps": architecture.rms_norm_eps,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": architecture.rope_scaling.map(|scaling| json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        })),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": architecture.tied,
        "torch_dtype": dtype.config_name(),
        "use_cache": true,
        "vocab_size": architecture.vocab_size,
    });
    match family {
        Family::Llama => {
            config["attention_bias"] = architecture.output_bias.into();
            config["mlp_bias"] = architecture.mlp_bias.into();
        }
        Family::Mistral => config["sliding_window"] = Value::Null,
        Family::Qwen2 | Family::Qwen3 => {
            config["use_sliding_window"] = false.into();
            config["sliding_window"] = Value::Null;
            config["max_window_layers"] = architecture.n_layers.into();
        }
    }
    match family {
        // Their head size is hidden_size / num_attention_heads by definition.
        Family::Llama | Family::Qwen2 => {
            if let Some(config) = config.as_object_mut() {
                config.shift_remove("head_dim");
            }
        }
        Family::Qwen3 => config["attention_bias"] = architecture.output_bias.into(),
        Family::Mistral => {}
    }
    config
}

fn generation(vocabulary: &Vocabulary) -> Value {
    let ends = match vocabulary.ends.as_slice() {
        [] => Value::Null,
        [end] => json!(end),
        ends => json!(ends),
    };
    json!({"bos_token_id": vocabulary.bos, "eos_token_id": ends, "pad_token_id": vocabulary.pad})
}
