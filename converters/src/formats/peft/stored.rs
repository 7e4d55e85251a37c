//! Whole weights that a PEFT directory stores with the adapter: copies of the base's weights, or weights that were
//! trained besides the adapter.
//!
//! PEFT saves `lm_head.base_layer.weight` with every LoRA on `lm_head`, the embeddings and the head with
//! `save_embedding_layers`, and the trained weights of `modules_to_save`, all under similar names. Only the base tells
//! which of these a weight is.

use crate::model_files::ModelFiles;
use crate::problem::Problem;
use crate::targets::OUTPUT_HEAD;
use crate::tensors::compare::n_different;
use crate::tensors::tensor::Tensor;

pub(super) const MERGE: &str =
    "merge it into the base with PEFT (merge_and_unload), or train without it";
const MERGE_UNTIED: &str = "train without it; merging with PEFT (merge_and_unload) would change the embedding too, since this base ties it to the head";

/// A whole weight, by its name in the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Whole(pub(super) String);

impl Whole {
    /// Returns the base's weight of which `path`, a tensor's name after PEFT's prefix, is a copy or another version.
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

    /// Returns the problem with the stored `tensor` named `name`, or `None` if it is the base's own weight.
    pub(super) fn check(
        &self,
        name: &str,
        tensor: &Tensor,
        base: Option<&ModelFiles>,
    ) -> Option<Problem> {
        let refuse =
            |code, message: String, fix: &str| Some(Problem::new(code, name, message, fix));
        let Some(base) = base else {
            let message = "a whole weight beside A and B: only the base tells whether it is a copy of its own, as PEFT stores with \
                 LoRA on lm_head and with save_embedding_layers, or was trained (modules_to_save, a bias)";
            let fix = "give the base: monteclora convert ADAPTER -o DIR --to lora -m BASE leaves out what is a copy";
            return refuse("stored-weight", message.to_owned(), fix);
        };
        let Some(theirs) = base.weight(&self.0) else {
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
        match n_different(tensor, &theirs) {
            0 => None,
            n => {
                let n_all = tensor.n_elements();
                let message = format!(
                    "a whole weight that differs from the base's in {n} of {n_all} values: it was trained besides the adapter"
                );
                let is_either = self.0.contains("embed") || self.0.starts_with(OUTPUT_HEAD);
                let is_shared = is_either && base.ties_embeddings();
                refuse(
                    "modules-to-save",
                    message,
                    if is_shared { MERGE_UNTIED } else { MERGE },
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
