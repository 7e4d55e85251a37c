//! Sums over the steps since the last `train` line of the metrics.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::checkpoint::Progress;
use super::metrics::{TrainRecord, peak_memory_bytes};
use super::state::RegulariserMeans;

/// What one optimiser step measured.
#[derive(Debug, Clone)]
pub(super) struct StepResult {
    pub(super) task_loss: f64,
    pub(super) regulariser: RegulariserMeans,
    pub(super) grad_norm: f64,
    pub(super) tokens: u64,
    pub(super) trained_tokens: u64,
}

/// Sums over steps; part of a checkpoint, so that a resumed run prints the means an undisturbed one prints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    steps: u64,
    task_loss: f64,
    regulariser: RegulariserMeans,
    grad_norm: f64,
    tokens: u64,
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
    pub(super) fn stored(&self) -> Self {
        Self {
            seconds: self.elapsed(),
            since: None,
            ..self.clone()
        }
    }

    pub(super) fn add(&mut self, result: &StepResult) {
        self.steps += 1;
        self.task_loss += result.task_loss;
        self.regulariser.dirichlet += result.regulariser.dirichlet;
        self.regulariser.wishart += result.regulariser.wishart;
        self.regulariser.gaussian += result.regulariser.gaussian;
        self.regulariser.weighted_kl += result.regulariser.weighted_kl;
        self.regulariser.sum_of_squares += result.regulariser.sum_of_squares;
        self.grad_norm += result.grad_norm;
        self.tokens += result.tokens;
    }

    /// The means as a line of the metrics.
    pub(super) fn record(
        &self,
        progress: &Progress,
        epoch: f64,
        learning_rate: f64,
        wall_s: f64,
    ) -> TrainRecord {
        let mean = |sum: f64| sum / self.steps.max(1) as f64;
        TrainRecord {
            step: progress.step,
            epoch,
            loss: mean(self.task_loss + self.regulariser.total()),
            task_loss: mean(self.task_loss),
            kl_loss: mean(self.regulariser.weighted_kl),
            kl_dirichlet: mean(self.regulariser.dirichlet),
            kl_wishart: mean(self.regulariser.wishart),
            kl_gaussian: mean(self.regulariser.gaussian),
            entropy_loss: mean(self.regulariser.sum_of_squares),
            grad_norm: mean(self.grad_norm),
            learning_rate,
            tokens: progress.tokens,
            trained_tokens: progress.trained_tokens,
            tokens_per_second: self.tokens as f64 / self.elapsed().max(1e-9),
            peak_memory_bytes: peak_memory_bytes(),
            wall_s,
        }
    }

    fn elapsed(&self) -> f64 {
        self.seconds
            + self
                .since
                .map_or(0.0, |since| since.elapsed().as_secs_f64())
    }
}
