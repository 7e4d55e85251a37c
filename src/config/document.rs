//! A TOML file with command-line overrides: where every key comes from, unknown keys, and typed sections.

use std::collections::BTreeMap;

use monteclora_adapters::methods::METHODS;
use monteclora_converters::{Problem, Problems};
use serde::{
    Deserializer,
    de::{DeserializeOwned, Error as _, Visitor, value},
    forward_to_deserialize_any,
};
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use super::peers;

/// The tables of a file and the keys of each; the table of name "" is the top.
pub(super) type Schema = Vec<(&'static str, &'static [&'static str])>;

/// Where a key was given.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Line(usize),
    Override,
}

/// A parsed file with overrides applied and the problems found so far.
#[derive(Debug)]
pub(super) struct Document {
    name: String,
    table: Table,
    origins: BTreeMap<String, Origin>,
    problems: Vec<String>,
}

impl Document {
    /// Parses the text, applies `key.path=value` overrides and checks every key against the schema.
    ///
    /// An override's value is TOML; what is not valid TOML is taken as a string.
    ///
    /// # Errors
    /// Text that is not TOML; unknown keys are collected as problems.
    pub(super) fn parse(
        text: &str,
        name: &str,
        overrides: &[String],
        schema: &Schema,
    ) -> Result<Self, Problems> {
        let syntax = |error: toml::de::Error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            one(format!(
                "{name}:{line}: not valid TOML: {}",
                error.message()
            ))
        };
        let spanned = DeTable::parse(text).map_err(syntax)?;
        let mut document = Self {
            name: name.to_owned(),
            table: text.parse().map_err(syntax)?,
            origins: BTreeMap::new(),
            problems: Vec::new(),
        };
        document.locate(text, "", spanned.get_ref());
        for entry in overrides {
            document.set(entry);
        }
        document.check_keys(schema);
        Ok(document)
    }

    fn locate(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = join(prefix, key.get_ref());
            let line = line_of(text, Spanned::span(key).start);
            self.origins.insert(path.clone(), Origin::Line(line));
            if let DeValue::Table(inner) = value.get_ref() {
                self.locate(text, &path, inner);
            }
        }
    }

    fn set(&mut self, entry: &str) {
        match set(&mut self.table, entry) {
            Ok(path) => {
                self.origins.insert(path.to_owned(), Origin::Override);
            }
            Err(message) => self.problems.push(format!("--set {message}")),
        }
    }

    fn check_keys(&mut self, schema: &Schema) {
        let mut problems = Vec::new();
        for (section, fields) in schema {
            for key in self.table_at(section).into_iter().flat_map(Table::keys) {
                if !fields.contains(&key.as_str()) {
                    let path = join(section, key);
                    let remedy = remedy(key, section, fields, schema);
                    problems.push((
                        self.line(&path),
                        self.place(&path),
                        format!("unknown key `{key}`; {remedy}"),
                    ));
                }
            }
        }
        // In the file's order; overrides come last.
        problems.sort_by_key(|(line, _, _)| *line);
        self.problems.extend(
            problems
                .into_iter()
                .map(|(_, place, message)| format!("{place} {message}")),
        );
    }

    fn line(&self, path: &str) -> usize {
        match self.origins.get(path) {
            Some(Origin::Line(line)) => *line,
            _ => usize::MAX,
        }
    }

    fn value_at(&self, path: &str) -> Option<&Value> {
        let (section, key) = path.rsplit_once('.').unwrap_or(("", path));
        self.table_at(section)?.get(key)
    }

    fn table_at(&self, section: &str) -> Option<&Table> {
        match section {
            "" => Some(&self.table),
            section => self.value_at(section)?.as_table(),
        }
    }

    /// Puts the values of `defaults` below a section: for the keys that it does not give.
    pub(super) fn defaults(&mut self, section: &str, defaults: Table) {
        for (key, value) in defaults {
            let path = join(section, &key);
            if self.value_at(&path).is_none() {
                // Where the section is no table, reading says so.
                let _ = insert(&mut self.table, &path, value);
            }
        }
    }

    /// The value of one key, if it is there and sound.
    pub(super) fn value<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        self.value_at(path)?.clone().try_into().ok()
    }

    /// Reads key by key, so that every value of a wrong type is reported; every field of `T` has a default.
    pub(super) fn read<T: DeserializeOwned + Default>(&mut self, schema: &Schema) -> T {
        let mut sound = Table::new();
        let mut problems = Vec::new();
        for (section, fields) in schema {
            if let Some(value) = self.value_at(section).filter(|value| !value.is_table()) {
                let found = value.type_str();
                problems.push((
                    (*section).to_owned(),
                    format!("found {found}, expected a table"),
                ));
            }
            for (key, value) in self.table_at(section).into_iter().flatten() {
                let path = join(section, key);
                if !fields.contains(&key.as_str()) || is_section(&path, schema) {
                    continue;
                }
                let mut single = Table::new();
                // Nothing is in the way in an empty table, and sections are tables.
                let _ = insert(&mut single, &path, value.clone());
                match single.try_into::<T>() {
                    Ok(_) => {
                        let _ = insert(&mut sound, &path, value.clone());
                    }
                    Err(error) => problems.push((path, plain(error.message()))),
                }
            }
        }
        for (path, message) in problems {
            self.problem(&path, message);
        }
        sound.try_into().unwrap_or_default()
    }

    /// Adds a problem of a key; `path` is the key with its section, such as `lora.r`.
    pub(super) fn problem(&mut self, path: &str, message: impl AsRef<str>) {
        let key = path.rsplit('.').next().unwrap_or_default();
        let place = self.place(path);
        self.problems
            .push(format!("{place} {key}: {}", message.as_ref()));
    }

    /// `run.toml:12: [lora]`, or `--set lora.r: [lora]`, or `run.toml: [lora]` for a key that was not given.
    fn place(&self, path: &str) -> String {
        let at = match self.origins.get(path) {
            Some(Origin::Line(line)) => format!("{}:{line}:", self.name),
            Some(Origin::Override) => format!("--set {path}:"),
            None => format!("{}:", self.name),
        };
        match path.rsplit_once('.') {
            Some((section, _)) => format!("{at} [{section}]"),
            None => at,
        }
    }

    /// Whether the key was given on the command line.
    pub(super) fn is_override(&self, path: &str) -> bool {
        self.origins.get(path) == Some(&Origin::Override)
    }

    /// Whether the key was given in the file or on the command line.
    pub(super) fn is_given(&self, path: &str) -> bool {
        self.origins.contains_key(path)
    }

    /// Adds a problem of the file as a whole.
    pub(super) fn file_problem(&mut self, message: &str) {
        self.problems.push(format!("{}: {message}", self.name));
    }

    /// The problems found, in the order they were found.
    pub(super) fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

/// What stops before anything else can be found.
pub(super) fn one(message: String) -> Problems {
    Problems::from(vec![Problem::usage(message)])
}

/// Applies an override `key.path=value` to `table`, and returns the path. The value is TOML; what is not valid TOML is a string.
///
/// # Errors
/// Returns an error if there is no value, or if something on the way to the key is no table.
pub(crate) fn set<'a>(table: &mut Table, entry: &'a str) -> Result<&'a str, String> {
    let (path, value) = entry
        .split_once('=')
        .ok_or_else(|| format!("{entry}: has no value; write --set key.path=value"))?;
    let path = path.trim();
    insert(table, path, override_value(value.trim()))
        .map_err(|parent| format!("{path}: `{parent}` is not a table"))?;
    Ok(path)
}

fn override_value(text: &str) -> Value {
    format!("value = {text}")
        .parse::<Table>()
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Puts a value at a path, with the tables that lead there.
///
/// # Errors
/// The name on the way that is no table.
fn insert<'a>(mut table: &mut Table, path: &'a str, value: Value) -> Result<(), &'a str> {
    let (parents, key) = path.rsplit_once('.').unwrap_or(("", path));
    for parent in parents.split('.').filter(|parent| !parent.is_empty()) {
        let inner = table
            .entry(parent)
            .or_insert_with(|| Value::Table(Table::new()));
        table = inner.as_table_mut().ok_or(parent)?;
    }
    table.insert(key.to_owned(), value);
    Ok(())
}

fn is_section(path: &str, schema: &Schema) -> bool {
    schema.iter().any(|(section, _)| *section == path)
}

fn remedy(key: &str, section: &str, fields: &[&str], schema: &Schema) -> String {
    if let Some(remedy) = peers::remedy(key) {
        return remedy.to_owned();
    }
    let mut methods = METHODS.iter().filter(|_| section == "lora");
    if let Some(kind) = methods.find(|kind| kind.section() == key) {
        return format!(
            "method \"{}\" has no keys of its own; `r` and `lora_alpha` of [lora] are its settings",
            kind.name
        );
    }
    if let Some(nearest) = nearest(key, fields) {
        let path = join(section, nearest);
        return if is_section(&path, schema) {
            format!("did you mean [{path}]?")
        } else {
            format!("did you mean `{nearest}`?")
        };
    }
    let owns = |(section, fields): &&(&str, &[&str])| {
        fields.contains(&key) && !is_section(&join(section, key), schema)
    };
    match schema.iter().find(owns) {
        Some(("", _)) => "it belongs at the top of the file".to_owned(),
        Some((owner, _)) => format!("it belongs in [{owner}]"),
        None => format!("known keys: {}", fields.join(", ")),
    }
}

/// The most similar name, if it is similar enough to be a slip.
fn nearest<'a>(key: &str, names: &[&'a str]) -> Option<&'a str> {
    names
        .iter()
        .map(|name| (strsim::jaro_winkler(key, name), *name))
        .filter(|(similarity, name)| {
            *similarity > 0.8 && strsim::damerau_levenshtein(key, name) <= name.len().div_ceil(3)
        })
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, name)| name)
}

fn join(section: &str, key: &str) -> String {
    if section.is_empty() {
        key.to_owned()
    } else {
        format!("{section}.{key}")
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

/// A message about a value in the words of TOML: Rust's names of numbers say nothing to who writes a run.toml.
fn plain(message: &str) -> String {
    let words = [
        ("expected usize", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected u32", "expected a whole number, 0 or more"),
        ("expected f64", "expected a number"),
    ];
    words
        .iter()
        .fold(message.to_owned(), |text, (rust, plain)| {
            text.replace(rust, plain)
        })
}

/// The names of a struct's fields as serde sees them, so that the schema cannot differ from the struct.
pub(super) fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // The deserialiser answers with an error as soon as it was told the names.
    let _ = T::deserialize(FieldNames(&mut names));
    names
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
        Err(value::Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(value::Error::custom("names only"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
