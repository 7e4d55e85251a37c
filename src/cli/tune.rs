//! Arguments of the search for settings.

use std::path::PathBuf;

use clap::Args;

use crate::eval::DEFAULT_SEED;
use crate::tune::Strategy;

/// `tune`
#[derive(Debug, Args)]
pub struct TuneArgs {
    /// TOML file of the run whose settings are searched. It needs validation rows.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// TOML file with the keys that are searched and their ranges.
    #[arg(long, value_name = "FILE")]
    pub space: PathBuf,
    /// Override any key of the run for all trials.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,
    /// Number of trials of the study. A study that has ended goes on with a higher number.
    #[arg(long, default_value_t = 20)]
    pub trials: usize,
    /// Trials at the same time, each a process with its share of the cores.
    #[arg(long, default_value_t = 1)]
    pub jobs: usize,
    /// How the next trial is chosen.
    #[arg(long, value_enum, default_value_t)]
    pub strategy: Strategy,
    /// Score of `eval` to optimise: loss, perplexity, nll, ece, brier, aurc; accuracy, token_accuracy, auroc.
    #[arg(long, value_name = "SCORE", default_value = "loss")]
    pub objective: String,
    /// Rows to evaluate trials on. Default: the validation rows of the run.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Use only the first N rows for the objective.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Directory of the study.
    #[arg(short, long, value_name = "DIR", default_value = "tune-out")]
    pub output: PathBuf,
    /// Random seed of the search.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// Train every trial to its end.
    #[arg(long)]
    pub no_early_stopping: bool,
    /// Run on the CPU even if the build supports an accelerator.
    #[arg(long)]
    pub cpu: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
