//! Sums of matrix products on any device, on the CPU cut into pieces that the cores work through side by side.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::brain::{Kernel, PackedRows, Weights};
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

/// How the numbers of a product are multiplied. Sums are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// In f32; a bfloat16 factor is widened.
    #[default]
    Single,
    /// Both factors in bfloat16, the left one rounded to nearest: relative error `2^-9` a factor. Twice as fast as f32 on
    /// processors with AVX512-BF16 (`vdpbf16ps`, which takes denormals as zero) and on GPUs; elsewhere the same rounding, then f32.
    Brain,
}

/// One term of [`sum_of_products`]: `scale * lhs rhs`.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// Left factor, f32.
    pub lhs: Factor<'a>,
    /// Right factor, f32 or bfloat16.
    pub rhs: Factor<'a>,
    /// Factor of the whole term.
    pub scale: f64,
    /// How it is multiplied.
    pub precision: Precision,
}

impl<'a> Product<'a> {
    /// `lhs rhs` in f32.
    pub fn new(lhs: Factor<'a>, rhs: Factor<'a>) -> Self {
        Self {
            lhs,
            rhs,
            scale: 1.0,
            precision: Precision::Single,
        }
    }

    /// `scale * lhs rhs` in f32.
    pub fn scaled(lhs: Factor<'a>, rhs: Factor<'a>, scale: f64) -> Self {
        Self {
            scale,
            ..Self::new(lhs, rhs)
        }
    }

    /// The same term computed otherwise.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    fn on_any_device(&self) -> Result<Tensor> {
        let (lhs, rhs) = (self.lhs.view()?, self.rhs.view()?);
        let term = match self.precision {
            Precision::Single => lhs.matmul(&rhs.to_dtype(lhs.dtype())?)?,
            // candle's CPU has no bf16 product of this shape everywhere, and would round the sums.
            Precision::Brain if matches!(lhs.device(), Device::Cpu) => {
                let rounded = lhs.to_dtype(DType::BF16)?.to_dtype(lhs.dtype())?;
                rounded.matmul(&rhs.to_dtype(lhs.dtype())?)?
            }
            Precision::Brain => lhs
                .to_dtype(DType::BF16)?
                .matmul(&rhs.to_dtype(DType::BF16)?)?
                .to_dtype(lhs.dtype())?,
        };
        Ok(if self.scale == 1.0 {
            term
        } else {
            (term * self.scale)?
        })
    }
}

/// `start + sum_i scale_i lhs_i rhs_i`; every product must give the same `[m, n]`, and `start`, where given, is `[m, n]` or a row
/// `[n]` for all rows. A right factor may be bfloat16; sums and result are f32.
///
/// # Errors
/// [`crate::Error::Shape`] when inner or outer sizes disagree; candle's errors.
pub fn sum_of_products(start: Option<&Tensor>, products: &[Product<'_>]) -> Result<Tensor> {
    let mut shape = None;
    for Product { lhs, rhs, .. } in products {
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
    if OWN_GEMM && let Some(sum) = on_cpu_products(start, products, (m, n), Kernel::detect())? {
        return Ok(sum);
    }
    let mut total = start.cloned();
    for product in products {
        let term = product.on_any_device()?;
        total = Some(match total {
            None => term,
            Some(sum) => term.broadcast_add(&sum)?,
        });
    }
    total.ok_or_else(|| candle_core::Error::Msg("a sum of no products".to_owned()).into())
}

/// `x w^T`: `[m, k]` by `[n, k]` gives `[m, n]`.
pub fn matmul_nt(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    sum_of_products(
        None,
        &[Product::new(Factor::Plain(x), Factor::Transposed(w))],
    )
}

/// `g w`: `[m, k]` by `[k, n]` gives `[m, n]`.
pub fn matmul_nn(g: &Tensor, w: &Tensor) -> Result<Tensor> {
    sum_of_products(None, &[Product::new(Factor::Plain(g), Factor::Plain(w))])
}

/// `a^T b`: `[k, m]` by `[k, n]` gives `[m, n]`.
pub fn matmul_tn(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    sum_of_products(
        None,
        &[Product::new(Factor::Transposed(a), Factor::Plain(b))],
    )
}

#[derive(Clone, Copy)]
enum Values<'a> {
    Single(&'a [f32]),
    Brain(&'a [bf16]),
}

/// A product whose factors lie in memory.
enum Operands<'a> {
    Single {
        lhs: Strided<'a>,
        rhs: Values<'a>,
        /// Distances between rows and between columns of the right factor.
        rhs_strides: (usize, usize),
        k: usize,
        scale: f32,
    },
    /// Both factors in bf16, for the processor's own instruction.
    Brain {
        kernel: Kernel,
        lhs: PackedRows,
        rhs: Weights<'a>,
        k: usize,
        scale: f32,
    },
}

impl Operands<'_> {
    fn k(&self) -> usize {
        match self {
            Self::Single { k, .. } | Self::Brain { k, .. } => *k,
        }
    }

    fn is_widened(&self) -> bool {
        matches!(
            self,
            Self::Single {
                rhs: Values::Brain(_),
                ..
            }
        )
    }
}

/// Where the pieces write: each its own columns of one buffer.
struct Destination(*mut f32);

// SAFETY: the pieces' columns are disjoint, and the buffer outlives them all.
unsafe impl Sync for Destination {}

#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(
        unused_variables,
        unreachable_code,
        reason = "there is no kernel to pass operands to"
    )
)]
fn on_cpu_products(
    start: Option<&Tensor>,
    products: &[Product<'_>],
    (m, n): (usize, usize),
    kernel: Option<Kernel>,
) -> Result<Option<Tensor>> {
    let tensors: Vec<&Tensor> = products
        .iter()
        .flat_map(|product| [product.lhs.tensor(), product.rhs.tensor()])
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
    let mut rounded = Vec::with_capacity(products.len());
    for (product, pair) in products.iter().zip(values.chunks_exact(2)) {
        let Values::Single(left) = pair[0] else {
            return Ok(None);
        };
        rounded.push(match (product.precision, kernel, product.lhs, pair[1]) {
            (Precision::Brain, Some(_), Factor::Plain(_), Values::Brain(_)) => None,
            (Precision::Brain, ..) => Some(round(left)),
            (Precision::Single, ..) => None,
        });
    }
    let mut operands = Vec::with_capacity(products.len());
    for ((product, pair), rounded) in products.iter().zip(values.chunks_exact(2)).zip(&rounded) {
        let (Values::Single(left), right) = (pair[0], pair[1]) else {
            return Ok(None);
        };
        let k = product.lhs.dims()?.1;
        let scale = product.scale as f32;
        operands.push(match (product.precision, kernel, rounded, right) {
            (Precision::Brain, Some(kernel), None, Values::Brain(data)) => Operands::Brain {
                kernel,
                lhs: kernel.pack_rows(left, (m, k)),
                rhs: Weights {
                    data,
                    stride: product.rhs.tensor().dims()[1],
                    transposed: matches!(product.rhs, Factor::Transposed(_)),
                },
                k,
                scale,
            },
            _ => {
                let (row, column) = product.lhs.strides();
                Operands::Single {
                    lhs: Strided {
                        data: rounded.as_deref().unwrap_or(left),
                        row,
                        column,
                    },
                    rhs: right,
                    rhs_strides: product.rhs.strides(),
                    k,
                    scale,
                }
            }
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
    let work: usize = operands.iter().map(|o| m * n * o.k()).sum();
    let most = (n / PIECE_FROM).max(1);
    if operands.iter().any(Operands::is_widened) {
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
        match operand {
            Operands::Brain {
                kernel,
                lhs,
                rhs,
                scale,
                ..
            } => {
                let columns = columns.clone();
                // SAFETY: the destination has m rows of n floats, of which this writes columns that no other piece touches, and
                // reads them only once `accumulate` says they are written.
                unsafe { kernel.product(lhs, *rhs, columns, destination.0, n, accumulate, *scale) };
                accumulate = true;
            }
            Operands::Single {
                lhs,
                rhs,
                rhs_strides: (row, column),
                k,
                scale,
            } => {
                let depth = match rhs {
                    Values::Single(_) => (*k).max(1),
                    Values::Brain(_) => WIDENED_ROWS,
                };
                for from in (0..(*k).max(1)).step_by(depth) {
                    let k = depth.min(k - from);
                    let rhs = match rhs {
                        Values::Single(data) => Strided {
                            data: &data[(from * row + columns.start * column).min(data.len())..],
                            row: *row,
                            column: *column,
                        },
                        Values::Brain(data) => {
                            let (rows, columns) = (from..from + k, columns.clone());
                            widen(data, (*row, *column), rows, columns, &mut widened)
                        }
                    };
                    let lhs = Strided {
                        data: &lhs.data[(from * lhs.column).min(lhs.data.len())..],
                        ..*lhs
                    };
                    assert!(
                        lhs.holds(m, k) && rhs.holds(k, width),
                        "matrix product: a factor is too short"
                    );
                    // SAFETY: the factors hold every element that is read; the destination has m rows of n floats, of which
                    // this writes columns that no other piece touches, and reads them only once `accumulate` says they are
                    // written.
                    unsafe {
                        raw_gemm(
                            (m, width, k),
                            destination.0.add(columns.start),
                            n,
                            accumulate,
                            lhs,
                            rhs,
                            *scale,
                            parallel,
                        );
                    }
                    accumulate = true;
                }
            }
        }
    }
}

/// The values rounded to bf16.
fn round(values: &[f32]) -> Vec<f32> {
    values
        .par_iter()
        .with_min_len(1 << 12)
        .map(|v| bf16::from_f32(*v).to_f32())
        .collect()
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
                let second = Product::scaled(Factor::Plain(&h), Factor::Plain(&b), 0.5);
                let single = Product::new(Factor::Plain(&x), Factor::Transposed(&w));
                let found = sum_of_products(Some(&start), &[single, second])?;
                assert!(largest_difference(&found, &(x.matmul(&w.t()?)? + &low_rank)?)? < 2e-3);
                let expected = (x.matmul(&rounded.t()?)? + &low_rank)?;
                let transposed = Product::new(Factor::Plain(&x), Factor::Transposed(&w16));
                let found = sum_of_products(Some(&start), &[transposed, second])?;
                assert!(largest_difference(&found, &expected)? < 2e-3);
                let plain = Product::new(Factor::Plain(&x), Factor::Plain(&v16));
                let found = sum_of_products(Some(&start), &[plain, second])?;
                assert!(largest_difference(&found, &expected)? < 2e-3);
                let strided = matrix(k, m, 1.0).t()?;
                let composed = sum_of_products(
                    Some(&start),
                    &[
                        Product::new(Factor::Plain(&strided), Factor::Plain(&v16)),
                        second,
                    ],
                )?;
                let expected = (strided.matmul(&rounded.t()?)? + &low_rank)?;
                assert!(largest_difference(&composed, &expected)? < 2e-3);
            }
        }
        Ok(())
    }

    /// bf16 products by the processor's instruction and by rounding and widening, against candle on rounded factors.
    #[test]
    fn brain_products_equal_rounded_factors() -> Result<()> {
        for (m, n, k) in [
            (1, 1, 1),
            (5, 7, 3),
            (8, 48, 32),
            (67, 413, 2101),
            (40, 200, 33),
            (9, 97, 1026),
        ] {
            let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0).to_dtype(DType::BF16)?);
            let v = w.t()?.contiguous()?;
            let start = matrix(m, n, 5.0);
            // Sums of k terms below one.
            let bound = 1e-6 * (k as f32).max(100.0);
            let (h, b) = (matrix(m, 4, 3.0), matrix(4, n, 4.0));
            let low_rank = Product::new(Factor::Plain(&h), Factor::Plain(&b));
            let wide = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
            let product = (wide(&x)?.matmul(&wide(&v)?)? * 0.5)?;
            let expected = ((product + &start)? + h.matmul(&b)?)?;
            for rhs in [Factor::Transposed(&w), Factor::Plain(&v)] {
                let base =
                    Product::scaled(Factor::Plain(&x), rhs, 0.5).with_precision(Precision::Brain);
                let products = [base, low_rank];
                for kernel in [None, Kernel::detect()] {
                    let sum = on_cpu_products(Some(&start), &products, (m, n), kernel)?
                        .expect("contiguous matrices in memory");
                    let difference = largest_difference(&sum, &expected)?;
                    assert!(difference < bound, "{m} {n} {k}: {difference}");
                }
                let transposed = x.t()?.contiguous()?;
                let base = Product::scaled(Factor::Transposed(&transposed), rhs, 0.5)
                    .with_precision(Precision::Brain);
                let sum = sum_of_products(Some(&start), &[base, low_rank])?;
                assert!(largest_difference(&sum, &expected)? < bound);
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
                            Product::new(Factor::Plain(&x), Factor::Transposed(&w)),
                            Product::scaled(Factor::Plain(&x), Factor::Plain(&v16), 0.5),
                        ],
                    )?;
                    let narrow = Product::new(Factor::Plain(&x), Factor::Plain(&v16))
                        .with_precision(Precision::Brain);
                    let rounded = sum_of_products(Some(&sum), &[narrow])?;
                    let single = matmul_nt(&x, &w)?;
                    let values = Tensor::cat(&[sum, single, rounded], 0)?.flatten_all()?;
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
