//! Evaluation: scores of a data file and its multiple-choice rows, and the confidence and calibration of predictions.

pub mod abstention;
mod answers;
pub mod calibration;
mod choices;
mod draws;
mod interval;
pub mod measures;
#[cfg(feature = "mistralrs")]
mod parity;
mod predict;
mod prediction;
mod recital;
mod scores;
mod temperature;

use monteclora_converters::Problem;

pub use answers::{AnswerCertainty, certainties};
pub use choices::{ChoiceRows, LengthNormalisation, log_likelihoods};
pub use draws::{DEFAULT_SEED, posterior_draw, posterior_draws};
pub use interval::bootstrap;
#[cfg(feature = "mistralrs")]
pub use parity::{Agreement, Bases, Engines, Parity, Reference, compare};
pub use predict::{Answer, Answerer, Cancelled, ChoiceProbability, Question, Uncertainty};
pub use prediction::{Prediction, entropies, tempered};
pub use recital::{Opening, Recital};
pub use scores::{
    Batching, CalibratedScores, EvalOptions, Intervals, Predictor, RowLoss, Scored, Scores,
    Selection, score,
};
pub use temperature::{fit_temperature, is_at_bound};

/// The error for a score that is not finite: the weights of the model or the adapter contain bad values.
fn not_finite(what: &str) -> Problem {
    let message = format!(
        "{what} is not finite; are the weights of the model and of the adapter sound? `monteclora inspect` tells"
    );
    Problem::sentence("not-finite", message).exit(5)
}

#[cfg(test)]
mod recorded;
