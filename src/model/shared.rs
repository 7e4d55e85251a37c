//! What passes without gradients over one batch have in common when only the adapter differs.

use std::borrow::Cow;

use candle_core::Tensor;
use monteclora_adapters::Result;
use monteclora_adapters::device::to_device;
use monteclora_converters::architecture::Rope;

use super::adapter::ActiveAdapter;
use super::block::Block;
use super::decoder::{Decoder, Sequences, TaskLoss, on_pool, split};
use super::merge::Merged;

/// A batch with targets, for passes without gradients by several adapters. What the passes share is computed once: a
/// beginning that several sequences have in common, and the blocks below the lowest one that any of the adapters changes.
#[derive(Debug)]
pub struct SharedBatch<'a> {
    pub(super) decoder: &'a Decoder,
    /// The tokens that the targets depend on.
    sequences: Cow<'a, Sequences>,
    /// The rows whose keys and values the segments read. `None` for all rows.
    keys: Option<Tensor>,
    /// The row of each target.
    rows: Tensor,
    /// The tokens that the targets should predict.
    pub(super) labels: Vec<u32>,
    /// Number of blocks that none of the adapters changes, from the lowest on.
    n_below: usize,
    /// Hidden states after these blocks.
    below: Tensor,
}

impl Decoder {
    /// Prepares passes of `adapters` at `targets`. A target is a row of `sequences` and the token that it should predict.
    /// Common beginnings are merged, and what no target depends on is left out, unless a rotation may depend on the length of
    /// its sequence.
    ///
    /// # Errors
    /// Returns an error of candle.
    pub fn shared<'a>(
        &'a self,
        sequences: &'a Sequences,
        targets: &[(usize, u32)],
        adapters: impl IntoIterator<Item = &'a ActiveAdapter>,
    ) -> Result<SharedBatch<'a>> {
        let (wanted, labels) = split(targets);
        let longest = sequences.segments.iter().map(|s| s.query_len).max();
        let mut thresholds = self.config.ropes.iter().filter_map(Rope::threshold);
        let is_fixed = thresholds.all(|threshold| longest <= Some(threshold));
        let merged = (is_fixed && !wanted.is_empty()).then(|| Merged::new(sequences, &wanted));
        let on_device = |rows: Vec<u32>| {
            let n_rows = rows.len();
            to_device(rows, n_rows, &self.device)
        };
        let (sequences, keys, rows) = match merged.flatten() {
            None => (Cow::Borrowed(sequences), None, wanted),
            Some(merged) => {
                let rows = wanted.iter().map(|row| merged.rows[*row as usize]);
                let rows = rows.collect();
                (Cow::Owned(merged.sequences), Some(merged.keys), rows)
            }
        };
        let n_below = adapters.into_iter().map(|adapter| self.n_below(adapter));
        let mut batch = SharedBatch {
            decoder: self,
            keys: keys.map(on_device).transpose()?,
            rows: on_device(rows)?,
            labels,
            n_below: 0,
            below: self.embedding.forward(&sequences.tokens)?,
            sequences,
        };
        // The last block is not shared: of its rows, few are wanted.
        let n_below = n_below.min().unwrap_or(0);
        let n_below = n_below.min(self.blocks.len().saturating_sub(1));
        if n_below > 0 {
            let base = ActiveAdapter::default();
            batch.below = on_pool(|| batch.through(0..n_below, batch.below.clone(), &base))?;
            batch.n_below = n_below;
        }
        Ok(batch)
    }

    /// Number of blocks below the lowest one that `adapter` changes.
    fn n_below(&self, adapter: &ActiveAdapter) -> usize {
        let is_adapted = |block: &Block| block.projections().any(|p| adapter.get(p.id).is_some());
        let lowest = self.blocks.iter().position(is_adapted);
        lowest.unwrap_or(self.blocks.len())
    }
}

impl SharedBatch<'_> {
    /// Losses at the targets without gradients.
    ///
    /// # Errors
    /// Returns an error of candle.
    pub fn evaluate(&self, adapter: &ActiveAdapter) -> Result<TaskLoss> {
        on_pool(|| {
            let hidden = self.hidden(adapter)?;
            let loss = (self.decoder.head).losses(&hidden, &self.labels, adapter, None)?;
            Ok(TaskLoss {
                nll: loss.nll,
                correct: loss.correct,
                gradients: None,
            })
        })
    }

    /// Hidden states of the targets before the last norm, `[targets, hidden]`.
    pub(super) fn hidden(&self, adapter: &ActiveAdapter) -> Result<Tensor> {
        let (decoder, n_blocks) = (self.decoder, self.decoder.blocks.len());
        let (first, x) = match decoder.n_below(adapter) < self.n_below {
            true => (0, decoder.embedding.forward(&self.sequences.tokens)?),
            false => (self.n_below, self.below.clone()),
        };
        self.through(first..n_blocks, x, adapter)
    }

    /// Takes hidden states through some of the blocks. After the last block of all, only the targets' rows are left.
    fn through(
        &self,
        blocks: std::ops::Range<usize>,
        x: Tensor,
        adapter: &ActiveAdapter,
    ) -> Result<Tensor> {
        let (keys, all) = (self.keys.as_ref(), &self.decoder.blocks);
        let is_last = blocks.end == all.len();
        let rows = is_last.then_some(&self.rows);
        (self.decoder).through(&all[blocks], x, &self.sequences, keys, adapter, rows)
    }
}
