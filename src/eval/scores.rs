//! All scores of several predictors on one data file. Each adapter needs one forward pass.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::choices::{Places, prediction};
use super::interval::bootstrap;
use super::measures::{self, Bin, Outcome};
use super::prediction::entropies;
use super::{ChoiceRows, LengthNormalisation, Prediction, not_finite, tempered};
use crate::data::{ChoiceSet, Dataset};
use crate::distributed::{Communicator, balanced};
use crate::model::{ActiveAdapter, Decoder, Sequences, SharedBatch, TaskLoss};
use crate::train::sequences;

/// How many rows go through the model at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// This many rows.
    Rows(usize),
    /// Rows with at most this many tokens together, but at least one row.
    Tokens(usize),
}

impl Batching {
    /// Batches of `rows`, or of 2048 tokens if `rows` is `None`: enough for the matrix products to run at full speed,
    /// and little in memory.
    pub fn new(rows: Option<usize>) -> Self {
        rows.map_or(Self::Tokens(2048), Self::Rows)
    }

    /// Splits rows of these lengths into batches, in order.
    pub fn plan(self, lengths: &[usize]) -> Vec<Range<usize>> {
        let (mut batches, mut start, mut tokens) = (Vec::new(), 0, 0);
        for (row, length) in lengths.iter().enumerate() {
            let is_full = match self {
                Self::Rows(most) => row - start >= most.max(1),
                Self::Tokens(most) => row > start && tokens + length > most,
            };
            if is_full {
                batches.push(start..row);
                (start, tokens) = (row, 0);
            }
            tokens += length;
        }
        if start < lengths.len() {
            batches.push(start..lengths.len());
        }
        batches
    }
}

/// How a file is scored.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// How rows are put into batches.
    pub batching: Batching,
    /// Number of bins of the calibration error.
    pub ece_bins: usize,
    /// How the likelihoods of choices are compared.
    pub normalisation: LengthNormalisation,
}

/// Scores after temperature scaling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CalibratedScores {
    /// The temperature.
    pub temperature: f64,
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// Brier's score.
    pub brier: f64,
}

/// 95 % bootstrap intervals over the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Intervals {
    /// Interval of the loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<[f64; 2]>,
    /// Interval of the accuracy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<[f64; 2]>,
    /// Interval of the negative log-likelihood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll: Option<[f64; 2]>,
    /// Interval of the calibration error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece: Option<[f64; 2]>,
    /// Interval of Brier's score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brier: Option<[f64; 2]>,
    /// Interval of the area under the ROC curve of error detection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auroc: Option<[f64; 2]>,
    /// Interval of the area under the risk-coverage curve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aurc: Option<[f64; 2]>,
}

/// Scores of one predictor. Scores of choices exist only if rows have choices.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Share of trained tokens that were the most likely one.
    pub token_accuracy: f64,
    /// Mean of the losses of the single draws, nats. It is above `loss`, the loss of their average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draw_loss: Option<f64>,
    /// Share of rows whose most likely choice is the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean negative log-probability of the answer among the choices, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// Expected calibration error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece: Option<f64>,
    /// Expected calibration error of a calibrated model with the same confidences on as many rows; see
    /// [`measures::calibration_error_floor`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece_floor: Option<f64>,
    /// Brier's score, from 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brier: Option<f64>,
    /// Area under the ROC curve when low confidence detects errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auroc: Option<f64>,
    /// The same when the entropy of the average detects errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auroc_entropy: Option<f64>,
    /// The same when the mutual information of the draws, their disagreement, detects errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auroc_mutual_information: Option<f64>,
    /// Area under the risk-coverage curve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aurc: Option<f64>,
    /// Number of adapters whose predictions were averaged: posterior draws, or the members of an ensemble.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draws: Option<usize>,
    /// 95 % bootstrap intervals.
    pub intervals: Intervals,
    /// Scores after temperature scaling with the temperature of `calibrate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibrated: Option<CalibratedScores>,
    /// The reliability diagram: predictions in bins of confidence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reliability: Vec<Bin>,
}

/// The adapters whose predictions are scored.
#[derive(Debug, Clone, Copy)]
pub enum Predictor<'a> {
    /// One adapter.
    One(&'a ActiveAdapter),
    /// The average probabilities of several adapters: of the next token, and of a row's choices.
    Average(&'a [ActiveAdapter]),
}

/// The loss of one example over its trained tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLoss {
    /// Sum of the negative log-likelihoods, nats.
    pub nll: f64,
    /// Number of trained tokens.
    pub n_tokens: usize,
    /// Number of trained tokens that were the most likely token.
    pub n_correct: usize,
}

/// A predictor's losses and predictions for every row.
#[derive(Debug, Clone, Default)]
pub struct Scored {
    /// The loss of every example, in the given order.
    pub losses: Vec<RowLoss>,
    /// Predictions for choices, `[row with choices][adapter]`.
    pub choices: Vec<Vec<Prediction>>,
    /// Sum over the examples of each adapter's own negative log-likelihoods.
    member_nll: Vec<f64>,
    is_average: bool,
}

/// A batch of rows with the choices of those that have some.
struct Asked<'a> {
    sequences: Sequences,
    targets: Vec<(usize, u32)>,
    /// Number of targets that are trained tokens of the rows; those of choices follow.
    n_answers: usize,
    /// The targets of each row's trained tokens.
    of_examples: Vec<Range<usize>>,
    places: Vec<(&'a ChoiceSet, Places)>,
}

impl<'a> Asked<'a> {
    fn new(
        data: &Dataset,
        rows: &[usize],
        choices: &'a ChoiceRows,
        model: &Decoder,
    ) -> Result<Self> {
        let prefixes = !model.depends_on_length();
        let batch = data.batch(rows)?;
        let (mut sequences, mut targets) = (sequences(&batch), batch.targets);
        let n_answers = targets.len();
        let of_examples = batch
            .segments
            .iter()
            .map(|(start, length)| {
                let at = |row| targets.partition_point(|(position, _)| *position < row);
                at(*start)..at(start + length)
            })
            .collect();
        let places = batch
            .examples
            .iter()
            .enumerate()
            .filter_map(|(segment, example)| Some((segment, choices.of(*example)?)))
            .map(|(segment, set)| {
                let places =
                    Places::new(set, (&mut sequences, &mut targets), Some(segment), prefixes);
                (set, places)
            })
            .collect();
        Ok(Self {
            sequences,
            targets,
            n_answers,
            of_examples,
            places,
        })
    }
}

/// A predictor's losses at the targets of a batch, and the loss of each adapter if several are averaged.
struct Passed {
    loss: TaskLoss,
    members: Vec<TaskLoss>,
}

impl Passed {
    /// Appends the losses, in the form that [`Self::read`] takes.
    fn write(&self, into: &mut Vec<u8>) {
        let all = || std::iter::once(&self.loss).chain(&self.members);
        for count in [self.loss.nll.len(), self.members.len()] {
            into.extend((count as u64).to_le_bytes());
        }
        for loss in all() {
            into.extend(loss.nll.iter().flat_map(|nll| nll.to_le_bytes()));
            into.extend(loss.correct.iter().map(|correct| u8::from(*correct)));
        }
    }

    /// Takes one predictor's losses from the front of `bytes`. `None` if there are not enough bytes.
    fn read(bytes: &mut &[u8]) -> Option<Self> {
        let mut take = |n: usize| {
            let (taken, rest) = bytes.split_at_checked(n)?;
            *bytes = rest;
            Some(taken)
        };
        let mut count = || {
            let count = u64::from_le_bytes(*take(8)?.first_chunk()?);
            usize::try_from(count).ok()
        };
        let (n_targets, n_members) = (count()?, count()?);
        let mut loss = || {
            let nll = take(n_targets.checked_mul(4)?)?.as_chunks().0.iter();
            Some(TaskLoss {
                nll: nll.map(|nll| f32::from_le_bytes(*nll)).collect(),
                correct: take(n_targets)?
                    .iter()
                    .map(|correct| *correct != 0)
                    .collect(),
                gradients: None,
            })
        };
        Some(Self {
            loss: loss()?,
            members: (0..n_members).map(|_| loss()).collect::<Option<_>>()?,
        })
    }
}

impl<'a> Predictor<'a> {
    fn adapters(self) -> &'a [ActiveAdapter] {
        match self {
            Self::One(adapter) => std::slice::from_ref(adapter),
            Self::Average(adapters) => adapters,
        }
    }

    /// One forward pass per adapter.
    fn pass(self, batch: &SharedBatch<'_>) -> Result<Passed> {
        match self {
            Self::One(adapter) => Ok(Passed {
                loss: batch.evaluate(adapter)?,
                members: Vec::new(),
            }),
            Self::Average(adapters) => {
                let found = batch.average(adapters)?;
                Ok(Passed {
                    loss: found.loss,
                    members: found.members,
                })
            }
        }
    }
}

/// The rows that are scored.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    /// The data file.
    pub data: &'a Dataset,
    /// Indices of its examples.
    pub rows: &'a [usize],
    /// The choices of those that have some.
    pub choices: &'a ChoiceRows,
}

/// Scores rows with each of `predictors`, and the choices of the rows that have some.
///
/// Batches are divided among `ranks`, and every rank gets all scores: the same bits as of one rank.
///
/// `done` receives the number of rows of every batch that this rank has finished. If it returns an error, scoring ends with this error.
///
/// # Errors
/// Returns an error if a row cannot be read, if the decoder fails, or if a likelihood is not finite.
pub fn score(
    model: &Decoder,
    predictors: &[Predictor<'_>],
    selection: Selection<'_>,
    options: &EvalOptions,
    ranks: &dyn Communicator,
    mut done: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Scored>> {
    let Selection {
        data,
        rows,
        choices,
    } = selection;
    let mut scored: Vec<Scored> = predictors
        .iter()
        .map(|predictor| Scored {
            is_average: matches!(predictor, Predictor::Average(_)),
            ..Scored::default()
        })
        .collect();
    let lengths = data.lengths();
    let lengths: Vec<usize> = rows.iter().map(|row| lengths[*row]).collect();
    let plan = options.batching.plan(&lengths);
    let of_batch = |range: &Range<usize>| lengths[range.clone()].iter().sum();
    let rank_of = balanced(&plan.iter().map(of_batch).collect::<Vec<_>>(), ranks.size());
    let is_own = |rank: usize| rank == ranks.rank();
    let pass = |range: &Range<usize>| -> Result<(Asked<'_>, Vec<Passed>)> {
        let asked = Asked::new(data, &rows[range.clone()], choices, model)?;
        let adapters = predictors.iter().flat_map(|predictor| predictor.adapters());
        let batch = model.shared(&asked.sequences, &asked.targets, adapters)?;
        let passed = predictors.iter().map(|predictor| predictor.pass(&batch));
        let passed = passed.collect::<Result<_>>()?;
        Ok((asked, passed))
    };
    // With several ranks, each makes its passes first, and gets those of the others.
    let mut exchanged = Vec::new();
    if ranks.size() > 1 {
        let mut own = Vec::new();
        for (range, _) in plan.iter().zip(&rank_of).filter(|(_, rank)| is_own(**rank)) {
            pass(range)?
                .1
                .iter()
                .for_each(|passed| passed.write(&mut own));
            done(range.len())?;
        }
        exchanged = ranks.all_gather(&own);
    }
    let mut exchanged: Vec<&[u8]> = exchanged.iter().map(Vec::as_slice).collect();
    for (range, rank) in plan.into_iter().zip(rank_of) {
        let (asked, passed) = match exchanged.get_mut(rank) {
            None => pass(&range)?,
            Some(bytes) => {
                let passed = predictors.iter().map(|_| Passed::read(bytes));
                let passed: Option<Vec<_>> = passed.collect();
                let passed = passed.context("a rank sent fewer losses than it has batches")?;
                (
                    Asked::new(data, &rows[range.clone()], choices, model)?,
                    passed,
                )
            }
        };
        for (passed, scored) in passed.iter().zip(&mut scored) {
            let Passed { loss, members } = passed;
            scored.losses.extend(asked.of_examples.iter().map(|range| {
                let nll = loss.nll[range.clone()].iter().map(|v| f64::from(*v));
                let correct = loss.correct[range.clone()].iter();
                RowLoss {
                    nll: nll.sum(),
                    n_tokens: range.len(),
                    n_correct: correct.filter(|c| **c).count(),
                }
            }));
            scored.member_nll.resize(members.len(), 0.0);
            for (total, member) in scored.member_nll.iter_mut().zip(members) {
                let answers = member.nll[..asked.n_answers].iter();
                *total += answers.map(|v| f64::from(*v)).sum::<f64>();
            }
            let each = match members.is_empty() {
                true => std::slice::from_ref(loss),
                false => members,
            };
            for (set, places) in &asked.places {
                let row = scored.choices.len();
                let of_row = each.iter().map(|loss| {
                    let log_likelihoods = places.log_likelihoods(&loss.nll);
                    prediction(set, &log_likelihoods, options.normalisation, row)
                });
                scored.choices.push(of_row.collect::<Result<_, _>>()?);
            }
        }
        if ranks.size() == 1 {
            done(range.len())?;
        }
    }
    for scored in &scored {
        if !scored.loss().is_finite() {
            bail!(not_finite("the loss"));
        }
    }
    Ok(scored)
}

/// Mean negative log-likelihood of the trained tokens of `losses`.
fn mean_loss(losses: &[RowLoss]) -> f64 {
    let n_tokens: usize = losses.iter().map(|row| row.n_tokens).sum();
    losses.iter().map(|row| row.nll).sum::<f64>() / n_tokens.max(1) as f64
}

impl Scored {
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub fn loss(&self) -> f64 {
        mean_loss(&self.losses)
    }

    /// The prediction of every row with choices: the adapter's, or the average of the adapters'.
    pub fn predictions(&self) -> Vec<Prediction> {
        let rows = self.choices.iter();
        rows.filter_map(|of_row| Prediction::average(of_row))
            .collect()
    }

    /// All scores, and with a `temperature` also the scores after temperature scaling.
    pub fn scores(&self, options: &EvalOptions, temperature: Option<f64>) -> Scores {
        let n_tokens: usize = self.losses.iter().map(|row| row.n_tokens).sum();
        let n_correct: usize = self.losses.iter().map(|row| row.n_correct).sum();
        let tokens = n_tokens.max(1) as f64;
        let n_members = self.member_nll.len();
        let members = self.member_nll.iter().sum::<f64>() / (n_members.max(1) as f64 * tokens);
        let loss = self.loss();
        let mut scores = Scores {
            loss,
            perplexity: loss.exp(),
            token_accuracy: n_correct as f64 / tokens,
            draw_loss: self.is_average.then_some(members),
            draws: self.is_average.then_some(n_members),
            ..Scores::default()
        };
        scores.intervals.loss = bootstrap(&self.losses, |rows| Some(mean_loss(rows)));
        let predictions = self.predictions();
        if predictions.is_empty() {
            return scores;
        }
        let (outcomes, bins) = (measures::outcomes(&predictions), options.ece_bins);
        let calibration_error = |rows: &[Outcome]| measures::expected_calibration_error(rows, bins);
        scores.accuracy = measures::accuracy(&outcomes);
        scores.nll = measures::negative_log_likelihood(&predictions);
        scores.ece = calibration_error(&outcomes);
        scores.ece_floor = measures::calibration_error_floor(&outcomes, bins);
        scores.brier = measures::brier(&predictions);
        scores.auroc = measures::error_detection_auroc(&outcomes);
        scores.aurc = measures::risk_coverage_area(&outcomes);
        scores.reliability = measures::reliability(&outcomes, bins);
        if self.is_average {
            let entropies: Vec<_> = self
                .choices
                .iter()
                .filter_map(|row| entropies(row))
                .collect();
            let correct = || outcomes.iter().map(|o| !o.correct);
            let predictive = entropies.iter().map(|(predictive, _)| *predictive);
            scores.auroc_entropy = measures::auroc(predictive.zip(correct()));
            let mutual = entropies
                .iter()
                .map(|(predictive, expected)| predictive - expected);
            scores.auroc_mutual_information = measures::auroc(mutual.zip(correct()));
        }
        // Resample one number per row, not its whole distribution.
        let nll: Vec<f64> = predictions.iter().map(Prediction::nll).collect();
        let squares: Vec<f64> = predictions.iter().map(Prediction::brier).collect();
        let mean = |values: &[f64]| Some(values.iter().sum::<f64>() / values.len() as f64);
        scores.intervals = Intervals {
            accuracy: bootstrap(&outcomes, measures::accuracy),
            nll: bootstrap(&nll, mean),
            ece: bootstrap(&outcomes, calibration_error),
            brier: bootstrap(&squares, mean),
            auroc: bootstrap(&outcomes, measures::error_detection_auroc),
            aurc: bootstrap(&outcomes, measures::risk_coverage_area),
            ..scores.intervals
        };
        scores.calibrated = temperature.and_then(|temperature| {
            let tempered = tempered(&predictions, temperature);
            Some(CalibratedScores {
                temperature,
                nll: measures::negative_log_likelihood(&tempered)?,
                ece: calibration_error(&measures::outcomes(&tempered))?,
                brier: measures::brier(&tempered)?,
            })
        });
        scores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_row_once_and_no_more_than_they_may() {
        let lengths = [5, 3, 9, 1, 1, 1, 20, 2];
        let by_tokens = Batching::Tokens(10).plan(&lengths);
        assert_eq!(by_tokens, [0..2, 2..4, 4..6, 6..7, 7..8]);
        assert_eq!(Batching::Rows(3).plan(&lengths), [0..3, 3..6, 6..8]);
        assert_eq!(Batching::Rows(0).plan(&[1, 1]), [0..1, 1..2]);
        assert!(Batching::new(None).plan(&[]).is_empty());
    }
}
