//! The weights: which tensor becomes which, dequantised and reordered a few megabytes at a time into safetensors files.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::rope::TENSORS;
use super::{Findings, ImportOptions, Tools, write_json};
use crate::architecture::{ModelShape, TensorShape};
use crate::error::{Error, Result};
use crate::files::write_file;
use crate::tensors::ggml_type::{REQUANTISE, ggml_block, ggml_type_name};
use crate::tensors::gguf::{GgufFile, GgufTensor};
use crate::tensors::safetensors_write::{Slot, stream};

/// Elements dequantised at a time, about: 4 MB of float32.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// At least the alignment of every ggml block, which libraries insist on.
const BLOCK_ALIGNMENT: usize = 16;

/// Elements of a tensor.
pub(super) fn n_elements(tensor: &TensorShape) -> u64 {
    tensor.shape.iter().map(|size| *size as u64).product()
}

/// Every tensor of the model in the order of its names; what is missing, superfluous or misshapen becomes a problem.
pub(super) fn plan(
    source: &GgufFile,
    shape: &ModelShape,
    findings: &mut Findings,
) -> Vec<TensorShape> {
    let mut plan = shape.tensors();
    plan.sort_by(|left, right| left.name.cmp(&right.name));
    let mut unread: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    let mut refuse =
        |code, at: &str, message: String, fix| findings.problem(code, at, message, fix);
    // The parts of one tensor are looked at together, by the first.
    for planned in plan.iter().filter(|planned| planned.part.0 == 0) {
        let name = planned.gguf_name.as_str();
        let expected = dims(planned);
        match source.tensor(name) {
            None if planned.part.1 > 1 && source.tensor(&single(name)).is_some() => {
                let message = "each expert by itself, as llama.cpp wrote them before April 2024";
                let fix = "convert the model again with a current llama.cpp";
                refuse("experts", &single(name), message.to_owned(), fix);
            }
            None => {
                let fix = "the file holds no whole model";
                refuse("missing", name, "missing".to_owned(), fix);
            }
            Some(tensor) if tensor.dims() != expected => {
                let message = format!("shape {:?}, expected {expected:?}", tensor.dims());
                refuse("shape", name, message, "");
            }
            Some(tensor) if !tensor.is_readable() => {
                unread.entry(tensor.ggml_type).or_default().push(name);
            }
            Some(tensor) if planned.interleaved && tensor.is_vector_of_blocks() => {
                let block = ggml_type_name(tensor.ggml_type);
                let reason = format!("a vector in {block} blocks cannot be reordered");
                refuse("block_format", name, reason, REQUANTISE);
            }
            Some(_) => {}
        }
    }
    for (ggml_type, names) in &unread {
        let more = match names.len() - 1 {
            0 => String::new(),
            n => format!(", as in {n} more tensors"),
        };
        let block = ggml_type_name(*ggml_type);
        let message = format!("{block} blocks{more}, which are not read");
        let fix = format!(
            "supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K; {REQUANTISE}"
        );
        findings.problem("block_format", names[0], message, fix);
    }
    let known: HashSet<&str> = plan
        .iter()
        .map(|planned| planned.gguf_name.as_str())
        .collect();
    for name in source.names() {
        if !TENSORS.contains(&name) && !known.contains(name) && !is_single(&known, name) {
            let message = format!("has no place in a {} model", shape.family.class_name);
            findings.problem("unknown_tensor", name, message, "");
        }
    }
    plan
}

/// Dimensions of llama.cpp's tensor, of which `planned` may be a part.
fn dims(planned: &TensorShape) -> Vec<usize> {
    let n_parts = planned.part.1;
    let outer = (n_parts > 1).then_some(n_parts);
    outer
        .into_iter()
        .chain(planned.shape.iter().copied())
        .collect()
}

/// What the first expert's tensor was called when each expert had its own: `ffn_up.0` for `ffn_up_exps`.
fn single(name: &str) -> String {
    name.replace("_exps.", ".0.")
}

/// Whether `name` is that of one expert's tensor, of which the first is reported.
fn is_single(known: &HashSet<&str>, name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    let [block, layer, kind, expert, suffix] = parts[..] else {
        return false;
    };
    let stacked = format!("{block}.{layer}.{kind}_exps.{suffix}");
    expert.parse::<usize>().is_ok() && known.contains(stacked.as_str())
}

/// Writes model.safetensors, or its shards and their index.
pub(super) fn write(
    dir: &Path,
    source: &GgufFile,
    plan: &[TensorShape],
    shape: &ModelShape,
    options: &ImportOptions,
    tools: &Tools<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let n_bytes = |planned: &TensorShape| n_elements(planned) * options.dtype.size() as u64;
    let total = plan.iter().map(n_bytes).sum();
    let shards = split(plan, options.max_shard_bytes, n_bytes);
    // transformers asks for this entry.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut written = 0;
    progress(written, total);
    let mut weight_map = Map::new();
    for (idx, shard) in shards.iter().enumerate() {
        let file_name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n_shards => format!("model-{:05}-of-{n_shards:05}.safetensors", idx + 1),
        };
        let path = dir.join(&file_name);
        let by_name: BTreeMap<&str, &TensorShape> = shard
            .iter()
            .map(|planned| (planned.name.as_str(), planned))
            .collect();
        let slots = shard.iter().map(|planned| Slot {
            name: planned.name.clone(),
            dtype: options.dtype,
            shape: planned.shape.clone(),
        });
        write_file(&path, |writer| {
            stream(&path, writer, slots.collect(), &metadata, |slot, out| {
                let planned = by_name[slot.name.as_str()];
                let wrong = |message: String| {
                    Error::malformed(source.path(), format!("{}: {message}", planned.gguf_name))
                };
                let tensor = source.tensor(&planned.gguf_name);
                let tensor = tensor.ok_or_else(|| wrong("missing".to_owned()))?;
                let head = planned.interleaved.then_some(shape.head_dim);
                let mut rows = Rows::new(tensor, planned, head).map_err(wrong)?;
                while let Some(values) = rows.next_chunk(tools).map_err(wrong)? {
                    let bytes = options.dtype.encode(&values).unwrap_or_default();
                    out.write_all(&bytes).map_err(Error::io("write", &path))?;
                    written += bytes.len() as u64;
                    progress(written, total);
                }
                Ok(())
            })
        })?;
        let names = shard.iter().map(|planned| planned.name.clone());
        weight_map.extend(names.map(|name| (name, file_name.as_str().into())));
    }
    if shards.len() > 1 {
        let index =
            json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
        write_json(dir, "model.safetensors.index.json", &index)?;
    }
    Ok(())
}

/// Consecutive runs of at most `limit` bytes, or of one tensor that is larger.
fn split(
    plan: &[TensorShape],
    limit: u64,
    n_bytes: impl Fn(&TensorShape) -> u64,
) -> Vec<&[TensorShape]> {
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

/// The row in llama.cpp's order that is row `row` in Hugging Face's, for heads of `head` rows.
///
/// Within a head of size d, Hugging Face's row `j d/2 + i` (j = 0, 1) is llama.cpp's row `2 i + j`.
fn interleaved_row(row: usize, head: usize) -> usize {
    let (start, within) = (row - row % head, row % head);
    let (half, idx) = (within / (head / 2), within % (head / 2));
    start + 2 * idx + half
}

/// The rows of one tensor, or of one of its parts, in the order they are written, some at a time.
struct Rows<'a> {
    ggml_type: u32,
    bytes: &'a [u8],
    /// What is subtracted from every value.
    offset: f32,
    /// Size of the heads whose rows are interleaved.
    head: Option<usize>,
    n_rows: usize,
    row_elements: usize,
    row_bytes: usize,
    next_row: usize,
    buffer: Vec<u8>,
}

impl<'a> Rows<'a> {
    fn new(
        tensor: GgufTensor<'a>,
        planned: &TensorShape,
        head: Option<usize>,
    ) -> Result<Self, String> {
        let (block, block_bytes) =
            ggml_block(tensor.ggml_type).ok_or("its block format is not supported")?;
        let shape = &planned.shape;
        let row_elements = match (shape.as_slice(), head) {
            // A reordered vector is a column: its elements move one by one.
            ([_], Some(_)) => 1,
            (shape, _) => shape.last().copied().unwrap_or(1),
        };
        let n_elements: usize = shape.iter().product();
        let n_rows = n_elements.checked_div(row_elements).unwrap_or(0);
        let row_bytes = row_elements / block * block_bytes;
        let (part, n_parts) = planned.part;
        let n_bytes = n_rows.checked_mul(row_bytes);
        let whole = n_bytes.and_then(|n_bytes| n_bytes.checked_mul(n_parts));
        let (Some(n_bytes), true) = (n_bytes, whole == Some(tensor.bytes.len())) else {
            return Err(format!(
                "{} bytes do not hold {n_parts} times {n_elements} values",
                tensor.bytes.len()
            ));
        };
        let bytes = tensor.bytes.get(part * n_bytes..(part + 1) * n_bytes);
        Ok(Self {
            ggml_type: tensor.ggml_type,
            bytes: bytes.ok_or("part outside the tensor")?,
            offset: planned.offset,
            head,
            n_rows,
            row_elements,
            row_bytes,
            next_row: 0,
            buffer: Vec::new(),
        })
    }

    /// The values of the next rows, `None` at the end. Values that are not finite are an error.
    fn next_chunk(&mut self, tools: &Tools<'_>) -> Result<Option<Vec<f32>>, String> {
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
            let row = self.next_row + idx;
            let row = self.head.map_or(row, |head| interleaved_row(row, head));
            let begin = row * self.row_bytes;
            let target = start + idx * self.row_bytes;
            let bytes = self.bytes.get(begin..begin + self.row_bytes);
            let bytes = bytes.ok_or("row outside the tensor")?;
            self.buffer[target..target + self.row_bytes].copy_from_slice(bytes);
        }
        let blocks = &self.buffer[start..start + length];
        let mut values = (tools.dequantize)(self.ggml_type, blocks)
            .map_err(|error| format!("cannot be dequantised: {error}"))?;
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let row = self.next_row + position / self.row_elements;
            return Err(format!(
                "the value in row {row} of the written tensor is not finite"
            ));
        }
        if self.offset != 0.0 {
            values.iter_mut().for_each(|value| *value -= self.offset);
        }
        self.next_row += n_rows;
        Ok(Some(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llama.cpp's converter does: reshape to [heads, 2, d/2], swap the last two axes.
    fn permute(rows: &[usize], head_dim: usize) -> Vec<usize> {
        let mut permuted = Vec::new();
        for head in rows.chunks(head_dim) {
            for idx in 0..head_dim / 2 {
                permuted.extend([head[idx], head[head_dim / 2 + idx]]);
            }
        }
        permuted
    }

    #[test]
    fn interleaved_rows_are_where_llama_cpp_puts_them() {
        for (heads, head_dim) in [(1, 2), (3, 4), (2, 6), (9, 64)] {
            let rows: Vec<usize> = (0..heads * head_dim).collect();
            let permuted = permute(&rows, head_dim);
            let restored: Vec<usize> = rows
                .iter()
                .map(|row| permuted[interleaved_row(*row, head_dim)])
                .collect();
            assert_eq!(restored, rows);
            assert!(head_dim == 2 || permuted != rows);
        }
    }

    #[test]
    fn shards_hold_every_tensor_once_in_order() {
        let plan: Vec<TensorShape> = [3, 4, 9, 1, 1]
            .iter()
            .enumerate()
            .map(|(idx, size)| TensorShape {
                name: idx.to_string(),
                gguf_name: idx.to_string(),
                shape: vec![*size],
                interleaved: false,
                part: (0, 1),
                offset: 0.0,
            })
            .collect();
        let shards = split(&plan, 7, n_elements);
        let sizes: Vec<usize> = shards.iter().map(|shard| shard.len()).collect();
        assert_eq!(sizes, [2, 1, 2]);
        assert_eq!(shards.concat(), plan);
    }
}
