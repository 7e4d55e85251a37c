//! SmolLM3: a Llama in which every fourth layer has no rotation.

use super::family::{Defaults, Family, Gguf, Rotary, RotaryLayers, Windows};
use super::llama;

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    class_name: "SmolLM3ForCausalLM",
    defaults: Defaults {
        num_key_value_heads: Some(4),
        max_position_embeddings: 32_768,
        rope_theta: 2_000_000.0,
        tie_word_embeddings: true,
        ..Family::PLAIN.defaults
    },
    windows: Windows::Unrotated,
    rotary: Rotary {
        layers: RotaryLayers::Marked { interval: 4 },
        ..Family::PLAIN.rotary
    },
    gguf: Gguf {
        architecture: "smollm3",
        interleaved: true,
        ..Family::PLAIN.gguf
    },
    runtime_keys: Some(&["rope_scaling", "no_rope_layers", "no_rope_layer_interval"]),
    ..llama::FAMILY
};
