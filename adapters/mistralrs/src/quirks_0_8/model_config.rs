//! Turns a Hugging Face `config.json` of either generation into the one mistral.rs 0.8.1 reads correctly, or says why that cannot be done.

use monteclora_converters::Problem;
use monteclora_converters::architecture::{ModelShape, RopeKind};
use serde_json::{Map, Value, json};

const REMEDY: &str =
    "merge the adapter into a full model directory and serve that with a runtime that supports it";

/// A configuration that mistral.rs 0.8.1 represents exactly, and what follows from it.
#[derive(Debug, Clone)]
pub struct NormalisedConfig {
    /// The model.
    pub shape: ModelShape,
    /// The `config.json` to hand to mistral.rs: only the keys it reads.
    pub json: Value,
    /// Longest sequence served, in tokens.
    pub max_sequence_length: usize,
}

/// Rewrites a Hugging Face configuration for mistral.rs 0.8.1.
///
/// `rope_parameters` of transformers 5 becomes top-level `rope_theta` and `rope_scaling`; absent keys get the values
/// transformers assumes. mistral.rs 0.8.1 lets a query see one key more than a sliding window holds, so a window is
/// replaced by an equally long context limit, within which full and windowed attention are the same.
///
/// # Errors
/// Every key that mistral.rs 0.8.1 would ignore although it changes the result, and every key that is missing or malformed.
pub fn normalise_config(config: &Map<String, Value>) -> Result<NormalisedConfig, Vec<Problem>> {
    let shape = ModelShape::from_config(config)?;
    let problems = ignored(&shape, config);
    if !problems.is_empty() {
        return Err(problems);
    }
    let windows = shape.layers.iter().filter_map(|layer| layer.window);
    let max_sequence_length = windows.chain([shape.max_position_embeddings]).min();
    let max_sequence_length = max_sequence_length.unwrap_or(shape.max_position_embeddings);
    let mut json = json!({
        "architectures": [shape.family.class_name],
        "model_type": shape.family.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": max_sequence_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": shape.activation.name(),
        "rope_theta": shape.ropes[0].theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
    });
    let further = [
        ("rope_scaling", shape.ropes[0].kind.scaling_json()),
        ("head_dim", json!(shape.head_dim)),
        ("use_sliding_window", json!(false)),
        ("max_window_layers", json!(shape.num_hidden_layers)),
    ];
    for (key, value) in further {
        if shape.family.runtime_reads(key) && !value.is_null() {
            json[key] = value;
        }
    }
    Ok(NormalisedConfig {
        shape,
        json,
        max_sequence_length,
    })
}

/// What changes the result and cannot be said to mistral.rs 0.8.1.
fn ignored(shape: &ModelShape, config: &Map<String, Value>) -> Vec<Problem> {
    let family = shape.family;
    let (model_type, class_name) = (family.model_type, family.class_name);
    let mut problems = Vec::new();
    let mut problem = |code, key: &str, message: String| {
        let location = format!("config.json: {key}");
        problems.push(Problem::new(code, location, message, REMEDY));
    };
    let class = config.get("architectures").and_then(|list| list.get(0));
    if let Some(class) = class.and_then(Value::as_str)
        && class != class_name
    {
        let message = format!("`{class}` is not {class_name}");
        problem("architecture", "architectures", message);
    }
    if family.runtime_keys.is_none() {
        let message = format!("mistral.rs 0.8.1 has no {model_type}");
        problem("architecture", "model_type", message);
    }
    let mut problem = |key: &str, message| problem("model-config", key, message);
    for key in shape
        .bias_keys
        .iter()
        .filter(|key| !family.runtime_reads(key))
    {
        let message = format!("true, but mistral.rs 0.8.1 has no such biases for {model_type}");
        problem(key, message);
    }
    if shape.query_width() != shape.hidden_size && !family.runtime_reads("head_dim") {
        problem(
            "head_dim",
            format!(
                "{}, but mistral.rs 0.8.1 always uses hidden_size / num_attention_heads = {} / {} for {model_type}",
                shape.head_dim, shape.hidden_size, shape.num_attention_heads
            ),
        );
    }
    if shape.ropes[0].kind != RopeKind::Default && !family.runtime_reads("rope_scaling") {
        let message = format!("mistral.rs 0.8.1 has no scaled rotary embedding for {model_type}");
        problem("rope_scaling", message);
    }
    problems
}

#[cfg(test)]
mod tests;
