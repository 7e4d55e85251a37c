//! Tensors that are computed from others when their bytes are read, so that the conversion of an adapter holds one at a
//! time.

use rayon::prelude::*;

use crate::tensors::blocks::interleaved_row;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// Elements converted at a time by one thread.
const BLOCK_ELEMENTS: usize = 1 << 16;
/// Side of the square tiles in which a matrix is transposed; a tile and its transpose fit the first-level cache.
const TILE: usize = 32;

/// How a tensor's elements are computed from its source's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Derivation {
    /// Rows and columns exchanged.
    Transposed,
    /// Zeros to the right of a matrix and below it.
    Padded,
    /// Each value times `factor`, in f32, rounded to the new element type.
    Scaled { factor: f32 },
    /// The rows of every `head` rows reordered: the halves of a rotated pair side by side if `pairs`, apart otherwise.
    HeadRows { head: usize, pairs: bool },
}

impl Derivation {
    /// Whether every element is one of the source's, or zero.
    pub(crate) fn only_moves(self) -> bool {
        !matches!(self, Self::Scaled { .. })
    }

    /// Returns the bytes of a tensor of type `dtype` and shape `shape` that is derived from `source`. The caller has
    /// checked that the shapes agree and that scaled types are float types.
    pub(crate) fn bytes(self, source: &Tensor, dtype: DType, shape: &[usize]) -> Vec<u8> {
        let from = source.bytes();
        let n_bytes = shape.iter().product::<usize>() * dtype.size();
        let mut out = vec![0; n_bytes];
        let columns = source.shape().get(1).copied().unwrap_or(1);
        match self {
            Self::Transposed => match dtype.size() {
                1 => transpose::<1>(&from, &mut out, columns),
                2 => transpose::<2>(&from, &mut out, columns),
                4 => transpose::<4>(&from, &mut out, columns),
                _ => transpose::<8>(&from, &mut out, columns),
            },
            Self::Padded => {
                let new_columns = shape.get(1).copied().unwrap_or(1);
                let (old_row, new_row) = (columns * dtype.size(), new_columns * dtype.size());
                if old_row > 0 {
                    for (row, padded) in from
                        .chunks_exact(old_row)
                        .zip(out.chunks_exact_mut(new_row))
                    {
                        padded[..old_row].copy_from_slice(row);
                    }
                }
            }
            Self::Scaled { factor } => {
                let (old_size, new_size) = (source.dtype().size(), dtype.size());
                from.par_chunks(BLOCK_ELEMENTS * old_size)
                    .zip(out.par_chunks_mut(BLOCK_ELEMENTS * new_size))
                    .for_each(|(block, place)| {
                        if let Some(stored) = scaled(source.dtype(), block, factor)
                            .and_then(|values| dtype.encode(&values))
                        {
                            place.copy_from_slice(&stored);
                        }
                    });
            }
            Self::HeadRows { head, pairs } => {
                let row_bytes = columns * dtype.size();
                if row_bytes > 0 {
                    for (row, place) in out.chunks_exact_mut(row_bytes).enumerate() {
                        let at = match pairs {
                            true => row - row % head + row % head % 2 * (head / 2) + row % head / 2,
                            false => interleaved_row(row, head),
                        };
                        place.copy_from_slice(&from[at * row_bytes..(at + 1) * row_bytes]);
                    }
                }
            }
        }
        out
    }
}

/// Returns the decoded values times `factor`; `None` if the type is not a float type.
fn scaled(dtype: DType, block: &[u8], factor: f32) -> Option<Vec<f32>> {
    let mut values = dtype.decode(block)?;
    if factor != 1.0 {
        for value in &mut values {
            *value *= factor;
        }
    }
    Some(values)
}

/// Whether the type `dtype` holds every value of `source` times `factor` exactly.
pub(crate) fn holds_scaled(source: &Tensor, factor: f32, dtype: DType) -> bool {
    source
        .bytes()
        .par_chunks(BLOCK_ELEMENTS * source.dtype().size())
        .all(|block| {
            let values = scaled(source.dtype(), block, factor);
            let stored = values.as_ref().and_then(|values| dtype.encode(values));
            stored.and_then(|stored| dtype.decode(&stored)) == values && values.is_some()
        })
}

/// Writes the transpose of `from` `[rows, n_columns]`, elements of N bytes, into `out` `[n_columns, rows]`.
fn transpose<const N: usize>(from: &[u8], out: &mut [u8], n_columns: usize) {
    let (from, out) = (from.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
    if from.is_empty() || n_columns == 0 {
        return;
    }
    let n_rows = from.len() / n_columns;
    out.par_chunks_mut(TILE * n_rows)
        .enumerate()
        .for_each(|(strip, place)| {
            let first_column = strip * TILE;
            let width = place.len() / n_rows;
            for first_row in (0..n_rows).step_by(TILE) {
                let height = TILE.min(n_rows - first_row);
                for row in first_row..first_row + height {
                    let start = row * n_columns + first_column;
                    for (column, element) in from[start..start + width].iter().enumerate() {
                        place[column * n_rows + row] = *element;
                    }
                }
            }
        });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_transpose_moves_every_element_and_is_its_own_inverse(rows in 1usize..80, columns in 1usize..80, seed in any::<u64>()) {
            let mut stream = crate::fixtures::Stream(seed);
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let tensor = stream.tensor(&[rows, columns], dtype);
                let other = tensor.transposed().expect("a matrix");
                let (before, after) = (tensor.to_f32().expect("real"), other.to_f32().expect("real"));
                for row in 0..rows {
                    for column in 0..columns {
                        prop_assert_eq!(before[row * columns + column], after[column * rows + row]);
                    }
                }
                prop_assert_eq!(other.transposed().expect("a matrix"), tensor);
            }
        }

        #[test]
        fn scaled_values_are_rounded_once(values in prop::collection::vec(-1e3f32..1e3, 1..300), factor in 0.1f32..9.0) {
            let tensor = Tensor::from_f32(&[values.len()], values.clone()).expect("sized");
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let plain: Vec<f32> = values.iter().map(|value| value * factor).collect();
                let expected = Tensor::from_f32_as(&[values.len()], &plain, dtype).expect("sized");
                prop_assert_eq!(&tensor.scaled(factor, dtype).expect("real"), &expected);
                prop_assert_eq!(holds_scaled(&tensor, factor, dtype), expected.to_f32().expect("real") == plain);
            }
        }
    }

    #[test]
    fn padding_adds_zeros_and_head_rows_have_an_inverse() {
        let tensor = Tensor::from_f32(&[2, 2], vec![1.0, 2.0, 3.0, 4.0]).expect("sized");
        let padded = tensor.padded(3, 3).expect("larger");
        let expected = [1.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(padded.to_f32().expect("real"), expected);
        assert!(tensor.padded(1, 3).is_err());
        let rows = Tensor::from_f32(&[8, 1], (0..8u8).map(f32::from).collect()).expect("sized");
        let paired = rows.head_rows(4, true).expect("whole heads");
        let expected = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
        assert_eq!(paired.to_f32().expect("real"), expected);
        assert_eq!(paired.head_rows(4, false).expect("whole heads"), rows);
        assert!(rows.head_rows(3, true).is_err());
    }
}
