//! Whole weights that a PEFT directory stores with the adapter: copies of the base's, or trained besides the adapter.
//!
//! PEFT saves `lm_head.base_layer.weight` with every LoRA on `lm_head`, the embeddings and the head with
//! `save_embedding_layers`, and the trained ones of `modules_to_save`, all under like names: only the base tells which it is.

use rayon::prelude::*;

use crate::error::Result;
use crate::model_files::ModelFiles;
use crate::problem::Problem;
use crate::targets::OUTPUT_HEAD;
use crate::tensors::tensor::Tensor;

/// Elements that are compared at a time.
const BLOCK: usize = 1 << 20;

const MERGE: &str = "merge it into the base with PEFT (merge_and_unload), or train without it";
const MERGE_UNTIED: &str = "train without it; merging with PEFT (merge_and_unload) would change the embedding too, since this base ties it to the head";

/// A whole weight, by the name that the base has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Whole(pub(super) String);

impl Whole {
    /// The weight that `path`, a tensor's name behind PEFT's prefix, is a copy or another version of.
    pub(super) fn of(path: &str) -> Self {
        let is_peft = |segment: &&str| !matches!(*segment, "base_layer" | "original_module");
        let segments: Vec<&str> = path.split('.').filter(is_peft).collect();
        let plain = match segments
            .iter()
            .position(|segment| *segment == "modules_to_save")
        {
            // `modules_to_save.NAME.weight`, where NAME is the adapter's.
            Some(at) if at + 2 < segments.len() => [&segments[..at], &segments[at + 2..]].concat(),
            _ => segments,
        };
        Self(plain.join("."))
    }

    /// What is wrong with the stored `tensor` of the name `name`; none if it is the base's own weight.
    ///
    /// # Errors
    /// If the values of a tensor cannot be read.
    pub(super) fn check(
        &self,
        name: &str,
        tensor: &Tensor,
        base: Option<&ModelFiles>,
    ) -> Result<Option<Problem>> {
        let refuse =
            |code, message: String, fix: &str| Ok(Some(Problem::new(code, name, message, fix)));
        let Some(base) = base else {
            let message = "a whole weight beside A and B: only the base tells whether it is a copy of its own, as PEFT stores with \
                 LoRA on lm_head and with save_embedding_layers, or was trained (modules_to_save, a bias)";
            let fix = "give the base: monteclora convert ADAPTER -o DIR --to lora -m BASE leaves out what is a copy";
            return refuse("stored-weight", message.to_owned(), fix);
        };
        let is_tied = base.ties_embeddings();
        let theirs = base.get(&self.0).or_else(|| {
            let is_head = self.0.strip_suffix(".weight") == Some(OUTPUT_HEAD);
            (is_head && is_tied).then(|| base.embedding())?
        });
        let Some(theirs) = theirs else {
            let message = format!("a whole weight that the base does not have (`{}`)", self.0);
            return refuse("modules-to-save", message, MERGE);
        };
        if theirs.shape() != tensor.shape() {
            let message = format!(
                "a whole weight of shape {:?}, where the base has {:?}: it was resized, for example for new tokens, and trained",
                tensor.shape(),
                theirs.shape()
            );
            return refuse("modules-to-save", message, MERGE);
        }
        match n_different(tensor, &theirs)? {
            0 => Ok(None),
            n => {
                let n_all = tensor.n_elements();
                let message = format!(
                    "a whole weight that differs from the base's in {n} of {n_all} values: it was trained besides the adapter"
                );
                let is_shared =
                    is_tied && (self.0.contains("embed") || self.0.starts_with(OUTPUT_HEAD));
                refuse(
                    "modules-to-save",
                    message,
                    if is_shared { MERGE_UNTIED } else { MERGE },
                )
            }
        }
    }
}

/// How many elements of `stored` are not those of `theirs` as its type holds them.
fn n_different(stored: &Tensor, theirs: &Tensor) -> Result<usize> {
    let (dtype, other) = (stored.dtype(), theirs.dtype());
    if !dtype.is_float() || !other.is_float() {
        let is_same = dtype == other && stored.bytes() == theirs.bytes();
        return Ok(if is_same { 0 } else { stored.n_elements() });
    }
    let (bytes, other_bytes) = (stored.bytes(), theirs.bytes());
    let blocks = bytes.par_chunks(BLOCK * dtype.size());
    let other_blocks = other_bytes.par_chunks(BLOCK * other.size());
    let n = blocks.zip(other_blocks).map(|(block, other_block)| {
        if dtype == other && block == other_block {
            return 0;
        }
        // The base may be stored more finely than the type that the model was loaded in, which is the adapter's.
        let values = other.decode(other_block).unwrap_or_default();
        let rounded = dtype.encode(&values).unwrap_or_default();
        let (found, expected) = (dtype.decode(block), dtype.decode(&rounded));
        let pairs = found
            .unwrap_or_default()
            .into_iter()
            .zip(expected.unwrap_or_default());
        pairs.filter(|(found, expected)| found != expected).count()
    });
    Ok(n.sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::dtype::DType;

    #[test]
    fn names_lead_to_the_bases() {
        for (path, expected) in [
            ("lm_head.base_layer.weight", "lm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
            (
                "model.embed_tokens.modules_to_save.default.weight",
                "model.embed_tokens.weight",
            ),
            (
                "model.embed_tokens.original_module.weight",
                "model.embed_tokens.weight",
            ),
            (
                "model.layers.0.self_attn.q_proj.bias",
                "model.layers.0.self_attn.q_proj.bias",
            ),
        ] {
            assert_eq!(Whole::of(path), Whole(expected.to_owned()), "{path}");
        }
    }

    #[test]
    fn copies_in_another_type_are_copies() {
        let base = Tensor::from_f32(&[2, 2], vec![1.0, 0.1, -2.5, 1e-3]).expect("sized");
        let stored = base.to_dtype(DType::BF16).expect("float");
        assert_eq!(n_different(&stored, &base).expect("float"), 0);
        assert_eq!(
            n_different(&stored.to_dtype(DType::F32).expect("float"), &stored).expect("float"),
            0
        );
        let other = Tensor::from_f32(&[2, 2], vec![1.0, 0.2, -2.5, 2e-3]).expect("sized");
        assert_eq!(n_different(&other, &base).expect("float"), 2);
    }
}
