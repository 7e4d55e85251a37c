//! Training: posterior draw, task loss with its gradients, regulariser, AdamW, evaluation, metrics.

pub mod audit;
mod checkpoint;
mod evaluation;
mod identity;
mod init_from;
mod lock;
pub mod memory;
pub mod metrics;
mod optimizer;
mod plan;
mod prepare;
pub mod record;
mod run;
mod schedule;
mod settings;
mod start;
mod state;
mod suggest;
mod tensorboard;
mod window;

use std::path::{Path, PathBuf};

pub use checkpoint::{
    Checkpoint, Progress, best_step, checkpoints, latest_checkpoint, rebuild_best, remove_partial,
    write_adapter,
};
pub(crate) use evaluation::sequences;
pub use identity::{Drift, Identity};
pub use lock::RunLock;
pub use optimizer::{AdamW, AdamWSettings, SiteMoments, clip, global_norm};
pub use plan::{Advice, BatchShape, Plan};
pub use prepare::Prepared;
pub use run::{Event, Interrupt, Outcome, Trainer};
pub use schedule::{Schedule, Shape};
pub use settings::TrainSettings;
pub use start::{Begin, Start, begin};
pub use state::{AdapterState, DrawForm, DrawnAdapter, RegulariserMeans, SiteGradient, SiteState};
pub use suggest::Suggestion;
pub use window::Window;

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A loss or gradient is NaN or infinite; nothing was updated with it.
    #[error(
        "step {step}: {what} is not finite{}; lower train.learning_rate or lora.monteclora.sample_scaler, or set train.max_grad_norm",
        sites(.names)
    )]
    NonFinite {
        /// Optimiser step, from 1.
        step: u64,
        /// The loss, the validation loss, the gradient or a weight.
        what: &'static str,
        /// Sites concerned.
        names: Vec<String>,
    },
    /// Gradients that should be there are zero.
    #[error("step {}: no gradient reaches {}", .step + 1, sites_list(.silent))]
    Audit {
        /// Optimiser step, from 0.
        step: u64,
        /// Parameters without a gradient.
        silent: Vec<String>,
    },
    /// Internal bookkeeping lost a site.
    #[error("{site}: no gradient was computed for this site")]
    Site {
        /// Module path.
        site: String,
    },
    /// Another process trains into the same directory.
    #[error(
        "another run{} is writing to `{}`; wait for it, stop it, or set another train.output_dir",
        process(.holder), .path.display()
    )]
    Busy {
        /// The output directory.
        path: PathBuf,
        /// The id of the process, where it is known.
        holder: String,
    },
    /// The best adapter, which is to remain at the end, is gone.
    #[error(
        "`{}`, the best adapter (of step {step}), is missing or damaged, and [train] load_best_model_at_end needs it; bring it back, or leave it to what later evaluations find with --set train.load_best_model_at_end=false",
        .path.display()
    )]
    BestLost {
        /// `best` of the output directory.
        path: PathBuf,
        /// The step it was of.
        step: u64,
    },
    /// A file cannot be read or written.
    #[error("cannot access `{}`: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A checkpoint of which a file is missing or damaged.
    #[error("`{}` is not a complete checkpoint: {problem}", .path.display())]
    Torn {
        /// The checkpoint directory.
        path: PathBuf,
        /// What is missing or damaged.
        problem: String,
    },
    /// A checkpoint does not belong to this run.
    #[error("`{}` cannot be resumed: {problem}", .path.display())]
    Checkpoint {
        /// The checkpoint directory.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// What the run is made of changed since the checkpoint.
    #[error(
        "`{}` cannot be resumed, for the run would not be the same:\n  {}\nundo the changes, or begin another run in another output_dir (`lora.init_from` can start it from this adapter)",
        .path.display(), .drift.refused.join("\n  ")
    )]
    Drift {
        /// The checkpoint directory.
        path: PathBuf,
        /// All that changed.
        drift: Drift,
    },
    /// The decoder failed.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// The method's mathematics failed.
    #[error(transparent)]
    Method(#[from] monteclora_adapters::Error),
    /// Reading data, or reading or writing an adapter, failed.
    #[error(transparent)]
    Format(#[from] monteclora_converters::Error),
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

fn process(id: &str) -> String {
    match id {
        "" => String::new(),
        id => format!(" (process {id})"),
    }
}

fn sites(names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    format!(" at {}", sites_list(names))
}

fn sites_list(names: &[String]) -> String {
    let shown = names
        .iter()
        .take(20)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(20) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
