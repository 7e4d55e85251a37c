//! MLX's affine quantisation: integers of 4 or 8 bits, packed into 32-bit words from the lowest bit on, with a scale
//! and a bias per group of a row.
//!
//! `w = scale * q + bias`, in float32 from the stored scale and bias. `mlx.core.dequantize` computes the same in the
//! type of the scales; MLX's quantised product does not have this rounding.

use std::ops::Range;

use half::{bf16, f16};

use crate::simd::vectorised;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// A matrix of `rows` times `columns` integers.
#[derive(Debug, Clone)]
pub(crate) struct Affine {
    /// Words `[rows, columns * bits / 32]`.
    quants: Tensor,
    /// `[rows, columns / group]`.
    scales: Tensor,
    /// As `scales`.
    biases: Tensor,
    bits: usize,
    group: usize,
}

impl Affine {
    /// Checks that the three tensors belong together, or returns what is wrong.
    pub(crate) fn new(
        quants: Tensor,
        scales: Tensor,
        biases: Tensor,
        (bits, group): (usize, usize),
    ) -> Result<Self, String> {
        if !matches!(bits, 4 | 8) {
            return Err(format!("{bits} bits; 4 and 8 are read"));
        }
        let (&[rows, words], DType::U32) = (quants.shape(), quants.dtype()) else {
            return Err(format!(
                "{} {:?}, expected a matrix of U32 (experts in one stack, as mlx-lm has them, are not read)",
                quants.dtype(),
                quants.shape()
            ));
        };
        let columns = words.saturating_mul(32 / bits);
        if !matches!(group, 32 | 64 | 128) || !columns.is_multiple_of(group) {
            let message = "groups of 32, 64 and 128 that fill rows are read";
            return Err(format!(
                "rows of {columns} values in groups of {group}, as config.json has it; {message}"
            ));
        }
        for (what, tensor) in [("scales", &scales), ("biases", &biases)] {
            let expected = [rows, columns / group];
            let is_read = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
            if tensor.shape() != expected || !is_read || tensor.dtype() != scales.dtype() {
                let (dtype, shape) = (tensor.dtype(), tensor.shape());
                return Err(format!(
                    "{what} are {dtype} {shape:?}, expected {expected:?} for {bits} bits in groups of {group}, as config.json has it; scales \
                     and biases of one type, F32, F16 or BF16"
                ));
            }
        }
        Ok(Self {
            quants,
            scales,
            biases,
            bits,
            group,
        })
    }

    /// Returns which scale or bias is not finite, if any.
    pub(super) fn fault(&self) -> Option<String> {
        let parts = [("scales", &self.scales), ("biases", &self.biases)];
        parts.into_iter().find_map(|(what, tensor)| {
            let at = tensor.first_non_finite()?;
            let groups = tensor.shape().get(1).copied().unwrap_or(1).max(1);
            Some(format!("its {what} are not finite in row {}", at / groups))
        })
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        let words = self.quants.shape().get(1).copied().unwrap_or_default();
        let rows = self.quants.shape().first().copied().unwrap_or_default();
        (rows, words * 32 / self.bits)
    }

    pub(super) fn name(&self) -> String {
        format!("MLX, {} bits, groups of {}", self.bits, self.group)
    }

    pub(super) fn n_bytes(&self) -> usize {
        let parts = [&self.quants, &self.scales, &self.biases];
        parts.into_iter().map(Tensor::n_bytes).sum()
    }

    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// Decodes values `columns`, which are whole groups, of row `row`.
    pub(super) fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let (_, width) = self.dims();
        let groups = row * (width / self.group) + columns.start / self.group;
        let size = self.scales.dtype().size();
        let (scales, biases) = (self.scales.bytes(), self.biases.bytes());
        let (scales, biases) = (&scales[groups * size..], &biases[groups * size..]);
        let quants = self.quants.bytes();
        let group_bytes = self.group * self.bits / 8;
        let quants = quants[groups * group_bytes..].chunks_exact(group_bytes);
        let (dtype, is_short) = (self.scales.dtype(), self.bits == 4);
        let scales = scales.chunks_exact(size).zip(biases.chunks_exact(size));
        let groups = out.chunks_exact_mut(self.group).zip(quants).zip(scales);
        vectorised(
            #[inline(always)]
            || {
                for ((out, quants), (scale, bias)) in groups {
                    let (scale, bias) = (float(dtype, scale), float(dtype, bias));
                    if is_short {
                        for (pair, q) in out.as_chunks_mut::<2>().0.iter_mut().zip(quants) {
                            *pair = [q & 15, q >> 4].map(|q| scale * f32::from(q) + bias);
                        }
                    } else {
                        for (out, q) in out.iter_mut().zip(quants) {
                            *out = scale * f32::from(*q) + bias;
                        }
                    }
                }
            },
        );
    }
}

/// Reads one number of a type that scales have.
#[inline(always)]
fn float(dtype: DType, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (DType::BF16, [a, b]) => bf16::from_le_bytes([*a, *b]).to_f32(),
        (DType::F16, [a, b]) => f16::from_le_bytes([*a, *b]).to_f32(),
        (_, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]),
        _ => f32::NAN,
    }
}
