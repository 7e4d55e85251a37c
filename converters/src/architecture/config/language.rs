//! Finds the decoder's part of a config.json, and the decoder's family.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::plain;
use crate::architecture::{BODY, FAMILIES, Family, WRAPPERS, Wrapper};
use crate::problem::Problem;

/// Prefix of the location of a problem with a key.
pub(super) const AT: &str = "config.json: ";

/// Where a multimodal model keeps its decoder's configuration.
pub(super) const INSIDE: &str = "text_config";

/// Keys that are read beside `text_config`, not in it.
pub(super) const OUTSIDE: [&str; 4] = [
    "tie_word_embeddings",
    "quantization_config",
    "compression_config",
    "quantization",
];

/// A decoder's configuration in a config.json.
pub(super) struct Language<'a> {
    /// Its family.
    pub(super) family: &'static Family,
    /// The multimodal model that contains it, if any.
    pub(super) wrapper: Option<&'static Wrapper>,
    /// Its keys, including those read outside `text_config`, without those that the wrapper does not read.
    pub(super) config: Cow<'a, Map<String, Value>>,
}

impl Language<'_> {
    /// Returns the location of a problem with `key`.
    pub(super) fn at(&self, key: &str) -> String {
        match self.wrapper.is_some() && !OUTSIDE.contains(&key) {
            true => format!("{AT}{INSIDE}.{key}"),
            false => format!("{AT}{key}"),
        }
    }

    /// The class of transformers that reads the model.
    pub(super) fn class_name(&self) -> &'static str {
        self.wrapper
            .map_or(self.family.class_name, |wrapper| wrapper.class_name)
    }
}

/// Returns the decoder's part of `config`.
///
/// # Errors
/// Returns a problem that names the model or its decoder if it is not supported.
pub(super) fn language(config: &Map<String, Value>) -> Result<Language<'_>, Problem> {
    let Some(wrapper) = Wrapper::of(config) else {
        let known = wrapped_names();
        return Ok(Language {
            family: named(config, AT, FAMILIES, &known)?,
            wrapper: None,
            config: Cow::Borrowed(config),
        });
    };
    let empty = Map::new();
    let inside = match config.get(INSIDE) {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(inside)) => inside,
        Some(found) => {
            let message = format!("expected an object, found {found}");
            let at = format!("{AT}{INSIDE}");
            return Err(Problem::new(
                "model-config",
                at,
                message,
                "correct config.json",
            ));
        }
    };
    let is_named = inside
        .get("model_type")
        .is_some_and(|found| !found.is_null());
    let family = match is_named {
        true => named(inside, &format!("{AT}{INSIDE}."), wrapper.families, "")?,
        false => wrapper.families[0],
    };
    let mut keys = inside.clone();
    keys.retain(|key, _| !wrapper.unused.contains(&key.as_str()));
    for key in OUTSIDE {
        match config.get(key).filter(|value| !value.is_null()) {
            Some(value) => keys.insert(key.to_owned(), value.clone()),
            None => keys.remove(key),
        };
    }
    let tied = ties_embeddings(config).unwrap_or(wrapper.tie_word_embeddings);
    keys.entry("tie_word_embeddings").or_insert(tied.into());
    Ok(Language {
        family,
        wrapper: Some(wrapper),
        config: Cow::Owned(keys),
    })
}

/// Returns the decoder's family by `model_type` or, if that is absent, by the class in `architectures`.
pub(crate) fn family(config: &Map<String, Value>) -> Result<&'static Family, Problem> {
    Ok(language(config)?.family)
}

/// Returns the one of `families` that `config` names. `at` is the location of `config`; `more` lists what else may be
/// named there.
fn named(
    config: &Map<String, Value>,
    at: &str,
    families: &[&'static Family],
    more: &str,
) -> Result<&'static Family, Problem> {
    type Name = fn(&Family) -> &'static str;
    let model_type = config.get("model_type").filter(|value| !value.is_null());
    let class = || config.get("architectures")?.get(0)?.as_str();
    let (key, found, name): (_, _, Name) = match (model_type, class()) {
        (None, Some(class)) => ("architectures", class.to_owned(), |family| {
            family.class_name
        }),
        (found, _) => {
            let found = found.map_or("absent".to_owned(), plain);
            ("model_type", found, |family| family.model_type)
        }
    };
    let mut candidates = families.iter().copied();
    candidates
        .find(|family| name(family) == found)
        .ok_or_else(|| {
            let known: Vec<_> = families.iter().map(|family| name(family)).collect();
            Problem::new(
                "architecture",
                format!("{at}{key}"),
                format!("`{found}` is not supported"),
                format!("supported are {}{more}", known.join(", ")),
            )
        })
}

/// Lists the multimodal models for a message.
fn wrapped_names() -> String {
    let names: Vec<_> = WRAPPERS.iter().map(|wrapper| wrapper.model_type).collect();
    format!(", and the language model in {}", names.join(", "))
}

/// Path of the decoder without its head, in the names of modules.
pub(crate) fn body(config: &Map<String, Value>) -> &'static str {
    Wrapper::of(config).map_or(BODY, |wrapper| wrapper.body)
}

/// Returns the location of the decoder's `key` in `config`, and its value if present.
pub(crate) fn entry<'a>(config: &'a Map<String, Value>, key: &str) -> (String, Option<&'a Value>) {
    match Wrapper::of(config).is_some() && !OUTSIDE.contains(&key) {
        true => {
            let inside = config.get(INSIDE).and_then(Value::as_object);
            let value = inside.and_then(|inside| inside.get(key));
            (format!("{AT}{INSIDE}.{key}"), value)
        }
        false => (format!("{AT}{key}"), config.get(key)),
    }
}

/// Returns `config` with the decoder's `key` set to `value`.
pub(crate) fn with_entry(
    config: &Map<String, Value>,
    key: &str,
    value: Value,
) -> Map<String, Value> {
    let mut config = config.clone();
    let is_inside = Wrapper::of(&config).is_some() && !OUTSIDE.contains(&key);
    match config.get_mut(INSIDE).filter(|_| is_inside) {
        Some(inside) => inside[key] = value,
        None => _ = config.insert(key.to_owned(), value),
    }
    config
}

/// Whether the output head is the embedding, if the configuration or its family determines it. For a multimodal model
/// its own key counts. Without that key this uses the decoder's, which agrees with published weights; transformers
/// finds out from the weights.
pub(crate) fn ties_embeddings(config: &Map<String, Value>) -> Option<bool> {
    const KEY: &str = "tie_word_embeddings";
    let written = |config: &Map<String, Value>| config.get(KEY).and_then(Value::as_bool);
    if let Some(written) = written(config) {
        return Some(written);
    }
    match Wrapper::of(config) {
        Some(wrapper) => {
            let inside = config.get(INSIDE).and_then(Value::as_object);
            let inside = inside.and_then(written);
            Some(inside.unwrap_or(wrapper.tie_word_embeddings))
        }
        None => Some(family(config).ok()?.defaults.tie_word_embeddings),
    }
}

/// Whether `config` leaves it to the weights if the head is the embedding. This is so for a multimodal model without
/// the key: it has its own head if one is stored.
pub(crate) fn ties_by_files(config: &Map<String, Value>) -> bool {
    let is_written = config
        .get("tie_word_embeddings")
        .is_some_and(|value| !value.is_null());
    !is_written && Wrapper::of(config).is_some()
}

#[cfg(test)]
mod tests;
