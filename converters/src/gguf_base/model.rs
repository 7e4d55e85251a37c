//! The hyperparameters of a GGUF model as the config.json of a family that computes the same.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::options::{self, Blocks};
use super::{Findings, metadata, rope};
use crate::architecture::{Bias, FAMILIES, Family, RopeKind, Windows};
use crate::tensors::gguf::GgufFile;

/// Largest number of blocks accepted, several times that of any model.
const LAYERS_MAX: usize = 1024;

/// The config.json, with nulls where the vocabulary and the written type belong; `None` if a problem leaves it incomplete.
pub(super) fn read(source: &GgufFile, findings: &mut Findings) -> Option<Map<String, Value>> {
    let n_problems = findings.problems.len();
    check_container(source, findings);
    let name = architecture(source, findings)?;
    let mut keys = Keys::new(source, name, findings);
    let hidden_size = keys.dimension("embedding_length");
    let intermediate_size = keys.dimension("feed_forward_length");
    let n_layers = keys.dimension("block_count");
    let n_heads = keys.dimension("attention.head_count");
    let n_kv_heads = keys
        .optional_dimension("attention.head_count_kv")
        .unwrap_or(n_heads);
    let context_length = keys.dimension("context_length");
    let rms_norm_eps = keys.positive("attention.layer_norm_rms_epsilon", None);
    if keys.findings.problems.len() > n_problems {
        return None;
    }

    let head_dim = keys
        .optional_dimension("attention.key_length")
        .unwrap_or(hidden_size / n_heads);
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
        return None;
    }
    let blocks = Blocks {
        n_layers,
        hidden_size,
        n_heads,
        head_dim,
        intermediate_size,
        context_length,
    };
    let family = family(&mut keys, &blocks)?;
    let class = family.class_name.trim_end_matches("ForCausalLM");
    let rotated = rotated(&mut keys, family, head_dim);
    let stated_vocab_size = keys.optional_dimension("vocab_size");
    let vocab_size = vocab_size(source, hidden_size, keys.findings)?;
    if let Some(stated) = stated_vocab_size.filter(|stated| *stated != vocab_size) {
        keys.findings.note(format!(
            "{name}.vocab_size is {stated}, but token_embd.weight has {vocab_size} rows: these count, as in llama.cpp"
        ));
    }
    let sizes = rope::Sizes {
        head_dim,
        rotated,
        context_length,
    };
    let rotary = rope::read(&mut keys, family, sizes);
    let own = options::read(&mut keys, family, &blocks);
    let read = keys.into_read();
    metadata::check(source, (name, family), head_dim, &read, findings);
    let is_scaled = rotary.kind != RopeKind::Default;
    let is_tied = source.tensor("output.weight").is_none();

    let config = json!({
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
        (family.activation_key): family.defaults.activation.name(),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": rms_norm_eps,
    });
    let mut config: Map<String, Value> = config.as_object()?.clone();
    config.extend(rotary.fields);
    let rest = json!({
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": is_tied,
        "torch_dtype": null,
        "use_cache": true,
        "vocab_size": vocab_size,
    });
    config.extend(rest.as_object()?.clone());
    config.extend(own);
    if family.defaults.head_dim.is_none()
        && !family.runtime_reads("head_dim")
        && !has_own_head_dim(&blocks)
    {
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
    if name != family.gguf.architecture {
        findings.note(format!(
            "written as a {class} model; a GGUF LoRA made for it says `{}`, and llama.cpp wants `{name}` for this file",
            family.gguf.architecture
        ));
    }
    if family.runtime_keys.is_some() {
        let unread =
            |key: &&str| config.get(*key) == Some(&true.into()) && !family.runtime_reads(key);
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
        let known: BTreeSet<&str> = FAMILIES
            .iter()
            .map(|family| family.gguf.architecture)
            .collect();
        let known: Vec<&str> = known.into_iter().collect();
        let message = format!("architecture `{name}` is not supported");
        let fix = format!("supported: {}", known.join(", "));
        findings.problem("architecture", KEY, message, fix);
        return None;
    }
    Some(name)
}

fn has_own_head_dim(blocks: &Blocks) -> bool {
    blocks.head_dim.checked_mul(blocks.n_heads) != Some(blocks.hidden_size)
}

/// The family that a key tells, or else the first of this architecture that has what the file needs: a Llama with a head size of its
/// own or with a window computes what a Mistral does.
fn family(keys: &mut Keys<'_>, blocks: &Blocks) -> Option<&'static Family> {
    let window = options::window(keys, blocks);
    let has_own_head_dim = has_own_head_dim(blocks);
    let mut told = Family::of_gguf(keys.prefix).filter(|family| {
        family
            .gguf
            .told_by
            .is_some_and(|key| keys.above_0(key).is_some())
    });
    if let Some(family) = told.next() {
        return Some(family);
    }
    let holds_heads = |family: &Family| {
        !has_own_head_dim || family.runtime_keys.is_none() || family.runtime_reads("head_dim")
    };
    let holds_window = |family: &Family| window.is_none() || family.windows != Windows::No;
    let known: Vec<_> = Family::of_gguf(keys.prefix)
        .filter(|family| family.gguf.told_by.is_none())
        .collect();
    let found = known
        .iter()
        .position(|family| holds_heads(family) && holds_window(family));
    let Some(idx) = found else {
        if !known.iter().any(|family| holds_heads(family)) {
            let message = "a head size other than embedding_length / head_count is not supported";
            keys.refuse("head_dim", "attention.key_length", message);
        } else {
            let message = format!("a window of {} is not supported", window.unwrap_or(0));
            keys.refuse("sliding_window", options::WINDOW, message);
        }
        return None;
    };
    let family = known[idx];
    if idx > 0 && has_own_head_dim {
        let class = family.class_name.trim_end_matches("ForCausalLM");
        let without = match window {
            None => " without sliding window",
            Some(_) => "",
        };
        let head_dim = blocks.head_dim;
        keys.findings.note(format!(
            "heads of size {head_dim}: written as a {class} model{without}, which computes the same",
        ));
    }
    Some(family)
}

/// Entries of a head that turn: all, where the family knows nothing else.
fn rotated(keys: &mut Keys<'_>, family: &Family, head_dim: usize) -> usize {
    let mut size = |key: &str| keys.optional_dimension(key).unwrap_or(head_dim);
    let (values, rotated) = (size("attention.value_length"), size("rope.dimension_count"));
    let mut unequal = vec![("attention.value_length", values)];
    if family.rotary.partial.is_none() {
        unequal.push(("rope.dimension_count", rotated));
    } else if rotated > head_dim || !rotated.is_multiple_of(2) {
        let message = format!("{rotated} entries of a head of {head_dim} cannot turn in pairs");
        keys.refuse("head_dim", "rope.dimension_count", message);
        return head_dim;
    }
    unequal.retain(|(_, value)| *value != head_dim);
    for (key, value) in &unequal {
        let message =
            format!("is {value}, but the key size is {head_dim}; only equal sizes are supported");
        keys.refuse("head_dim", key, message);
    }
    if family.rotary.partial.is_none() {
        return head_dim;
    }
    rotated
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
