//! What is done for mistral.rs 0.8.1 alone; a move to another version begins with this folder.

pub(crate) mod model_config;
