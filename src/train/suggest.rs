//! Suggests settings for a data file and a machine.

use anyhow::Result;

use super::Prepared;
use super::memory::{MemoryEstimate, MemoryInputs};
use crate::data::{BatchOptions, Overlong};
use crate::system::available_memory_bytes;

/// Share of the available memory that the estimate of a suggested run may reach.
const SHARE: f64 = 0.7;
/// Number of tokens that an optimiser step should have at least.
const STEP_TOKENS: usize = 2048;
/// Largest suggested sequence length. A note tells if there are longer examples.
const LONGEST: usize = 4096;

/// Settings that suit the data and the machine.
#[derive(Debug)]
pub struct Suggestion {
    /// Length limit, tokens.
    pub max_seq_length: usize,
    /// How longer examples are treated.
    pub overlong: Overlong,
    /// Whether short examples are packed together.
    pub packing: bool,
    /// Number of examples, or packs, per batch.
    pub batch_size: usize,
    /// Number of batches per optimiser step.
    pub accumulation: usize,
    /// Whether blocks are recomputed in the backward pass.
    pub checkpointing: bool,
    /// Passes over the rows.
    pub epochs: usize,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl Suggestion {
    /// Suggests settings for a run over the rows of `prepared` on a model with `limit` positions.
    ///
    /// # Errors
    /// As [`Prepared::modules`].
    pub fn new(prepared: &Prepared, limit: usize) -> Result<Self> {
        let stats = prepared.train.stats();
        let mut notes = Vec::new();
        if stats.n_dropped > 0 {
            notes.push(format!(
                "{} examples are longer than the model's {limit} tokens and will be dropped",
                stats.n_dropped
            ));
        }
        let capped = stats.tokens.max > LONGEST;
        if capped {
            notes.push(format!(
            "the longest example has {} tokens; max_seq_length is set to {LONGEST} and longer ones are dropped",
            stats.tokens.max
        ));
        }
        // The next multiple of 64, so that slightly longer rows still fit.
        let longest = stats.tokens.max.min(LONGEST);
        let longest = longest.next_multiple_of(64).min(limit);
        let tokens = stats.tokens.total as usize;
        let mean = tokens.div_ceil(stats.n_examples.max(1));
        // If most examples are much shorter than the longest, packing makes the sizes of batches more equal.
        let packing = 2 * mean < longest && stats.n_examples >= 16;
        let sites = prepared.modules()?;
        let row_tokens = if packing { longest } else { mean };
        let wanted = STEP_TOKENS.div_ceil(row_tokens).clamp(1, 16);
        let wanted = wanted.next_power_of_two();
        let budget = available_memory_bytes().map(|bytes| (bytes as f64 * SHARE) as u64);
        let mut lengths = prepared.train.lengths();
        for length in &mut lengths {
            *length = (*length).min(longest);
        }
        let fits = |batch_size: usize, gradient_checkpointing: bool| {
            let inputs = MemoryInputs {
                batches: BatchOptions {
                    batch_size,
                    pack_tokens: packing.then_some(longest),
                    ..prepared.settings.batches
                },
                gradient_checkpointing,
                ..prepared.inputs(&sites, &lengths)
            };
            budget.is_none_or(|budget| MemoryEstimate::of(&inputs).peak <= budget)
        };
        let mut batch_size = wanted;
        while batch_size > 1 && !fits(batch_size, false) {
            batch_size /= 2;
        }
        let checkpointing = !fits(batch_size, false);
        if !fits(batch_size, checkpointing) {
            notes.push("by the estimate this will not fit into the available memory; --dry-run tells what to change".to_owned());
        }
        let steps_an_epoch = if packing {
            tokens.div_ceil(longest * wanted)
        } else {
            stats.n_examples.div_ceil(wanted)
        };
        Ok(Self {
            max_seq_length: longest,
            overlong: if capped || stats.n_dropped > 0 {
                Overlong::Drop
            } else {
                Overlong::Error
            },
            packing,
            batch_size,
            accumulation: wanted / batch_size,
            checkpointing,
            // Up to three epochs for small data, until there are about a hundred steps.
            epochs: 100usize.div_ceil(steps_an_epoch.max(1)).clamp(1, 3),
            notes,
        })
    }
}
