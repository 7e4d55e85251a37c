//! Names that a wrapper around the model has changed, and what the wrapper was.

use std::collections::BTreeSet;

use crate::problem::Problem;

/// What stands in names that training code has wrapped, what puts it there, and how to save without it.
const SEGMENTS: [(&str, &str, &str); 6] = [
    (
        "base_layer",
        "a model with an adapter that was not merged, as PEFT wraps it",
        "save `model.merge_and_unload()`, or `model.unload()` for the base alone",
    ),
    (
        "_orig_mod",
        "a model as torch.compile wraps it",
        "save `model._orig_mod`",
    ),
    (
        "_fsdp_wrapped_module",
        "a model as FSDP wraps it",
        "save the full state dict of the unwrapped model",
    ),
    (
        "_checkpoint_wrapped_module",
        "a model as activation checkpointing wraps it",
        "save the state dict of the unwrapped model",
    ),
    (
        "_forward_module",
        "a model as Fabric wraps it",
        "save `model.module`",
    ),
    (
        "module",
        "a model as DataParallel or DeepSpeed wraps it",
        "save `model.module`",
    ),
];
/// What PEFT puts before every name.
const PEFT: &str = "base_model.model.";

/// A stored name that is one of the model's in another form.
pub(super) struct Wrapped {
    /// As the file has it.
    pub(super) stored: String,
    /// As the model has it.
    pub(super) expected: String,
}

/// Those of `stored` that are one of `missing` but for a wrapper's prefix or segments, or for the prefix `model.`.
pub(super) fn wrapped(stored: &[&str], missing: &BTreeSet<String>) -> Vec<Wrapped> {
    let of = |name: &str| {
        let is_kept = |part: &&str| SEGMENTS.iter().all(|(segment, _, _)| segment != part);
        let parts: Vec<&str> = name.split('.').filter(is_kept).collect();
        let candidates = (0..parts.len()).map(|at| parts[at..].join("."));
        let without = candidates.clone().find(|name| missing.contains(name));
        without.or_else(|| {
            let mut whole = candidates.map(|name| format!("model.{name}"));
            whole.find(|name| missing.contains(name))
        })
    };
    stored
        .iter()
        .filter_map(|stored| {
            Some(Wrapped {
                stored: (*stored).to_owned(),
                expected: of(stored)?,
            })
        })
        .collect()
}

/// One report of all of them.
pub(super) fn report(wrapped: &[Wrapped]) -> Option<Problem> {
    let first = wrapped.first()?;
    let (stored, expected) = (first.stored.as_str(), first.expected.as_str());
    let (_, what, fix) = SEGMENTS
        .into_iter()
        .find(|(segment, _, _)| stored.split('.').any(|part| part == *segment))
        .filter(|_| !stored.starts_with(PEFT))
        .unwrap_or_else(|| match stored.strip_suffix(expected) {
            _ if stored.starts_with(PEFT) => SEGMENTS[0],
            Some(_) => (
                "",
                "a part of a larger model",
                "save the language model by itself",
            ),
            None => (
                "",
                "a decoder without its head, as AutoModel saves it",
                "save it with AutoModelForCausalLM",
            ),
        });
    let message = format!(
        "should be `{expected}`, and so with all {} tensors of this form: {what}",
        wrapped.len()
    );
    Some(Problem::new("tensor-names", stored, message, fix))
}
