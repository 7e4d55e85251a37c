//! Mixtral: a Mistral in which each token goes through two of eight feed-forward layers.

use super::family::{Defaults, Experts, Family, Gguf, Normalised};
use super::mistral;

pub(super) const FAMILY: Family = Family {
    model_type: "mixtral",
    class_name: "MixtralForCausalLM",
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        rope_theta: 1_000_000.0,
        sliding_window: None,
        ..mistral::FAMILY.defaults
    },
    projections: mistral::FAMILY.projections.split_at(4).0,
    experts: Some(&Experts {
        router: "block_sparse_moe.gate",
        gguf_router: "ffn_gate_inp",
        path: "block_sparse_moe.experts",
        projections: [
            ("w1", "ffn_gate_exps"),
            ("w3", "ffn_up_exps"),
            ("w2", "ffn_down_exps"),
        ],
        count: (&["num_local_experts", "num_experts"], 8),
        per_token: 2,
        width: ("intermediate_size", 14_336),
        normalised: Normalised::Yes,
        has_dense_layers: false,
    }),
    gguf: Gguf {
        architecture: "llama",
        interleaved: true,
        told_by: Some("expert_count"),
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["sliding_window", "num_local_experts", "num_experts_per_tok"]),
    ..mistral::FAMILY
};
