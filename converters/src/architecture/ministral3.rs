//! Ministral 3, the language model: a Mistral with YaRN and queries that are scaled with their position.

use super::family::{Defaults, Family, Gguf, Rotary};
use super::mistral;

pub(super) const FAMILY: Family = Family {
    model_type: "ministral3",
    class_name: "Ministral3ForCausalLM",
    defaults: Defaults {
        head_dim: Some(128),
        max_position_embeddings: 262_144,
        rms_norm_eps: 1e-5,
        sliding_window: None,
        ..mistral::FAMILY.defaults
    },
    rotary: Rotary {
        scales_queries: true,
        absent: Some(
            r#"{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}"#,
        ),
        ..Family::PLAIN.rotary
    },
    gguf: Gguf {
        architecture: "mistral3",
        interleaved: true,
        told_by: Some("attention.temperature_scale"),
        ..Family::PLAIN.gguf
    },
    runtime_keys: None,
    ..mistral::FAMILY
};
