//! The frozen decoder, any of whose projections can carry an update.

mod adapter;
mod block;
mod decoder;
mod generate;
mod load;
pub(crate) mod parts;
mod predictive;

use std::path::{Path, PathBuf};

use monteclora_converters::architecture::ModelShape;

pub use adapter::{ActiveAdapter, AdapterGradients, ModuleId};
pub use decoder::{Decoder, Dropout, PassOptions, Sequences, TaskLoss};
pub use generate::{Generation, GenerationSettings};
pub use parts::attention::Segment;
pub use predictive::Predictive;
pub(crate) use predictive::log_mean_exp;

/// What can go wrong in reading or running a decoder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Tensors of the checkpoint are missing or have another shape.
    #[error("`{}` does not hold the model its config.json describes: {}", .path.display(), .problems.join("; "))]
    Weights {
        /// The model directory.
        path: PathBuf,
        /// One line a tensor.
        problems: Vec<String>,
    },
    /// An adapter names sites that the base does not have, or of another shape.
    #[error("the adapter does not fit this base: {}", .problems.join("; "))]
    Adapter {
        /// One line a site.
        problems: Vec<String>,
    },
    /// Token ids outside the vocabulary.
    #[error(
        "token id {token} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?"
    )]
    Token {
        /// The offending id.
        token: u32,
        /// Entries of the model's embedding.
        vocab_size: usize,
    },
    /// An average over no adapters.
    #[error("an average needs at least one adapter")]
    NoAdapters,
    /// Weights cannot be held in this type.
    #[error("weights as {0}: the decoder holds them as f32 or bf16")]
    WeightType(&'static str),
    /// Reading tensors failed.
    #[error(transparent)]
    Format(#[from] monteclora_converters::Error),
    /// The method's mathematics failed.
    #[error(transparent)]
    Method(#[from] monteclora_adapters::Error),
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// The sizes and options of the model in `dir`, read from its config.json.
///
/// # Errors
/// As [`ModelShape::read`], and what this decoder does not compute.
pub fn read_shape(dir: &Path) -> Result<ModelShape> {
    let shape = ModelShape::read(dir)?;
    let problems = load::not_computed(&shape);
    if problems.is_empty() {
        return Ok(shape);
    }
    Err(monteclora_converters::Error::refused(dir, problems).into())
}
