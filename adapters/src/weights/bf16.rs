//! Weights in bfloat16: half the memory of float32, widened piece by piece or multiplied as they are.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use monteclora_converters as formats;

use super::{Access, Kind, Weight, lend};
use crate::error::Result;
use crate::simd::vectorised;

/// The kind `bf16`: half the memory of float32.
pub static KIND: Kind = Kind {
    name: "bf16",
    about: "bfloat16",
    help: "bfloat16",
    bytes: |n_values, _| 2 * n_values,
    hold: |values, device| {
        let tensor = Tensor::from_vec(narrow(values)?, values.shape(), &Device::Cpu)?;
        Ok(Arc::new(Bf16(tensor.to_device(device)?)))
    },
};

/// A matrix in bfloat16.
#[derive(Debug, Clone)]
pub struct Bf16(Tensor);

impl Bf16 {
    /// Rounds `matrix` to nearest.
    ///
    /// # Errors
    /// Returns an error if candle cannot convert `matrix`.
    pub fn new(matrix: &Tensor) -> Result<Self> {
        Ok(Self(matrix.to_dtype(DType::BF16)?))
    }
}

impl Weight for Bf16 {
    fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.0.dims2()?)
    }

    fn bytes(&self) -> usize {
        Weight::bytes(&self.0)
    }

    fn access(&self) -> Access<'_, f32> {
        match lend::<bf16>(&self.0) {
            Some(_) => Access::Pieces,
            None => Access::Elsewhere,
        }
    }

    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let stride = self.0.dims().last().copied().unwrap_or_default();
        let Some(values) = lend::<bf16>(&self.0) else {
            return;
        };
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let row = &values[row * stride..][columns.clone()];
            vectorised(
                #[inline(always)]
                || {
                    for (wide, narrow) in out.iter_mut().zip(row) {
                        *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                    }
                },
            );
        }
    }

    fn access_bf16(&self) -> Access<'_, bf16> {
        lend(&self.0).map_or(Access::Elsewhere, Access::Lent)
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(self.0.clone())
    }
}

/// Converts the values to bf16, without an f32 copy if they are bfloat16 or float32.
fn narrow(tensor: &formats::Tensor) -> Result<Vec<bf16>> {
    let bytes = tensor.bytes();
    Ok(match tensor.dtype() {
        formats::DType::BF16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]))
            .collect(),
        formats::DType::F32 => bytes
            .chunks_exact(4)
            .map(|b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        _ => tensor.to_f32()?.into_iter().map(bf16::from_f32).collect(),
    })
}
