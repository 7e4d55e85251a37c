//! Weights that stay in the quantised blocks of a model file and are decoded piece by piece. The file stays mapped:
//! nothing is copied, and when other programs need memory, the operating system takes it from these pages first.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use monteclora_converters::{self as formats, BlockMatrix};

use super::{Access, BF16, F32, Kind, Weight};
use crate::error::Result;

/// The kind `auto`: quantised blocks stay as they are, anything else becomes float32.
pub static AUTO: Kind = Kind {
    name: "auto",
    about: "blocks of quantised values as they are, anything else as float32",
    help: "",
    bytes: |n_values, blocks| blocks.map_or(4 * n_values, BlockMatrix::n_bytes),
    hold: |values, device| hold(values, device, (DType::F32, &F32)),
};

/// The kind `auto` for products in bf16: quantised blocks stay as they are and decode to values rounded to bf16;
/// anything else becomes bf16.
pub static AUTO_BF16: Kind = Kind {
    name: "auto",
    about: "blocks of quantised values as they are, anything else as bfloat16",
    help: "",
    bytes: |n_values, blocks| blocks.map_or(2 * n_values, BlockMatrix::n_bytes),
    hold: |values, device| hold(values, device, (DType::BF16, &BF16)),
};

fn hold(
    values: &formats::Tensor,
    device: &Device,
    (dtype, otherwise): (DType, &Kind),
) -> Result<Arc<dyn Weight>> {
    match values.blocks() {
        Some(blocks) => Ok(Arc::new(Blocks::new(blocks.clone(), dtype, device)?)),
        None => (otherwise.hold)(values, device),
    }
}

/// A matrix in quantised blocks, which decode to float32 or to values rounded to bf16.
///
/// On an accelerator, blocks of ggml are held in its memory and decoded there for each product; blocks of other formats
/// are held as decoded values.
#[derive(Debug, Clone)]
pub struct Blocks {
    matrix: BlockMatrix,
    /// f32 or bf16.
    dtype: DType,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    /// In host memory, where the file is mapped.
    Host,
    Blocks(Arc<QTensor>, Device),
    Values(Tensor),
}

impl Blocks {
    /// Holds `matrix` on `device`, with its values as `dtype`, f32 or bf16.
    ///
    /// # Errors
    /// Returns an error if the device cannot hold the values.
    pub fn new(matrix: BlockMatrix, dtype: DType, device: &Device) -> Result<Self> {
        let place = match (device, ggml_dtype(&matrix)) {
            (Device::Cpu, _) => Place::Host,
            (_, Some(ggml_dtype)) => {
                let (rows, columns) = matrix.dims();
                let all: Vec<u8> = (0..rows).flat_map(|row| matrix.row(row)).copied().collect();
                let storage = QStorage::from_data(Cow::Owned(all), device, ggml_dtype)?;
                let tensor = QTensor::new(storage, (rows, columns))?;
                Place::Blocks(Arc::new(tensor), device.clone())
            }
            (_, None) => Place::Values(decoded(&matrix, dtype)?.to_device(device)?),
        };
        Ok(Self {
            matrix,
            dtype,
            place,
        })
    }
}

/// Returns candle's type of the blocks, if they have a quantised format of ggml that candle decodes.
fn ggml_dtype(matrix: &BlockMatrix) -> Option<GgmlDType> {
    use GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let name = matrix.ggml_format()?.name;
    [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K]
        .into_iter()
        .find(|dtype| format!("{dtype:?}") == name)
}

/// Decodes all values on the host.
fn decoded(matrix: &BlockMatrix, dtype: DType) -> Result<Tensor> {
    let (rows, columns) = matrix.dims();
    let mut values = vec![0f32; rows * columns];
    matrix.decode(0..rows, 0..columns, &mut values);
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?.to_dtype(dtype)?)
}

impl Weight for Blocks {
    fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.matrix.dims())
    }

    fn bytes(&self) -> usize {
        match &self.place {
            Place::Values(values) => Weight::bytes(values),
            Place::Host | Place::Blocks(..) => self.matrix.n_bytes(),
        }
    }

    fn access(&self) -> Access<'_, f32> {
        match self.place {
            Place::Host => Access::Pieces,
            Place::Blocks(..) | Place::Values(_) => Access::Elsewhere,
        }
    }

    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        self.matrix.decode(rows, columns, out);
        if self.dtype == DType::BF16 {
            for value in out {
                *value = bf16::from_f32(*value).to_f32();
            }
        }
    }

    fn access_bf16(&self) -> Access<'_, bf16> {
        match (&self.place, self.dtype) {
            (Place::Host, DType::BF16) => Access::Pieces,
            _ => Access::Elsewhere,
        }
    }

    fn widen_bf16(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [bf16]) {
        self.matrix.decode_bf16(rows, columns, out);
    }

    fn block(&self) -> usize {
        self.matrix.block()
    }

    fn tensor(&self) -> Result<Tensor> {
        match &self.place {
            Place::Host => decoded(&self.matrix, self.dtype),
            Place::Blocks(blocks, device) => Ok(blocks.dequantize(device)?.to_dtype(self.dtype)?),
            Place::Values(values) => Ok(values.clone()),
        }
    }

    fn gather(&self, rows: &[u32]) -> Result<Tensor> {
        let (_, columns) = self.matrix.dims();
        let mut values = vec![0f32; rows.len() * columns];
        for (row, out) in rows.iter().zip(values.chunks_exact_mut(columns.max(1))) {
            let row = *row as usize;
            self.widen(row..row + 1, 0..columns, out);
        }
        let values = Tensor::from_vec(values, (rows.len(), columns), &Device::Cpu)?;
        Ok(match &self.place {
            Place::Host => values,
            Place::Blocks(_, device) => values.to_device(device)?,
            Place::Values(held) => values.to_device(held.device())?,
        })
    }
}
