//! Statistics of a data set, for the dry run and for warnings before training.

use serde::Serialize;

/// The distribution of a count over examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LengthSummary {
    /// Smallest.
    pub min: usize,
    /// The value that at least half of the examples do not exceed.
    pub median: usize,
    /// The value that at least 90 % of the examples do not exceed.
    pub p90: usize,
    /// The value that at least 95 % of the examples do not exceed.
    pub p95: usize,
    /// The value that at least 99 % of the examples do not exceed.
    pub p99: usize,
    /// Largest.
    pub max: usize,
    /// Sum.
    pub total: u64,
}

impl LengthSummary {
    /// Summarises counts in any order; all fields are zero if there are none.
    pub fn of(mut counts: Vec<u32>) -> Self {
        counts.sort_unstable();
        // Nearest rank: the smallest value with at least this share of the values at or below it.
        let rank = |percent: usize| {
            let rank = (counts.len() * percent).div_ceil(100).max(1);
            counts.get(rank - 1).map_or(0, |count| *count as usize)
        };
        Self {
            min: rank(0),
            median: rank(50),
            p90: rank(90),
            p95: rank(95),
            p99: rank(99),
            max: rank(100),
            total: counts.iter().map(|count| u64::from(*count)).sum(),
        }
    }
}

/// Statistics of a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Number of rows.
    pub n_rows: usize,
    /// Number of training sequences.
    pub n_examples: usize,
    /// Number of rows that became several examples, because the template rewrites earlier turns.
    pub n_split_rows: usize,
    /// Number of examples left out because they are too long.
    pub n_dropped: usize,
    /// Number of examples cut to `max_seq_length`.
    pub n_truncated: usize,
    /// Number of examples without a trained end token, from which the model does not learn to stop.
    pub n_without_end: usize,
    /// Tokens per example.
    pub tokens: LengthSummary,
    /// Trained tokens per example.
    pub trained_tokens: LengthSummary,
}

impl Stats {
    pub(super) fn set_lengths(&mut self, tokens: Vec<u32>, trained_tokens: Vec<u32>) {
        self.tokens = LengthSummary::of(tokens);
        self.trained_tokens = LengthSummary::of(trained_tokens);
    }
}

/// The number of examples that have from `from` to `to` tokens, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Fewest tokens.
    pub from: usize,
    /// Most tokens.
    pub to: usize,
    /// Number of examples.
    pub n: usize,
}

/// A histogram of at most 16 bins of equal width, a power of two.
pub fn histogram(lengths: &[usize]) -> Vec<Bin> {
    const MAX_BINS: usize = 16;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut width = 1;
    while longest / width >= MAX_BINS {
        width *= 2;
    }
    let n_bins = if lengths.is_empty() {
        0
    } else {
        longest / width + 1
    };
    let mut bins: Vec<Bin> = (0..n_bins)
        .map(|idx| Bin {
            from: idx * width,
            to: (idx + 1) * width - 1,
            n: 0,
        })
        .collect();
    for length in lengths {
        bins[length / width].n += 1;
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_every_length_once() {
        assert_eq!(histogram(&[]), []);
        let bins = histogram(&[0, 3, 16, 31, 31]);
        assert_eq!(bins.len(), 16);
        assert_eq!((bins[15].from, bins[15].to, bins[15].n), (30, 31, 2));
        assert_eq!(bins.iter().map(|bin| bin.n).sum::<usize>(), 5);
        assert_eq!(histogram(&[1000]).last().map(|bin| bin.to), Some(1023));
    }

    #[test]
    fn ranks_are_the_nearest() {
        let summary = LengthSummary::of((1..=100).rev().collect());
        assert_eq!(
            summary,
            LengthSummary {
                min: 1,
                median: 50,
                p90: 90,
                p95: 95,
                p99: 99,
                max: 100,
                total: 5050
            }
        );
        assert_eq!(
            LengthSummary::of(vec![7]),
            LengthSummary {
                min: 7,
                median: 7,
                p90: 7,
                p95: 7,
                p99: 7,
                max: 7,
                total: 7
            }
        );
        assert_eq!(LengthSummary::of(Vec::new()), LengthSummary::default());
    }
}
