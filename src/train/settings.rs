//! Settings of the training loop.

use super::schedule::Schedule;
use crate::config::{RunConfig, TrainConfig};
use crate::data::{BatchOptions, Batches, Cursor, Dataset};

/// All settings of the training loop.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    /// Seed of noise, initial values, order and dropout.
    pub seed: u64,
    /// Dropout on the adapters' inputs.
    pub lora_dropout: f64,
    /// How training rows are put into batches.
    pub batches: BatchOptions,
    /// Batches per optimiser step, those of all ranks together.
    pub micro_batches: usize,
    /// The table `[train]` of the configuration.
    pub train: TrainConfig,
}

impl TrainSettings {
    /// The settings of `run` on one rank, with sequences of at most `max_seq_length` tokens.
    pub fn new(run: &RunConfig, max_seq_length: usize) -> Self {
        Self {
            seed: run.seed,
            lora_dropout: run.lora.lora_dropout,
            batches: run.batch_options(max_seq_length),
            micro_batches: run.train.gradient_accumulation_steps.max(1),
            train: run.train.clone(),
        }
    }

    /// Number of optimiser steps of a whole run over `train`.
    pub fn total_steps(&self, train: &Dataset) -> u64 {
        self.train.max_steps.unwrap_or_else(|| {
            Batches::new(train, self.batches, Cursor::default()).n_steps(
                self.train.num_train_epochs.unwrap_or_default(),
                self.micro_batches,
            )
        })
    }

    /// The learning rate's schedule over `total_steps`.
    pub(super) fn schedule(&self, total_steps: u64) -> Schedule {
        let shape = self.train.lr_scheduler_type;
        match self.train.warmup_steps {
            Some(warmup_steps) => Schedule {
                shape,
                warmup_steps,
                total_steps,
            },
            None => Schedule::new(shape, self.train.warmup_ratio, total_steps),
        }
    }
}
