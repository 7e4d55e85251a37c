//! Sequences of a batch that begin alike share the rows of their common beginning.

use super::decoder::Sequences;
use super::parts::attention::Segment;

/// A batch in which every common beginning of its sequences is computed once, and what no wanted row depends on is left
/// out. For passes without gradients.
#[derive(Debug)]
pub(super) struct Merged {
    /// The distinct rows. Each segment's queries are the rows that its sequence shares with no earlier one.
    pub(super) sequences: Sequences,
    /// The rows whose keys and values the segments read, in the order of [`Segment::key_start`].
    pub(super) keys: Vec<u32>,
    /// For every row of the batch that was not left out, the row that holds its value.
    pub(super) rows: Vec<u32>,
}

impl Merged {
    /// Merges `sequences`, which must each start at position 0, and leaves out rows that none of `wanted` depends on: those
    /// after the last wanted row of a sequence. Returns `None` if all rows are needed.
    pub(super) fn new(sequences: &Sequences, wanted: &[u32]) -> Option<Self> {
        let mut lengths = vec![0; sequences.segments.len()];
        for row in wanted.iter().map(|row| *row as usize) {
            let index = sequences.segments.partition_point(|s| s.query_start <= row) - 1;
            lengths[index] = lengths[index].max(row + 1 - sequences.segments[index].query_start);
        }
        let sequence = |index: usize| &sequences.sequence(index)[..lengths[index]];
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by(|a, b| sequence(*a).cmp(sequence(*b)));
        let n_shared = |pair: &[usize]| {
            let [a, b] = [pair[0], pair[1]].map(sequence);
            a.iter().zip(b).take_while(|(a, b)| a == b).count()
        };
        // In sorted order, a sequence shares at least as much with its neighbour as with any earlier one.
        let shared: Vec<usize> = order.windows(2).map(n_shared).collect();
        let n_needed = lengths.iter().sum::<usize>() - shared.iter().sum::<usize>();
        if n_needed == sequences.tokens.len() {
            return None;
        }
        let mut merged = Self {
            sequences: Sequences::default(),
            keys: Vec::new(),
            rows: vec![0; sequences.tokens.len()],
        };
        // The rows of the sequence before.
        let mut path: Vec<u32> = Vec::new();
        for (index, n_shared) in order.into_iter().zip(std::iter::once(0).chain(shared)) {
            let tokens = sequence(index);
            let own = &tokens[n_shared..];
            let batch = &mut merged.sequences;
            let query_start = batch.tokens.len();
            path.truncate(n_shared);
            path.extend(query_start as u32..(query_start + own.len()) as u32);
            if !own.is_empty() {
                batch.segments.push(Segment {
                    query_start,
                    query_len: own.len(),
                    key_start: merged.keys.len(),
                    key_len: path.len(),
                });
                batch.tokens.extend_from_slice(own);
                batch.positions.extend(n_shared as u32..tokens.len() as u32);
                merged.keys.extend_from_slice(&path);
            }
            let start = sequences.segments[index].query_start;
            merged.rows[start..start + tokens.len()].copy_from_slice(&path);
        }
        Some(merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_beginning_is_computed_once() {
        let batch = Sequences::new(&[
            vec![5u32, 6, 7, 8],
            vec![9, 9],
            vec![5, 6, 7, 1, 2],
            vec![5, 6],
            vec![5, 6, 7, 8],
        ]);
        let all: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        let merged = Merged::new(&batch, &all).expect("sequences begin alike");
        assert_eq!(merged.sequences.tokens, [5, 6, 7, 1, 2, 8, 9, 9]);
        assert_eq!(merged.sequences.positions, [0, 1, 2, 3, 4, 3, 0, 1]);
        let tokens = merged
            .rows
            .iter()
            .map(|row| merged.sequences.tokens[*row as usize]);
        assert_eq!(tokens.collect::<Vec<_>>(), batch.tokens);
        // Every segment reads the keys of its whole sequence.
        for segment in &merged.sequences.segments {
            let keys = &merged.keys[segment.key_start..][..segment.key_len];
            let last = segment.query_start + segment.query_len - 1;
            assert_eq!(keys.last(), Some(&(last as u32)));
            let positions = keys
                .iter()
                .map(|key| merged.sequences.positions[*key as usize]);
            assert!(positions.eq(0..segment.key_len as u32));
        }
        let apart = Sequences::new(&[vec![1u32, 2], vec![2, 1]]);
        assert!(Merged::new(&apart, &[1, 3]).is_none());
    }

    #[test]
    fn rows_after_the_last_wanted_one_are_left_out() {
        let batch = Sequences::new(&[vec![1u32, 2, 3], vec![4, 5], vec![6, 7, 8, 9]]);
        let merged = Merged::new(&batch, &[7, 1, 6]).expect("rows are left out");
        assert_eq!(merged.sequences.tokens, [1, 2, 6, 7, 8]);
        assert_eq!([7, 1, 6].map(|row| merged.rows[row]), [4, 1, 3]);
    }
}
