//! How far a run has come, with the sums over the steps since the last `train` line of the metrics.

use std::time::{Duration, Instant};

use indexmap::IndexMap;
use monteclora_adapters::methods::Metric;
use serde::{Deserialize, Serialize};

use crate::data::Cursor;

/// How far a run has come; with the adapter and the moments, all that continues it exactly. Noise, order and dropout are
/// functions of the seed and of these counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps made.
    pub step: u64,
    /// Next batch.
    pub cursor: Cursor,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// Seconds so far.
    pub wall_s: f64,
    /// Best validation loss and its step.
    pub best: Option<(f64, u64)>,
    /// Evaluations since then.
    pub evaluations_without_improvement: u64,
    /// Whether the run ended for lack of improvement.
    pub stopped_early: bool,
    /// Whether the evaluation of this step was broken off and is still to be made.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Sums since the last `train` line of the metrics.
    pub window: Window,
}

/// What one optimiser step measured.
#[derive(Debug, Clone)]
pub(super) struct StepResult {
    pub(super) task_loss: f64,
    /// Means over the modules of what the method reports.
    pub(super) metrics: Vec<f64>,
    pub(super) grad_norm: f64,
    pub(super) tokens: u64,
    pub(super) trained_tokens: u64,
}

/// Sums over steps; part of a checkpoint, so that a resumed run prints the means an undisturbed one prints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    pub(super) steps: u64,
    pub(super) task_loss: f64,
    /// What the method reports, by [`Metric::stored`].
    regulariser: IndexMap<String, f64>,
    pub(super) grad_norm: f64,
    pub(super) tokens: u64,
    /// Seconds spent in earlier processes.
    seconds: f64,
    #[serde(skip)]
    since: Option<Instant>,
}

impl Window {
    /// Starts the clock, unless it runs.
    pub(super) fn begin(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Takes `pause` out of the time measured.
    pub(super) fn exclude(&mut self, pause: Duration) {
        if let Some(since) = &mut self.since {
            *since += pause;
        }
    }

    /// The window as a checkpoint keeps it: the time so far as a number.
    pub(super) fn stored(&self, metrics: &[Metric]) -> Self {
        let mut window = self.clone();
        (window.seconds, window.since) = (self.elapsed(), None);
        for metric in metrics {
            // Before the first step of a window there is none.
            let _ = window.sum(metric);
        }
        window
    }

    pub(super) fn add(&mut self, result: &StepResult, metrics: &[Metric]) {
        self.steps += 1;
        self.task_loss += result.task_loss;
        for (metric, value) in metrics.iter().zip(&result.metrics) {
            *self.sum(metric) += value;
        }
        self.grad_norm += result.grad_norm;
        self.tokens += result.tokens;
    }

    fn sum(&mut self, metric: &Metric) -> &mut f64 {
        self.regulariser
            .entry(metric.stored.to_owned())
            .or_default()
    }

    /// Sums of what the method reports.
    pub(super) fn sums(&self, metrics: &[Metric]) -> Vec<f64> {
        let sum = |metric: &Metric| self.regulariser.get(metric.stored).copied();
        metrics.iter().map(|m| sum(m).unwrap_or_default()).collect()
    }

    /// Seconds of the steps.
    pub(super) fn elapsed(&self) -> f64 {
        let since = self.since.map(|since| since.elapsed().as_secs_f64());
        self.seconds + since.unwrap_or_default()
    }
}
