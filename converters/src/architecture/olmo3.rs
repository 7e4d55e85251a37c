//! OLMo 3: OLMo 2 with a window in three of four layers, which may have a rotation of their own.

use super::family::{Defaults, Family, Gguf, Rotary, RotaryLayers, Windows};
use super::olmo2;

pub(super) const FAMILY: Family = Family {
    model_type: "olmo3",
    class_name: "Olmo3ForCausalLM",
    defaults: Defaults {
        rope_theta: 500_000.0,
        sliding_window: Some(4096),
        ..olmo2::FAMILY.defaults
    },
    windows: Windows::AllBut(4, &[]),
    rotary: Rotary {
        layers: RotaryLayers::ByWindow {
            theta: 500_000.0,
            key: None,
        },
        ..Family::PLAIN.rotary
    },
    gguf: Gguf {
        told_by: Some("attention.sliding_window"),
        ..olmo2::FAMILY.gguf
    },
    ..olmo2::FAMILY
};
