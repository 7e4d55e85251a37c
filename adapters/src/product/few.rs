//! Products of few rows with a transposed right factor, as in decoding: dot products of rows, so that nothing is packed
//! and each value of a weight is read or decoded once.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use self::avx512::Kernel;
use crate::simd::{dots_fused, vectorised};

/// Largest number of rows. With more, packing the right factor pays.
pub(super) const FEW: usize = 32;

/// Source of the right factor's rows.
pub(super) enum Rows<'a> {
    /// In memory, `stride` apart.
    Lent { values: &'a [f32], stride: usize },
    /// Written to memory a few at a time.
    Widened(&'a (dyn Fn(Range<usize>, &mut [f32]) + Sync)),
}

/// Computes `destination[:, columns] = scale * left right[columns]^T`, or `+=` with `accumulate`; `left` is `[m, k]`,
/// rows of the destination are `n` apart. The order in which an element is summed depends only on `k`.
///
/// # Panics
/// When a factor is too short.
///
/// # Safety
/// `destination` must hold `m` rows of `n` floats with `n >= columns.end`; nobody else may use `columns` of them.
pub(super) unsafe fn product(
    left: &[f32],
    (m, k): (usize, usize),
    right: &Rows<'_>,
    columns: Range<usize>,
    (destination, n): (*mut f32, usize),
    (accumulate, scale): (bool, f32),
) {
    // SAFETY: the caller's promise.
    let place = |row: usize, column: usize, sum: f32| unsafe {
        let target = destination.add(row * n + column);
        let sum = scale * sum;
        target.write(if accumulate { target.read() + sum } else { sum });
    };
    #[cfg(target_arch = "x86_64")]
    if let Some(kernel) = Kernel::detect() {
        in_tiles(
            left,
            (m, k),
            right,
            columns,
            place,
            |left, right, ahead, sums| {
                kernel.sums(left, right, ahead, sums);
            },
        );
        return;
    }
    in_tiles(
        left,
        (m, k),
        right,
        columns,
        place,
        |left, right, _, sums| {
            vectorised(
                #[inline(always)]
                || {
                    for (sums, left) in sums.iter_mut().zip(left) {
                        for (sums, right) in sums
                            .as_chunks_mut::<2>()
                            .0
                            .iter_mut()
                            .zip(right.as_chunks().0)
                        {
                            [*sums] = dots_fused([left], *right);
                        }
                    }
                },
            );
        },
    );
}

/// Rows of the left factor, and rows of the right one, that are multiplied together.
const TILE: usize = 4;

/// Computes the sums of up to [`TILE`] rows of each factor by `sums_of`, and calls `place` with the row, the column and the
/// sum of each.
fn in_tiles(
    left: &[f32],
    (m, k): (usize, usize),
    right: &Rows<'_>,
    columns: Range<usize>,
    place: impl Fn(usize, usize, f32),
    sums_of: impl Fn(&[&[f32]], &[&[f32]; TILE], Option<usize>, &mut [[f32; TILE]]),
) {
    let is_lent = matches!(right, Rows::Lent { .. });
    let mut widened = Vec::new();
    for first in columns.clone().step_by(TILE) {
        let tile = first..columns.end.min(first + TILE);
        let (values, stride) = match right {
            Rows::Lent { values, stride } => (&values[tile.start * stride..], *stride),
            Rows::Widened(widen) => {
                widened.resize(tile.len() * k, 0.0);
                widen(tile.clone(), &mut widened);
                (&*widened, k)
            }
        };
        // Rows beyond the last are the last once more.
        let right: [&[f32]; TILE] = std::array::from_fn(|idx| {
            let row = idx.min(tile.len() - 1);
            &values[row * stride..][..k]
        });
        for start in (0..m).step_by(TILE) {
            let rows = TILE.min(m - start);
            let left: [&[f32]; TILE] = std::array::from_fn(|idx| {
                let row = start + idx.min(rows - 1);
                &left[row * k..][..k]
            });
            let mut sums = [[0f32; TILE]; TILE];
            // The first pass over a tile fetches the next one, which the processor's own prediction finds too late.
            let ahead = (start == 0 && is_lent).then_some(TILE * stride);
            sums_of(&left[..rows], &right, ahead, &mut sums[..rows]);
            for (row, sums) in sums[..rows].iter().enumerate() {
                for (idx, sum) in sums[..tile.len()].iter().enumerate() {
                    place(start + row, first + idx, *sum);
                }
            }
        }
    }
}

/// The sums by AVX-512, with the bits of [`dots_fused`].
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __mmask16, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps,
        _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
        _mm512_storeu_ps,
    };

    use super::TILE;
    use crate::simd::LANES;

    /// Proof that the processor has the instructions.
    #[derive(Debug, Clone, Copy)]
    pub(super) struct Kernel(());

    impl Kernel {
        pub(super) fn detect() -> Option<Self> {
            is_x86_feature_detected!("avx512f").then_some(Self(()))
        }

        /// The sums of each of `left`, at most [`TILE`] rows, with each of `right`; all rows have one length. Values that
        /// are `ahead` behind those of `right` are fetched into the cache.
        pub(super) fn sums(
            self,
            left: &[&[f32]],
            right: &[&[f32]; TILE],
            ahead: Option<usize>,
            out: &mut [[f32; TILE]],
        ) {
            // SAFETY: the processor has the instructions, as `self` proves.
            unsafe {
                match *left {
                    [a] => tile([a], *right, ahead, out),
                    [a, b] => tile([a, b], *right, ahead, out),
                    [a, b, c] => tile([a, b, c], *right, ahead, out),
                    [a, b, c, d] => tile([a, b, c, d], *right, ahead, out),
                    _ => {}
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn tile<const M: usize>(
        left: [&[f32]; M],
        right: [&[f32]; TILE],
        ahead: Option<usize>,
        out: &mut [[f32; TILE]],
    ) {
        let len = right[0].len();
        assert!(
            left.iter().chain(&right).all(|row| row.len() == len) && out.len() == M,
            "dot products: rows of different lengths"
        );
        let mut sums = [[_mm512_setzero_ps(); TILE]; TILE];
        for start in (0..len / LANES * LANES).step_by(LANES) {
            if let Some(ahead) = ahead {
                for right in right {
                    let next = right.as_ptr().wrapping_add(start + ahead);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
            }
            // SAFETY: the rows hold sixteen numbers from `start` on.
            unsafe { add_products(&mut sums, left, right, start, !0) };
        }
        let rest = len % LANES;
        if rest > 0 {
            // SAFETY: the rows hold as many numbers from there on as the mask has bits.
            unsafe { add_products(&mut sums, left, right, len - rest, (1 << rest) - 1) };
        }
        let mut totals = [0f32; TILE * TILE];
        // SAFETY: there are sixteen numbers.
        unsafe { _mm512_storeu_ps(totals.as_mut_ptr(), total_of_each(sums)) };
        for (row, out) in out.iter_mut().enumerate() {
            for (column, out) in out.iter_mut().enumerate() {
                *out = totals[column * TILE + row];
            }
        }
    }

    /// Adds the products of the numbers from `start` on that `mask` names to the sums.
    ///
    /// # Safety
    /// The rows must hold these numbers.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn add_products<const M: usize>(
        sums: &mut [[__m512; TILE]; TILE],
        left: [&[f32]; M],
        right: [&[f32]; TILE],
        start: usize,
        mask: __mmask16,
    ) {
        let mut columns = [_mm512_setzero_ps(); TILE];
        for (column, right) in columns.iter_mut().zip(right) {
            // SAFETY: the caller's promise.
            *column = unsafe { _mm512_maskz_loadu_ps(mask, right.as_ptr().add(start)) };
        }
        for (sums, left) in sums.iter_mut().zip(left) {
            // SAFETY: the caller's promise.
            let row = unsafe { _mm512_maskz_loadu_ps(mask, left.as_ptr().add(start)) };
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_fmadd_ps(row, column, *sum);
            }
        }
    }

    /// The sum of each vector's lanes by halves, as `simd::total`: lane `4 column + row` is the sum of
    /// `sums[row][column]`.
    #[target_feature(enable = "avx512f")]
    fn total_of_each(sums: [[__m512; TILE]; TILE]) -> __m512 {
        // Quarter q of each is column q of the row.
        let mut of_rows = [_mm512_setzero_ps(); TILE];
        for (of_row, [a, b, c, d]) in of_rows.iter_mut().zip(sums) {
            let ab = fold_quarters::<0x44, 0xee>(a, b);
            let cd = fold_quarters::<0x44, 0xee>(c, d);
            *of_row = fold_quarters::<0x88, 0xdd>(ab, cd);
        }
        let [a, b, c, d] = of_rows;
        let ab = fold_lanes::<0x44, 0xee>(a, b);
        let cd = fold_lanes::<0x44, 0xee>(c, d);
        fold_lanes::<0x88, 0xdd>(ab, cd)
    }

    /// The sum of two choices of quarters of `a` and `b`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn fold_quarters<const LOW: i32, const HIGH: i32>(a: __m512, b: __m512) -> __m512 {
        let (low, high) = (
            _mm512_shuffle_f32x4::<LOW>(a, b),
            _mm512_shuffle_f32x4::<HIGH>(a, b),
        );
        _mm512_add_ps(low, high)
    }

    /// The sum of two choices of lanes of `a` and `b`, within each quarter.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn fold_lanes<const LOW: i32, const HIGH: i32>(a: __m512, b: __m512) -> __m512 {
        let (low, high) = (
            _mm512_shuffle_ps::<LOW>(a, b),
            _mm512_shuffle_ps::<HIGH>(a, b),
        );
        _mm512_add_ps(low, high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::dot_fused;

    /// Every shape of a tile, with and without AVX-512, gives the bits of a single dot product.
    #[test]
    fn every_sum_is_that_of_a_single_dot_product() {
        for (m, n, k) in [(1, 1, 5), (3, 7, 16), (4, 4, 33), (9, 10, 576), (32, 5, 1)] {
            let values = |len: usize, seed: f32| -> Vec<f32> {
                (0..len).map(|i| (i as f32 * seed).sin()).collect()
            };
            let (left, right) = (values(m * k, 0.7), values(n * k, 0.3));
            let widen = |rows: Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&right[rows.start * k..rows.end * k]);
            };
            let lent = Rows::Lent {
                values: &right,
                stride: k,
            };
            for rows in [lent, Rows::Widened(&widen)] {
                let mut found = vec![1f32; m * n];
                let destination = (found.as_mut_ptr(), n);
                // SAFETY: the destination has `m` rows of `n` floats.
                unsafe {
                    product(&left, (m, k), &rows, 0..n - 1, destination, (true, 2.0));
                    product(&left, (m, k), &rows, n - 1..n, destination, (true, 2.0));
                }
                for row in 0..m {
                    for column in 0..n {
                        let sum = dot_fused(&left[row * k..][..k], &right[column * k..][..k]);
                        assert_eq!(found[row * n + column], 1.0 + 2.0 * sum);
                    }
                }
            }
        }
    }
}
