//! Converts a Hugging Face `config.json` of transformers 4 or 5 to one that mistral.rs 0.8.1 reads correctly, or
//! reports why it cannot.

use monteclora_converters::Problem;
use monteclora_converters::architecture::{ModelShape, RopeKind};
use serde_json::{Map, Value, json};

const REMEDY: &str =
    "merge the adapter into a full model directory and serve that with a runtime that supports it";

/// A configuration that mistral.rs 0.8.1 represents exactly, and its consequences.
#[derive(Debug, Clone)]
pub struct NormalisedConfig {
    /// The shape of the model.
    pub shape: ModelShape,
    /// The `config.json` for mistral.rs, with only the keys that it reads.
    pub json: Value,
    /// Maximum length of a sequence, in tokens.
    pub max_sequence_length: usize,
    /// Whether mistral.rs gets each window minus 1, so that its caches must be restored.
    pub(crate) restores_caches: bool,
    /// Further peculiarities of the family.
    pub(crate) peculiar: Peculiarities,
}

/// How mistral.rs 0.8.1 treats a family differently from its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Peculiarities {
    /// Types of rotary scaling that it supports for the family.
    scalings: &'static [&'static str],
    /// It loads the family with its loader for vision models.
    pub(crate) is_multimodal: bool,
    /// It reads experts only from transposed tensors, each with all experts of a layer.
    pub(crate) stacks_experts: bool,
    /// It uses the embedding as output head whatever config.json says.
    pub(crate) always_ties: bool,
    /// It masks prompts layer by layer as the model does, except that a window is one key too long; see
    /// [`super::windows`].
    has_windows: bool,
    /// It does not load a configuration without a window.
    needs_window: bool,
}

impl Peculiarities {
    fn of(model_type: &str) -> Self {
        let none = Self::default();
        match model_type {
            "llama" | "smollm3" => Self {
                scalings: &["linear", "llama3"],
                ..none
            },
            "mistral" | "mixtral" => Self {
                has_windows: true,
                ..none
            },
            "phi3" => Self {
                scalings: &["longrope"],
                has_windows: true,
                ..none
            },
            "gemma2" => Self {
                always_ties: true,
                has_windows: true,
                needs_window: true,
                ..none
            },
            "gemma3_text" => Self {
                scalings: &["linear"],
                is_multimodal: true,
                has_windows: true,
                needs_window: true,
                ..none
            },
            "qwen3_moe" => Self {
                stacks_experts: true,
                ..none
            },
            _ => none,
        }
    }
}

/// Rewrites a Hugging Face configuration for mistral.rs 0.8.1.
///
/// `rope_parameters` of transformers 5 becomes top-level `rope_theta` and `rope_scaling`; absent keys get the values
/// that transformers assumes. mistral.rs 0.8.1 lets a query see one key more than a sliding window holds, so a window
/// is replaced by a context limit of the same length. Within that limit full and windowed attention are equal. In
/// mistral.rs the long factors of LongRoPE begin one token early, so the limit is below the length at which they begin.
///
/// # Errors
/// Returns every key that mistral.rs 0.8.1 would ignore although it changes the result, and every key that is missing
/// or malformed.
pub fn normalise_config(config: &Map<String, Value>) -> Result<NormalisedConfig, Vec<Problem>> {
    normalise(config, false)
}

/// As [`normalise_config`]. With `restores_caches`, mistral.rs gets each window minus 1 instead of a limit, if it
/// supports windows for the family.
pub(crate) fn normalise(
    config: &Map<String, Value>,
    restores_caches: bool,
) -> Result<NormalisedConfig, Vec<Problem>> {
    let shape = ModelShape::from_config(config)?;
    let peculiar = Peculiarities::of(shape.family.model_type);
    let mut problems = ignored(&shape, peculiar, config);
    let has_windows = shape.layers.iter().any(|layer| layer.window.is_some());
    let restores_caches = restores_caches && peculiar.has_windows && has_windows;
    let limit = limit(&shape, restores_caches);
    let mut windows = shape.layers.iter().filter_map(|layer| layer.window);
    let window = match restores_caches {
        true => windows.next().map(|window| window - 1),
        // The window has no effect within the limit.
        false => peculiar.needs_window.then_some(limit),
    };
    let mut json = json!({
        "architectures": [shape.family.class_name],
        "model_type": shape.family.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        // mistral.rs computes LongRoPE's factor on cosines and sines from this value.
        "max_position_embeddings": match shape.ropes[0].kind {
            RopeKind::LongRope(_) => shape.max_position_embeddings,
            _ => limit,
        },
        "rms_norm_eps": shape.rms_norm_eps,
        shape.family.activation_key: shape.activation.name(),
        "rope_theta": shape.ropes[0].theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
    });
    for key in shape.family.runtime_keys.unwrap_or_default() {
        match further(&shape, key, window) {
            Ok(Value::Null) => {}
            Ok(value) => json[*key] = value,
            Err((at, message)) => {
                let location = format!("config.json: {at}");
                problems.push(Problem::new("model-config", location, message, REMEDY));
            }
        }
    }
    match problems.is_empty() {
        true => Ok(NormalisedConfig {
            shape,
            json,
            max_sequence_length: limit,
            restores_caches,
            peculiar,
        }),
        false => Err(problems),
    }
}

/// The longest sequence for which mistral.rs 0.8.1 computes the same as transformers, with or without windows.
fn limit(shape: &ModelShape, has_windows: bool) -> usize {
    let windows = shape.layers.iter().filter_map(|layer| layer.window);
    let windows = windows.filter(|_| !has_windows);
    let short = match &shape.ropes[0].kind {
        RopeKind::LongRope(scaling) => Some(scaling.original_max_position_embeddings - 1),
        _ => None,
    };
    let limits = windows.chain(short).chain([shape.max_position_embeddings]);
    limits.min().unwrap_or_default().max(1)
}

/// The value of a key that only some families have; null if the key is not needed. The error is a key of the model's
/// own configuration that mistral.rs cannot represent, and a message.
fn further(
    shape: &ModelShape,
    key: &str,
    window: Option<usize>,
) -> Result<Value, (&'static str, String)> {
    let rope = &shape.ropes[0];
    let layers = &shape.layers;
    Ok(match key {
        "rope_scaling" => scaling(&rope.kind),
        "head_dim" => json!(shape.head_dim),
        "use_sliding_window" => json!(false),
        "max_window_layers" => json!(shape.num_hidden_layers),
        "sliding_window" => json!(window),
        "attention_bias" => json!(shape.bias_keys.contains(&key)),
        "partial_rotary_factor" => json!(rope.dim as f64 / shape.head_dim as f64),
        "original_max_position_embeddings" => match &rope.kind {
            RopeKind::LongRope(scaling) => json!(scaling.original_max_position_embeddings),
            _ => json!(shape.max_position_embeddings),
        },
        "query_pre_attn_scalar" => {
            let multiplier = shape.multipliers.attention.unwrap_or(1.0);
            let scalar = multiplier.powi(-2);
            if (scalar - scalar.round()).abs() > 1e-9 * scalar {
                let message = "mistral.rs 0.8.1 takes whole numbers only".to_owned();
                return Err(("query_pre_attn_scalar", message));
            }
            json!(scalar.round() as u64)
        }
        "attn_logit_softcapping" => json!(shape.score_cap),
        "final_logit_softcapping" => json!(shape.logit_cap),
        "rope_local_base_freq" => json!(shape.ropes.get(1).map(|rope| rope.theta)),
        "sliding_window_pattern" => {
            let is_local = |idx: usize| layers[idx].window.is_some();
            let first = (0..layers.len()).find(|idx| !is_local(*idx));
            let period = first.unwrap_or(layers.len()) + 1;
            let fits = |idx: usize| is_local(idx) != (idx + 1).is_multiple_of(period);
            if !(0..layers.len()).all(fits) {
                let message =
                    "mistral.rs 0.8.1 knows only layers of which every n-th sees everything";
                return Err(("layer_types", message.to_owned()));
            }
            json!(period)
        }
        "no_rope_layers" => {
            let turned = layers.iter().map(|layer| u8::from(layer.rope.is_some()));
            json!(turned.collect::<Vec<_>>())
        }
        // It has no effect beside the list.
        "no_rope_layer_interval" => json!(4),
        "num_experts" | "num_local_experts" => json!(shape.experts.map(|experts| experts.count)),
        "num_experts_per_tok" => json!(shape.experts.map(|experts| experts.per_token)),
        "moe_intermediate_size" => json!(shape.experts.map(|experts| experts.width)),
        "norm_topk_prob" => json!(shape.experts.map(|experts| experts.is_normalised)),
        "decoder_sparse_step" => json!(1),
        "mlp_only_layers" => {
            let dense = (0..layers.len()).filter(|idx| !layers[*idx].has_experts);
            json!(dense.collect::<Vec<_>>())
        }
        _ => Value::Null,
    })
}

/// `rope_scaling` as mistral.rs 0.8.1 reads it. LongRoPE has the key names of older files; the other types are as in
/// transformers.
fn scaling(kind: &RopeKind) -> Value {
    match kind {
        RopeKind::LongRope(scaling) => json!({
            "type": "longrope",
            "short_factor": scaling.short_factor,
            "long_factor": scaling.long_factor,
        }),
        other => other.scaling_json(),
    }
}

/// Settings that change the result and that mistral.rs 0.8.1 cannot represent.
fn ignored(
    shape: &ModelShape,
    peculiar: Peculiarities,
    config: &Map<String, Value>,
) -> Vec<Problem> {
    let family = shape.family;
    let (model_type, class_name) = (family.model_type, family.class_name);
    let mut problems = Vec::new();
    let mut problem = |code, key: &str, message: String| {
        let location = format!("config.json: {key}");
        problems.push(Problem::new(code, location, message, REMEDY));
    };
    if shape.wrapper.is_some() {
        let message = format!(
            "the language model of a {} is not served",
            shape.class_name()
        );
        problem("architecture", "model_type", message);
        return problems;
    }
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
        return problems;
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
    if peculiar.always_ties && !shape.tie_word_embeddings {
        let message = format!(
            "false, but mistral.rs 0.8.1 always takes the embedding as output head for {model_type}"
        );
        problem("tie_word_embeddings", message);
    }
    for (idx, rope) in shape.ropes.iter().enumerate() {
        // Only the rotation of layers with full attention can be scaled.
        let is_known = idx == 0 && peculiar.scalings.contains(&rope.kind.name());
        if rope.kind != RopeKind::Default && !is_known {
            let message = format!(
                "mistral.rs 0.8.1 has no rotary embedding of type `{}` for {model_type}",
                rope.kind.name()
            );
            problem("rope_scaling", message);
        }
    }
    if let RopeKind::LongRope(scaling) = &shape.ropes[0].kind
        && (scaling.factor.is_some() || scaling.attention_factor.is_some())
    {
        let message = "factor or attention_factor is given, which mistral.rs 0.8.1 does not read";
        problem("rope_scaling", message.to_owned());
    }
    problems
}

#[cfg(test)]
mod tests;
