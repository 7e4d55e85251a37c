//! Products with a bfloat16 right factor by the processor's own instruction (AVX512-BF16), detected at run time.
//!
//! `vdpbf16ps` multiplies two pairs of bf16 numbers and adds both products to an f32: on AMD's processors at twice the rate
//! of f32 arithmetic. The left factor is rounded to bf16; the sums stay f32. Weights need no second, packed copy: their panels
//! are packed during the product, which costs about 1 % at a few hundred rows.

use std::arch::x86_64::{
    __cpuid, __m256i, __m512bh, __m512i, __mmask16, __mmask32, _mm256_loadu_epi16,
    _mm256_maskz_loadu_epi16, _mm256_setzero_si256, _mm256_storeu_si256, _mm512_add_ps,
    _mm512_castsi512_si256, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps,
    _mm512_mul_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// f32 lanes of a register.
const LANES: usize = 16;
/// Registers of columns that are computed together; with [`ROWS`] rows their sums fill 24 of the 32 registers.
const VECTORS: usize = 3;
/// Columns of a packed panel of the right factor.
const PANEL: usize = LANES * VECTORS;
/// Rows of a packed panel of the left factor.
const ROWS: usize = 8;
/// Inner size of a packed panel of the right factor, chosen so that the panel fits the second-level cache.
const DEPTH: usize = 1024;

/// A row-major bf16 matrix, taken as it is or transposed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// Its elements.
    pub data: &'a [bf16],
    /// Distance between rows of the matrix in memory.
    pub stride: usize,
    /// Whether the factor is the transpose of the matrix in memory.
    pub transposed: bool,
    /// Numbers of leading rows and columns of the factor that are not in memory.
    pub skipped: (usize, usize),
}

/// Proof that the processor has the instructions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel(());

/// A left factor rounded to bf16. For every [`ROWS`] rows it holds the pairs of neighbours, `[pair][row]`; missing
/// values are zero.
#[derive(Debug)]
pub(crate) struct PackedRows {
    data: Vec<u32>,
    rows: usize,
    depth: usize,
}

impl PackedRows {
    fn pairs(&self) -> usize {
        self.depth.div_ceil(2)
    }
}

impl Kernel {
    /// Returns the kernel if the processor and the operating system support it.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        found.then_some(Self(()))
    }

    /// Whether a product by these instructions is taken to be faster than one in f32: on processors of AMD. Intel's expect
    /// products in bf16 in their matrix unit (AMX). The one that was measured (model 207, Emerald Rapids) executes `vdpbf16ps`
    /// at a quarter of the rate of an f32 `fma`.
    pub(crate) fn is_fast() -> bool {
        static IS_FAST: LazyLock<bool> = LazyLock::new(|| {
            let vendor = __cpuid(0);
            let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
        });
        *IS_FAST
    }

    /// Rounds and packs row-major `x` `[rows, depth]`.
    ///
    /// # Panics
    /// When `x` is too short.
    pub(crate) fn pack_rows(self, x: &[f32], (rows, depth): (usize, usize)) -> PackedRows {
        let pairs = depth.div_ceil(2);
        let mut data = vec![0u32; rows.div_ceil(ROWS) * pairs * ROWS];
        if pairs > 0 {
            data.par_chunks_exact_mut(pairs * ROWS)
                .with_min_len(4)
                .zip(x[..rows * depth].par_chunks(ROWS * depth))
                // SAFETY: the processor has the instructions, as `self` proves.
                .for_each(|(panel, rows)| unsafe { pack_left(rows, depth, panel) });
        }
        PackedRows { data, rows, depth }
    }

    /// Splits an inner size of `k` into the ranges that are multiplied one after the other.
    pub(crate) fn depths(self, k: usize) -> impl Iterator<Item = Range<usize>> {
        (0..k)
            .step_by(DEPTH)
            .map(move |from| from..k.min(from + DEPTH))
    }

    /// Computes `destination[:, columns] = scale * lhs[:, depth] rhs[depth, columns]`, or `+=` with `accumulate`; rows
    /// of the destination are `n` apart. If the caller takes the [`depths`](Self::depths) in turn, the order in which
    /// each element is summed depends only on the inner size.
    ///
    /// # Panics
    /// When `rhs` does not hold `depth` and `columns`.
    ///
    /// # Safety
    /// `destination` must hold the left factor's rows, `n >= columns.end` floats each; nobody else may use `columns` of
    /// them.
    #[expect(
        clippy::too_many_arguments,
        reason = "a matrix product has this many sizes"
    )]
    pub(crate) unsafe fn product(
        self,
        lhs: &PackedRows,
        rhs: Matrix<'_>,
        depth: Range<usize>,
        columns: Range<usize>,
        destination: *mut f32,
        n: usize,
        accumulate: bool,
        scale: f32,
    ) {
        let from = depth.start;
        let pairs = depth.len().div_ceil(2);
        let mut packed = vec![0u32; pairs * PANEL];
        let (above, before) = rhs.skipped;
        let inner = depth.start - above..depth.end - above;
        for start in columns.clone().step_by(PANEL) {
            let columns = start..columns.end.min(start + PANEL);
            let stored = columns.start - before..columns.end - before;
            // SAFETY: the processor has the instructions, as `self` proves.
            unsafe {
                if rhs.transposed {
                    pack_transposed(rhs, inner.clone(), stored, &mut packed);
                } else {
                    pack_plain(rhs, inner.clone(), stored, &mut packed);
                }
            }
            for (index, panel) in lhs.data.chunks_exact(lhs.pairs() * ROWS).enumerate() {
                let row = index * ROWS;
                let left = &panel[from / 2 * ROWS..(from / 2 + pairs) * ROWS];
                // SAFETY: the instructions exist, and the caller promises that the rows and columns lie in the
                // destination. It is read only where the caller or the previous part of the sum has written it.
                unsafe {
                    tile(
                        left,
                        &packed,
                        destination.add(row * n + start),
                        n,
                        (ROWS.min(lhs.rows - row), columns.len()),
                        accumulate,
                        scale,
                    );
                }
            }
        }
    }
}

/// The first `len` of sixteen lanes.
fn lanes(len: usize) -> __mmask16 {
    if len >= LANES { !0 } else { (1 << len) - 1 }
}

/// Packs rows of `depth` f32 numbers, at most [`ROWS`], as pairs of bf16: `out[pair][row]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_left(x: &[f32], depth: usize, out: &mut [u32]) {
    for (block, out) in out.chunks_mut(LANES * ROWS).enumerate() {
        let from = block * 2 * LANES;
        let mut registers = [_mm512_setzero_si512(); LANES];
        for (register, row) in registers.iter_mut().zip(x.chunks_exact(depth)) {
            let values = &row[from..depth.min(from + 2 * LANES)];
            let (low, high) = values.split_at(values.len().min(LANES));
            // SAFETY: the masks confine the loads to the slices; both types are 512 bits of plain numbers.
            *register = unsafe {
                let low = _mm512_maskz_loadu_ps(lanes(low.len()), low.as_ptr());
                let high = _mm512_maskz_loadu_ps(lanes(high.len()), high.as_ptr());
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            };
        }
        let pairs = transpose(registers);
        for (out, pair) in out.chunks_exact_mut(ROWS).zip(pairs) {
            let target: *mut __m256i = out.as_mut_ptr().cast();
            // SAFETY: `out` holds eight 32-bit numbers.
            unsafe { _mm256_storeu_si256(target, _mm512_castsi512_si256(pair)) };
        }
    }
}

/// Packs `depth` and `columns` of the transpose of `w`, that is rows `columns` of `w`, as `out[pair][column]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_transposed(w: Matrix<'_>, depth: Range<usize>, columns: Range<usize>, out: &mut [u32]) {
    let data = w.data.reinterpret_cast();
    for vector in 0..VECTORS {
        let first = (columns.start + vector * LANES).min(columns.end);
        let rows = first..columns.end.min(first + LANES);
        for (block, from) in depth.clone().step_by(2 * LANES).enumerate() {
            let len = (depth.end - from).min(2 * LANES);
            let mask: __mmask32 = if len == 2 * LANES { !0 } else { (1 << len) - 1 };
            let mut registers = [_mm512_setzero_si512(); LANES];
            for (register, row) in registers.iter_mut().zip(rows.clone()) {
                let values = &data[row * w.stride + from..row * w.stride + from + len];
                // SAFETY: the mask confines the load to the slice.
                *register = unsafe { _mm512_maskz_loadu_epi16(mask, values.as_ptr().cast()) };
            }
            let pairs = len.div_ceil(2);
            for (pair, values) in transpose(registers).into_iter().take(pairs).enumerate() {
                let at = (block * LANES + pair) * PANEL + vector * LANES;
                let out: &mut [u32] = &mut out[at..at + LANES];
                // SAFETY: `out` holds sixteen 32-bit numbers.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) };
            }
        }
    }
}

/// Packs `depth` (rows) and `columns` of `w` as `out[pair][column]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_plain(w: Matrix<'_>, depth: Range<usize>, columns: Range<usize>, out: &mut [u32]) {
    let data: &[u16] = w.data.reinterpret_cast();
    let load = |row: usize, columns: Range<usize>| -> __m256i {
        if row >= depth.end || columns.is_empty() {
            return _mm256_setzero_si256();
        }
        let values = &data[row * w.stride + columns.start..row * w.stride + columns.end];
        // SAFETY: the mask confines the load to the slice.
        unsafe {
            if values.len() == LANES {
                _mm256_loadu_epi16(values.as_ptr().cast())
            } else {
                _mm256_maskz_loadu_epi16(lanes(values.len()), values.as_ptr().cast())
            }
        }
    };
    for (row, out) in depth.clone().step_by(2).zip(out.chunks_exact_mut(PANEL)) {
        for (vector, out) in out.chunks_exact_mut(LANES).enumerate() {
            let first = (columns.start + vector * LANES).min(columns.end);
            let columns = first..columns.end.min(first + LANES);
            let low = _mm512_cvtepu16_epi32(load(row, columns.clone()));
            let high = _mm512_cvtepu16_epi32(load(row + 1, columns));
            let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            // SAFETY: `out` holds sixteen 32-bit numbers.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs) };
        }
    }
}

/// Transposes sixteen rows of sixteen 32-bit numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = rows;
    for i in 0..LANES / 2 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4 i + j]: quarter q holds column 4 q + j of rows 4 i to 4 i + 3.
    let mut fours = pairs;
    for i in 0..LANES / 4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|j| pairs[4 * i + j]);
        fours[4 * i] = _mm512_unpacklo_epi64(a, c);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut columns = fours;
    for j in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|i| fours[i + j]);
        let even_ab = _mm512_shuffle_i32x4::<0x88>(a, b);
        let odd_ab = _mm512_shuffle_i32x4::<0xdd>(a, b);
        let even_cd = _mm512_shuffle_i32x4::<0x88>(c, d);
        let odd_cd = _mm512_shuffle_i32x4::<0xdd>(c, d);
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd);
    }
    columns
}

/// Computes one tile of the result, at most [`ROWS`] by [`PANEL`]: `c = scale * left right`, or `+=` with `accumulate`.
///
/// # Safety
/// `c` must hold `rows` rows, `n` apart, of `columns` floats.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile(
    left: &[u32],
    right: &[u32],
    c: *mut f32,
    n: usize,
    (rows, columns): (usize, usize),
    accumulate: bool,
    scale: f32,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (left, right) in left.chunks_exact(ROWS).zip(right.chunks_exact(PANEL)) {
        let mut vectors = [_mm512_setzero_si512(); VECTORS];
        for (vector, right) in vectors.iter_mut().zip(right.chunks_exact(LANES)) {
            // SAFETY: `right` holds sixteen 32-bit numbers.
            *vector = unsafe { _mm512_loadu_si512(right.as_ptr().cast()) };
        }
        for (sums, left) in sums.iter_mut().zip(left) {
            let left = _mm512_set1_epi32(left.cast_signed());
            for (sum, right) in sums.iter_mut().zip(vectors) {
                // SAFETY: all of these types are 512 bits of plain numbers.
                let (left, right) = unsafe {
                    (
                        std::mem::transmute::<__m512i, __m512bh>(left),
                        std::mem::transmute::<__m512i, __m512bh>(right),
                    )
                };
                *sum = _mm512_dpbf16_ps(*sum, left, right);
            }
        }
    }
    let scale = _mm512_set1_ps(scale);
    for (row, sums) in sums.into_iter().take(rows).enumerate() {
        for (vector, sum) in sums.into_iter().enumerate() {
            let mask = lanes(columns.saturating_sub(vector * LANES));
            if mask == 0 {
                continue;
            }
            // SAFETY: the row is one of the caller's `rows`, and the mask confines load and store to its `columns`.
            unsafe {
                let target = c.add(row * n + vector * LANES);
                let mut sum = _mm512_mul_ps(sum, scale);
                if accumulate {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), sum);
                }
                _mm512_mask_storeu_ps(target, mask, sum);
            }
        }
    }
}
