//! Reads, checks, collapses, converts and merges LoRA and MonteCLoRA adapters.
//!
//! The crate works with bytes, element types, shapes and names. It uses no tensor library. Files are memory-mapped:
//! only the data that is needed is read, and unchanged tensors are copied as bytes. If the crate does not understand an
//! input, it returns an error that names every offending item. Training and serving must render chat templates
//! identically, so the Jinja engine is here, in [`jinja`].
//!
//! Other programs must not change files while they are open. If a file is replaced by a rename, it stays readable. This
//! crate writes all files in this way. If a file is truncated in place, reading a page beyond its new end ends the
//! process with SIGBUS, as for any memory-mapped file.
//!
//! ```
//! use monteclora_converters::{
//!     Adapter, AdapterConfig, LoraOptions, ModelFiles, Runtime, Site, TargetModules, Tensor, merge_dir, validate_path,
//!     write_safetensors,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let scratch = tempfile::tempdir()?;
//! # let dir = scratch.path();
//! // A base model with one linear module.
//! let weight = Tensor::from_f32(&[2, 2], vec![1.0, 0.0, 0.0, 1.0])?;
//! std::fs::create_dir(dir.join("base"))?;
//! std::fs::write(dir.join("base/config.json"), r#"{"model_type": "llama", "tie_word_embeddings": false}"#)?;
//! let name = "model.layers.0.self_attn.q_proj";
//! write_safetensors(dir.join("base/model.safetensors"), [(format!("{name}.weight"), weight)], &Default::default())?;
//!
//! // An adapter for it, made in memory and written as PEFT writes it.
//! let config = AdapterConfig {
//!     r: 1,
//!     lora_alpha: 2.0,
//!     target_modules: TargetModules::List(vec!["q_proj".into()]),
//!     ..AdapterConfig::default()
//! };
//! let site = Site {
//!     name: name.into(),
//!     rank: 1,
//!     alpha: 2.0,
//!     scaling: config.scaling_for(name)?,
//!     lora_a: Tensor::from_f32(&[1, 2], vec![1.0, 0.0])?,
//!     lora_b: Tensor::from_f32(&[2, 1], vec![0.0, 1.0])?,
//!     posterior: None,
//!     beyond: None,
//!     triplets: None,
//! };
//! let adapter = Adapter { config, sites: vec![site], format: "peft-lora", metadata: Default::default(), notes: Vec::new() };
//! adapter.write_peft(&dir.join("out"), false)?;
//!
//! // Read, check against the base and a runtime, export, merge.
//! let base = ModelFiles::open(dir.join("base"))?;
//! assert!(validate_path(&dir.join("out"), Some(&base), &[Runtime::Vllm])?.is_empty());
//! let adapter = Adapter::read(&dir.join("out"))?;
//! adapter.write_lora(&dir.join("lora"), &LoraOptions::default())?;
//! merge_dir(&base, &adapter, &dir.join("merged"), None, &Default::default())?;
//! let merged = ModelFiles::open(dir.join("merged"))?;
//! let weight = merged.get(&format!("{name}.weight")).expect("every tensor is there");
//! assert_eq!(weight.to_f32()?, [1.0, 0.0, 2.0, 1.0]); // W + 2 * B A
//! # Ok(())
//! # }
//! ```

mod absent;
mod adapter;
pub mod architecture;
mod beside;
mod beyond;
mod config;
mod error;
pub mod files;
pub mod foreign;
mod formats;
pub mod gguf_base;
mod inspect;
pub mod jinja;
pub mod json;
mod low_rank;
mod merge;
mod model_files;
mod module_path;
mod problem;
pub mod simd;
mod site_pattern;
mod source;
mod targets;
mod tensors;
mod trained_base;
mod validate;

#[cfg(test)]
#[path = "tests/cases.rs"]
mod cases;
#[cfg(test)]
#[path = "tests/fixtures.rs"]
mod fixtures;
#[cfg(test)]
#[path = "tests/gguf_keys.rs"]
mod gguf_keys;
#[cfg(test)]
#[path = "tests/gguf.rs"]
mod gguf_tests;
#[cfg(test)]
#[path = "tests/llama_cpp.rs"]
mod llama_cpp;
#[cfg(test)]
#[path = "tests/messages.rs"]
mod messages;
#[cfg(test)]
#[path = "tests/methods.rs"]
mod method_tests;
#[cfg(test)]
#[path = "tests/names.rs"]
mod names;
#[cfg(test)]
#[path = "tests/nested.rs"]
mod nested;
#[cfg(test)]
#[path = "tests/round_trips.rs"]
mod round_trips;

pub use adapter::{Adapter, Site, SitePosterior, Triplets};
pub use beside::{Beside, Carried, ConversationSettings, LeftOut, other_conversation};
pub use beyond::{Beyond, places};
pub use config::{
    AdaLoraSettings, AdapterConfig, ExcludeModules, MonteCloraSettings, PeftType, TargetModules,
};
pub use error::{Error, Result, exit_code};
pub use formats::gguf_lora::{base_named_in, is_gguf};
pub use formats::lora::{LoraOptions, LoraReport};
pub use formats::{About, FORMATS, Format, ReadOptions, Written, format_named, format_of, read_as};
pub use inspect::{AdapterSummary, SiteSummary, summarise};
pub use merge::{MergeReport, OverlayReport, merge_dir, write_overlay};
pub use model_files::ModelFiles;
pub use problem::{Problem, Problems, shell_word};
pub use targets::LinearModule;
pub use tensors::blocks::{BLOCK_FORMATS, BlockFormat, BlockMatrix};
pub use tensors::dtype::DType;
pub use tensors::ggml_type::ggml_block;
pub use tensors::gguf::{GgufArray, GgufFile, GgufTensor, GgufValue};
pub use tensors::safetensors_file::SafetensorsFile;
pub use tensors::safetensors_write::write_safetensors;
pub use tensors::tensor::Tensor;
pub use trained_base::{base_fingerprint, base_sample, base_warnings, training_record};
pub use validate::runtime::{MISTRALRS, Runtime};
pub use validate::{Findings, examine, validate, validate_path};
