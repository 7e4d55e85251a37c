//! Qwen3: a norm on each head of queries and keys.

use super::family::{
    Bias, Defaults, Extent, Family, Gguf, Norm, NormPlace, Role, Windows, separate,
};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    class_name: "Qwen3ForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        sliding_window: Some(4096),
        ..Family::PLAIN.defaults
    },
    projections: &separate(
        Bias::Key("attention_bias"),
        Bias::Key("attention_bias"),
        Bias::No,
    ),
    norms: &[
        Norm::BEFORE_ATTENTION,
        Norm::BEFORE_FEED_FORWARD,
        HEAD_NORMS[0],
        HEAD_NORMS[1],
    ],
    windows: Windows::From(28),
    gguf: Gguf {
        architecture: "qwen3",
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["head_dim", "use_sliding_window", "max_window_layers"]),
    ..Family::PLAIN
};

/// A norm on each head of queries and keys.
pub(super) const HEAD_NORMS: [Norm; 2] = [
    Norm {
        name: "self_attn.q_norm",
        gguf_name: "attn_q_norm",
        place: NormPlace::On(Role::Query, Extent::Head),
    },
    Norm {
        name: "self_attn.k_norm",
        gguf_name: "attn_k_norm",
        place: NormPlace::On(Role::Key, Extent::Head),
    },
];
