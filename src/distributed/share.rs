//! How the rows of an optimiser step are divided among the ranks.

/// The rank that takes each of several items of these lengths, so that the ranks get about the same sum: each item, longest first,
/// goes to the rank that has the least so far. Ties go to the earlier item and the lower rank.
pub fn balanced(lengths: &[usize], n_ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|item| std::cmp::Reverse(lengths[*item]));
    let mut taken = vec![0; n_ranks.max(1)];
    let mut rank_of = vec![0; lengths.len()];
    for item in order {
        let least = (0..taken.len()).min_by_key(|rank| taken[*rank]);
        let rank = least.unwrap_or_default();
        taken[rank] += lengths[item];
        rank_of[item] = rank;
    }
    rank_of
}

/// The micro-batches of `rank` among `n_ranks` for a step with the micro-batches `all` (indices of examples). `length` is the number of
/// tokens of an example.
///
/// The examples are divided among the ranks by [`balanced`]. A rank's examples keep their order, and are split into at most
/// `all.len() / n_ranks` micro-batches, rounded up, of about the same number of tokens: another one of a few tokens would cost a pass
/// over all weights. One rank gets `all`. A rank may get none.
pub fn micro_batches(
    all: Vec<Vec<usize>>,
    length: impl Fn(usize) -> usize,
    rank: usize,
    n_ranks: usize,
) -> Vec<Vec<usize>> {
    if n_ranks <= 1 {
        return all;
    }
    let n_batches = all.len().div_ceil(n_ranks);
    let examples = all.concat();
    let lengths: Vec<usize> = examples.iter().map(|example| length(*example)).collect();
    let rank_of = balanced(&lengths, n_ranks);
    let own = || (0..examples.len()).filter(|at| rank_of[*at] == rank);
    let n_tokens: usize = own().map(|at| lengths[at]).sum();
    let mut batches = vec![Vec::new(); n_batches];
    let mut before = 0;
    for at in own() {
        // The batch in which the middle of the example lies.
        let middle = 2 * before + lengths[at];
        let batch = middle * n_batches / (2 * n_tokens.max(1));
        batches[batch.min(n_batches - 1)].push(examples[at]);
        before += lengths[at];
    }
    batches.retain(|batch| !batch.is_empty());
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A share that is a token longer than the batches were gets no micro-batch for this token.
    #[test]
    fn no_micro_batch_holds_a_rest() {
        let lengths = [50, 51, 49, 50, 2, 1];
        let all = vec![vec![0, 1], vec![2, 3, 4, 5]];
        for rank in 0..2 {
            let own = micro_batches(all.clone(), |idx| lengths[idx], rank, 2);
            assert_eq!(own.len(), 1, "{own:?}");
        }
    }

    #[test]
    fn the_longest_rows_go_to_different_ranks() {
        assert_eq!(balanced(&[10, 1, 1, 9, 2], 2), [0, 0, 0, 1, 1]);
        assert_eq!(balanced(&[3, 3, 3], 3), [0, 1, 2]);
        assert_eq!(balanced(&[5], 3), [0]);
        assert_eq!(
            micro_batches(vec![vec![4]], |_| 7, 2, 3),
            Vec::<Vec<usize>>::new()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_row_goes_to_one_rank_and_fits(
            lengths in prop::collection::vec(1usize..60, 1..40),
            rows in 1usize..6,
            n_ranks in 1usize..5,
        ) {
            let examples: Vec<usize> = (0..lengths.len()).rev().collect();
            let all: Vec<Vec<usize>> = examples.chunks(rows).map(<[usize]>::to_vec).collect();
            let tokens = |batch: &Vec<usize>| batch.iter().map(|idx| lengths[*idx]).sum::<usize>();
            let longest = lengths.iter().max().copied().unwrap_or_default();
            let most = all.iter().map(tokens).max().unwrap_or_default() + 2 * longest;
            let of_rank = |rank| micro_batches(all.clone(), |idx| lengths[idx], rank, n_ranks);
            let shares: Vec<_> = (0..n_ranks).map(of_rank).collect();
            for batch in shares.iter().flatten() {
                prop_assert!(!batch.is_empty() && tokens(batch) <= most);
            }
            prop_assert!(shares.iter().all(|share| share.len() <= all.len().div_ceil(n_ranks)));
            let mut rows: Vec<usize> = shares.iter().flatten().flatten().copied().collect();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            // No rank has more than the least by more than the longest row.
            let loads: Vec<usize> = shares.iter().map(|share| share.iter().map(tokens).sum()).collect();
            let (least, largest) = (loads.iter().min(), loads.iter().max());
            prop_assert!(largest <= least.map(|n| n + longest).as_ref());
        }
    }
}
