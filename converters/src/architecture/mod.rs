//! Decoder families as data. Each family has one file and one entry in the registry; nothing else in the workspace
//! knows a family by name.
//!
//! A family's file states what its blocks hold ([`Projection`], [`Norm`]), what an absent key of config.json means
//! ([`Defaults`], those of transformers' configuration class), how llama.cpp names and orders its tensors ([`Gguf`]),
//! and which keys the server's runtime reads. [`ModelShape`] is a config.json read by that description; the decoder,
//! the server, the memory estimate and the converters all work from it. A larger model may contain the decoder:
//! [`Wrapper`].

mod config;
mod family;
mod gemma2;
mod gemma3;
mod glm4;
mod granite;
mod llama;
mod ministral3;
mod mistral;
mod mixtral;
mod nested;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;
mod shape;
mod smollm3;

pub use family::{
    Activation, Bias, Defaults, Experts, Extent, Factor, Family, Gguf, Multiplier, Norm, NormPlace,
    Normalised, Pairs, Projection, Role, Rotary, RotaryLayers, Sizes, Softcap, SoftcapPlace,
    Windows,
};
pub use nested::{WRAPPERS, Wrapper};
pub use rope::{Llama3Scaling, LongRopeScaling, QueryScaling, Rope, RopeKind, YarnScaling};
pub use shape::{ExpertSizes, Layer, ModelShape, Module, Multipliers, TensorShape};

pub(crate) use config::{
    body, entry, family, heads, ties_by_files, ties_embeddings, unread, with_entry,
};
pub(crate) use family::HEAD;
pub(crate) use shape::BODY;

/// All supported families. Of several with the same GGUF architecture, the first is preferred.
pub const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &ministral3::FAMILY,
    &mixtral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &qwen3_moe::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &phi3::FAMILY,
    &smollm3::FAMILY,
    &granite::FAMILY,
    &olmo2::FAMILY,
    &olmo3::FAMILY,
    &glm4::FAMILY,
];
