//! The progress of a run, with the sums over the steps since the last `train` line of the metrics.

use std::time::{Duration, Instant};

use indexmap::IndexMap;
use monteclora_adapters::methods::{Chart, Metric};
use serde::{Deserialize, Serialize};

use crate::data::Cursor;

/// The progress of a run. Together with the adapter and the moments it is enough to continue the run exactly, since
/// noise, order and dropout depend only on the seed and these counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Number of optimiser steps so far.
    pub step: u64,
    /// Position of the next batch.
    pub cursor: Cursor,
    /// Number of tokens so far.
    pub tokens: u64,
    /// Number of tokens with a loss so far.
    pub trained_tokens: u64,
    /// Seconds so far.
    pub wall_s: f64,
    /// Best validation loss and its step.
    pub best: Option<(f64, u64)>,
    /// Number of evaluations since the best one.
    pub evaluations_without_improvement: u64,
    /// Whether the run ended early because the validation loss did not improve.
    pub stopped_early: bool,
    /// Whether the evaluation of this step was interrupted and must be repeated.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Sums since the last `train` line of the metrics.
    pub window: Window,
}

/// The measurements of one optimiser step.
#[derive(Debug, Clone)]
pub(super) struct StepResult {
    pub(super) task_loss: f64,
    /// The method's metrics, as means over the modules.
    pub(super) metrics: Vec<f64>,
    pub(super) grad_norm: f64,
    pub(super) tokens: u64,
    pub(super) trained_tokens: u64,
    /// Seconds of waiting for other ranks, and of the exchange of gradients.
    pub(super) between_ranks: [f64; 2],
}

/// Sums over steps. They are part of a checkpoint, so that a resumed run reports the same means as an uninterrupted
/// one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    pub(super) steps: u64,
    pub(super) task_loss: f64,
    /// Sums of the method's metrics, by [`Metric::stored`].
    regulariser: IndexMap<String, f64>,
    pub(super) grad_norm: f64,
    pub(super) tokens: u64,
    /// Seconds of waiting for other ranks, and of the exchange of gradients, of this process.
    #[serde(skip)]
    pub(super) between_ranks: [f64; 2],
    /// Seconds spent in earlier processes.
    seconds: f64,
    #[serde(skip)]
    since: Option<Instant>,
}

impl Window {
    /// Starts the clock unless it runs.
    pub(super) fn begin(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Excludes `pause` from the measured time.
    pub(super) fn exclude(&mut self, pause: Duration) {
        if let Some(since) = &mut self.since {
            *since += pause;
        }
    }

    /// The window in the form of a checkpoint, with the time so far as a number.
    pub(super) fn stored(&self, metrics: &[Metric]) -> Self {
        let mut window = self.clone();
        (window.seconds, window.since) = (self.elapsed(), None);
        for metric in metrics {
            // Adds the entry with value 0 if the window has no steps yet.
            let _ = window.sum(metric);
        }
        window
    }

    pub(super) fn add(&mut self, result: &StepResult, metrics: &[Metric]) {
        self.steps += 1;
        self.task_loss += result.task_loss;
        let steps = self.steps as f64;
        for (metric, value) in metrics.iter().zip(&result.metrics) {
            let sum = self.sum(metric);
            // A rank is told as it is, not as it was on the way.
            *sum = match metric.chart {
                Chart::Rank => value * steps,
                _ => *sum + value,
            };
        }
        self.grad_norm += result.grad_norm;
        self.tokens += result.tokens;
        for (sum, seconds) in self.between_ranks.iter_mut().zip(result.between_ranks) {
            *sum += seconds;
        }
    }

    fn sum(&mut self, metric: &Metric) -> &mut f64 {
        self.regulariser
            .entry(metric.stored.to_owned())
            .or_default()
    }

    /// Sums of the method's metrics.
    pub(super) fn sums(&self, metrics: &[Metric]) -> Vec<f64> {
        let sum = |metric: &Metric| self.regulariser.get(metric.stored).copied();
        metrics.iter().map(|m| sum(m).unwrap_or_default()).collect()
    }

    /// Seconds of the window's steps.
    pub(super) fn elapsed(&self) -> f64 {
        let since = self.since.map(|since| since.elapsed().as_secs_f64());
        self.seconds + since.unwrap_or_default()
    }
}
