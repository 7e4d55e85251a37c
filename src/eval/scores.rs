//! All scores of one model on one data file.

use anyhow::{Result, bail};
use serde::Serialize;

use super::calibration::{
    Bin, Prediction, accuracy, brier, error_detection_auroc, expected_calibration_error,
    negative_log_likelihood, reliability,
};
use super::choices::{Places, prediction};
use super::{ChoiceRows, LengthNormalisation, not_finite};
use crate::data::{BatchOptions, Batches, Cursor, Dataset};
use crate::model::{ActiveAdapter, Decoder, Sequences, TaskLoss};
use crate::train::sequences;

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

impl Predictor<'_> {
    /// One forward pass of each adapter: the loss at `targets`, and `[adapter][target]`, the log-probability of the label.
    fn pass(
        self,
        model: &Decoder,
        sequences: &Sequences,
        targets: &[(usize, u32)],
    ) -> Result<(TaskLoss, Vec<Vec<f64>>)> {
        match self {
            Self::One(adapter) => {
                let loss = model.evaluate(sequences, targets, adapter)?;
                let log_p = loss.nll.iter().map(|nll| -f64::from(*nll)).collect();
                Ok((loss, vec![log_p]))
            }
            Self::Average(draws) => {
                let found = model.evaluate_average(sequences, targets, draws)?;
                Ok((found.loss, found.label_log_p))
            }
        }
    }
}

/// Scores a predictor on the rows of `data` and on those among them that have choices, which the same forward pass scores;
/// `done` is told the rows of every batch.
///
/// # Errors
/// Those of the data and of the decoder; scores that are not finite.
pub fn score(
    model: &Decoder,
    predictor: Predictor<'_>,
    data: &Dataset,
    choices: &ChoiceRows,
    options: &EvalOptions,
    mut done: impl FnMut(usize),
) -> Result<Scores> {
    let batch_options = BatchOptions {
        batch_size: options.batch_size,
        pack_tokens: None,
        shuffle_seed: None,
    };
    let mut batches = Batches::new(data, batch_options, Cursor::default());
    let (mut total, mut n_tokens, mut n_correct) = (0.0, 0, 0);
    // `[row][adapter][choice]`
    let mut of_choices: Vec<Vec<Vec<f64>>> = Vec::with_capacity(choices.len());
    for _ in 0..batches.n_batches() {
        let batch = batches.next_batch()?;
        let (mut sequences, mut targets) = (sequences(&batch), batch.targets);
        let n_answers = targets.len();
        let rows = batch.examples.iter().enumerate();
        let places: Vec<Places> = rows
            .filter_map(|(segment, example)| Some((segment, choices.of(*example)?)))
            .map(|(segment, set)| Places::new(set, &mut sequences, &mut targets, Some(segment)))
            .collect();
        let (loss, label_log_p) = predictor.pass(model, &sequences, &targets)?;
        total += loss.nll[..n_answers]
            .iter()
            .map(|nll| f64::from(*nll))
            .sum::<f64>();
        n_tokens += n_answers;
        n_correct += loss.correct[..n_answers].iter().filter(|c| **c).count();
        of_choices.extend(places.iter().map(|row| {
            let adapters = label_log_p.iter();
            adapters.map(|log_p| row.log_likelihoods(log_p)).collect()
        }));
        done(batch.examples.len());
    }
    let loss = total / n_tokens.max(1) as f64;
    if !loss.is_finite() {
        bail!(not_finite("the loss"));
    }
    let mut scores = Scores {
        loss,
        perplexity: loss.exp(),
        token_accuracy: n_correct as f64 / n_tokens.max(1) as f64,
        draws: match predictor {
            Predictor::One(_) => None,
            Predictor::Average(draws) => Some(draws.len()),
        },
        ..Scores::default()
    };
    if choices.is_empty() {
        return Ok(scores);
    }
    let mut predictions = Vec::with_capacity(choices.len());
    for (row, (set, adapters)) in choices.sets().zip(&of_choices).enumerate() {
        let of_draws = adapters
            .iter()
            .map(|scores| prediction(set, scores, options.normalisation, row))
            .collect::<Result<Vec<_>, _>>()?;
        predictions.extend(Prediction::average(&of_draws));
    }
    scores.accuracy = accuracy(&predictions);
    scores.nll = negative_log_likelihood(&predictions);
    scores.ece = expected_calibration_error(&predictions, options.ece_bins);
    scores.brier = brier(&predictions);
    scores.auroc = error_detection_auroc(&predictions);
    scores.reliability = reliability(&predictions, options.ece_bins);
    Ok(scores)
}
