//! Gemma 2: four norms around two sublayers, bounded scores and logits, and a window in every other layer.

use super::family::{
    Activation, Bias, Defaults, Factor, Family, Gguf, Multiplier, Norm, NormPlace, Softcap,
    SoftcapPlace, Windows, separate,
};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    class_name: "Gemma2ForCausalLM",
    defaults: DEFAULTS,
    projections: &separate(
        Bias::Key("attention_bias"),
        Bias::Key("attention_bias"),
        Bias::No,
    ),
    norms: &SANDWICH,
    norm_offset: 1.0,
    activation_key: "hidden_activation",
    windows: Windows::AllBut(2, &[]),
    multipliers: MULTIPLIERS,
    softcaps: &[
        Softcap {
            place: SoftcapPlace::Scores,
            key: "attn_logit_softcapping",
            default: Some(50.0),
        },
        Softcap {
            place: SoftcapPlace::Logits,
            key: "final_logit_softcapping",
            default: Some(30.0),
        },
    ],
    gguf: Gguf {
        architecture: "gemma2",
        window: Some(4096),
        wide_scores: Some(46),
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&[
        "head_dim",
        "attention_bias",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window",
    ]),
    ..Family::PLAIN
};

/// The values of absent keys in Gemma 2.
pub(super) const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    sliding_window: Some(4096),
    activation: Activation::GeluTanh,
    ..Family::PLAIN.defaults
};

/// Embeddings are scaled by the root of the width, and scores by a key of their own.
pub(super) const MULTIPLIERS: &[(Multiplier, Factor)] = &[
    (Multiplier::Embedding, Factor::RootOfWidth),
    (
        Multiplier::Attention,
        Factor::InverseRoot("query_pre_attn_scalar", 256.0),
    ),
];

/// One norm before and one after each sublayer.
pub(super) const SANDWICH: [Norm; 4] = [
    Norm::BEFORE_ATTENTION,
    Norm {
        name: "post_attention_layernorm",
        gguf_name: "post_attention_norm",
        place: NormPlace::AfterAttention,
    },
    Norm {
        name: "pre_feedforward_layernorm",
        gguf_name: "ffn_norm",
        place: NormPlace::BeforeFeedForward,
    },
    Norm {
        name: "post_feedforward_layernorm",
        gguf_name: "post_ffw_norm",
        place: NormPlace::AfterFeedForward,
    },
];
