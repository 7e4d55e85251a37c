//! run.toml: file form -> overrides -> checked, resolved form.
//!
//! Command line > file > defaults. Relative paths are relative to the current directory, as in axolotl and mlx-lm, and
//! not to the file.

mod document;
mod error;
mod file;
mod resolve;
mod run;

pub use error::ConfigError;
pub use run::{
    DataConfig, DataFormat, DtypeChoice, EvalConfig, Length, LoraConfig, LrSchedulerType, Method,
    ModelConfig, ModuleSelection, MonteCloraConfig, Objective, Preset, Report, RunConfig,
    TrainConfig,
};
