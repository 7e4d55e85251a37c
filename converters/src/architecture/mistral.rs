//! Mistral: a head size independent of the width, and one window for all layers.

use super::family::{Defaults, Family, Gguf, Windows};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    class_name: "MistralForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        ..Family::PLAIN.defaults
    },
    windows: Windows::All,
    gguf: Gguf {
        architecture: "llama",
        interleaved: true,
        also: &["mistral3"],
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["head_dim", "sliding_window"]),
    ..Family::PLAIN
};
