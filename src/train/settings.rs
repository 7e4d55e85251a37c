//! What the training loop is told.

use super::metrics::Sinks;
use super::optimizer::AdamWSettings;
use super::schedule::{Schedule, Shape};
use crate::config::{LrSchedulerType, Method, Report, RunConfig};
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
    /// What a run's configuration says, given the length limit.
    pub fn new(run: &RunConfig, max_seq_length: usize) -> Self {
        let train = &run.train;
        Self {
            seed: run.seed,
            num_train_epochs: train.num_train_epochs.unwrap_or_default(),
            max_steps: train.max_steps,
            batch_size: train.per_device_train_batch_size,
            pack_tokens: run.data.packing.then_some(max_seq_length),
            gradient_accumulation_steps: train.gradient_accumulation_steps,
            learning_rate: train.learning_rate,
            variational_learning_rate: train.variational_learning_rate,
            shape: match train.lr_scheduler_type {
                LrSchedulerType::Linear => Shape::Linear,
                LrSchedulerType::Cosine => Shape::Cosine,
                LrSchedulerType::Constant => Shape::Constant,
            },
            warmup_ratio: train.warmup_ratio,
            warmup_steps: train.warmup_steps,
            kl_warmup_ratio: (run.lora.monteclora.as_ref()).map_or(0.0, |m| m.kl_warmup_ratio),
            adamw: AdamWSettings {
                beta1: train.adam_beta1,
                beta2: train.adam_beta2,
                epsilon: train.adam_epsilon,
                weight_decay: train.weight_decay,
                train_a: run.lora.method != Method::LoraFa,
                loraplus_lr_ratio: train.loraplus_lr_ratio,
            },
            max_grad_norm: train.max_grad_norm,
            lora_dropout: run.lora.lora_dropout,
            gradient_checkpointing: train.gradient_checkpointing,
            logging_steps: train.logging_steps,
            eval_steps: train.eval_steps,
            save_steps: train.save_steps,
            save_total_limit: train.save_total_limit,
            load_best_model_at_end: train.load_best_model_at_end,
            early_stopping_patience: train.early_stopping_patience,
            sinks: Sinks {
                jsonl: train.report_to.contains(&Report::Jsonl),
                tensorboard: train.report_to.contains(&Report::Tensorboard),
            },
        }
    }

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
