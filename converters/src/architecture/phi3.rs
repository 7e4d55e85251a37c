//! Phi-3, 3.5 and 4 (the dense models): queries, keys and values in one module, gate and up in another, and rotations
//! that may cover only a part of each head.

use super::family::{Bias, Defaults, Family, Gguf, Projection, Role, Rotary, Windows};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    class_name: "Phi3ForCausalLM",
    defaults: Defaults {
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        original_max_position_embeddings: Some(4096),
        ..Family::PLAIN.defaults
    },
    projections: &[
        Projection {
            name: "self_attn.qkv_proj",
            gguf_name: "attn_qkv",
            parts: &[Role::Query, Role::Key, Role::Value],
            bias: Bias::No,
        },
        Projection {
            name: "self_attn.o_proj",
            gguf_name: "attn_output",
            parts: &[Role::Output],
            bias: Bias::No,
        },
        GATE_UP,
        DOWN,
    ],
    windows: Windows::All,
    rotary: Rotary {
        partial: Some(1.0),
        ..Family::PLAIN.rotary
    },
    gguf: Gguf {
        architecture: "phi3",
        keeps_space_after: Some(&["<unk>", "<s>", "<|endoftext|>"]),
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&[
        "rope_scaling",
        "sliding_window",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ]),
    ..Family::PLAIN
};

/// Gate and up in one module.
pub(super) const GATE_UP: Projection = Projection {
    name: "mlp.gate_up_proj",
    gguf_name: "ffn_up",
    parts: &[Role::Gate, Role::Up],
    bias: Bias::No,
};

/// The feed-forward layer's output.
pub(super) const DOWN: Projection = Projection {
    name: "mlp.down_proj",
    gguf_name: "ffn_down",
    parts: &[Role::Down],
    bias: Bias::No,
};
