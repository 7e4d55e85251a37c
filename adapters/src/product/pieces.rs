//! A sum of products on the CPU, cut into ranges of columns that the cores compute in parallel.

use std::ops::Range;

use candle_core::{Device, Tensor};
use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::bf16::{Kernel, Matrix, PackedRows};
use super::few::{self, FEW, Rows};
use super::{Factor, Precision, Product};
use crate::error::Result;
use crate::linalg::{PARALLEL_FROM, Strided, raw_gemm};
use crate::simd::{has_fused, vectorised};
use crate::weights::{Access, Lent, lend};

/// Minimum columns per piece; fewer would leave the kernel's registers half empty.
const PIECE_FROM: usize = 96;

/// Minimum rows for cutting a result by the number of threads.
const PIECE_ROWS: usize = 16;

/// Minimum columns per piece of a result with fewer rows: `gemm` sums a single row of up to 256 columns in another
/// order.
const FEW_ROWS_PIECE_FROM: usize = 272;

/// Columns of the widest vector.
const VECTOR: usize = 16;

/// Values that one task rounds.
const ROUNDED: usize = 1 << 14;

/// Inner size up to which a product is computed at once; see [`depth_at_a_time`].
const DEPTH: usize = 2048;

/// A product whose factors lie in host memory.
struct Term<'a> {
    product: &'a Product<'a>,
    operands: Operands<'a>,
    /// Inner size.
    k: usize,
    /// Columns of the right factor's matrix in memory.
    stride: usize,
}

enum Operands<'a> {
    /// In f32; a right factor that is not lent is widened.
    Single {
        left: Lent<'a, f32>,
        /// The left factor rounded to bf16, if the product asks for it.
        rounded: Option<Vec<f32>>,
        right: Option<Lent<'a, f32>>,
    },
    /// Both in bf16, for the processor's own instruction; a right factor that is not lent is decoded.
    #[cfg(target_arch = "x86_64")]
    Bf16 {
        kernel: Kernel,
        left: PackedRows,
        right: Option<Lent<'a, bf16>>,
    },
}

impl<'a> Term<'a> {
    /// Returns `None` unless the factors are contiguous and in host memory. With `instruction`, uses the processor's
    /// own instruction for bf16.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "there is no such instruction")
    )]
    fn new(product: &'a Product<'a>, instruction: bool) -> Result<Option<Self>> {
        let Product {
            lhs,
            rhs,
            precision,
            ..
        } = product;
        let (m, k) = lhs.dims()?;
        let weight = rhs.matrix();
        let stride = weight.dims()?.1;
        let Some(left) = lend::<f32>(lhs.matrix()) else {
            return Ok(None);
        };
        let term = |operands| {
            Ok(Some(Self {
                product,
                operands,
                k,
                stride,
            }))
        };
        let narrow = *precision == Precision::Bf16;
        #[cfg(target_arch = "x86_64")]
        if instruction
            && narrow
            && !lhs.is_transposed()
            && let Some(kernel) = Kernel::detect()
            && let Some(right) = in_memory(weight.access_bf16())
        {
            let left = kernel.pack_rows(&left, (m, k));
            return term(Operands::Bf16 {
                kernel,
                left,
                right,
            });
        }
        let Some(right) = in_memory(weight.access()) else {
            return Ok(None);
        };
        term(Operands::Single {
            rounded: narrow.then(|| round(&left)),
            left,
            right,
        })
    }

    /// Whether a piece of the right factor is written to memory before it is multiplied.
    fn is_widened(&self) -> bool {
        match &self.operands {
            Operands::Single { right, .. } => right.is_none(),
            #[cfg(target_arch = "x86_64")]
            Operands::Bf16 { right, .. } => right.is_none(),
        }
    }

    /// Block size in columns of the result: cuts at its multiples decode nothing twice.
    fn block(&self) -> usize {
        match self.product.rhs.is_transposed() {
            true => 1,
            false => self.product.rhs.matrix().block(),
        }
    }

    /// Whether the product with a left factor of `m` rows is a matter of few dot products; see [`few`].
    fn is_few(&self, m: usize) -> bool {
        matches!(self.operands, Operands::Single { .. })
            && m <= FEW
            && has_fused()
            && !self.product.lhs.is_transposed()
            && self.product.rhs.is_transposed()
    }

    /// Maps rows and columns of the right factor to those of its matrix in memory.
    fn stored(&self, rows: Range<usize>, columns: Range<usize>) -> (Range<usize>, Range<usize>) {
        match self.product.rhs.is_transposed() {
            true => (columns, rows),
            false => (rows, columns),
        }
    }

    /// Returns rows `rows` and columns `columns` of the right factor; widened values are written to `buffer`.
    fn right<'b>(
        &self,
        lent: Option<&'b [f32]>,
        rows: Range<usize>,
        columns: Range<usize>,
        buffer: &'b mut Vec<f32>,
    ) -> Strided<'b> {
        let transposed = self.product.rhs.is_transposed();
        let (rows, columns) = self.stored(rows, columns);
        let (data, stride) = match lent {
            Some(values) => {
                let from = rows.start * self.stride + columns.start;
                (&values[from.min(values.len())..], self.stride)
            }
            None => {
                buffer.resize(rows.len() * columns.len(), 0.0);
                self.product
                    .rhs
                    .matrix()
                    .widen(rows, columns.clone(), buffer);
                (&**buffer, columns.len())
            }
        };
        if transposed {
            Strided::transposed(data, stride)
        } else {
            Strided::rows(data, stride)
        }
    }
}

/// Returns the lent values, `Some(None)` for values that come in pieces, and `None` for values elsewhere.
fn in_memory<T>(access: Access<'_, T>) -> Option<Option<Lent<'_, T>>> {
    match access {
        Access::Lent(values) => Some(Some(values)),
        Access::Pieces => Some(None),
        Access::Elsewhere => None,
    }
}

/// The buffer of the result; each piece writes its own columns.
struct Destination(*mut f32);

// SAFETY: the pieces' columns are disjoint, and the buffer outlives them all.
unsafe impl Sync for Destination {}

/// Computes [`super::sum_of_products`]. Returns `None` if a factor or `start` is elsewhere, is not contiguous or has
/// another type, or if there is nothing to add up.
pub(super) fn sum_in_pieces(
    start: Option<&Tensor>,
    products: &[Product<'_>],
    (m, n): (usize, usize),
    instruction: bool,
) -> Result<Option<Tensor>> {
    let lent = start.map(lend::<f32>);
    let terms: Option<Vec<Term<'_>>> = products
        .iter()
        .map(|product| Term::new(product, instruction))
        .collect::<Result<_>>()?;
    let (Some(terms), None | Some(Some(_))) = (terms.filter(|t| !t.is_empty()), &lent) else {
        return Ok(None);
    };
    let start = lent.as_ref().and_then(Option::as_deref);
    let mut sum: Vec<f32> = Vec::with_capacity(m * n);
    let destination = Destination(sum.as_mut_ptr());
    let at = cuts_at(&terms);
    let pieces = n_pieces((m, n), &terms, at);
    if pieces == 1 {
        piece(&destination, (m, n), 0..n, start, &terms, true);
    } else {
        (0..pieces).into_par_iter().for_each(|index| {
            let columns = cut(index, pieces, (n, at))..cut(index + 1, pieces, (n, at));
            piece(&destination, (m, n), columns, start, &terms, false);
        });
    }
    // SAFETY: the capacity is m * n, and the pieces have written every column of every row.
    unsafe { sum.set_len(m * n) };
    Ok(Some(Tensor::from_vec(sum, (m, n), &Device::Cpu)?))
}

/// Number of tasks that share the columns of the result.
///
/// `gemm` sums an element in an order that depends only on the inner size, except for very small results, which are not
/// cut. So the positions of the cuts change no bit; tests compare thread counts and kinds of weights. Pieces are faster
/// than `gemm`'s own threads, because `gemm` packs the left factor on one thread.
fn n_pieces((m, n): (usize, usize), terms: &[Term<'_>], at: usize) -> usize {
    let threads = rayon::current_num_threads();
    let work: usize = terms.iter().map(|term| m * n * term.k).sum();
    let most = (n / PIECE_FROM).max(1);
    if terms.iter().all(|term| term.is_few(m)) {
        // No cut changes a bit. Several pieces per thread even out what the cores lose to others.
        return match work < PARALLEL_FROM {
            true => 1,
            false => most.min(4 * threads),
        };
    }
    if terms.iter().any(Term::is_widened) {
        // The cuts also bound the memory for widened values, so they do not depend on the number of threads.
        if m < PIECE_ROWS {
            (n / FEW_ROWS_PIECE_FROM.next_multiple_of(at)).max(1)
        } else {
            most.min(2 * n.div_ceil(512)).min(n / at).max(1)
        }
    } else if work < PARALLEL_FROM || m < PIECE_ROWS || most < threads {
        1
    } else {
        threads
    }
}

/// Returns the unit at whose multiples columns are cut: a multiple of the widest vector, and of blocks, so that none is
/// decoded twice.
fn cuts_at(terms: &[Term<'_>]) -> usize {
    let blocks = terms.iter().map(Term::block);
    blocks.max().unwrap_or(1).next_multiple_of(VECTOR)
}

/// Returns how much of an inner size of `k` is multiplied at a time. It is the same for every kind of weight, because
/// it determines the order of the sum. It is a multiple of the parts that `gemm` itself cuts `k` into, which are equal
/// and at most 512, so these cuts change no bit.
fn depth_at_a_time(k: usize) -> usize {
    if k <= DEPTH {
        k.max(1)
    } else {
        4 * k.div_ceil(k.div_ceil(DEPTH / 4))
    }
}

/// Returns the first column of piece `index`, of `n` columns in all; pieces are cut at multiples of `at`.
fn cut(index: usize, pieces: usize, (n, at): (usize, usize)) -> usize {
    if index == pieces {
        n
    } else {
        index * n / pieces / at * at
    }
}

/// Computes `columns` of the sum.
fn piece(
    destination: &Destination,
    (m, n): (usize, usize),
    columns: Range<usize>,
    start: Option<&[f32]>,
    terms: &[Term<'_>],
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
    #[cfg(target_arch = "x86_64")]
    let mut narrowed = Vec::new();
    for term in terms {
        let scale = term.product.scale as f32;
        match &term.operands {
            #[cfg(target_arch = "x86_64")]
            Operands::Bf16 {
                kernel,
                left,
                right,
            } => {
                let transposed = term.product.rhs.is_transposed();
                for depth in kernel.depths(term.k) {
                    let (data, stride, skipped) = match right {
                        Some(values) => (&**values, term.stride, (0, 0)),
                        None => {
                            let (rows, cols) = term.stored(depth.clone(), columns.clone());
                            narrowed.resize(rows.len() * cols.len(), bf16::ZERO);
                            let weight = term.product.rhs.matrix();
                            weight.widen_bf16(rows, cols.clone(), &mut narrowed);
                            (&*narrowed, cols.len(), (depth.start, columns.start))
                        }
                    };
                    let right = Matrix {
                        data,
                        stride,
                        transposed,
                        skipped,
                    };
                    // SAFETY: the destination has m rows of n floats, of which this writes columns that no other piece
                    // touches, and reads them only once `accumulate` says they are written.
                    unsafe {
                        kernel.product(
                            left,
                            right,
                            depth,
                            columns.clone(),
                            destination.0,
                            n,
                            accumulate,
                            scale,
                        );
                    }
                    accumulate = true;
                }
            }
            Operands::Single {
                left,
                rounded,
                right,
            } => {
                let left = rounded.as_deref().unwrap_or(left);
                if term.is_few(m) {
                    let weight = term.product.rhs.matrix();
                    let widen = |rows: Range<usize>, out: &mut [f32]| {
                        weight.widen(rows, 0..term.k, out);
                    };
                    let rows = match right.as_deref() {
                        Some(values) => Rows::Lent {
                            values,
                            stride: term.stride,
                        },
                        None => Rows::Widened(&widen),
                    };
                    // SAFETY: the destination has m rows of n floats, of which this writes columns that no other piece
                    // touches, and reads them only once `accumulate` says they are written.
                    unsafe {
                        few::product(
                            left,
                            (m, term.k),
                            &rows,
                            columns.clone(),
                            (destination.0, n),
                            (accumulate, scale),
                        );
                    }
                    accumulate = true;
                    continue;
                }
                let lhs = match term.product.lhs {
                    Factor::Plain(_) => Strided::rows(left, term.k),
                    Factor::Transposed(_) => Strided::transposed(left, m),
                };
                let depth = depth_at_a_time(term.k);
                for from in (0..term.k.max(1)).step_by(depth) {
                    let inner = from..term.k.min(from + depth);
                    let k = inner.len();
                    let rhs = term.right(right.as_deref(), inner, columns.clone(), &mut widened);
                    let lhs = Strided {
                        data: &lhs.data[(from * lhs.column).min(lhs.data.len())..],
                        ..lhs
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
                            scale,
                            parallel,
                        );
                    }
                    accumulate = true;
                }
            }
        }
    }
}

/// Rounds the values to bf16.
fn round(values: &[f32]) -> Vec<f32> {
    let mut rounded = vec![0f32; values.len()];
    rounded
        .par_chunks_mut(ROUNDED)
        .zip(values.par_chunks(ROUNDED))
        .for_each(|(rounded, values)| {
            vectorised(
                #[inline(always)]
                || {
                    for (rounded, value) in rounded.iter_mut().zip(values) {
                        *rounded = to_bf16(*value);
                    }
                },
            );
        });
    rounded
}

/// The nearest bfloat16 number, of two the even one: `bf16::from_f32`, but without branches.
#[inline(always)]
fn to_bf16(value: f32) -> f32 {
    const LOW: u32 = 0xffff;
    let bits = value.to_bits();
    let nearest = bits.wrapping_add((LOW >> 1) + ((bits >> 16) & 1)) & !LOW;
    let quiet = (bits & !LOW) | 0x0040_0000;
    f32::from_bits(if value.is_nan() { quiet } else { nearest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_as_by_half() {
        let special = [
            0.0,
            -0.0,
            1e-45,
            f32::MAX,
            f32::MIN,
            f32::INFINITY,
            f32::NAN,
            -f32::NAN,
        ];
        let others = (0..1u32 << 16).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        let ties = (0..1u32 << 8).map(|i| f32::from_bits(0x3f80_8000 + (i << 16)));
        let values: Vec<f32> = special.into_iter().chain(others).chain(ties).collect();
        for (value, rounded) in values.iter().zip(round(&values)) {
            let expected = bf16::from_f32(*value).to_f32();
            assert_eq!(rounded.to_bits(), expected.to_bits(), "{value}");
        }
    }
}
