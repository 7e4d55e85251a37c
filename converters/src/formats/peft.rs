//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

pub(crate) mod config_read;
pub(crate) mod config_write;
pub(crate) mod read;
pub(crate) mod write;
