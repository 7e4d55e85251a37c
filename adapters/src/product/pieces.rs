//! A sum of products on the CPU, cut into columns that the cores work through side by side.

use std::ops::Range;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{Factor, Precision, Product};
use crate::brain::{Kernel, PackedRows, Weights};
use crate::error::Result;
use crate::linalg::{PARALLEL_FROM, Strided, raw_gemm};
use crate::simd::vectorised;

/// Columns a piece has at least; fewer would leave the kernel's registers half empty.
const PIECE_FROM: usize = 96;

/// Rows from which a result is cut.
const PIECE_ROWS: usize = 16;

/// Rows of a bf16 factor that are widened to f32 at a time.
const WIDENED_ROWS: usize = 2048;

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

/// The sum of [`super::sum_of_products`], unless a tensor is elsewhere, is not contiguous, or has another type.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(
        unused_variables,
        unreachable_code,
        reason = "there is no kernel to pass operands to"
    )
)]
pub(super) fn sum_in_pieces(
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
