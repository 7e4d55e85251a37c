//! Experts in one tensor. For Qwen3-MoE on a CPU, mistral.rs 0.8.1 loads experts only from `mlp.experts.gate_up_proj`
//! `[experts, hidden, 2 inner]` and `mlp.experts.down_proj` `[experts, inner, hidden]`. From one tensor per expert it
//! makes layers that fail at the first token.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{ModelFiles, Tensor, write_safetensors};

use crate::error::{Error, Result};

/// Writes the experts of each layer of `files` to a separate file in `dir`, in the type in which they are stored. It
/// needs the memory of one layer.
///
/// # Errors
/// Returns an error if a tensor is missing or a file cannot be written.
pub(crate) fn stack_experts(
    files: &ModelFiles,
    shape: &ModelShape,
    dir: &Path,
) -> Result<Vec<PathBuf>> {
    let Some((experts, sizes)) = shape.mixture() else {
        return Ok(Vec::new());
    };
    let (inner, hidden) = (sizes.width, shape.hidden_size);
    let mixed = (0..shape.num_hidden_layers).filter(|layer| shape.layers[*layer].has_experts);
    mixed
        .map(|layer| {
            let path = format!("model.layers.{layer}.{}", experts.path);
            let [gate, up, down] = experts.projections.map(|(name, _)| name);
            let stored = |expert: usize, name: &str| -> Result<Tensor> {
                let name = format!("{path}.{expert}.{name}.weight");
                let missing = || Error::Engine(format!("`{name}` is missing"));
                files.get(&name).ok_or_else(missing)
            };
            let stack = |names: &[&str], shape: [usize; 3]| -> Result<Tensor> {
                let mut bytes = Vec::new();
                for expert in 0..sizes.count {
                    let parts = names.iter().map(|name| stored(expert, name));
                    let parts = parts.collect::<Result<Vec<_>>>()?;
                    let views: Vec<_> = parts.iter().map(Tensor::bytes).collect();
                    let size = parts[0].dtype().size();
                    transpose(&views, shape[1], size, &mut bytes);
                }
                let dtype = stored(0, names[0])?.dtype();
                Ok(Tensor::from_bytes(dtype, &shape, bytes)?)
            };
            let tensors = [
                (
                    format!("{path}.gate_up_proj"),
                    stack(&[gate, up], [sizes.count, hidden, 2 * inner])?,
                ),
                (
                    format!("{path}.down_proj"),
                    stack(&[down], [sizes.count, inner, hidden])?,
                ),
            ];
            let file = dir.join(format!("experts-{layer}.safetensors"));
            write_safetensors(&file, tensors, &BTreeMap::new())?;
            Ok(file)
        })
        .collect()
}

/// Appends the transpose of vertically stacked matrices of `n_columns` columns to `out`.
fn transpose(parts: &[impl AsRef<[u8]>], n_columns: usize, size: usize, out: &mut Vec<u8>) {
    for column in 0..n_columns {
        for part in parts {
            for row in part.as_ref().chunks_exact(n_columns * size) {
                out.extend_from_slice(&row[column * size..][..size]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_side_by_side_when_turned() {
        let mut out = Vec::new();
        // [[1, 2, 3]] above [[4, 5, 6], [7, 8, 9]].
        transpose(&[vec![1, 2, 3], vec![4, 5, 6, 7, 8, 9]], 3, 1, &mut out);
        assert_eq!(out, [1, 4, 7, 2, 5, 8, 3, 6, 9]);
    }
}
