//! Every key of the file is read, known to change nothing, or refused by name.

use std::collections::BTreeSet;

use super::Findings;
use crate::architecture::Family;
use crate::problem::listed;
use crate::tensors::gguf::{GgufArray, GgufFile, GgufValue};

/// Keys below the architecture that llama.cpp uses for nothing in a model that is imported, where they were not looked up: how long
/// a scaled model was trained and the shape of its scaling, the layers of no window, the other norm's epsilon, how experts are chosen
/// where there are none.
const RECORDS: &str = "rope.scaling.factor rope.scale_linear rope.scaling.original_context_length rope.scaling.finetuned \
rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow attention.sliding_window_pattern attention.layer_norm_epsilon \
expert_gating_func expert_weights_norm";

/// Values with which a key below the architecture changes nothing, where 0 (false, an empty list) is not the only one; `scale` is that
/// of attention, the root of the head's size.
const NEUTRAL: &str = "logit_scale=0,1 embedding_scale=0,1 residual_scale=0,1 expert_weights_scale=0,1 attention.causal=1 \
attention.scale=0,scale attention.output_scale=0,1 rope.scaling.attn_factor=1 rope.scaling.yarn_attn_factor=1 \
rope.scaling.yarn_ext_factor=-1,0";

/// What Meta's own files were called by the first converters; the order of rows is llama.cpp's.
const LAYOUT: (&str, &str) = ("tensor_data_layout", "Meta AI original pth");

/// `tokenizer.` keys that are read, or that change no text's tokens.
const TOKENIZER: &str = "ggml.model ggml.pre ggml.tokens ggml.token_type ggml.token_type_count ggml.scores ggml.merges \
ggml.add_bos_token ggml.add_eos_token ggml.add_space_prefix ggml.remove_extra_whitespaces ggml.precompiled_charsmap chat_template \
chat_templates";

/// Beginnings of keys about the file: its name, license, origin, how it was quantised and split.
const ABOUT: [&str; 4] = ["general.", "quantize.", "split.", "imatrix."];
/// Beginnings of keys of files that are no models by themselves.
const OTHERS: [&str; 3] = ["adapter.", "clip.", "control_vector."];
/// Keys that say how to draw tokens.
const SAMPLING: &str = "general.sampling.";

fn named(words: &str, key: &str) -> bool {
    words.split_whitespace().any(|word| word == key)
}

/// Refuses the keys below the architecture that change the computation of its family and were not read, and notes what is left out.
pub(super) fn check(
    source: &GgufFile,
    (prefix, family): (&str, &Family),
    head_dim: usize,
    read: &BTreeSet<String>,
    findings: &mut Findings,
) {
    let scale = (head_dim as f64).powf(-0.5);
    let mut left_out: Vec<&str> = Vec::new();
    for (key, value) in source.metadata() {
        let own = key
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_prefix('.'));
        let refusal = match (own, key.strip_prefix("tokenizer.")) {
            (Some(own), _) => {
                let switch = family.gguf.switches.iter().find(|(key, _)| *key == own);
                let is_known = match switch {
                    Some((_, understood)) => number(value) == Some(*understood),
                    None => read.contains(own) || changes_nothing(own, value, scale),
                };
                (!is_known).then_some("unsupported")
            }
            (_, Some(key)) => (!keeps_tokens(key, value)).then_some("tokenizer"),
            _ if OTHERS.iter().any(|other| key.starts_with(other)) => Some("type"),
            _ => {
                if key.starts_with(SAMPLING) || !ABOUT.iter().any(|about| key.starts_with(about)) {
                    left_out.push(key);
                }
                None
            }
        };
        if let Some(code) = refusal {
            let what = match code {
                "tokenizer" => "may change how text becomes tokens",
                _ => "may change the computation",
            };
            let message = format!("{} is not read, and {what}", shown(value));
            findings.problem(code, key, message, "use the model's original directory");
        }
    }
    if source.metadata().contains_key("tokenizer.huggingface.json") {
        left_out.push("tokenizer.huggingface.json");
    }
    if !left_out.is_empty() {
        findings.note(format!("keys left out: {}", listed(&left_out)));
    }
}

/// A number, or a flag as one.
fn number(value: &GgufValue) -> Option<f64> {
    let flag = value.as_bool().map(|flag| f64::from(u8::from(flag)));
    flag.or_else(|| value.as_f64())
}

fn changes_nothing(key: &str, value: &GgufValue, scale: f64) -> bool {
    if named(RECORDS, key) || (key, value.as_str()) == (LAYOUT.0, Some(LAYOUT.1)) {
        return true;
    }
    let mut known = NEUTRAL
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    let neutral = known
        .find(|(name, _)| *name == key)
        .map_or("0", |(_, values)| values);
    let is = |number: f64| {
        neutral.split(',').any(|neutral| {
            let neutral = neutral.parse().unwrap_or(scale);
            (number - neutral).abs() <= 1e-6 * neutral.abs()
        })
    };
    match value {
        GgufValue::Array(values) => is_zero(values),
        GgufValue::String(text) => text.is_empty(),
        value => number(value).is_some_and(is),
    }
}

fn keeps_tokens(key: &str, value: &GgufValue) -> bool {
    let is_empty = match value {
        GgufValue::Bool(flag) => !flag,
        GgufValue::Array(values) => is_zero(values),
        GgufValue::String(text) => text.is_empty(),
        number => number.as_f64() == Some(0.0),
    };
    named(TOKENIZER, key)
        || key.starts_with("chat_template.")
        || key.starts_with("ggml.") && key.ends_with("_token_id")
        || key == "huggingface.json"
        || is_empty
}

fn is_zero(values: &GgufArray) -> bool {
    match values {
        GgufArray::Unsigned(values) => values.iter().all(|value| *value == 0),
        GgufArray::Signed(values) => values.iter().all(|value| *value == 0),
        GgufArray::Float(values) => values.iter().all(|value| *value == 0.0),
        GgufArray::Bool(values) => values.iter().all(|value| !value),
        GgufArray::String(values) => values.is_empty(),
    }
}

/// A value for a message.
fn shown(value: &GgufValue) -> String {
    match value {
        GgufValue::Bool(value) => value.to_string(),
        GgufValue::String(text) => format!("`{}`", text.chars().take(40).collect::<String>()),
        GgufValue::Array(_) => "a list".to_owned(),
        // What was stored as a float32 is shown as one.
        GgufValue::Float(value) => (*value as f32).to_string(),
        GgufValue::Unsigned(value) => value.to_string(),
        GgufValue::Signed(value) => value.to_string(),
    }
}
