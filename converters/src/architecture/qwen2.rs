//! Qwen2 and Qwen2.5: biases on queries, keys and values.

use super::family::{Bias, Defaults, Family, Gguf, Windows, separate};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    class_name: "Qwen2ForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        sliding_window: Some(4096),
        ..Family::PLAIN.defaults
    },
    projections: &separate(Bias::Yes, Bias::No, Bias::No),
    windows: Windows::From(28),
    gguf: Gguf {
        architecture: "qwen2",
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&[]),
    ..Family::PLAIN
};
