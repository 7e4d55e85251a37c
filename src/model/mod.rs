//! The frozen decoder. Any of its projections can carry an update.

mod adapter;
mod block;
mod decoder;
mod dropout;
mod generate;
mod load;
mod merge;
pub(crate) mod parts;
mod predictive;
mod shared;

use std::path::Path;

use monteclora_adapters::weights::Kind;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{ModelFiles, Tensor};

pub use adapter::{ActiveAdapter, AdapterGradients, ModuleId};
pub use decoder::{Decoder, PassOptions, Sequences, TaskLoss};
pub use dropout::Dropout;
pub use generate::{Continuation, Generation, GenerationSettings};
pub use parts::attention::Segment;
pub(crate) use predictive::log_mean_exp;
pub use predictive::{Average, Predictive};
pub use shared::SharedBatch;

use monteclora_adapters::Result;

/// Opens the files of the base model in `dir` and checks their headers against config.json. Other findings are logged
/// as warnings.
///
/// # Errors
/// As [`ModelFiles::open`] and [`ModelFiles::check`].
pub fn open_base(dir: &Path) -> Result<ModelFiles> {
    let files = ModelFiles::open(dir)?;
    warn_of_base(&files)?;
    Ok(files)
}

/// Checks the headers of a base model against its config.json, and logs other findings as warnings.
///
/// # Errors
/// As [`ModelFiles::check`].
pub(crate) fn warn_of_base(files: &ModelFiles) -> Result<()> {
    for warning in files.check()? {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Bytes in memory of all weights of a base model that a decoder holds as `kind`.
pub(crate) fn held_bytes(files: &ModelFiles, kind: &Kind) -> u64 {
    let names = files.names().filter(|name| !files.is_beside(name));
    let tensors = names.filter_map(|name| files.get(name));
    tensors.map(|tensor| bytes_held(&tensor, kind)).sum()
}

/// Bytes in memory of one tensor of a base model that is held as `kind`.
pub(crate) fn bytes_held(tensor: &Tensor, kind: &Kind) -> u64 {
    (kind.bytes)(tensor.n_elements(), tensor.blocks()) as u64
}

/// The sizes and options of the model in `dir`, read from its config.json.
///
/// # Errors
/// As [`ModelShape::read`], or if this decoder does not support the model.
pub fn read_shape(dir: &Path) -> Result<ModelShape> {
    let shape = ModelShape::read(dir)?;
    let problems = load::not_computed(&shape);
    if problems.is_empty() {
        return Ok(shape);
    }
    Err(monteclora_converters::Error::refused(dir, problems).into())
}
