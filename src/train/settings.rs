//! What the training loop is told.

use super::metrics::Sinks;
use super::optimizer::AdamWSettings;
use super::schedule::{Schedule, Shape};
use crate::data::{BatchOptions, Batches, Cursor, Dataset};

/// Everything the loop is told.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    /// Seed of noise, initial values, order and dropout.
    pub seed: u64,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Optimiser steps; takes precedence over epochs.
    pub max_steps: Option<u64>,
    /// Rows (or packs) a micro-batch.
    pub batch_size: usize,
    /// Tokens a pack holds, where rows are packed.
    pub pack_tokens: Option<usize>,
    /// Micro-batches an optimiser step; they share one posterior draw.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate of A and B.
    pub learning_rate: f64,
    /// Peak learning rate of the variational parameters.
    pub variational_learning_rate: f64,
    /// Shape of the schedule.
    pub shape: Shape,
    /// Share of the steps spent warming up.
    pub warmup_ratio: f64,
    /// Steps spent warming up; takes precedence over the share.
    pub warmup_steps: Option<u64>,
    /// Share of the steps over which the weight of the divergences rises to its value.
    pub kl_warmup_ratio: f64,
    /// AdamW's constants.
    pub adamw: AdamWSettings,
    /// Largest gradient norm; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Dropout on the adapters' inputs.
    pub lora_dropout: f64,
    /// Recompute activations in the backward pass.
    pub gradient_checkpointing: bool,
    /// Steps between metrics lines.
    pub logging_steps: u64,
    /// Steps between evaluations; 0 for only at the end.
    pub eval_steps: u64,
    /// Steps between checkpoints; 0 for none.
    pub save_steps: u64,
    /// Checkpoints kept.
    pub save_total_limit: usize,
    /// Whether the best adapter by validation loss is what remains at the end.
    pub load_best_model_at_end: bool,
    /// Evaluations without improvement before the run ends; 0 for never.
    pub early_stopping_patience: u64,
    /// Where metrics go.
    pub sinks: Sinks,
}

impl TrainSettings {
    /// How training rows are put into batches.
    pub(super) fn batch_options(&self) -> BatchOptions {
        BatchOptions {
            batch_size: self.batch_size,
            pack_tokens: self.pack_tokens,
            shuffle_seed: Some(self.seed),
        }
    }

    /// Optimiser steps of a whole run over `train`.
    pub fn total_steps(&self, train: &Dataset) -> u64 {
        self.max_steps.unwrap_or_else(|| {
            Batches::new(train, self.batch_options(), Cursor::default())
                .n_steps(self.num_train_epochs, self.gradient_accumulation_steps)
        })
    }

    /// The learning rate's schedule over `total_steps`.
    pub(super) fn schedule(&self, total_steps: u64) -> Schedule {
        match self.warmup_steps {
            Some(steps) => Schedule {
                shape: self.shape,
                warmup_steps: steps,
                total_steps,
            },
            None => Schedule::new(self.shape, self.warmup_ratio, total_steps),
        }
    }

    /// The schedule of the divergences' weight over `total_steps`.
    pub(super) fn kl_schedule(&self, total_steps: u64) -> Schedule {
        Schedule::new(Shape::Constant, self.kl_warmup_ratio, total_steps)
    }
}
