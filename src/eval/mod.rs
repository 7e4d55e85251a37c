//! Evaluation: token scores of a data file, scores of its multiple-choice rows, calibration.

pub mod calibration;
mod choices;
mod draws;
#[cfg(feature = "mistralrs")]
mod parity;
mod predict;
mod recital;
mod scores;

pub use choices::{ChoiceRows, LengthNormalisation, log_likelihoods};
pub use draws::posterior_draws;
#[cfg(feature = "mistralrs")]
pub use parity::{Agreement, Engines, Parity, Reference, compare};
pub use predict::{Answer, Answerer, ChoiceProbability, Question, Uncertainty};
pub use recital::Recital;
pub use scores::{EvalOptions, Predictor, Scores, score};

/// A score that is not a number: the model or the adapter holds values it should not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} is not finite; are the weights of the model and of the adapter sound? `monteclora inspect` tells"
)]
pub struct NotFinite {
    /// What was computed.
    pub what: String,
}
