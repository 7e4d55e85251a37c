//! Weights in f32: a candle tensor as it is, lent without a copy.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Access, Kind, Weight, lend};
use crate::error::Result;

/// The kind `f32`: the type in which products are computed.
pub static KIND: Kind = Kind {
    name: "f32",
    about: "32 bits",
    help: "Single precision",
    bytes: |n_values, _| 4 * n_values,
    hold: |values, device| {
        let tensor = Tensor::from_vec(values.to_f32()?, values.shape(), &Device::Cpu)?;
        Ok(Arc::new(tensor.to_device(device)?))
    },
};

impl Weight for Tensor {
    fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.dims2()?)
    }

    fn bytes(&self) -> usize {
        self.elem_count() * self.dtype().size_in_bytes()
    }

    fn access(&self) -> Access<'_, f32> {
        lend(self).map_or(Access::Elsewhere, Access::Lent)
    }

    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let stride = Tensor::dims(self).last().copied().unwrap_or_default();
        let Some(values) = lend::<f32>(self) else {
            return;
        };
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            out.copy_from_slice(&values[row * stride..][columns.clone()]);
        }
    }

    fn tensor(&self) -> Result<Tensor> {
        Ok(self.clone())
    }
}
