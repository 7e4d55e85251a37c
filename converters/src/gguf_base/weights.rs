//! The weights: which tensor becomes which, and all of them decoded a few megabytes at a time into safetensors files.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::rope::TENSORS;
use super::{Findings, GgufBase, ImportOptions, write_json};
use crate::architecture::{ModelShape, TensorShape};
use crate::error::{Error, Result};
use crate::files::write_file;
use crate::tensors::blocks::{BlockFormat, BlockMatrix};
use crate::tensors::ggml_type::{REQUANTISE, ggml_type_name};
use crate::tensors::gguf::GgufFile;
use crate::tensors::safetensors_write::{Slot, stream};
use crate::tensors::tensor::Tensor;

/// Elements decoded at a time, about: 4 MB of float32.
const CHUNK_ELEMENTS: usize = 1 << 20;

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

/// A tensor of the model as the file has it: a matrix in its blocks, anything else decoded.
fn tensor(base: &GgufBase, planned: &TensorShape) -> Result<Tensor> {
    let GgufBase { source, shape, .. } = base;
    let wrong = |message: &str| {
        Error::malformed(source.path(), format!("{}: {message}", planned.gguf_name))
    };
    let found = source.tensor(&planned.gguf_name);
    let found = found.ok_or_else(|| wrong("missing"))?;
    let format = BlockFormat::find(found.ggml_type);
    let format = format.ok_or_else(|| wrong("its block format is not supported"))?;
    let (map, range) = source
        .region(&planned.gguf_name)
        .ok_or_else(|| wrong("missing"))?;
    let (part, n_parts) = planned.part;
    let length = range.len() / n_parts.max(1);
    let from = range.start + part * length;
    let head = planned.interleaved.then_some(shape.head_dim);
    let dims = match (planned.shape.as_slice(), head) {
        // A reordered vector is a column: its elements move one by one.
        (&[n_values], Some(_)) => (n_values, 1),
        (&[n_values], None) => (1, n_values),
        (&[rows, columns], _) => (rows, columns),
        (shape, _) => {
            let (columns, rows) = shape.split_last().unwrap_or((&1, &[]));
            (rows.iter().product(), *columns)
        }
    };
    let blocks = BlockMatrix::ggml(format, (map, from..from + length), dims, head)
        .ok_or_else(|| wrong("its bytes do not hold its values"))?;
    if planned.shape.len() == 2 && planned.offset == 0.0 {
        return Ok(Tensor::from_blocks(blocks));
    }
    let mut values = blocks.values();
    if planned.offset != 0.0 {
        values.iter_mut().for_each(|value| *value -= planned.offset);
    }
    Tensor::from_f32(&planned.shape, values)
}

/// Every tensor by its name.
pub(super) fn tensors(base: &GgufBase) -> Result<BTreeMap<String, Tensor>> {
    let plan = base.plan.iter();
    plan.map(|planned| Ok((planned.name.clone(), tensor(base, planned)?)))
        .collect()
}

/// Looks through all values for one that is not finite.
pub(super) fn check(base: &GgufBase, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let total = base.source.n_bytes();
    let mut seen = 0;
    progress(seen, total);
    for planned in &base.plan {
        let tensor = tensor(base, planned)?;
        if let Some(position) = tensor.first_non_finite() {
            return Err(non_finite(&base.source, planned, position));
        }
        seen += tensor.stored_bytes() as u64;
        progress(seen, total);
    }
    Ok(())
}

fn non_finite(source: &GgufFile, planned: &TensorShape, position: usize) -> Error {
    let row = position / planned.shape.last().copied().unwrap_or(1).max(1);
    let message = format!(
        "{}: the value in row {row} of the written tensor is not finite: the file is damaged; fetch it, or make it, again",
        planned.gguf_name
    );
    Error::malformed(source.path(), message)
}

/// Writes model.safetensors, or its shards and their index.
pub(super) fn write(
    dir: &Path,
    base: &GgufBase,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let GgufBase { source, plan, .. } = base;
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
                let tensor = tensor(base, planned)?;
                let mut position = 0;
                for_each_chunk(&tensor, |values| {
                    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                        return Err(non_finite(source, planned, position + at));
                    }
                    position += values.len();
                    let bytes = options.dtype.encode(values).unwrap_or_default();
                    out.write_all(&bytes).map_err(Error::io("write", &path))?;
                    written += bytes.len() as u64;
                    progress(written, total);
                    Ok(())
                })
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

/// All values of a tensor in their order, some rows at a time.
fn for_each_chunk(tensor: &Tensor, mut write: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let Some(blocks) = tensor.blocks() else {
        return write(&tensor.to_f32()?);
    };
    let (n_rows, n_columns) = blocks.dims();
    let at_a_time = (CHUNK_ELEMENTS / n_columns.max(1)).max(1);
    let mut values = Vec::new();
    for first in (0..n_rows).step_by(at_a_time) {
        let last = n_rows.min(first + at_a_time);
        values.resize((last - first) * n_columns, 0.0);
        values
            .par_chunks_mut(n_columns.max(1))
            .enumerate()
            .for_each(|(idx, out)| {
                let row = first + idx;
                blocks.decode(row..row + 1, 0..n_columns, out);
            });
        write(&values)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
