//! All scores of one model on one data file.

use anyhow::Result;
use serde::Serialize;

use super::calibration::{
    Bin, accuracy, brier, error_detection_auroc, expected_calibration_error,
    negative_log_likelihood, reliability,
};
use super::{ChoiceRows, LengthNormalisation, NotFinite};
use crate::data::Dataset;
use crate::model::{ActiveAdapter, Decoder};
use crate::train::evaluate;

/// How a file is scored.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// Rows at a time.
    pub batch_size: usize,
    /// Bins of the calibration error.
    pub ece_bins: usize,
    /// What is compared between choices.
    pub normalisation: LengthNormalisation,
}

/// Scores of one model; those of choices only where rows have them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Share of trained tokens that were the most likely one.
    pub token_accuracy: f64,
    /// Share of rows whose most likely choice is the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean negative log-probability of the answer among the choices, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// Expected calibration error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece: Option<f64>,
    /// Brier's score, from 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brier: Option<f64>,
    /// How well low confidence detects errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auroc: Option<f64>,
    /// Predictions by confidence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reliability: Vec<Bin>,
}

/// Scores `adapter` on the rows of `data` and on those among them that have choices.
///
/// # Errors
/// Those of the data and of the decoder; [`NotFinite`].
pub fn score(
    model: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    choices: &ChoiceRows,
    options: &EvalOptions,
    mut done: impl FnMut(usize),
) -> Result<Scores> {
    let tokens = evaluate(model, adapter, data, options.batch_size, &mut done)?;
    if !tokens.loss.is_finite() {
        return Err(NotFinite {
            what: "the loss".to_owned(),
        }
        .into());
    }
    let mut scores = Scores {
        loss: tokens.loss,
        perplexity: tokens.perplexity,
        token_accuracy: tokens.token_accuracy,
        ..Scores::default()
    };
    if choices.is_empty() {
        return Ok(scores);
    }
    let log_likelihoods = choices.log_likelihoods(model, adapter, options.batch_size, &mut done)?;
    let predictions = choices.predictions(&log_likelihoods, options.normalisation)?;
    scores.accuracy = accuracy(&predictions);
    scores.nll = negative_log_likelihood(&predictions);
    scores.ece = expected_calibration_error(&predictions, options.ece_bins);
    scores.brier = brier(&predictions);
    scores.auroc = error_detection_auroc(&predictions);
    scores.reliability = reliability(&predictions, options.ece_bins);
    Ok(scores)
}
