//! The formats in which adapters are kept.

pub(crate) mod gguf_lora;
pub(crate) mod lora_export;
pub(crate) mod mlx;
pub(crate) mod peft;
