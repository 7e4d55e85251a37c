//! Reads text and environment variables into a [`ServeFile`], with every unknown key and every value of a wrong type in
//! one report.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::{ServeFile, keys};
use crate::field_names::suggestion;

/// Prefix of the environment variables that override keys.
const PREFIX: &str = "MONTECLORA_";

/// Separator of sections and keys in such a name. It distinguishes these variables from others with the prefix.
const SEPARATOR: &str = "__";

/// The only key outside the sections.
const TOP_LEVEL: &str = "DEFAULT_MODEL_ID";

/// Reads `text`; the values of `variables` replace those of the text.
///
/// `MONTECLORA_SERVER__PORT=8080` sets `port` in `[server]`, `MONTECLORA_MODELS__0__DTYPE=f16` sets `dtype` of the
/// first model. Values are TOML, or plain text where the key takes text. Empty variables count as unset.
pub(super) fn parse(
    text: &str,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<ServeFile, String> {
    let syntax = |error: toml::de::Error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        format!("line {line}: {}", error.message())
    };
    let spanned = DeTable::parse(text).map_err(syntax)?;
    let mut table: Table = text.parse().map_err(syntax)?;
    let mut problems = Problems::default();
    problems.locate(text, "", &DeValue::Table(spanned.into_inner()));
    for (name, value) in variables {
        if let Some(path) = key_path(&name).filter(|_| !value.is_empty()) {
            problems.set(&mut table, &name, &path, &value);
        }
    }
    let value = Value::Table(table);
    problems.unknown_keys(&value, "", "");
    problems.types(&value, "", &|leaf| leaf);
    if problems.found.is_empty() {
        // No error is expected here; if there is one, it is reported.
        return value.try_into().map_err(|error| error.message().to_owned());
    }
    Err(problems.found.join("\n  "))
}

/// The key that an environment variable overrides, split into sections.
fn key_path(variable: &str) -> Option<Vec<String>> {
    let key = variable.strip_prefix(PREFIX)?;
    let overrides = key == TOP_LEVEL || key.contains(SEPARATOR);
    overrides.then(|| key.split(SEPARATOR).map(str::to_lowercase).collect())
}

/// The faults found, and the place where every key was given.
#[derive(Default)]
struct Problems {
    origins: BTreeMap<String, String>,
    found: Vec<String>,
}

impl Problems {
    fn push(&mut self, at: &str, message: &str) {
        let origin = self.origins.get(at).map(|origin| format!("{origin}: "));
        let origin = origin.unwrap_or_default();
        self.found.push(format!("{origin}{at}: {message}"));
    }

    /// Records the line of every key.
    fn locate(&mut self, text: &str, at: &str, value: &DeValue<'_>) {
        match value {
            DeValue::Table(table) => {
                for (key, value) in table {
                    let at = join(at, key.get_ref());
                    let line = line_of(text, Spanned::span(key).start);
                    self.origins.insert(at.clone(), format!("line {line}"));
                    self.locate(text, &at, value.get_ref());
                }
            }
            DeValue::Array(items) => {
                for (idx, item) in items.iter().enumerate() {
                    self.locate(text, &format!("{at}[{idx}]"), item.get_ref());
                }
            }
            _ => {}
        }
    }

    /// Sets the key at `path` to the value of an environment variable.
    fn set(&mut self, table: &mut Table, variable: &str, path: &[String], text: &str) {
        let mut at = String::new();
        for part in path {
            at = match part.parse::<usize>() {
                Ok(idx) if !at.is_empty() => format!("{at}[{idx}]"),
                _ => join(&at, part),
            };
        }
        self.origins.insert(at.clone(), variable.to_owned());
        let parsed = format!("value = {text}")
            .parse::<Table>()
            .ok()
            .filter(|table| table.len() == 1)
            .and_then(|mut table| table.remove("value"));
        let plain = Value::String(text.to_owned());
        // TOML reads `8` as a number; a key that takes text gets it as text.
        let value = match parsed {
            Some(parsed) if fits(path, &parsed) || !fits(path, &plain) => parsed,
            _ => plain,
        };
        if let Err(message) = insert(table, path, value) {
            self.found.push(format!("{variable}: {at}: {message}"));
        }
    }

    /// Reports unknown keys; `kind` is the path without list positions.
    fn unknown_keys(&mut self, value: &Value, kind: &str, at: &str) {
        match value {
            Value::Table(table) => {
                let Some((_, known)) = keys().into_iter().find(|(name, _)| *name == kind) else {
                    return;
                };
                for (key, value) in table {
                    let (kind, at) = (join(kind, key), join(at, key));
                    if known.contains(&key.as_str()) {
                        self.unknown_keys(value, &kind, &at);
                    } else {
                        let hint = suggestion(key, known, f64::NEG_INFINITY);
                        self.push(&at, &format!("unknown key{hint}"));
                    }
                }
            }
            Value::Array(items) => {
                for (idx, item) in items.iter().enumerate() {
                    self.unknown_keys(item, kind, &format!("{at}[{idx}]"));
                }
            }
            _ => {}
        }
    }

    /// Checks every value separately, so that each value of a wrong type is reported. `wrap` puts a value into an
    /// otherwise empty file.
    fn types(&mut self, value: &Value, at: &str, wrap: &dyn Fn(Value) -> Value) {
        match value {
            Value::Table(table) => {
                for (key, value) in table {
                    let single = |leaf| wrap(Value::Table(Table::from_iter([(key.clone(), leaf)])));
                    self.types(value, &join(at, key), &single);
                }
            }
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_table) => {
                for (idx, item) in items.iter().enumerate() {
                    let single = |leaf| wrap(Value::Array(vec![leaf]));
                    self.types(item, &format!("{at}[{idx}]"), &single);
                }
            }
            leaf => {
                if let Err(error) = wrap(leaf.clone()).try_into::<ServeFile>()
                    && !error.message().starts_with("unknown field")
                {
                    self.push(at, error.message());
                }
            }
        }
    }
}

/// Whether `value` is of the type that the key at `path` takes.
fn fits(path: &[String], value: &Value) -> bool {
    let whole = path.iter().rev().fold(value.clone(), |inner, part| {
        if part.parse::<usize>().is_ok() {
            Value::Array(vec![inner])
        } else {
            Value::Table(Table::from_iter([(part.clone(), inner)]))
        }
    });
    whole.try_into::<ServeFile>().is_ok()
}

/// Sets the key at `path`. The position after the last item of a list appends an item.
fn insert(table: &mut Table, path: &[String], value: Value) -> Result<(), String> {
    let (last, sections) = path.split_last().ok_or("names no key")?;
    let mut place = table;
    let mut sections = sections.iter().peekable();
    while let Some(section) = sections.next() {
        let idx = sections.peek().and_then(|next| next.parse::<usize>().ok());
        let inner = place.entry(section.clone()).or_insert_with(|| match idx {
            Some(_) => Value::Array(Vec::new()),
            None => Value::Table(Table::new()),
        });
        let found = match (inner, idx) {
            (Value::Array(items), Some(idx)) => {
                sections.next();
                if items.len() == idx {
                    items.push(Value::Table(Table::new()));
                }
                let length = items.len();
                items
                    .get_mut(idx)
                    .ok_or_else(|| format!("`{section}` has {length} entries, counted from 0"))?
            }
            (inner, _) => inner,
        };
        place = found
            .as_table_mut()
            .ok_or_else(|| format!("`{section}` is not a section"))?;
    }
    place.insert(last.clone(), value);
    Ok(())
}

fn join(prefix: &str, key: &str) -> String {
    match prefix {
        "" => key.to_owned(),
        _ => format!("{prefix}.{key}"),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}
