//! Gemma 3, the language model: Gemma 2 with norms on heads instead of bounds on scores, and with a rotation of its own
//! for layers with a sliding window.

use super::family::{
    Defaults, Family, Gguf, Norm, Rotary, RotaryLayers, Sizes, Softcap, SoftcapPlace, Windows,
};
use super::{gemma2, qwen3};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    class_name: "Gemma3ForCausalLM",
    defaults: Defaults {
        max_position_embeddings: 131_072,
        rope_theta: 1_000_000.0,
        sizes: Some(Sizes {
            vocab_size: 262_208,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
        }),
        ..gemma2::DEFAULTS
    },
    norms: &NORMS,
    windows: Windows::AllBut(6, &["sliding_window_pattern"]),
    rotary: Rotary {
        layers: RotaryLayers::ByWindow {
            theta: 10_000.0,
            key: Some("rope_local_base_freq"),
        },
        ..Family::PLAIN.rotary
    },
    // transformers also has a key for a bound on scores, but never applies it.
    softcaps: &[Softcap {
        place: SoftcapPlace::Logits,
        key: "final_logit_softcapping",
        default: None,
    }],
    gguf: Gguf {
        architecture: "gemma3",
        local_theta: Some(10_000.0),
        wide_scores: Some(62),
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&[
        "head_dim",
        "attention_bias",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "sliding_window",
        "sliding_window_pattern",
        "rope_local_base_freq",
        "rope_scaling",
    ]),
    ..gemma2::FAMILY
};

const NORMS: [Norm; 6] = {
    let [before, after, before_feed_forward, after_feed_forward] = gemma2::SANDWICH;
    let [queries, keys] = qwen3::HEAD_NORMS;
    [
        before,
        after,
        before_feed_forward,
        after_feed_forward,
        queries,
        keys,
    ]
};
