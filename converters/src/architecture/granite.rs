//! Granite 3, the dense models: a Llama with four multipliers.

use super::family::{Factor, Family, Gguf, Multiplier};
use super::llama;

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    class_name: "GraniteForCausalLM",
    multipliers: &[
        (Multiplier::Embedding, Factor::Key("embedding_multiplier")),
        (Multiplier::Attention, Factor::Key("attention_multiplier")),
        (Multiplier::Residual, Factor::Key("residual_multiplier")),
        (Multiplier::LogitsDivisor, Factor::Key("logits_scaling")),
    ],
    gguf: Gguf {
        architecture: "granite",
        interleaved: true,
        // The value false means a model without rotation.
        switches: &[("rope.scaling.finetuned", 1.0)],
        ..Family::PLAIN.gguf
    },
    runtime_keys: None,
    ..llama::FAMILY
};
