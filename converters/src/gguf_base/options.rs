//! What a family has of its own, from the file's keys or, where a file says nothing, as llama.cpp has it: windows, factors, bounds,
//! experts, layers without rotation.

use serde_json::{Map, Value, json};

use super::keys::{Keys, all_but};
use crate::architecture::{
    Experts, Factor, Family, Multiplier, Normalised, RotaryLayers, SoftcapPlace, Windows,
};

/// The key of the window.
pub(super) const WINDOW: &str = "attention.sliding_window";
/// The key of the layers that have it.
const PATTERN: &str = "attention.sliding_window_pattern";

/// Sizes of the blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    pub(super) n_layers: usize,
    pub(super) hidden_size: usize,
    pub(super) n_heads: usize,
    pub(super) head_dim: usize,
    pub(super) intermediate_size: usize,
    pub(super) context_length: usize,
}

/// The window that the file gives, if it hides anything.
pub(super) fn window(keys: &mut Keys<'_>, blocks: &Blocks) -> Option<usize> {
    keys.dimension_above_0(WINDOW)
        .filter(|window| *window < blocks.context_length)
}

/// The keys of config.json that only some families have.
pub(super) fn read(keys: &mut Keys<'_>, family: &Family, blocks: &Blocks) -> Map<String, Value> {
    let mut fields = Map::new();
    windows(keys, family, blocks, &mut fields);
    if let RotaryLayers::Marked { interval } = family.rotary.layers {
        let marks: Vec<u8> = all_but(interval, blocks.n_layers)
            .into_iter()
            .map(u8::from)
            .collect();
        fields.insert("no_rope_layers".to_owned(), marks.into());
        fields.insert("no_rope_layer_interval".to_owned(), interval.into());
        let message =
            format!("one layer in {interval} does not rotate, as in llama.cpp: no key says it");
        keys.findings.note(message);
    }
    for (multiplier, factor) in family.multipliers {
        multiply(keys, family, blocks, (*multiplier, *factor), &mut fields);
    }
    for cap in family.softcaps {
        let key = match cap.place {
            SoftcapPlace::Scores => "attn_logit_softcapping",
            SoftcapPlace::Logits => "final_logit_softcapping",
        };
        let bound = match (keys.has(key), cap.default) {
            (false, default) => default,
            (true, None) => keys.above_0(key),
            (true, Some(_)) => Some(keys.positive(key, None)),
        };
        fields.insert(cap.key.to_owned(), bound.into());
    }
    if let Some(experts) = family.experts {
        mixture(keys, experts, blocks, &mut fields);
    }
    fields
}

/// Which layers see only a window.
fn windows(keys: &mut Keys<'_>, family: &Family, blocks: &Blocks, fields: &mut Map<String, Value>) {
    let n_layers = blocks.n_layers;
    let mut insert = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    let found = window(keys, blocks);
    // Without a window llama.cpp reads no layers either.
    let pattern = match keys.dimension_above_0(WINDOW).or(family.gguf.window) {
        Some(_) => keys.pattern(PATTERN, n_layers),
        None => None,
    };
    let is_all = pattern
        .as_ref()
        .is_none_or(|slides| slides.iter().all(|slides| *slides));
    match family.windows {
        Windows::No => {}
        Windows::AllBut(every, _) => {
            let given = keys.dimension_above_0(WINDOW);
            let window = given.or(family.gguf.window);
            let slides = match window {
                None => vec![false; n_layers],
                Some(_) => pattern.clone().unwrap_or_else(|| all_but(every, n_layers)),
            };
            let kinds: Vec<&str> = slides.into_iter().map(kind).collect();
            insert("layer_types", kinds.into());
            // transformers wants a number even where no layer has a window.
            let length = window.unwrap_or(blocks.context_length);
            insert("sliding_window", length.into());
            if given.is_none() && window.is_some() {
                let key = keys.full(WINDOW);
                keys.findings.note(format!(
                    "{key} is absent: taken as {length}, as llama.cpp does"
                ));
            }
            if window.is_some() && pattern.is_none() {
                let message = format!(
                    "the file does not say which layers have a window: all but one in {every}, as in llama.cpp"
                );
                keys.findings.note(message);
            }
            return;
        }
        Windows::All | Windows::AllIfUsed => {
            if family.windows == Windows::AllIfUsed {
                insert("use_sliding_window", found.is_some().into());
            }
            insert("sliding_window", found.into());
            if found.is_some() && !is_all {
                let message = "a window in some layers only is not supported";
                keys.refuse("sliding_window", PATTERN, message);
            }
        }
        Windows::From(_) | Windows::Unrotated => {
            insert("use_sliding_window", found.is_some().into());
            insert("sliding_window", found.into());
            let kinds: Option<Vec<&str>> =
                pattern.map(|slides| slides.into_iter().map(kind).collect());
            if matches!(family.windows, Windows::From(_)) {
                let first = kinds.as_ref().filter(|_| found.is_some());
                let first = first.and_then(|kinds| kinds.iter().position(|kind| *kind == SLIDING));
                insert("max_window_layers", first.unwrap_or(n_layers).into());
            }
            match (found, kinds) {
                (Some(_), Some(kinds)) => {
                    insert("layer_types", kinds.into());
                }
                (Some(window), None) => {
                    let message =
                        format!("a window of {window}, but the file does not say in which layers");
                    keys.refuse("sliding_window", WINDOW, message);
                }
                (None, _) => {}
            }
        }
    }
    if let Some(window) = found {
        let key = keys.full(WINDOW);
        keys.findings.note(format!(
            "{key} is {window}: written as sliding_window, which transformers applies; llama.cpp does not in this architecture"
        ));
    }
}

const SLIDING: &str = "sliding_attention";

/// transformers' word for a layer with a window, or without.
fn kind(slides: bool) -> &'static str {
    if slides { SLIDING } else { "full_attention" }
}

/// A factor in the computation.
fn multiply(
    keys: &mut Keys<'_>,
    family: &Family,
    blocks: &Blocks,
    (multiplier, factor): (Multiplier, Factor),
    fields: &mut Map<String, Value>,
) {
    match factor {
        Factor::RootOfWidth => {}
        Factor::InverseRoot(key, _) => {
            let size = match family.gguf.wide_scores == Some(blocks.n_layers) {
                true => blocks.hidden_size / blocks.n_heads,
                false => blocks.head_dim,
            };
            fields.insert(key.to_owned(), size.into());
            let message =
                format!("{key} is {size}, by which llama.cpp scales scores: no key says it");
            keys.findings.note(message);
        }
        Factor::Key(key) => {
            let value = match multiplier {
                Multiplier::Embedding => keys.above_0("embedding_scale").unwrap_or(1.0),
                Multiplier::Residual => keys.above_0("residual_scale").unwrap_or(1.0),
                Multiplier::Attention => keys
                    .above_0("attention.scale")
                    .unwrap_or((blocks.head_dim as f64).powf(-0.5)),
                Multiplier::LogitsDivisor => keys.positive("logit_scale", None),
            };
            fields.insert(key.to_owned(), value.into());
        }
    }
}

/// The mixture of experts, in every layer: llama.cpp keeps no other kind of these families, and always divides the weights of a token's
/// experts by their sum.
fn mixture(
    keys: &mut Keys<'_>,
    experts: &Experts,
    blocks: &Blocks,
    fields: &mut Map<String, Value>,
) {
    let count = keys.dimension("expert_count");
    let used = keys.dimension("expert_used_count");
    let mut insert = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    if let Some(key) = experts.count.0.first() {
        insert(key, count.into());
    }
    insert("num_experts_per_tok", used.into());
    if experts.width.0 != "intermediate_size" {
        let width = keys
            .dimension_above_0("expert_feed_forward_length")
            .unwrap_or(blocks.intermediate_size / used);
        insert(experts.width.0, width.into());
    }
    if let Normalised::Key(key) = experts.normalised {
        insert(key, true.into());
    }
    if experts.has_dense_layers {
        insert("decoder_sparse_step", 1.into());
        insert("mlp_only_layers", json!([]));
    }
    const GATE: &str = "expert_gating_func";
    // 1 is softmax, over all experts.
    if keys.dimension_above_0(GATE).is_some_and(|gate| gate != 1) {
        keys.refuse("experts", GATE, "only 1, softmax, is supported");
    }
    const NORM: &str = "expert_weights_norm";
    if keys.has(NORM) && keys.source.boolean(&keys.full(NORM)) != Some(true) {
        let message = "only true is supported: llama.cpp does nothing else in this architecture";
        keys.refuse("experts", NORM, message);
    }
}
