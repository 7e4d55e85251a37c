//! Adapter formats: PEFT LoRA and MonteCLoRA directories read, checked, collapsed, written and merged.
//!
//! The crate knows bytes, element types, shapes and names; it holds no tensor library. Files stay memory-mapped, so
//! what is not asked for is not read, and what does not change is copied as bytes. What is not understood is refused
//! with every offender named. Files must not be changed by others while they are open.
//!
//! ```no_run
//! use monteclora_converters::{Adapter, LoraOptions, ModelFiles};
//!
//! let adapter = Adapter::read("out".as_ref())?;
//! let base = ModelFiles::open("SmolLM2-135M-Instruct")?;
//! for problem in adapter.check_against(&base)? {
//!     eprintln!("{problem}");
//! }
//! adapter.write_lora("out-lora".as_ref(), &LoraOptions::default())?;
//! # Ok::<(), monteclora_converters::Error>(())
//! ```

mod adapter;
mod check;
mod config;
mod config_read;
mod config_write;
mod dtype;
mod error;
mod files;
mod gguf;
mod gguf_lora;
mod gguf_write;
mod inspect;
mod json;
mod lora_export;
mod low_rank;
mod merge;
mod mlx;
mod model_files;
mod peft_read;
mod peft_write;
mod runtime;
mod safetensors_file;
mod safetensors_write;
mod shards;
mod targets;
mod tensor;
mod validate;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod round_trips;

pub use adapter::{Adapter, Format, Site, SitePosterior};
pub use config::{AdapterConfig, ExcludeModules, MonteCloraSettings, TargetModules};
pub use dtype::DType;
pub use error::{Error, Problem, Problems, Result, UnknownTarget, UnknownTargets};
pub use gguf::{GgufArray, GgufFile, GgufTensor, GgufValue, ggml_block};
pub use gguf_lora::is_gguf;
pub use inspect::{AdapterSummary, SiteSummary, summarise};
pub use lora_export::{LoraOptions, LoraReport};
pub use merge::{MergeReport, OverlayReport, merge_dir, write_overlay};
pub use model_files::ModelFiles;
pub use runtime::Runtime;
pub use safetensors_file::SafetensorsFile;
pub use safetensors_write::write_safetensors;
pub use targets::LinearModule;
pub use tensor::Tensor;
pub use validate::{validate, validate_path};
