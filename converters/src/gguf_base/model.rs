//! The hyperparameters of a GGUF model as the config.json of a family that computes the same.

use serde_json::{Map, Value, json};

use super::{Findings, metadata, rope};
use crate::architecture::{Bias, FAMILIES, Family, RopeKind, Windows};
use crate::tensors::gguf::GgufFile;

/// Largest value accepted for a dimension: their products stay far from overflow.
const DIMENSION_MAX: u64 = 1 << 28;

/// Largest number of blocks accepted, several times that of any model.
const LAYERS_MAX: usize = 1024;

/// The config.json, with nulls where the vocabulary and the written type belong; `None` if a problem leaves it incomplete.
pub(super) fn read(source: &GgufFile, findings: &mut Findings) -> Option<Map<String, Value>> {
    let n_problems = findings.problems.len();
    check_container(source, findings);
    let name = architecture(source, findings)?;
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
    if n_layers > source.names().count().min(LAYERS_MAX) {
        let message = format!(
            "{n_layers} blocks in a file of {} tensors",
            source.names().count()
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
    let stated_vocab_size = keys.optional_dimension("vocab_size");
    let vocab_size = vocab_size(source, hidden_size, findings)?;
    if let Some(stated) = stated_vocab_size.filter(|stated| *stated != vocab_size) {
        findings.note(format!(
            "{name}.vocab_size is {stated}, but token_embd.weight has {vocab_size} rows: these count, as in llama.cpp"
        ));
    }
    metadata::check(source, name, head_dim, findings);
    let rope = rope::read(source, name, head_dim, rope_theta, findings);
    let is_scaled = rope != RopeKind::Default;
    let has_own_head_dim = head_dim.checked_mul(n_heads) != Some(hidden_size);
    let (family, is_stand_in) = family(name, has_own_head_dim, findings)?;
    if is_stand_in && is_scaled {
        let message =
            "scaled rotary frequencies together with a head size of its own are not supported";
        findings.problem(
            "head_dim",
            format!("{name}.attention.key_length"),
            message,
            "",
        );
    }
    let is_tied = source.tensor("output.weight").is_none();

    // transformers >= 5 converts a top-level rope_theta and rope_scaling, and older readers know nothing else.
    let mut config = json!({
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": rope.scaling_json(),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": is_tied,
        "torch_dtype": null,
        "use_cache": true,
        "vocab_size": vocab_size,
    });
    match family.windows {
        Windows::No => {}
        Windows::All | Windows::AllBut(..) => config["sliding_window"] = Value::Null,
        Windows::AllIfUsed | Windows::Unrotated => {
            config["use_sliding_window"] = false.into();
            config["sliding_window"] = Value::Null;
        }
        Windows::From(_) => {
            config["use_sliding_window"] = false.into();
            config["sliding_window"] = Value::Null;
            config["max_window_layers"] = n_layers.into();
        }
    }
    let mut config: Map<String, Value> = config.as_object()?.clone();
    if !family.runtime_reads("head_dim") {
        // It is hidden_size / num_attention_heads by definition.
        config.shift_remove("head_dim");
    }
    for key in family.bias_keys() {
        let is_biased = family.projections.iter().any(|projection| {
            projection.bias == Bias::Key(key) && source.has_bias(projection.gguf_name)
        });
        config.insert(key.to_owned(), is_biased.into());
    }
    if is_tied {
        findings
            .note("no output.weight: the output layer shares the embedding (tie_word_embeddings)");
    }
    let class = family.class_name.trim_end_matches("ForCausalLM");
    if is_stand_in {
        findings.note(format!(
            "heads of size {head_dim}: written as a {class} model without sliding window, which computes the same",
        ));
    }
    let unread = |key: &&str| config.get(*key) == Some(&true.into()) && !family.runtime_reads(key);
    let unread: Vec<&str> = family.bias_keys().into_iter().filter(unread).collect();
    if !unread.is_empty() {
        findings.note(format!(
            "biases kept ({}): `serve` cannot serve such a {class} model",
            unread.join(", ")
        ));
    }
    if is_scaled && !family.runtime_reads("rope_scaling") {
        findings.note(format!(
            "scaled rotary frequencies: `serve` cannot serve such a {class} model"
        ));
    }
    (findings.problems.len() == n_problems).then_some(config)
}

fn architecture<'a>(source: &'a GgufFile, findings: &mut Findings) -> Option<&'a str> {
    const KEY: &str = "general.architecture";
    let Some(name) = source.text(KEY) else {
        findings.problem("metadata", KEY, "missing or not a string", "");
        return None;
    };
    if Family::of_gguf(name).next().is_none() {
        let mut known: Vec<&str> = FAMILIES
            .iter()
            .map(|family| family.gguf.architecture)
            .collect();
        known.dedup();
        let message = format!("architecture `{name}` is not supported");
        let fix = format!("supported: {}", known.join(", "));
        findings.problem("architecture", KEY, message, fix);
        return None;
    }
    Some(name)
}

/// The first family of this architecture that the server can also be told, and whether that is not simply the first: a Llama
/// with a head size of its own computes what a Mistral does.
fn family(
    name: &str,
    has_own_head_dim: bool,
    findings: &mut Findings,
) -> Option<(&'static Family, bool)> {
    let mut known = Family::of_gguf(name).enumerate();
    let found = known.find(|(_, family)| !has_own_head_dim || family.runtime_reads("head_dim"));
    if found.is_none() {
        let message = "a head size other than embedding_length / head_count is not supported";
        findings.problem(
            "head_dim",
            format!("{name}.attention.key_length"),
            message,
            "",
        );
    }
    found.map(|(idx, family)| (family, idx > 0))
}

fn vocab_size(source: &GgufFile, hidden_size: usize, findings: &mut Findings) -> Option<usize> {
    const NAME: &str = "token_embd.weight";
    match source.tensor(NAME).map(|tensor| tensor.dims()).as_deref() {
        Some([rows, columns]) if *rows > 0 && *columns == hidden_size => return Some(*rows),
        Some(shape) => {
            let message =
                format!("shape {shape:?} does not go with embedding_length {hidden_size}");
            findings.problem("shape", NAME, message, "");
        }
        None => findings.problem("missing", NAME, "missing", "the file holds no whole model"),
    }
    None
}
fn check_container(source: &GgufFile, findings: &mut Findings) {
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

/// Typed look-up of `<architecture>.<key>`; what is missing or malformed becomes a problem and a harmless value.
struct Keys<'a> {
    source: &'a GgufFile,
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
}
