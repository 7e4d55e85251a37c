//! The frozen decoder, any of whose projections can carry an update.

mod adapter;
mod block;
mod decoder;
mod generate;
mod load;
pub(crate) mod parts;
mod predictive;

use std::path::Path;

use monteclora_adapters::weights::Kind;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{ModelFiles, Tensor};

pub use adapter::{ActiveAdapter, AdapterGradients, ModuleId};
pub use decoder::{Decoder, Dropout, PassOptions, Sequences, TaskLoss};
pub use generate::{Continuation, Generation, GenerationSettings};
pub use parts::attention::Segment;
pub(crate) use predictive::log_mean_exp;
pub use predictive::{Average, Predictive};

use monteclora_adapters::Result;

/// The files of the base in `dir`, whose headers hold what its config.json describes; what else they hold is logged as a warning.
///
/// # Errors
/// As [`ModelFiles::open`] and [`ModelFiles::check`].
pub fn open_base(dir: &Path) -> Result<ModelFiles> {
    let files = ModelFiles::open(dir)?;
    warn_of_base(&files)?;
    Ok(files)
}

/// Compares the headers of a base with its config.json, and logs what else is to be said of them as warnings.
///
/// # Errors
/// As [`ModelFiles::check`].
pub(crate) fn warn_of_base(files: &ModelFiles) -> Result<()> {
    for warning in files.check()? {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Bytes of the weights that a decoder holds of a base's tensors as `kind`.
pub(crate) fn held_bytes(files: &ModelFiles, kind: &Kind) -> u64 {
    let names = files.names().filter(|name| !files.is_beside(name));
    let tensors = names.filter_map(|name| files.get(name));
    tensors.map(|tensor| bytes_held(&tensor, kind)).sum()
}

/// Bytes of the weight that a tensor of a base is held in as `kind`.
pub(crate) fn bytes_held(tensor: &Tensor, kind: &Kind) -> u64 {
    (kind.bytes)(tensor.n_elements(), tensor.blocks()) as u64
}

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
