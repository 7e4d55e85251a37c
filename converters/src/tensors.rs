//! Tensors as bytes, and the containers that hold them: safetensors, its shards, and GGUF.

pub(crate) mod blocks;
pub(crate) mod compare;
pub(crate) mod derived;
pub(crate) mod dtype;
pub(crate) mod ggml_type;
pub(crate) mod gguf;
pub(crate) mod gguf_write;
pub(crate) mod safetensors_file;
pub(crate) mod safetensors_write;
pub(crate) mod shards;
pub(crate) mod tensor;
