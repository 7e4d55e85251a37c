//! run.toml: text -> overrides -> one structure per section, checked once.
//!
//! Command line > file > defaults. Relative paths are relative to the current directory, as in axolotl and mlx-lm, and
//! not to the file.

mod adapter;
mod check;
mod document;
mod peers;
mod run;

pub(crate) use document::set;
pub use peers::flag_remedy;
pub use run::{
    DTYPES, DataConfig, DataFormat, DtypeChoice, ECE_BINS, EvalConfig, LoraConfig, LrSchedulerType,
    Method, ModelConfig, ModuleSelection, Report, RunConfig, TrainConfig,
};
