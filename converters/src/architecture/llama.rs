//! Llama, including SmolLM2.

use super::family::{Bias, Family, Gguf, separate};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    class_name: "LlamaForCausalLM",
    projections: &separate(
        Bias::Key("attention_bias"),
        Bias::Key("attention_bias"),
        Bias::Key("mlp_bias"),
    ),
    gguf: Gguf {
        architecture: "llama",
        interleaved: true,
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["rope_scaling"]),
    ..Family::PLAIN
};
