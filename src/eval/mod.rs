//! Evaluation: token scores of a data file, scores of its multiple-choice rows, calibration.

pub mod calibration;
mod choices;
mod draws;
#[cfg(feature = "mistralrs")]
mod parity;
mod predict;
mod recital;
mod scores;

use monteclora_converters::Problem;

pub use choices::{ChoiceRows, LengthNormalisation, log_likelihoods};
pub use draws::posterior_draws;
#[cfg(feature = "mistralrs")]
pub use parity::{Agreement, Bases, Engines, Parity, Reference, compare};
pub use predict::{Answer, Answerer, ChoiceProbability, Question, Uncertainty};
pub use recital::{Opening, Recital};
pub use scores::{EvalOptions, Predictor, Scores, score};

/// A score that is not a number: the model or the adapter holds values it should not.
fn not_finite(what: &str) -> Problem {
    let message = format!(
        "{what} is not finite; are the weights of the model and of the adapter sound? `monteclora inspect` tells"
    );
    Problem::sentence("not-finite", message).exit(5)
}
