//! What passes without gradients over one batch have in common when only the adapter differs.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;
use monteclora_adapters::Result;
use monteclora_adapters::device::{has_loops, to_device};
use monteclora_converters::architecture::Rope;

use super::adapter::ActiveAdapter;
use super::block::Block;
use super::decoder::{Decoder, Sequences, TaskLoss, on_pool, split};
use super::merge::Merged;
use super::parts::Pass;
use super::parts::attention::Masks;
use super::parts::rotary::Rotation;

/// A batch with targets, for passes without gradients by several adapters. What the passes share is computed once: a
/// beginning that several sequences have in common, and the blocks below the lowest one that any of the adapters changes.
#[derive(Debug)]
pub struct SharedBatch<'a> {
    pub(super) decoder: &'a Decoder,
    /// The tokens that the targets depend on.
    sequences: Cow<'a, Sequences>,
    rotations: Vec<Rotation>,
    /// The rows whose keys and values the segments read. `None` for all rows.
    keys: Option<Tensor>,
    /// The rows that targets have, each once, and the place of each target's row among them. `None` without targets.
    wanted: Option<(Tensor, Tensor)>,
    /// The tokens that the targets should predict.
    pub(super) labels: Vec<u32>,
    /// Number of blocks that are shared, from the lowest on. The last block is never shared: few of its rows may be wanted.
    n_shared: usize,
    /// Hidden states after these blocks, `[tokens, hidden]`.
    below: Tensor,
}

impl Decoder {
    /// Prepares passes of `adapters` at `targets`. A target is a row of `sequences` and the token that it should predict.
    /// Common beginnings are merged, and what no target depends on is left out, unless a rotation may depend on the length of
    /// its sequence. The batch takes other adapters, too, but shares nothing with one that changes a lower block.
    ///
    /// # Errors
    /// Returns an error of candle.
    pub fn shared<'a, 'b>(
        &'a self,
        sequences: &'a Sequences,
        targets: &[(usize, u32)],
        adapters: impl IntoIterator<Item = &'b ActiveAdapter>,
    ) -> Result<SharedBatch<'a>> {
        let n_below = adapters.into_iter().map(|adapter| self.n_below(adapter));
        let n_below = n_below.min().unwrap_or(0);
        on_pool(|| self.shared_by(sequences, targets, n_below))
    }

    fn shared_by<'a>(
        &'a self,
        sequences: &'a Sequences,
        targets: &[(usize, u32)],
        n_below: usize,
    ) -> Result<SharedBatch<'a>> {
        let (mut rows, labels) = split(targets);
        let longest = sequences.segments.iter().map(|s| s.query_len).max();
        let mut thresholds = self.config.ropes.iter().filter_map(Rope::threshold);
        let is_fixed = thresholds.all(|threshold| longest <= Some(threshold));
        let merged = (is_fixed && !rows.is_empty()).then(|| Merged::new(sequences, &rows));
        let on_device = |rows: Vec<u32>| {
            let n_rows = rows.len();
            to_device(rows, n_rows, &self.device)
        };
        let (sequences, keys) = match merged.flatten() {
            None => (Cow::Borrowed(sequences), None),
            Some(merged) => {
                for row in &mut rows {
                    *row = merged.rows[*row as usize];
                }
                (Cow::Owned(merged.sequences), Some(merged.keys))
            }
        };
        let mut distinct = rows.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let place = |row: &u32| distinct.partition_point(|other| other < row) as u32;
        let places: Vec<u32> = rows.iter().map(place).collect();
        let wanted = match distinct.is_empty() {
            true => None,
            false => Some((on_device(distinct)?, on_device(places)?)),
        };
        let mut batch = SharedBatch {
            decoder: self,
            rotations: self.rotations(&sequences)?,
            keys: keys.map(on_device).transpose()?,
            wanted,
            labels,
            n_shared: 0,
            below: self.embedding.forward(&sequences.tokens)?,
            sequences,
        };
        let n_shared = n_below.min(self.blocks.len().saturating_sub(1));
        if n_shared > 0 && batch.wanted.is_some() {
            let base = ActiveAdapter::default();
            batch.below = batch.through(0..n_shared, batch.below.clone(), &base)?;
            batch.n_shared = n_shared;
        }
        // Another thread may read what this one has written.
        if !has_loops(&self.device) {
            self.device.synchronize()?;
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
        let Some((_, places)) = &self.wanted else {
            return Ok(self.below.narrow(0, 0, 0)?);
        };
        let (first, x) = match self.decoder.n_below(adapter) < self.n_shared {
            true => (0, (self.decoder.embedding).forward(&self.sequences.tokens)?),
            false => (self.n_shared, self.below.clone()),
        };
        let x = self.through(first..self.decoder.blocks.len(), x, adapter)?;
        Ok(x.index_select(places, 0)?)
    }

    /// Takes the hidden states of all rows through some of the blocks. After the last block of all, only the wanted rows are
    /// left, each once.
    fn through(
        &self,
        range: Range<usize>,
        mut x: Tensor,
        adapter: &ActiveAdapter,
    ) -> Result<Tensor> {
        let blocks = &self.decoder.blocks;
        let pass = Pass {
            rotations: &self.rotations,
            segments: &self.sequences.segments,
            keys: self.keys.as_ref(),
            masks: &Masks::default(),
            adapter,
            dropout: None,
        };
        for index in range {
            let wanted = self.wanted.as_ref().map(|(rows, _)| rows);
            let wanted = wanted.filter(|_| index + 1 == blocks.len());
            x = blocks[index].forward_at(&x, &pass, wanted)?;
        }
        Ok(x)
    }
}
