//! The weights: dequantised and reordered a few megabytes at a time into one or more safetensors files.

use std::borrow::Cow;
use std::io::Write;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::bf16;
use serde_json::{Map, Value, json};

use super::output::Directory;
use super::source::{Source, SourceTensor};
use super::tensors::{Planned, RowOrder};
use super::{ImportDType, ImportError, ImportOptions};

/// Elements dequantised at a time, about: 4 MB of float32.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// At least the alignment of every ggml block, which candle insists on.
const BLOCK_ALIGNMENT: usize = 16;

/// Writes model.safetensors, or its shards and their index.
pub(super) fn write(
    directory: &Directory,
    source: &Source,
    plan: &[Planned],
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ImportError> {
    let n_bytes = |planned: &Planned| planned.n_elements() * options.dtype.size() as u64;
    let total = plan.iter().map(n_bytes).sum();
    let shards = split(plan, options.max_shard_bytes, n_bytes);
    let mut written = 0;
    progress(written, total);
    let mut weight_map = Map::new();
    for (idx, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n_shards => format!("model-{:05}-of-{n_shards:05}.safetensors", idx + 1),
        };
        let path = directory.destination(&name);
        directory.write(&name, |writer| {
            writer
                .write_all(&header(shard, options.dtype))
                .map_err(ImportError::io("write", &path))?;
            for planned in *shard {
                let weight_error = |message: String| ImportError::Weight {
                    path: source.path().to_path_buf(),
                    tensor: planned.source.clone(),
                    message,
                };
                let tensor = source
                    .tensor(&planned.source)
                    .ok_or_else(|| weight_error("missing".to_owned()))?;
                let mut rows = Rows::new(tensor, planned.order).map_err(weight_error)?;
                while let Some(values) = rows.next_chunk().map_err(weight_error)? {
                    let bytes = encode(&values, options.dtype);
                    writer
                        .write_all(&bytes)
                        .map_err(ImportError::io("write", &path))?;
                    written += bytes.len() as u64;
                    progress(written, total);
                }
            }
            Ok(())
        })?;
        for planned in *shard {
            weight_map.insert(planned.name.clone(), name.as_str().into());
        }
    }
    if shards.len() > 1 {
        let index =
            json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
        directory.write_json("model.safetensors.index.json", &index)?;
    }
    Ok(())
}

/// Consecutive runs of at most `limit` bytes, or of one tensor that is larger.
fn split(plan: &[Planned], limit: u64, n_bytes: impl Fn(&Planned) -> u64) -> Vec<&[Planned]> {
    let mut shards = Vec::new();
    let (mut begin, mut size) = (0, 0u64);
    for (idx, planned) in plan.iter().enumerate() {
        let bytes = n_bytes(planned);
        if idx > begin && size.saturating_add(bytes) > limit {
            shards.extend(plan.get(begin..idx));
            (begin, size) = (idx, 0);
        }
        size = size.saturating_add(bytes);
    }
    shards.extend(plan.get(begin..));
    shards
}

/// The safetensors header; transformers asks for the `format` entry.
fn header(shard: &[Planned], dtype: ImportDType) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for planned in shard {
        let end = offset + planned.n_elements() * dtype.size() as u64;
        let entry = json!({"dtype": dtype.safetensors_name(), "shape": planned.shape, "data_offsets": [offset, end]});
        entries.insert(planned.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    // The data begins on a multiple of eight bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

fn encode(values: &[f32], dtype: ImportDType) -> Vec<u8> {
    match dtype {
        ImportDType::F32 => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        ImportDType::Bf16 => values
            .iter()
            .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
            .collect(),
    }
}

/// The rows of one tensor in the order they are written, some at a time.
struct Rows<'a> {
    bytes: &'a [u8],
    block_format: GgmlDType,
    order: RowOrder,
    n_rows: usize,
    row_elements: usize,
    row_bytes: usize,
    next_row: usize,
    buffer: Vec<u8>,
}

impl<'a> Rows<'a> {
    fn new(tensor: SourceTensor<'a>, order: RowOrder) -> Result<Self, String> {
        let block_format = tensor
            .block_format()
            .ok_or("its block format is not supported")?;
        let row_elements = match (tensor.shape.as_slice(), order) {
            // A reordered vector is a column: its elements move one by one.
            ([_], RowOrder::Unpermuted { .. }) => 1,
            (shape, _) => shape.last().copied().unwrap_or(1),
        };
        let n_elements: usize = tensor.shape.iter().product();
        let n_rows = n_elements.checked_div(row_elements).unwrap_or(0);
        let row_bytes = row_elements / block_format.block_size() * block_format.type_size();
        if n_rows.checked_mul(row_bytes) != Some(tensor.bytes.len()) {
            return Err(format!(
                "{} bytes do not hold {n_elements} values",
                tensor.bytes.len()
            ));
        }
        Ok(Self {
            bytes: tensor.bytes,
            block_format,
            order,
            n_rows,
            row_elements,
            row_bytes,
            next_row: 0,
            buffer: Vec::new(),
        })
    }

    /// The values of the next rows, `None` at the end. Values that are not finite are an error.
    fn next_chunk(&mut self) -> Result<Option<Vec<f32>>, String> {
        let n_rows = (CHUNK_ELEMENTS / self.row_elements.max(1))
            .max(1)
            .min(self.n_rows - self.next_row);
        if n_rows == 0 {
            return Ok(None);
        }
        let length = n_rows * self.row_bytes;
        self.buffer.resize(length + BLOCK_ALIGNMENT, 0);
        let start = self
            .buffer
            .as_ptr()
            .align_offset(BLOCK_ALIGNMENT)
            .min(BLOCK_ALIGNMENT);
        for idx in 0..n_rows {
            let begin = self.order.source_row(self.next_row + idx) * self.row_bytes;
            let target = start + idx * self.row_bytes;
            let row = self
                .bytes
                .get(begin..begin + self.row_bytes)
                .ok_or("row outside the tensor")?;
            self.buffer[target..target + self.row_bytes].copy_from_slice(row);
        }
        let values = dequantize(&self.buffer[start..start + length], self.block_format)
            .map_err(|error| format!("cannot be dequantised: {error}"))?;
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let row = self.next_row + position / self.row_elements;
            return Err(format!(
                "the value in row {row} of the written tensor is not finite"
            ));
        }
        self.next_row += n_rows;
        Ok(Some(values))
    }
}

/// Dequantises whole blocks; `bytes` is aligned to [`BLOCK_ALIGNMENT`].
fn dequantize(bytes: &[u8], block_format: GgmlDType) -> candle_core::Result<Vec<f32>> {
    let n_elements = bytes.len() / block_format.type_size() * block_format.block_size();
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, block_format)?;
    QTensor::new(storage, n_elements)?
        .dequantize(&Device::Cpu)?
        .to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_every_tensor_once_in_order() {
        let plan: Vec<Planned> = [3, 4, 9, 1, 1]
            .iter()
            .enumerate()
            .map(|(idx, size)| Planned {
                source: idx.to_string(),
                name: idx.to_string(),
                shape: vec![*size],
                order: RowOrder::AsStored,
            })
            .collect();
        let shards = split(&plan, 7, Planned::n_elements);
        let sizes: Vec<usize> = shards.iter().map(|shard| shard.len()).collect();
        assert_eq!(sizes, [2, 1, 2]);
        assert_eq!(shards.concat(), plan);
    }

    #[test]
    fn every_supported_block_format_dequantises_what_candle_quantised() {
        let values: Vec<f32> = (0..512).map(|idx| (idx as f32 * 0.37).sin()).collect();
        let tensor =
            candle_core::Tensor::new(values.as_slice(), &Device::Cpu).expect("plain values");
        for id in 0..64 {
            let Some(dtype) = super::super::source::block_format(id) else {
                continue;
            };
            let quantised = QTensor::quantize(&tensor, dtype).expect("whole blocks");
            let bytes = quantised.data().expect("on the processor").to_vec();
            let tensor = SourceTensor::new(&[256, 2], &bytes, id);
            let mut rows = Rows::new(tensor, RowOrder::AsStored).expect("consistent");
            let found = rows.next_chunk().expect("finite").expect("two rows");
            let worst = values
                .iter()
                .zip(&found)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            let bound = if dtype == GgmlDType::Q2K { 0.5 } else { 0.25 };
            assert!(worst < bound, "{dtype:?}: {worst}");
            assert_eq!(rows.next_chunk().expect("finite"), None);
        }
    }
}
