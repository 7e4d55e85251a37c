//! The frozen decoder, any of whose projections can carry an update.

mod adapter;
mod block;
mod decoder;
mod generate;
mod load;
pub(crate) mod parts;
mod predictive;

use std::path::Path;

use monteclora_converters::architecture::ModelShape;

pub use adapter::{ActiveAdapter, AdapterGradients, ModuleId};
pub use decoder::{Decoder, Dropout, PassOptions, Sequences, TaskLoss};
pub use generate::{Generation, GenerationSettings};
pub use parts::attention::Segment;
pub use predictive::Predictive;
pub(crate) use predictive::log_mean_exp;

use monteclora_adapters::Result;

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
