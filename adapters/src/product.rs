//! Sums of matrix products on any device, on the CPU cut into pieces that the cores work through side by side.

use std::ops::Range;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::error::{Result, expect_shape};
use crate::linalg::{PARALLEL_FROM, Strided, raw_gemm};
use crate::simd::vectorised;

/// Accelerated CPU backends of candle replace `gemm`; then their product is used.
const OWN_GEMM: bool = !cfg!(any(feature = "mkl", feature = "accelerate"));

/// Columns a piece has at least; fewer would leave the kernel's registers half empty.
const PIECE_FROM: usize = 96;

/// Rows from which a result is cut.
const PIECE_ROWS: usize = 16;

/// Rows of a bf16 factor that are widened to f32 at a time.
const WIDENED_ROWS: usize = 2048;

/// One factor of a product: a row-major matrix, taken as it is or transposed.
#[derive(Debug, Clone, Copy)]
pub enum Factor<'a> {
    /// The matrix itself.
    Plain(&'a Tensor),
    /// Its transpose.
    Transposed(&'a Tensor),
}

impl<'a> Factor<'a> {
    fn tensor(self) -> &'a Tensor {
        match self {
            Self::Plain(tensor) | Self::Transposed(tensor) => tensor,
        }
    }

    fn dims(self) -> Result<(usize, usize)> {
        let (rows, columns) = self.tensor().dims2()?;
        Ok(match self {
            Self::Plain(_) => (rows, columns),
            Self::Transposed(_) => (columns, rows),
        })
    }

    /// Distances between rows and between columns of the factor, in elements.
    fn strides(self) -> (usize, usize) {
        let columns = self.tensor().dims()[1];
        match self {
            Self::Plain(_) => (columns, 1),
            Self::Transposed(_) => (1, columns),
        }
    }

    fn view(self) -> Result<Tensor> {
        Ok(match self {
            Self::Plain(tensor) => tensor.clone(),
            Self::Transposed(tensor) => tensor.t()?,
        })
    }
}

/// `start + sum_i scale_i lhs_i rhs_i`; every product must give the same `[m, n]`, and `start`, where given, is `[m, n]` or a row
/// `[n]` for all rows. A right factor may be bfloat16; arithmetic and result are f32.
///
/// # Errors
/// [`crate::Error::Shape`] when inner or outer sizes disagree; candle's errors.
pub fn sum_of_products(
    start: Option<&Tensor>,
    products: &[(Factor<'_>, Factor<'_>, f64)],
) -> Result<Tensor> {
    let mut shape = None;
    for (lhs, rhs, _) in products {
        let ((m, k), (k_rhs, n)) = (lhs.dims()?, rhs.dims()?);
        expect_shape("inner size of a product", &[k], &[k_rhs])?;
        expect_shape(
            "size of a product",
            &[m, n],
            &shape.map_or([m, n], |(m, n)| [m, n]),
        )?;
        shape = Some((m, n));
    }
    let (m, n) = shape.unwrap_or((0, 0));
    if let Some(start) = start {
        let expected: &[usize] = if start.rank() == 1 { &[n] } else { &[m, n] };
        expect_shape("start of a sum of products", expected, start.dims())?;
    }
    if OWN_GEMM && let Some(sum) = on_cpu_products(start, products, (m, n))? {
        return Ok(sum);
    }
    let mut total = start.cloned();
    for (lhs, rhs, scale) in products {
        let lhs = lhs.view()?;
        let mut term = lhs.matmul(&rhs.view()?.to_dtype(lhs.dtype())?)?;
        if *scale != 1.0 {
            term = (term * *scale)?;
        }
        total = Some(match total {
            None => term,
            Some(sum) => term.broadcast_add(&sum)?,
        });
    }
    total.ok_or_else(|| candle_core::Error::Msg("a sum of no products".to_owned()).into())
}

/// `x w^T`: `[m, k]` by `[n, k]` gives `[m, n]`.
pub fn matmul_nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    sum_of_products(None, &[(Factor::Plain(x), Factor::Transposed(w), 1.0)])
}

/// `g w`: `[m, k]` by `[k, n]` gives `[m, n]`.
pub fn matmul_nn(g: &Tensor, w: &Tensor) -> Result<Tensor> {
    sum_of_products(None, &[(Factor::Plain(g), Factor::Plain(w), 1.0)])
}

/// `a^T b`: `[k, m]` by `[k, n]` gives `[m, n]`.
pub fn matmul_tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    sum_of_products(None, &[(Factor::Transposed(a), Factor::Plain(b), 1.0)])
}

#[derive(Clone, Copy)]
enum Values<'a> {
    Single(&'a [f32]),
    Brain(&'a [bf16]),
}

/// A product whose factors lie in memory.
struct Operands<'a> {
    lhs: Strided<'a>,
    rhs: Values<'a>,
    /// Distances between rows and between columns of the right factor.
    rhs_strides: (usize, usize),
    k: usize,
    scale: f32,
}

/// Where the pieces write: each its own columns of one buffer.
struct Destination(*mut f32);

// SAFETY: the pieces' columns are disjoint, and the buffer outlives them all.
unsafe impl Sync for Destination {}

fn on_cpu_products(
    start: Option<&Tensor>,
    products: &[(Factor<'_>, Factor<'_>, f64)],
    (m, n): (usize, usize),
) -> Result<Option<Tensor>> {
    let tensors: Vec<&Tensor> = products
        .iter()
        .flat_map(|(lhs, rhs, _)| [lhs.tensor(), rhs.tensor()])
        .chain(start)
        .collect();
    if tensors.is_empty()
        || !tensors
            .iter()
            .all(|t| matches!(t.device(), Device::Cpu) && t.is_contiguous())
    {
        return Ok(None);
    }
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let mut values = Vec::with_capacity(guards.len());
    for (storage, layout) in &guards {
        let Some((from, to)) = layout.contiguous_offsets() else {
            return Ok(None);
        };
        values.push(match &**storage {
            Storage::Cpu(CpuStorage::F32(all)) => Values::Single(&all[from..to]),
            Storage::Cpu(CpuStorage::BF16(all)) => Values::Brain(&all[from..to]),
            _ => return Ok(None),
        });
    }
    let mut operands = Vec::with_capacity(products.len());
    for ((lhs, rhs, scale), pair) in products.iter().zip(values.chunks_exact(2)) {
        let (Values::Single(left), right) = (pair[0], pair[1]) else {
            return Ok(None);
        };
        let (row, column) = lhs.strides();
        operands.push(Operands {
            lhs: Strided {
                data: left,
                row,
                column,
            },
            rhs: right,
            rhs_strides: rhs.strides(),
            k: lhs.dims()?.1,
            scale: *scale as f32,
        });
    }
    let start = match (start, values.last()) {
        (None, _) => None,
        (Some(_), Some(Values::Single(start))) => Some(*start),
        _ => return Ok(None),
    };
    let mut sum: Vec<f32> = Vec::with_capacity(m * n);
    let destination = Destination(sum.as_mut_ptr());
    let pieces = n_pieces((m, n), &operands);
    if pieces == 1 {
        piece(&destination, (m, n), 0..n, start, &operands, true);
    } else {
        (0..pieces).into_par_iter().for_each(|index| {
            let columns = cut(index, pieces, n)..cut(index + 1, pieces, n);
            piece(&destination, (m, n), columns, start, &operands, false);
        });
    }
    // SAFETY: the capacity is m * n, and the pieces have written every column of every row.
    unsafe { sum.set_len(m * n) };
    Ok(Some(Tensor::from_vec(sum, (m, n), &Device::Cpu)?))
}

/// Number of tasks the columns of the result are divided among.
///
/// `gemm` sums an element in an order that depends on the inner size alone, except for very small results, which are not cut; so
/// where the cuts lie changes no bit, and a test compares thread counts. Pieces beat `gemm`'s own threads because it packs the
/// left factor on one of them.
fn n_pieces((m, n): (usize, usize), operands: &[Operands<'_>]) -> usize {
    let threads = rayon::current_num_threads();
    let work: usize = operands.iter().map(|o| m * n * o.k).sum();
    let most = (n / PIECE_FROM).max(1);
    if operands.iter().any(|o| matches!(o.rhs, Values::Brain(_))) {
        // The cuts bound the memory for widened values too, so they do not depend on the threads.
        most.min(2 * n.div_ceil(512))
    } else if work < PARALLEL_FROM || m < PIECE_ROWS || most < threads {
        1
    } else {
        threads
    }
}

/// Where piece `index` begins: cuts at multiples of the widest vector.
fn cut(index: usize, pieces: usize, n: usize) -> usize {
    if index == pieces {
        n
    } else {
        index * n / pieces / 16 * 16
    }
}

/// Computes `columns` of the sum.
fn piece(
    destination: &Destination,
    (m, n): (usize, usize),
    columns: Range<usize>,
    start: Option<&[f32]>,
    operands: &[Operands<'_>],
    parallel: bool,
) {
    let width = columns.len();
    if let Some(start) = start {
        for row in 0..m {
            let from = if start.len() == n { 0 } else { row * n } + columns.start;
            let source = &start[from..from + width];
            // SAFETY: row < m and the columns lie below n, so this stays in the buffer of m * n floats, in columns that are
            // this piece's alone.
            unsafe {
                let target = destination.0.add(row * n + columns.start);
                std::ptr::copy_nonoverlapping(source.as_ptr(), target, width);
            }
        }
    }
    let mut accumulate = start.is_some();
    let mut widened = Vec::new();
    for operand in operands {
        let (row, column) = operand.rhs_strides;
        let depth = match operand.rhs {
            Values::Single(_) => operand.k.max(1),
            Values::Brain(_) => WIDENED_ROWS,
        };
        for from in (0..operand.k.max(1)).step_by(depth) {
            let k = depth.min(operand.k - from);
            let rhs = match operand.rhs {
                Values::Single(data) => Strided {
                    data: &data[(from * row + columns.start * column).min(data.len())..],
                    row,
                    column,
                },
                Values::Brain(data) => {
                    let rows = from..from + k;
                    widen(
                        data,
                        operand.rhs_strides,
                        rows,
                        columns.clone(),
                        &mut widened,
                    )
                }
            };
            let lhs = Strided {
                data: &operand.lhs.data[(from * operand.lhs.column).min(operand.lhs.data.len())..],
                ..operand.lhs
            };
            assert!(
                lhs.holds(m, k) && rhs.holds(k, width),
                "matrix product: a factor is too short"
            );
            // SAFETY: the factors hold every element that is read; the destination has m rows of n floats, of which this
            // writes columns that no other piece touches, and reads them only once `accumulate` says they are written.
            unsafe {
                raw_gemm(
                    (m, width, k),
                    destination.0.add(columns.start),
                    n,
                    accumulate,
                    lhs,
                    rhs,
                    operand.scale,
                    parallel,
                );
            }
            accumulate = true;
        }
    }
}

/// Rows `rows` and columns `columns` of a bf16 factor as f32, in the factor's own order of memory.
fn widen<'a>(
    data: &[bf16],
    (row, column): (usize, usize),
    rows: Range<usize>,
    columns: Range<usize>,
    buffer: &'a mut Vec<f32>,
) -> Strided<'a> {
    let by_row = column == 1;
    // Runs of neighbours in memory: columns of a plain factor, rows of a transposed one.
    let (runs, run, stride) = if by_row {
        (rows, columns, row)
    } else {
        (columns, rows, column)
    };
    buffer.resize(runs.len() * run.len(), 0.0);
    for (target, index) in buffer.chunks_exact_mut(run.len().max(1)).zip(runs) {
        let source = &data[index * stride + run.start..index * stride + run.end];
        vectorised(
            #[inline(always)]
            || {
                for (wide, narrow) in target.iter_mut().zip(source) {
                    *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                }
            },
        );
    }
    if by_row {
        Strided::rows(buffer, run.len())
    } else {
        Strided::transposed(buffer, run.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    fn matrix(rows: usize, columns: usize, seed: f32) -> Tensor {
        let values = (0..rows * columns)
            .map(|i| ((i as f32 + seed) * 0.37).sin())
            .collect::<Vec<_>>();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("shape fits")
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
    }

    #[test]
    fn products_equal_candle() -> Result<()> {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 7),
            (33, 65, 129),
            (130, 70, 90),
            (70, 331, 45),
        ] {
            let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
            assert!(largest_difference(&matmul_nt(&x, &w)?, &x.matmul(&w.t()?)?)? < 1e-4);
            let v = matrix(k, n, 3.0);
            assert!(largest_difference(&matmul_nn(&x, &v)?, &x.matmul(&v)?)? < 1e-4);
            let (a, b) = (matrix(k, m, 4.0), matrix(k, n, 5.0));
            let expected = a.t()?.contiguous()?.matmul(&b)?;
            assert!(largest_difference(&matmul_tn(&a, &b)?, &expected)? < 1e-4);
        }
        Ok(())
    }

    /// Several products onto a matrix or a row, against candle, with and without bf16, and on a view that takes the plain path.
    #[test]
    fn sums_equal_candle() -> Result<()> {
        for (m, n, k) in [(5, 7, 3), (67, 413, 2100), (40, 200, 33)] {
            let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
            let (h, b) = (matrix(m, 4, 3.0), matrix(4, n, 4.0));
            let w16 = w.to_dtype(DType::BF16)?;
            let v16 = w.t()?.contiguous()?.to_dtype(DType::BF16)?;
            let rounded = w16.to_dtype(DType::F32)?;
            for start in [matrix(m, n, 5.0), matrix(1, n, 6.0).flatten_all()?] {
                let low_rank = (h.matmul(&b)? * 0.5)?.broadcast_add(&start)?;
                let second = (Factor::Plain(&h), Factor::Plain(&b), 0.5);
                let single = (Factor::Plain(&x), Factor::Transposed(&w), 1.0);
                let found = sum_of_products(Some(&start), &[single, second])?;
                assert!(largest_difference(&found, &(x.matmul(&w.t()?)? + &low_rank)?)? < 2e-3);
                let expected = (x.matmul(&rounded.t()?)? + &low_rank)?;
                let transposed = (Factor::Plain(&x), Factor::Transposed(&w16), 1.0);
                let found = sum_of_products(Some(&start), &[transposed, second])?;
                assert!(largest_difference(&found, &expected)? < 2e-3);
                let plain = (Factor::Plain(&x), Factor::Plain(&v16), 1.0);
                let found = sum_of_products(Some(&start), &[plain, second])?;
                assert!(largest_difference(&found, &expected)? < 2e-3);
                let strided = matrix(k, m, 1.0).t()?;
                let composed = sum_of_products(
                    Some(&start),
                    &[(Factor::Plain(&strided), Factor::Plain(&v16), 1.0), second],
                )?;
                let expected = (strided.matmul(&rounded.t()?)? + &low_rank)?;
                assert!(largest_difference(&composed, &expected)? < 2e-3);
            }
        }
        Ok(())
    }

    /// Where the cuts lie changes no bit.
    #[test]
    fn same_bytes_at_any_thread_count() -> Result<()> {
        for (m, n, k) in [
            (1, 576, 700),
            (3, 484, 600),
            (131, 576, 700),
            (64, 484, 1500),
            (37, 1540, 96),
            (200, 100, 640),
        ] {
            let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
            let v16 = matrix(k, n, 3.0).to_dtype(DType::BF16)?;
            let mut all = Vec::new();
            for threads in [1, 2, 3, 5, 16] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .expect("a pool of threads");
                let bits = pool.install(|| -> Result<Vec<u32>> {
                    let sum = sum_of_products(
                        None,
                        &[
                            (Factor::Plain(&x), Factor::Transposed(&w), 1.0),
                            (Factor::Plain(&x), Factor::Plain(&v16), 0.5),
                        ],
                    )?;
                    let single = matmul_nt(&x, &w)?;
                    let values = Tensor::cat(&[sum, single], 0)?.flatten_all()?;
                    Ok(values
                        .to_vec1::<f32>()?
                        .iter()
                        .map(|v| v.to_bits())
                        .collect())
                })?;
                all.push(bits);
            }
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{m} {n} {k}");
        }
        Ok(())
    }
}
