//! Decoder families as data: one file each, one line of the registry, and nothing else in the workspace knows a family by name.
//!
//! A family's file says what its blocks hold ([`Projection`], [`Norm`]), what an absent key of config.json means
//! ([`Defaults`], those of transformers' configuration class), how llama.cpp names and orders its tensors ([`Gguf`]), and what
//! the server's runtime reads of its configuration. [`ModelShape`] is a config.json read by that description; the decoder,
//! the server, the estimate of memory and the converters all work from it.

mod config;
mod family;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod rope;
mod shape;

pub use family::{
    Activation, Bias, Defaults, Extent, Family, Gguf, Multiplier, Norm, NormPlace, Projection,
    Role, Windows,
};
pub use rope::{Llama3Scaling, Rope, RopeKind};
pub use shape::{Layer, ModelShape, Module, Multipliers, TensorShape};

pub(crate) use config::{family, heads, ties_embeddings, unread};
pub(crate) use family::HEAD;

/// Every family that is known; the first of several with one GGUF architecture is preferred.
pub const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
];
