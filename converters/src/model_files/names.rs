//! Names that a wrapper around the model has changed, and what the wrapper was.

use std::collections::BTreeSet;

use crate::module_path::{base_of, unwrapped};
use crate::problem::Problem;

/// What PEFT puts before every name, and in the names of modules that it adapts.
const PEFT: &str = "base_model.model.";
const ADAPTED: &str = "base_layer";

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
        let (plain, _) = unwrapped(name);
        let parts: Vec<&str> = plain.split('.').filter(|part| *part != ADAPTED).collect();
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
    let is_adapted =
        |name: &str| name.starts_with(PEFT) || name.split('.').any(|part| part == ADAPTED);
    let (what, fix) = if wrapped.iter().any(|wrapped| is_adapted(&wrapped.stored)) {
        (
            "a model with an adapter that was not merged, as PEFT wraps it".to_owned(),
            "save `model.merge_and_unload()`, or `model.unload()` for the base alone",
        )
    } else if let Some(wrapper) = unwrapped(stored).1.first() {
        (
            format!(
                "`{}.` is a wrapper's ({})",
                wrapper.segment, wrapper.made_by
            ),
            "save the state dict of the model without its wrapper",
        )
    } else if expected.strip_prefix("model.") == Some(stored) {
        let what = base_of("layers.").unwrap_or_default();
        (what.to_owned(), "save it with AutoModelForCausalLM")
    } else {
        let what = base_of(stored).unwrap_or("a part of a larger model");
        (what.to_owned(), "save the language model by itself")
    };
    let message = format!(
        "should be `{expected}`, and so with all {} tensors of this form: {what}",
        wrapped.len()
    );
    Some(Problem::new("tensor-names", stored, message, fix))
}
