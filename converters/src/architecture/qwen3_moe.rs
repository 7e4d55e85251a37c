//! Qwen3 with a mixture of experts in all layers except those that the configuration names.

use super::family::{Bias, Defaults, Experts, Family, Gguf, Normalised, Windows, separate};
use super::qwen3;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    class_name: "Qwen3MoeForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(4),
        head_dim: None,
        ..qwen3::FAMILY.defaults
    },
    projections: &separate(
        Bias::Key("attention_bias"),
        Bias::Key("attention_bias"),
        Bias::No,
    ),
    windows: Windows::AllIfUsed,
    experts: Some(&Experts {
        router: "mlp.gate",
        gguf_router: "ffn_gate_inp",
        path: "mlp.experts",
        projections: [
            ("gate_proj", "ffn_gate_exps"),
            ("up_proj", "ffn_up_exps"),
            ("down_proj", "ffn_down_exps"),
        ],
        count: (&["num_experts", "num_local_experts"], 128),
        per_token: 8,
        width: ("moe_intermediate_size", 768),
        normalised: Normalised::Key("norm_topk_prob"),
        has_dense_layers: true,
    }),
    gguf: Gguf {
        architecture: "qwen3moe",
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&[
        "head_dim",
        "use_sliding_window",
        "max_window_layers",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    ]),
    ..qwen3::FAMILY
};
