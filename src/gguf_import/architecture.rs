//! The hyperparameters of a GGUF model, checked against what the written config.json can say.

use super::Findings;
use super::rope::{self, Llama3Scaling};
use super::source::Source;

/// A Hugging Face model class that computes what the GGUF architecture computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    /// Llama with a head size of its own, which the Llama class of mistral.rs 0.8.1 cannot express.
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    pub(super) fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Whether llama.cpp's converter permuted the query and key rows: it does for its `llama` architecture alone.
    pub(super) fn permuted(self) -> bool {
        matches!(self, Self::Llama | Self::Mistral)
    }
}

/// Hyperparameters under their Hugging Face names.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Architecture {
    pub(super) family: Family,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
    pub(super) context_length: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) rope_scaling: Option<Llama3Scaling>,
    pub(super) qkv_bias: bool,
    pub(super) output_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) tied: bool,
}

/// Largest value accepted for a dimension: their products stay far from overflow.
const DIMENSION_MAX: u64 = 1 << 28;

/// Largest number of blocks accepted, several times that of any model.
const LAYERS_MAX: usize = 1024;

/// Metadata that changes the computation and has no counterpart in the written configuration, with its neutral value.
const NEUTRAL: [(&str, f64); 9] = [
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.scale_linear", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.causal", 1.0),
];

/// Reads the hyperparameters; `None` if a problem leaves them incomplete.
pub(super) fn read(source: &Source, findings: &mut Findings) -> Option<Architecture> {
    let n_problems = findings.problems.len();
    check_container(source, findings);
    let name = match source.text("general.architecture") {
        Some(name @ ("llama" | "qwen2" | "qwen3")) => name,
        Some(other) => {
            let message = format!("architecture `{other}` is not supported");
            let fix = "supported: llama (also Mistral and SmolLM), qwen2, qwen3";
            findings.problem("architecture", "general.architecture", message, fix);
            return None;
        }
        None => {
            findings.problem(
                "metadata",
                "general.architecture",
                "missing or not a string",
                "",
            );
            return None;
        }
    };
    let mut keys = Keys {
        source,
        findings,
        prefix: name,
    };
    let hidden_size = keys.dimension("embedding_length");
    let intermediate_size = keys.dimension("feed_forward_length");
    let n_layers = keys.dimension("block_count");
    let n_heads = keys.dimension("attention.head_count");
    let n_kv_heads = keys
        .optional_dimension("attention.head_count_kv")
        .unwrap_or(n_heads);
    let context_length = keys.dimension("context_length");
    let rms_norm_eps = keys.positive("attention.layer_norm_rms_epsilon", None);
    // llama.cpp's default for files that do not say.
    let rope_theta = keys.positive("rope.freq_base", Some(10_000.0));
    keys.neutral();
    if keys.findings.problems.len() > n_problems {
        return None;
    }

    let head_dim = keys
        .optional_dimension("attention.key_length")
        .unwrap_or(hidden_size / n_heads);
    for key in ["attention.value_length", "rope.dimension_count"] {
        let value = keys.optional_dimension(key).unwrap_or(head_dim);
        if value != head_dim {
            let message = format!(
                "is {value}, but the key size is {head_dim}; only equal sizes are supported"
            );
            keys.refuse("head_dim", key, message);
        }
    }
    if !n_heads.is_multiple_of(n_kv_heads) || !head_dim.is_multiple_of(2) {
        let message = format!(
            "{n_heads} heads of size {head_dim} do not go with {n_kv_heads} key-value heads"
        );
        keys.refuse("heads", "attention.head_count", message);
    }
    if n_layers > source.n_tensors().min(LAYERS_MAX) {
        let message = format!(
            "{n_layers} blocks in a file of {} tensors",
            source.n_tensors()
        );
        keys.refuse("layers", "block_count", message);
    }
    if let Some(window) = keys.optional_dimension("attention.sliding_window")
        && window < context_length
    {
        keys.refuse(
            "sliding_window",
            "attention.sliding_window",
            format!("a window of {window} is not supported"),
        );
    }
    let vocab_size = match source
        .tensor("token_embd.weight")
        .map(|tensor| tensor.shape)
    {
        Some(shape) if shape.len() == 2 && shape[0] > 0 && shape[1] == hidden_size => shape[0],
        Some(shape) => {
            let message =
                format!("shape {shape:?} does not go with embedding_length {hidden_size}");
            keys.findings
                .problem("shape", "token_embd.weight", message, "");
            return None;
        }
        None => {
            keys.findings.problem(
                "missing",
                "token_embd.weight",
                "missing",
                "the file holds no whole model",
            );
            return None;
        }
    };

    let rope_scaling = rope::read(source, name, head_dim, rope_theta, findings);
    let own_head_dim = head_dim.checked_mul(n_heads) != Some(hidden_size);
    let family = match name {
        "llama" if own_head_dim => Family::Mistral,
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        _ => Family::Qwen3,
    };
    let has = |kinds: &[&str]| {
        kinds
            .iter()
            .any(|kind| source.tensor(&format!("blk.0.{kind}.bias")).is_some())
    };
    let qkv_bias = has(&["attn_q", "attn_k", "attn_v", "attn_output"]);
    let architecture = Architecture {
        family,
        hidden_size,
        intermediate_size,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab_size,
        context_length,
        rms_norm_eps,
        rope_theta,
        rope_scaling,
        // Qwen2's class has these three biases always and the output's never.
        qkv_bias: qkv_bias || family == Family::Qwen2,
        output_bias: qkv_bias && family != Family::Qwen2,
        mlp_bias: has(&["ffn_gate", "ffn_up", "ffn_down"]),
        tied: source.tensor("output.weight").is_none(),
    };
    check_family(&architecture, findings);
    describe(&architecture, findings);
    (findings.problems.len() == n_problems).then_some(architecture)
}

fn check_container(source: &Source, findings: &mut Findings) {
    match source.text("general.type") {
        None | Some("model") => {}
        Some(other) => {
            let fix = if other == "adapter" {
                "convert it with `monteclora convert`"
            } else {
                ""
            };
            let message = format!("`{other}` is not a model");
            findings.problem("type", "general.type", message, fix);
        }
    }
    if let Some(count) = source.integer("split.count")
        && count > 1
    {
        let message = format!("the model is split into {count} files");
        findings.problem(
            "split",
            "split.count",
            message,
            "join them with `llama-gguf-split --merge`",
        );
    }
}

fn check_family(architecture: &Architecture, findings: &mut Findings) {
    let family = architecture.family;
    let biased = architecture.output_bias || architecture.mlp_bias;
    if family == Family::Mistral && (biased || architecture.rope_scaling.is_some()) {
        let message = "biases or scaled rotary frequencies together with a head size of its own are not supported";
        findings.problem("head_dim", "llama.attention.key_length", message, "");
    }
    if family == Family::Qwen2
        && architecture.head_dim * architecture.n_heads != architecture.hidden_size
    {
        let message = "a head size other than embedding_length / head_count is not supported";
        findings.problem("head_dim", "qwen2.attention.key_length", message, "");
    }
    if matches!(family, Family::Qwen2 | Family::Qwen3) && architecture.mlp_bias {
        let message = format!("{} has no such bias", family.class());
        findings.problem("bias", "blk.0.ffn_gate.bias", message, "");
    }
}

fn describe(architecture: &Architecture, findings: &mut Findings) {
    if architecture.tied {
        findings
            .note("no output.weight: the output layer shares the embedding (tie_word_embeddings)");
    }
    match architecture.family {
        Family::Mistral => findings.note(format!(
            "heads of size {}: written as a Mistral model without sliding window, which computes the same",
            architecture.head_dim
        )),
        Family::Llama if architecture.output_bias || architecture.mlp_bias => findings.note(
            "biases kept (attention_bias, mlp_bias): mistral.rs 0.8.1 cannot serve such a Llama model",
        ),
        _ => {}
    }
}

/// Typed look-up of `<architecture>.<key>`; what is missing or malformed becomes a problem and a harmless value.
struct Keys<'a> {
    source: &'a Source,
    findings: &'a mut Findings,
    prefix: &'a str,
}

impl Keys<'_> {
    fn refuse(&mut self, code: &'static str, key: &str, message: impl Into<String>) {
        self.findings
            .problem(code, format!("{}.{key}", self.prefix), message, "");
    }

    fn dimension(&mut self, key: &str) -> usize {
        if !self.source.has(&format!("{}.{key}", self.prefix)) {
            self.refuse("metadata", key, "missing");
            return 1;
        }
        self.optional_dimension(key).unwrap_or(1)
    }

    fn optional_dimension(&mut self, key: &str) -> Option<usize> {
        let full = format!("{}.{key}", self.prefix);
        if !self.source.has(&full) {
            return None;
        }
        match self.source.integer(&full) {
            Some(value) if (1..=DIMENSION_MAX).contains(&value) => usize::try_from(value).ok(),
            Some(value) => {
                self.refuse(
                    "metadata",
                    key,
                    format!("{value} is not between 1 and {DIMENSION_MAX}"),
                );
                None
            }
            None => {
                self.refuse(
                    "metadata",
                    key,
                    "is not one whole number; a value per layer is not supported",
                );
                None
            }
        }
    }

    fn positive(&mut self, key: &str, default: Option<f64>) -> f64 {
        let full = format!("{}.{key}", self.prefix);
        let value = if self.source.has(&full) {
            self.source.number(&full)
        } else {
            default
        };
        match value {
            Some(value) if value > 0.0 && value.is_finite() => value,
            _ => {
                self.refuse("metadata", key, "missing or not a positive number");
                1.0
            }
        }
    }

    fn neutral(&mut self) {
        for (key, neutral) in NEUTRAL {
            let full = format!("{}.{key}", self.prefix);
            if !self.source.has(&full) {
                continue;
            }
            let value = self.source.number(&full).or_else(|| {
                self.source
                    .boolean(&full)
                    .map(|value| f64::from(u8::from(value)))
            });
            if value != Some(neutral) {
                self.refuse(
                    "unsupported",
                    key,
                    "changes the computation and is not supported",
                );
            }
        }
    }
}
