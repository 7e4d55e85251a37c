//! Turns a Hugging Face `config.json` of either generation into the one mistral.rs 0.8.1 reads correctly, or says why that cannot be done.

use std::collections::BTreeSet;

use monteclora_converters::Problem;
use serde_json::{Map, Value, json};

const REMEDY: &str =
    "merge the adapter into a full model directory and serve that with a runtime that supports it";

/// Decoder families whose mistral.rs 0.8.1 implementation is checked against reference logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The class name of Hugging Face transformers.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn detect(config: &Map<String, Value>) -> Result<Self, Problem> {
        let class = config
            .get("architectures")
            .and_then(|list| list.get(0))
            .and_then(Value::as_str);
        let model_type = config.get("model_type").and_then(Value::as_str);
        let found = match class {
            Some(class) => Self::ALL
                .into_iter()
                .find(|known| known.class_name() == class),
            None => Self::ALL
                .into_iter()
                .find(|known| Some(known.model_type()) == model_type),
        };
        found.ok_or_else(|| {
            Problem::new(
                "architecture",
                "config.json: architectures",
                format!(
                    "`{}` is not one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
                    class.or(model_type).unwrap_or("nothing")
                ),
                REMEDY,
            )
        })
    }

    /// Value that transformers assumes for an absent `num_key_value_heads`.
    fn default_kv_heads(self, n_heads: usize) -> usize {
        match self {
            Self::Llama => n_heads,
            Self::Mistral => 8,
            Self::Qwen2 | Self::Qwen3 => 32,
        }
    }

    /// Value that transformers assumes for an absent `max_position_embeddings`.
    fn default_max_positions(self) -> usize {
        match self {
            Self::Llama => 2048,
            Self::Mistral => 131_072,
            Self::Qwen2 | Self::Qwen3 => 32_768,
        }
    }
}

/// A configuration that mistral.rs 0.8.1 represents exactly, and what follows from it.
#[derive(Debug, Clone)]
pub struct NormalisedConfig {
    /// The decoder family.
    pub architecture: Architecture,
    /// The `config.json` to hand to mistral.rs: only the keys it reads.
    pub json: Value,
    /// Longest sequence served, in tokens.
    pub max_sequence_length: usize,
    n_layers: usize,
    tied: bool,
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
    let architecture = Architecture::detect(config).map_err(|problem| vec![problem])?;
    let mut keys = Keys {
        config,
        problems: Vec::new(),
    };
    keys.refuse_quantised();

    let vocab_size = keys.size("vocab_size", None);
    let hidden_size = keys.size("hidden_size", None);
    let intermediate_size = keys.size("intermediate_size", None);
    let n_layers = keys.size("num_hidden_layers", None);
    let n_heads = keys.size("num_attention_heads", None);
    let n_kv_heads = keys.size(
        "num_key_value_heads",
        Some(architecture.default_kv_heads(n_heads)),
    );
    if !n_heads.is_multiple_of(n_kv_heads) {
        keys.problem(
            "num_key_value_heads",
            format!("{n_heads} attention heads are not a multiple of {n_kv_heads}"),
            "correct config.json",
        );
    }
    let max_positions = keys.size(
        "max_position_embeddings",
        Some(architecture.default_max_positions()),
    );
    let eps = keys.positive("rms_norm_eps", 1e-6);
    let activation = keys.activation();
    let tied = keys.boolean("tie_word_embeddings", false);
    let head_dim = keys.head_dim(architecture, hidden_size, n_heads);
    let (rope_theta, rope_scaling) = keys.rope(architecture);

    let unread_biases: &[&str] = match architecture {
        Architecture::Llama => &["attention_bias", "mlp_bias"],
        Architecture::Qwen3 => &["attention_bias"],
        Architecture::Mistral | Architecture::Qwen2 => &[],
    };
    for key in unread_biases {
        if keys.boolean(key, false) {
            keys.problem(
                key,
                format!(
                    "true, but mistral.rs 0.8.1 has no such biases for {}",
                    architecture.model_type()
                ),
                REMEDY,
            );
        }
    }
    let max_sequence_length = match keys.sliding_window(architecture, n_layers) {
        Some(window) => window.min(max_positions),
        None => max_positions,
    };
    if !keys.problems.is_empty() {
        return Err(keys.problems);
    }

    let mut json = json!({
        "architectures": [architecture.class_name()],
        "model_type": architecture.model_type(),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": max_sequence_length,
        "rms_norm_eps": eps,
        "hidden_act": activation,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
    });
    match architecture {
        Architecture::Llama => {
            if let Some(scaling) = rope_scaling {
                json["rope_scaling"] = scaling;
            }
        }
        Architecture::Mistral => json["head_dim"] = json!(head_dim),
        Architecture::Qwen2 => {}
        Architecture::Qwen3 => {
            json["head_dim"] = json!(head_dim);
            json["use_sliding_window"] = json!(false);
            json["max_window_layers"] = json!(n_layers);
        }
    }
    Ok(NormalisedConfig {
        architecture,
        json,
        max_sequence_length,
        n_layers,
        tied,
    })
}

impl NormalisedConfig {
    /// Compares the checkpoint's tensor names with those the architecture reads.
    ///
    /// A tensor that mistral.rs would not read makes its answers silently wrong, so it is a problem, as is a missing one.
    pub fn check_tensors<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Vec<Problem> {
        let expected = self.expected_tensors();
        let mut missing: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
        let mut problems = Vec::new();
        for name in names {
            if missing.remove(name) || is_inert(name) || (self.tied && name == "lm_head.weight") {
                continue;
            }
            problems.push(Problem::new(
                "unread-tensor",
                name,
                format!(
                    "mistral.rs 0.8.1 does not read this tensor of a {} model",
                    self.architecture.model_type()
                ),
                REMEDY,
            ));
        }
        problems.extend(missing.into_iter().map(|name| {
            Problem::new(
                "missing-tensor",
                name,
                "the checkpoint does not hold this tensor",
                "use a complete Hugging Face model directory",
            )
        }));
        problems
    }

    fn expected_tensors(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::from([
            "model.embed_tokens.weight".to_owned(),
            "model.norm.weight".to_owned(),
        ]);
        if !self.tied {
            names.insert("lm_head.weight".to_owned());
        }
        let extra: &[&str] = match self.architecture {
            Architecture::Llama | Architecture::Mistral => &[],
            Architecture::Qwen2 => &[
                "self_attn.q_proj.bias",
                "self_attn.k_proj.bias",
                "self_attn.v_proj.bias",
            ],
            Architecture::Qwen3 => &["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
        };
        for layer in 0..self.n_layers {
            for suffix in LAYER_TENSORS.iter().chain(extra) {
                names.insert(format!("model.layers.{layer}.{suffix}"));
            }
        }
        names
    }
}

const LAYER_TENSORS: [&str; 9] = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
];

/// Buffers that older transformers wrote and nothing reads: they are recomputed from the configuration.
fn is_inert(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".masked_bias")
}

/// Reads keys of a configuration and gathers what is wrong with them.
struct Keys<'a> {
    config: &'a Map<String, Value>,
    problems: Vec<Problem>,
}

impl Keys<'_> {
    fn problem(&mut self, key: &str, message: impl Into<String>, fix: &str) {
        self.problems.push(Problem::new(
            "model-config",
            format!("config.json: {key}"),
            message,
            fix,
        ));
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    /// A positive integer; 1 stands in for a bad one so that the other keys can still be checked.
    fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        let message = match (self.get(key), default) {
            (Some(value), _) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) if size > 0 => return size,
                _ => format!("expected a positive integer, found {value}"),
            },
            (None, Some(default)) => return default.max(1),
            (None, None) => "missing".to_owned(),
        };
        self.problem(key, message, "correct config.json");
        1
    }

    fn positive(&mut self, key: &str, default: f64) -> f64 {
        match self.get(key).map(|value| (value.clone(), value.as_f64())) {
            None => default,
            Some((_, Some(number))) if number > 0.0 && number.is_finite() => number,
            Some((value, _)) => {
                self.problem(
                    key,
                    format!("expected a positive number, found {value}"),
                    "correct config.json",
                );
                default
            }
        }
    }

    fn boolean(&mut self, key: &str, default: bool) -> bool {
        match self.get(key).cloned() {
            None => default,
            Some(Value::Bool(value)) => value,
            Some(value) => {
                self.problem(
                    key,
                    format!("expected true or false, found {value}"),
                    "correct config.json",
                );
                default
            }
        }
    }

    fn refuse_quantised(&mut self) {
        for key in ["quantization_config", "compression_config"] {
            if let Some(value) = self.get(key) {
                let method = value
                    .get("quant_method")
                    .and_then(Value::as_str)
                    .unwrap_or("unknown method")
                    .to_owned();
                self.problem(
                    key,
                    format!("the base is already quantised ({method}), and an adapter cannot be merged into it"),
                    "use the full-precision model, and in_situ_quant to quantise it while loading",
                );
            }
        }
    }

    fn activation(&mut self) -> String {
        let name = match self.get("hidden_act").cloned() {
            None => return "silu".to_owned(),
            Some(Value::String(name)) => name,
            Some(other) => other.to_string(),
        };
        match name.as_str() {
            "silu" | "swish" => "silu".to_owned(),
            "gelu" | "gelu_new" | "gelu_pytorch_tanh" | "relu" => name,
            _ => {
                self.problem("hidden_act", format!("`{name}` is not supported"), REMEDY);
                name
            }
        }
    }

    fn head_dim(
        &mut self,
        architecture: Architecture,
        hidden_size: usize,
        n_heads: usize,
    ) -> usize {
        let even = hidden_size / n_heads;
        let explicit = self.config.contains_key("head_dim");
        let default = match architecture {
            // Qwen3Config's own default; an explicit null means hidden_size / heads.
            Architecture::Qwen3 if !explicit => 128,
            _ => even,
        };
        let head_dim = self.size("head_dim", Some(default));
        let derived = matches!(architecture, Architecture::Llama | Architecture::Qwen2);
        if derived && (head_dim != even || !hidden_size.is_multiple_of(n_heads)) {
            self.problem(
                "head_dim",
                format!(
                    "{head_dim}, but mistral.rs 0.8.1 always uses hidden_size / num_attention_heads = {hidden_size} / {n_heads} for {}",
                    architecture.model_type()
                ),
                REMEDY,
            );
        }
        head_dim
    }

    /// The rotary base and, for llama, the scaling in the form mistral.rs reads.
    fn rope(&mut self, architecture: Architecture) -> (f64, Option<Value>) {
        let mut merged = Map::new();
        let mut source = "rope_parameters";
        // The older key wins, as in transformers 5, which reads `rope_scaling` into `rope_parameters`.
        for key in ["rope_parameters", "rope_scaling"] {
            match self.get(key).cloned() {
                None => {}
                Some(Value::Object(mut fields)) => {
                    source = key;
                    // `type` is what `rope_type` was called before transformers 4.43.
                    if let Some(kind) = fields.remove("type").filter(|kind| !kind.is_null()) {
                        fields.entry("rope_type").or_insert(kind);
                    }
                    merged.extend(fields.into_iter().filter(|(_, value)| !value.is_null()));
                }
                Some(other) => self.problem(
                    key,
                    format!("expected an object, found {other}"),
                    "correct config.json",
                ),
            }
        }
        let rotary = Map::from_iter(
            self.config
                .get("rope_theta")
                .into_iter()
                .filter(|value| !value.is_null())
                .map(|value| ("rope_theta".to_owned(), value.clone())),
        );
        let theta_value = merged.get("rope_theta").or(rotary.get("rope_theta"));
        let theta = match theta_value.map(|value| (value, value.as_f64())) {
            None => 10_000.0,
            Some((_, Some(theta))) if theta > 0.0 && theta.is_finite() => theta,
            Some((value, _)) => {
                let message = format!("expected a positive number, found {value}");
                self.problem("rope_theta", message, "correct config.json");
                10_000.0
            }
        };
        let partial = merged
            .get("partial_rotary_factor")
            .or(self.get("partial_rotary_factor"))
            .map_or(Some(1.0), Value::as_f64);
        if partial != Some(1.0) {
            self.problem(
                "partial_rotary_factor",
                "mistral.rs 0.8.1 rotates whole heads only",
                REMEDY,
            );
        }
        let kind = merged
            .get("rope_type")
            .map_or("default".to_owned(), |kind| {
                kind.as_str().map_or(kind.to_string(), str::to_owned)
            });
        let needed: &[&str] = match (kind.as_str(), architecture) {
            ("default", _) => return (theta, None),
            ("linear", Architecture::Llama) => &["factor"],
            ("llama3", Architecture::Llama) => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            _ => {
                self.problem(
                    &format!("{source}.rope_type"),
                    format!(
                        "mistral.rs 0.8.1 has no `{kind}` rotary scaling for {}",
                        architecture.model_type()
                    ),
                    REMEDY,
                );
                return (theta, None);
            }
        };
        let mut scaling = Map::from_iter([("rope_type".to_owned(), json!(kind))]);
        for key in needed {
            match merged.get(*key) {
                Some(value) if value.as_f64().is_some_and(|number| number > 0.0) => {
                    scaling.insert((*key).to_owned(), value.clone());
                }
                _ => self.problem(
                    &format!("{source}.{key}"),
                    format!("`{kind}` needs a positive number here"),
                    "correct config.json",
                ),
            }
        }
        (theta, Some(Value::Object(scaling)))
    }

    /// Length of the sliding window if any layer uses one.
    fn sliding_window(&mut self, architecture: Architecture, n_layers: usize) -> Option<usize> {
        let window = match architecture {
            Architecture::Llama => return None,
            // MistralConfig assumes a window where the key is absent; null means none.
            Architecture::Mistral if !self.config.contains_key("sliding_window") => Some(4096),
            _ if self.get("sliding_window").is_none() => return None,
            _ => Some(self.size("sliding_window", None)),
        };
        let slides = |kind: &Value| kind.as_str() == Some("sliding_attention");
        let active = match (
            self.get("layer_types").and_then(Value::as_array),
            architecture,
        ) {
            (Some(kinds), _) => kinds.iter().any(slides),
            (None, Architecture::Qwen2 | Architecture::Qwen3) => {
                self.boolean("use_sliding_window", false)
                    && self
                        .config
                        .get("max_window_layers")
                        .and_then(Value::as_u64)
                        .unwrap_or(28)
                        < n_layers as u64
            }
            (None, _) => true,
        };
        window.filter(|_| active)
    }
}

#[cfg(test)]
mod tests;
