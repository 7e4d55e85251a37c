//! Batches of concatenated sequences without padding. Only the seed and the epoch decide their order.

use std::collections::VecDeque;

use monteclora_converters::Error;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::{Deserialize, Serialize};

use super::{dataset::Dataset, example::Example};

/// Sequences laid end to end. Attention is causal within a segment and never crosses one, and positions restart in each
/// segment. So nothing is padded, and a sequence gives the same result whatever else is in the batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// Position of each token within its segment, `[T]`.
    pub positions: Vec<u32>,
    /// `(start, length)` of each sequence in `tokens`, in order. Together they cover all tokens.
    pub segments: Vec<(usize, usize)>,
    /// `(position in tokens, the token that comes next)` for every position that carries loss, ascending.
    pub targets: Vec<(usize, u32)>,
    /// The data set's index of each segment's example.
    pub examples: Vec<usize>,
}

impl Batch {
    /// Appends an example as a segment of its own.
    pub fn push(&mut self, example_idx: usize, example: &Example) {
        let start = self.tokens.len();
        let n_tokens = example.input_ids.len();
        self.tokens.extend_from_slice(&example.input_ids);
        self.positions.extend((0u32..).take(n_tokens));
        self.segments.push((start, n_tokens));
        self.examples.push(example_idx);
        let next = example.input_ids.iter().zip(&example.loss_mask).skip(1);
        for (idx, (&token, _)) in next.enumerate().filter(|(_, (_, trained))| **trained) {
            self.targets.push((start + idx, token));
        }
    }
}

impl Dataset {
    /// Several examples as one batch.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn batch(&self, example_indices: &[usize]) -> Result<Batch, Error> {
        let mut batch = Batch::default();
        for &idx in example_indices {
            batch.push(idx, &self.example(idx)?);
        }
        Ok(batch)
    }
}

/// Number of packs that may still receive an example.
const OPEN_PACKS: usize = 64;

/// Options that decide how examples are put into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// Examples per batch, or packs per batch if `pack_tokens` is set. At least 1.
    pub batch_size: usize,
    /// Largest number of tokens per pack (`max_seq_length`, as in TRL); `None` if packing is off.
    pub pack_tokens: Option<usize>,
    /// The seed of the order; `None` keeps the file's order, for evaluation.
    pub shuffle_seed: Option<u64>,
}

/// The position of the next batch of a run; enough to resume the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Number of batches of this epoch that were already returned.
    pub batch: usize,
}

/// A permutation of `0..n` by Fisher-Yates with ChaCha8. It depends only on `n`, `seed` and `epoch`.
///
/// An index below `k` is the high word of a 64-bit draw times `k`. The bias is below `k / 2^64`, and the number of
/// draws is fixed.
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(epoch);
    let mut order: Vec<usize> = (0..n).collect();
    for idx in (1..n).rev() {
        let product = u128::from(generator.next_u64()) * (idx as u128 + 1);
        // The high word is at most idx, a usize.
        order.swap(idx, (product >> 64) as usize);
    }
    order
}

/// The batches of one epoch, as indices of examples. Every example occurs exactly once; the last batch may be smaller.
pub fn epoch_plan(lengths: &[usize], options: &BatchOptions, epoch: u64) -> Vec<Vec<usize>> {
    let order = match options.shuffle_seed {
        Some(seed) => epoch_order(lengths.len(), seed, epoch),
        None => (0..lengths.len()).collect(),
    };
    let batch_size = options.batch_size.max(1);
    match options.pack_tokens {
        None => order.chunks(batch_size).map(<[usize]>::to_vec).collect(),
        Some(capacity) => packs(lengths, order, capacity)
            .chunks(batch_size)
            .map(<[Vec<usize>]>::concat)
            .collect(),
    }
}

/// Packs of at most `capacity` tokens by online best fit. Each example, in the given order, goes to the fullest open
/// pack that still has room; among equals, to the oldest. Examples are never cut. An example of more than `capacity`
/// tokens is a pack of its own.
///
/// Only [`OPEN_PACKS`] are open at a time; the oldest is closed first. Sorting all examples by length, or keeping every
/// pack open, would fill packs a little better, but then length and not the seed would decide which examples meet in a
/// step.
fn packs(lengths: &[usize], order: Vec<usize>, capacity: usize) -> Vec<Vec<usize>> {
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut open: VecDeque<(usize, usize)> = VecDeque::with_capacity(OPEN_PACKS + 1); // (pack, room), oldest first
    for idx in order {
        let length = lengths[idx];
        let tightest = open
            .iter_mut()
            .filter(|(_, room)| length <= *room)
            .min_by_key(|(pack, room)| (*room, *pack));
        match tightest {
            Some((pack, room)) => {
                packs[*pack].push(idx);
                *room -= length;
            }
            None => {
                open.push_back((packs.len(), capacity.saturating_sub(length)));
                packs.push(vec![idx]);
                if open.len() > OPEN_PACKS {
                    open.pop_front();
                }
            }
        }
    }
    packs
}

/// The fraction of the packs' capacity that an epoch in file order fills, in (0, 1]; 1 if there are no packs.
pub fn pack_efficiency(lengths: &[usize], capacity: usize) -> f64 {
    let n_packs = packs(lengths, (0..lengths.len()).collect(), capacity).len();
    let n_tokens: usize = lengths.iter().sum();
    match n_packs * capacity {
        0 => 1.0,
        room => (n_tokens as f64 / room as f64).min(1.0),
    }
}

/// The endless sequence of training batches, starting at any cursor.
#[derive(Debug)]
pub struct Batches<'a> {
    dataset: &'a Dataset,
    lengths: Vec<usize>,
    options: BatchOptions,
    plan: Vec<Vec<usize>>,
    cursor: Cursor,
}

impl<'a> Batches<'a> {
    /// The batches from `cursor` on.
    pub fn new(dataset: &'a Dataset, options: BatchOptions, cursor: Cursor) -> Self {
        let lengths = dataset.lengths();
        let plan = epoch_plan(&lengths, &options, cursor.epoch);
        Self {
            dataset,
            lengths,
            options,
            plan,
            cursor,
        }
    }

    /// The position of the next batch.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The number of batches in the current epoch. With packing it may differ between epochs.
    pub fn n_batches(&self) -> usize {
        self.plan.len()
    }

    /// The number of batches in any epoch.
    pub fn n_batches_in(&self, epoch: u64) -> usize {
        if self.options.pack_tokens.is_none() {
            return self.lengths.len().div_ceil(self.options.batch_size.max(1));
        }
        epoch_plan(&self.lengths, &self.options, epoch).len()
    }

    /// The number of optimiser steps in `epochs`, which may end within an epoch. Accumulation never crosses the end of
    /// an epoch, so an epoch of `n` batches has `ceil(n / accumulation)` steps.
    pub fn n_steps(&self, epochs: f64, accumulation: usize) -> u64 {
        let steps_in = |epoch| self.n_batches_in(epoch).div_ceil(accumulation.max(1)) as u64;
        let whole = epochs.max(0.0).floor();
        let steps: u64 = if self.options.pack_tokens.is_none() {
            steps_in(0).saturating_mul(whole as u64)
        } else {
            (0..whole as u64).map(steps_in).sum()
        };
        let rest = epochs.max(0.0) - whole;
        if rest > 0.0 {
            steps + (rest * steps_in(whole as u64) as f64).ceil() as u64
        } else {
            steps
        }
    }

    /// Whether the next batch is the first of its epoch.
    pub fn at_epoch_start(&self) -> bool {
        self.cursor.batch == 0 || self.cursor.batch >= self.plan.len()
    }

    /// Returns the next batch. After the last batch of an epoch comes the first of the next.
    ///
    /// # Errors
    /// As [`Dataset::row`].
    pub fn next_batch(&mut self) -> Result<Batch, Error> {
        let examples = self.next_examples();
        self.dataset.batch(&examples)
    }

    /// The indices of the next batch's examples, which are not read.
    pub fn next_examples(&mut self) -> Vec<usize> {
        if self.cursor.batch >= self.plan.len() {
            self.cursor = Cursor {
                epoch: self.cursor.epoch + 1,
                batch: 0,
            };
            self.plan = epoch_plan(&self.lengths, &self.options, self.cursor.epoch);
        }
        self.cursor.batch += 1;
        self.plan[self.cursor.batch - 1].clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::{
        example::{EncodeOptions, Encoder, Overlong, Remedies, TrainOn},
        test_support::{tiny_llama, write_temp},
        tokenizer::Tokenizer,
    };

    #[test]
    fn a_batch_holds_sequences_end_to_end() {
        let mut batch = Batch::default();
        let mask = |text: &str| text.chars().map(|c| c == '1').collect();
        batch.push(
            7,
            &Example {
                input_ids: vec![10, 11, 12],
                loss_mask: mask("101"),
            },
        );
        batch.push(
            3,
            &Example {
                input_ids: vec![20, 21],
                loss_mask: mask("11"),
            },
        );
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.segments, [(0, 3), (3, 2)]);
        assert_eq!(batch.examples, [7, 3]);
        // The first token of a segment is never a target, and no target crosses into the next segment.
        assert_eq!(batch.targets, [(1, 12), (3, 21)]);
    }

    #[test]
    fn the_order_is_fixed_by_seed_and_epoch() {
        assert_eq!(epoch_order(8, 42, 0), epoch_order(8, 42, 0));
        assert_ne!(epoch_order(8, 42, 0), epoch_order(8, 42, 1));
        assert_ne!(epoch_order(8, 42, 0), epoch_order(8, 43, 0));
        // Golden value: another order would make a resumed run differ from the one it continues.
        assert_eq!(epoch_order(8, 42, 0), GOLDEN_ORDER);
        assert!(epoch_order(0, 1, 0).is_empty());
    }

    const GOLDEN_ORDER: [usize; 8] = [4, 7, 0, 1, 3, 2, 6, 5];

    #[test]
    fn every_place_is_equally_likely() {
        // 4 places, 4,000 epochs: each count is binomial(4000, 1/4), sd 27.4; 5 sd is passed by chance once in 10^5 runs.
        let mut counts = [[0i32; 4]; 4];
        for epoch in 0..4000 {
            for (place, item) in epoch_order(4, 7, epoch).into_iter().enumerate() {
                counts[place][item] += 1;
            }
        }
        for count in counts.as_flattened() {
            assert!((count - 1000).abs() < 137, "{counts:?}");
        }
    }

    #[test]
    fn packs_are_nearly_full() {
        // Lengths as in chat data: many short, few long.
        let lengths: Vec<usize> = epoch_order(5000, 1, 0)
            .into_iter()
            .map(|idx| 20 + (idx * idx) / 30_000)
            .collect();
        let efficiency = pack_efficiency(&lengths, 1024);
        assert!(efficiency > 0.98, "{efficiency}");
        assert_eq!(pack_efficiency(&[5, 6, 5, 4], 10), 1.0);
        assert_eq!(pack_efficiency(&[], 10), 1.0);
    }

    #[test]
    fn an_example_goes_where_it_fits_best() {
        let fits = |lengths: &[usize]| packs(lengths, (0..lengths.len()).collect(), 10);
        assert_eq!(fits(&[5, 7, 3, 5]), [vec![0, 3], vec![1, 2]]);
        assert_eq!(fits(&[6, 6, 4]), [vec![0, 2], vec![1]]);
        assert_eq!(fits(&[12, 1]), [vec![0], vec![1]]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_plan_holds_every_example_once(
            lengths in prop::collection::vec(1usize..50, 0..60),
            batch_size in 1usize..6,
            packing in any::<bool>(),
            seed in prop::option::of(any::<u64>()),
            epoch in 0u64..5,
        ) {
            let options = BatchOptions { batch_size, pack_tokens: packing.then_some(64), shuffle_seed: seed };
            let plan = epoch_plan(&lengths, &options, epoch);
            let mut all = plan.concat();
            if seed.is_none() && !packing {
                prop_assert!(all.is_sorted());
            }
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            for batch in &plan {
                prop_assert!(!batch.is_empty());
                let n_tokens: usize = batch.iter().map(|idx| lengths[*idx]).sum();
                if packing {
                    prop_assert!(n_tokens <= 64 * batch_size);
                } else {
                    prop_assert!(batch.len() <= batch_size);
                }
            }
        }
    }

    fn dataset(n_rows: usize) -> (tempfile::TempDir, Dataset) {
        let rows: String = (0..n_rows)
            .map(|idx| format!("{{\"text\":\"{}\"}}\n", "x".repeat(idx % 7 + 1)))
            .collect();
        let (dir, path) = write_temp(&rows);
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template: true,
            max_seq_length: 16,
            overlong: Overlong::Error,
            remedies: Remedies::Keys,
        };
        let tokenizer = Tokenizer::from_dir(&tiny_llama()).expect("loads");
        let encoder = std::sync::Arc::new(Encoder::new(tokenizer, None, options));
        (dir, Dataset::open(&path, None, encoder).expect("opens"))
    }

    #[test]
    fn a_run_continues_from_its_cursor() {
        let (_dir, dataset) = dataset(23);
        for pack_tokens in [None, Some(16)] {
            let options = BatchOptions {
                batch_size: 2,
                pack_tokens,
                shuffle_seed: Some(5),
            };
            let mut whole = Batches::new(&dataset, options, Cursor::default());
            let batches: Vec<_> = (0..40)
                .map(|_| whole.next_batch().expect("reads"))
                .collect();
            for stop in [0, 1, 7, 11, 12, 13, 29] {
                let mut first = Batches::new(&dataset, options, Cursor::default());
                for _ in 0..stop {
                    first.next_batch().expect("reads");
                }
                let mut second = Batches::new(&dataset, options, first.cursor());
                for expected in &batches[stop..] {
                    assert_eq!(&second.next_batch().expect("reads"), expected, "{stop}");
                }
            }
        }
    }

    #[test]
    fn steps_are_counted_by_epoch() {
        let (_dir, dataset) = dataset(23);
        let options = BatchOptions {
            batch_size: 4,
            pack_tokens: None,
            shuffle_seed: Some(5),
        };
        let batches = Batches::new(&dataset, options, Cursor::default());
        assert_eq!(batches.n_batches(), 6);
        assert!(batches.at_epoch_start());
        assert_eq!(batches.n_steps(1.0, 1), 6);
        assert_eq!(batches.n_steps(2.0, 4), 4);
        assert_eq!(batches.n_steps(0.5, 1), 3);
        assert_eq!(batches.n_steps(1.5, 4), 3);
        let packed = BatchOptions {
            batch_size: 1,
            pack_tokens: Some(16),
            shuffle_seed: Some(5),
        };
        let batches = Batches::new(&dataset, packed, Cursor::default());
        let counted: usize = (0..3).map(|epoch| batches.n_batches_in(epoch)).sum();
        assert_eq!(batches.n_steps(3.0, 1), counted as u64);
    }
}
