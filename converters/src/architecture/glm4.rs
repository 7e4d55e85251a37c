//! GLM-4 (of 2025, and its successors by this name): four norms around two sublayers, and a rotation of neighbouring
//! entries in half of each head.

use super::family::{
    Bias, Defaults, Family, Gguf, Norm, NormPlace, Pairs, Projection, Role, Rotary,
};
use super::phi3;

pub(super) const FAMILY: Family = Family {
    model_type: "glm4",
    class_name: "Glm4ForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(2),
        head_dim: Some(128),
        max_position_embeddings: 131_072,
        rms_norm_eps: 1.5625e-7,
        biases: true,
        ..Family::PLAIN.defaults
    },
    projections: &[
        one("self_attn.q_proj", "attn_q", &[Role::Query]),
        one("self_attn.k_proj", "attn_k", &[Role::Key]),
        one("self_attn.v_proj", "attn_v", &[Role::Value]),
        Projection {
            bias: Bias::No,
            ..one("self_attn.o_proj", "attn_output", &[Role::Output])
        },
        phi3::GATE_UP,
        phi3::DOWN,
    ],
    norms: &[
        Norm::BEFORE_ATTENTION,
        Norm {
            name: "post_self_attn_layernorm",
            gguf_name: "post_attention_norm",
            place: NormPlace::AfterAttention,
        },
        Norm::BEFORE_FEED_FORWARD,
        Norm {
            name: "post_mlp_layernorm",
            gguf_name: "post_ffw_norm",
            place: NormPlace::AfterFeedForward,
        },
    ],
    rotary: Rotary {
        pairs: Pairs::Neighbours,
        partial: Some(0.5),
        ..Family::PLAIN.rotary
    },
    gguf: Gguf {
        architecture: "glm4",
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["head_dim", "attention_bias", "partial_rotary_factor"]),
    ..Family::PLAIN
};

const fn one(name: &'static str, gguf_name: &'static str, parts: &'static [Role]) -> Projection {
    Projection {
        name,
        gguf_name,
        parts,
        bias: Bias::Key("attention_bias"),
    }
}
