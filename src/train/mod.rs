//! Training: posterior draw, task loss with its gradients, regulariser, AdamW, evaluation, metrics.

#[cfg(test)]
mod across_ranks;
mod ahead;
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
mod progress;
mod record;
mod run;
mod schedule;
mod settings;
mod start;
mod state;
mod suggest;
mod tensorboard;

use std::path::Path;

use monteclora_adapters::Error;
use monteclora_converters::Problem;

pub use checkpoint::{Checkpoint, checkpoints};
pub(crate) use evaluation::sequences;
pub use identity::{Drift, Identity};
pub use lock::RunLock;
pub use optimizer::{AdamW, Moments, clip};
pub use plan::{Advice, Plan};
pub use prepare::Prepared;
pub use progress::{Progress, Window};
pub(crate) use record::device_name;
pub use run::{Event, Interrupt, Outcome, Trainer};
pub use schedule::Schedule;
pub use settings::TrainSettings;
pub use start::{Begin, Start, begin};
pub use state::{AdapterState, DrawnAdapter, Gradients, modules};
pub use suggest::{Decided, Suggestion, record_of, toml_text, without_file};

/// The error for a file of a run that cannot be read or written.
fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let context = monteclora_converters::Error::io("access", path);
    move |source| context(source).into()
}

/// The error for a number that is NaN or infinite.
fn not_finite(step: u64, what: &str, names: &[String]) -> Error {
    let at = match names {
        [] => String::new(),
        names => format!(" at {}", list(names)),
    };
    let message = format!("{what} is not finite{at}");
    let fix = "lower train.learning_rate, or set train.max_grad_norm; with method \"monteclora\" a lower lora.monteclora.sample_scaler may do";
    let problem = Problem::new("not-finite", format!("step {step}"), message, fix);
    problem.exit(5).into()
}

/// The first twenty of `names`, and the number of the others.
fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(20)].join(", ");
    match names.len().saturating_sub(20) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
