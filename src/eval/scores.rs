//! All scores of one model on one data file.

use anyhow::Result;
use serde::Serialize;

use super::calibration::{
    Bin, Prediction, accuracy, brier, error_detection_auroc, expected_calibration_error,
    negative_log_likelihood, reliability,
};
use super::{ChoiceRows, LengthNormalisation, NotFinite};
use crate::data::Dataset;
use crate::model::{ActiveAdapter, Decoder};
use crate::train::{evaluate, evaluate_average};

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
    /// Posterior draws whose predictions were averaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draws: Option<usize>,
    /// Predictions by confidence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reliability: Vec<Bin>,
}

/// Whose predictions are scored.
#[derive(Debug, Clone, Copy)]
pub enum Predictor<'a> {
    /// One adapter's.
    One(&'a ActiveAdapter),
    /// The average over posterior draws, as probabilities: of the next token, and of a row's choices.
    Average(&'a [ActiveAdapter]),
}

/// Scores a predictor on the rows of `data` and on those among them that have choices; `done` is told how many of
/// [`Predictor::n_steps`] are done.
///
/// # Errors
/// Those of the data and of the decoder; [`NotFinite`].
pub fn score(
    model: &Decoder,
    predictor: Predictor<'_>,
    data: &Dataset,
    choices: &ChoiceRows,
    options: &EvalOptions,
    mut done: impl FnMut(usize),
) -> Result<Scores> {
    let batch_size = options.batch_size;
    let tokens = match predictor {
        Predictor::One(adapter) => evaluate(model, adapter, data, batch_size, &mut done)?,
        Predictor::Average(draws) => evaluate_average(model, draws, data, batch_size, &mut done)?,
    };
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
        draws: match predictor {
            Predictor::One(_) => None,
            Predictor::Average(draws) => Some(draws.len()),
        },
        ..Scores::default()
    };
    if choices.is_empty() {
        return Ok(scores);
    }
    let adapters = predictor.adapters();
    let normalisation = options.normalisation;
    let of_draws = choices.distributions(model, adapters, batch_size, normalisation, &mut done)?;
    let predictions: Vec<Prediction> = of_draws
        .iter()
        .filter_map(|row| Prediction::average(row))
        .collect();
    scores.accuracy = accuracy(&predictions);
    scores.nll = negative_log_likelihood(&predictions);
    scores.ece = expected_calibration_error(&predictions, options.ece_bins);
    scores.brier = brier(&predictions);
    scores.auroc = error_detection_auroc(&predictions);
    scores.reliability = reliability(&predictions, options.ece_bins);
    Ok(scores)
}

impl<'a> Predictor<'a> {
    fn adapters(self) -> &'a [ActiveAdapter] {
        match self {
            Self::One(adapter) => std::slice::from_ref(adapter),
            Self::Average(draws) => draws,
        }
    }

    /// Passes over rows that scoring takes: every row once, every row with choices once for each adapter.
    pub fn n_steps(self, n_rows: usize, n_choice_rows: usize) -> usize {
        n_rows + self.adapters().len() * n_choice_rows
    }
}
