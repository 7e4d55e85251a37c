//! One matrix product on slices, and row operations on tensors of any device with a direct path for f32 on the CPU.
//!
//! On the CPU products go straight to `gemm`, which candle uses too, so that a product can be added to its destination.

use candle_core::{Device, Tensor};
use gemm::Parallelism;

use crate::device::{has_loops, to_device};
use crate::error::Result;
use crate::numbers::Numbers;
use crate::weights::lend;

/// Products with fewer multiply-adds than this stay on the calling thread.
pub(crate) const PARALLEL_FROM: usize = 1 << 18;

/// A matrix as a slice with the distance between rows and between columns, in elements.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a> {
    /// First element and everything after it.
    pub data: &'a [f32],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub column: usize,
}

impl<'a> Strided<'a> {
    /// A row-major matrix of `columns` columns.
    pub fn rows(data: &'a [f32], columns: usize) -> Self {
        Self {
            data,
            row: columns,
            column: 1,
        }
    }

    /// The transpose of a row-major matrix of `columns` columns.
    pub fn transposed(data: &'a [f32], columns: usize) -> Self {
        Self {
            data,
            row: 1,
            column: columns,
        }
    }

    pub(crate) fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row + (columns - 1) * self.column < self.data.len()
    }
}

/// `dst = scale * lhs rhs`, or `dst += scale * lhs rhs` with `accumulate`, on the calling thread; `dst` is row-major
/// `[m, n]`.
///
/// # Panics
/// When a slice is too short for the shape: the caller's shapes are wrong, and reading on would be out of bounds.
pub fn gemm_f32(
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    lhs: Strided<'_>,
    rhs: Strided<'_>,
    scale: f32,
    accumulate: bool,
) {
    assert!(
        lhs.holds(m, k) && rhs.holds(k, n) && m * n <= dst.len(),
        "matrix product: a slice is too short"
    );
    let dst = dst.as_mut_ptr();
    // SAFETY: the assertion above bounds every access, and `dst` is borrowed mutably, so it overlaps neither factor.
    unsafe { raw_gemm((m, n, k), dst, n, accumulate, lhs, rhs, scale, false) }
}

/// Computes the product into memory that may be uninitialised unless `accumulate` is set.
///
/// # Safety
/// The factors must hold `[m, k]` and `[k, n]`, and `dst` `[m, n]` with rows `dst_row` apart, overlapping neither factor.
#[expect(
    clippy::too_many_arguments,
    reason = "a matrix product has this many sizes"
)]
pub(crate) unsafe fn raw_gemm(
    (m, n, k): (usize, usize, usize),
    dst: *mut f32,
    dst_row: usize,
    accumulate: bool,
    lhs: Strided<'_>,
    rhs: Strided<'_>,
    scale: f32,
    parallel: bool,
) {
    let parallelism = if parallel && m * n * k >= PARALLEL_FROM {
        Parallelism::Rayon(rayon::current_num_threads())
    } else {
        Parallelism::None
    };
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            1,
            dst_row as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.column as isize,
            lhs.row as isize,
            rhs.data.as_ptr(),
            rhs.column as isize,
            rhs.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Calls `f` with the elements of contiguous f32 tensors on the CPU. Returns `None` if any tensor is not one.
pub fn on_cpu<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> R,
) -> Result<Option<R>> {
    if !tensors.iter().all(|tensor| has_loops(tensor.device())) {
        return Ok(None);
    }
    let lent = tensors.map(lend::<f32>);
    if lent.iter().any(Option::is_none) {
        return Ok(None);
    }
    let slices = lent
        .each_ref()
        .map(|lent| lent.as_deref().unwrap_or_default());
    Ok(Some(f(slices)))
}

/// `a + diag(scales) g`: `[r, in]`, `[r, in]`, `[r]` gives `[r, in]`.
pub fn add_scaled_rows(a: &Tensor, g: &Tensor, scales: &[f32]) -> Result<Tensor> {
    let (rows, columns) = a.dims2()?;
    let fast = on_cpu([a, g], |[a, g]| {
        let mut out = Vec::with_capacity(a.len());
        for ((a, g), scale) in a
            .chunks_exact(columns)
            .zip(g.chunks_exact(columns))
            .zip(scales)
        {
            out.extend(a.iter().zip(g).map(|(a, g)| a + scale * g));
        }
        out
    })?;
    if let Some(values) = fast {
        return Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?);
    }
    let scales = to_device(scales.to_vec(), (rows, 1), a.device())?;
    Ok((a + g.broadcast_mul(&scales)?)?)
}

/// Row by row inner products of two `[r, in]` matrices, summed in double precision on the CPU.
pub fn row_dots(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    Numbers::row_dots(a, b)?.read()
}

/// The column of the largest value of each row of `[rows, columns]`, `[rows]`. Of equal values, the first.
///
/// candle's own `argmax` promises no order among equal values: on CUDA it depends on the number of threads.
pub fn argmax_rows(values: &Tensor) -> Result<Tensor> {
    let (_, columns) = values.dims2()?;
    let last = columns.saturating_sub(1) as u32;
    let is_largest = values.broadcast_eq(&values.max_keepdim(1)?)?;
    let column = to_device((0..columns as u32).collect(), (1, columns), values.device())?;
    // A row of NaN has no largest value. Its result is a column all the same.
    let other = Tensor::full(last, (1, 1), values.device())?;
    let (column, other) = (
        column.broadcast_as(values.shape())?,
        other.broadcast_as(values.shape())?,
    );
    Ok(is_largest.where_cond(&column, &other)?.min(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_values_is_the_largest() -> Result<()> {
        let rows: [[f32; 5]; 5] = [
            [1.0, 3.0, 3.0, -2.0, 3.0],
            [0.0; 5],
            [-5.0, -4.0, -6.0, -4.0, -4.5],
            [1.0, 2.0, 3.0, 4.0, 5.0],
            [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, -0.0, -1.0],
        ];
        let values = Tensor::new(&rows, &Device::Cpu)?;
        let strided = values.t()?.contiguous()?.t()?;
        for values in [&values, &strided] {
            let found = argmax_rows(values)?.to_vec1::<u32>()?;
            assert_eq!(found, [1, 0, 1, 4, 2]);
        }
        let nothing = Tensor::new(&[[f32::NAN; 3]], &Device::Cpu)?;
        assert!(argmax_rows(&nothing)?.to_vec1::<u32>()?[0] < 3);
        Ok(())
    }

    #[test]
    fn products_accumulate() {
        let mut dst = vec![1.0, 2.0, 3.0, 4.0];
        let (lhs, rhs) = (Strided::rows(&[1.0, 2.0], 1), Strided::rows(&[3.0, 4.0], 2));
        gemm_f32((2, 2, 1), &mut dst, lhs, rhs, 2.0, true);
        assert_eq!(dst, [7.0, 10.0, 15.0, 20.0]);
    }
}
