//! A TOML file with command-line overrides: where every key comes from, unknown keys, and typed sections.

use std::collections::BTreeMap;

use serde::{
    Deserializer,
    de::{DeserializeOwned, Error as _, Visitor, value},
    forward_to_deserialize_any,
};
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

use super::error::ConfigError;

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
    /// [`ConfigError::Syntax`]; unknown keys are collected as problems.
    pub(super) fn parse(
        text: &str,
        name: &str,
        overrides: &[String],
        schema: &Schema,
    ) -> Result<Self, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            name: name.to_owned(),
            line: error.span().map_or(1, |span| line_of(text, span.start)),
            message: error.message().to_owned(),
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
        let Some((path, value)) = entry.split_once('=') else {
            self.problems.push(format!(
                "--set {entry}: has no value; write --set key.path=value"
            ));
            return;
        };
        let path = path.trim();
        let mut table = &mut self.table;
        let (parents, key) = path
            .rsplit_once('.')
            .map_or((None, path), |(parents, key)| (Some(parents), key));
        for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
            let inner = table
                .entry(parent)
                .or_insert_with(|| Value::Table(Table::new()));
            match inner {
                Value::Table(inner) => table = inner,
                _ => {
                    self.problems
                        .push(format!("--set {path}: `{parent}` is not a table"));
                    return;
                }
            }
        }
        table.insert(key.to_owned(), override_value(value.trim()));
        self.origins.insert(path.to_owned(), Origin::Override);
    }

    fn check_keys(&mut self, schema: &Schema) {
        let mut problems = Vec::new();
        for (section, fields) in schema {
            let Some(table) = self.table_at(section) else {
                continue;
            };
            let children: Vec<&str> = schema
                .iter()
                .filter_map(|(child, _)| child_of(section, child))
                .collect();
            for key in table.keys() {
                if fields.contains(&key.as_str()) || children.contains(&key.as_str()) {
                    continue;
                }
                let path = join(section, key);
                let remedy = remedy(key, section, fields, &children, schema);
                problems.push((
                    self.line(&path),
                    self.place(&path),
                    format!("unknown key `{key}`; {remedy}"),
                ));
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

    fn table_at(&self, section: &str) -> Option<&Table> {
        let mut table = &self.table;
        for name in section.split('.').filter(|name| !name.is_empty()) {
            table = table.get(name)?.as_table()?;
        }
        Some(table)
    }

    /// Reads a section key by key, so that every value of a wrong type is reported. `T`'s fields are optional.
    pub(super) fn section<T: DeserializeOwned + Default>(&mut self, section: &str) -> T {
        let known = field_names::<T>();
        let holder = section.rsplit_once('.').map_or("", |(parent, _)| parent);
        let name = section.rsplit('.').next().unwrap_or_default();
        if !section.is_empty()
            && let Some(value) = self.table_at(holder).and_then(|table| table.get(name))
            && !value.is_table()
        {
            let found = value.type_str();
            self.problem(section, format!("found {found}, expected a table"));
            return T::default();
        }
        let entries: Vec<(String, Value)> = self
            .table_at(section)
            .into_iter()
            .flatten()
            .filter(|(key, _)| known.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let mut good = Table::new();
        for (key, value) in entries {
            let mut single = Table::new();
            single.insert(key.clone(), value.clone());
            match single.try_into::<T>() {
                Ok(_) => {
                    good.insert(key, value);
                }
                Err(error) => self.problem(&join(section, &key), error.message()),
            }
        }
        good.try_into().unwrap_or_default()
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

    /// The file's name, for messages about no key.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The problems found, in the order they were found.
    pub(super) fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

fn override_value(text: &str) -> Value {
    format!("value = {text}")
        .parse::<Table>()
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

fn remedy(key: &str, section: &str, fields: &[&str], children: &[&str], schema: &Schema) -> String {
    let names = || fields.iter().chain(children).copied();
    if let Some(nearest) = nearest(key, names()) {
        return if children.contains(&nearest) {
            format!("did you mean [{}]?", join(section, nearest))
        } else {
            format!("did you mean `{nearest}`?")
        };
    }
    if let Some((owner, _)) = schema.iter().find(|(_, fields)| fields.contains(&key)) {
        return match *owner {
            "" => "it belongs at the top of the file".to_owned(),
            owner => format!("it belongs in [{owner}]"),
        };
    }
    format!("known keys: {}", names().collect::<Vec<_>>().join(", "))
}

/// The most similar name, if it is similar enough to be a slip.
fn nearest<'a>(key: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| {
            (
                strsim::jaro_winkler(key, name),
                strsim::damerau_levenshtein(key, name),
                name,
            )
        })
        .filter(|(similarity, distance, name)| {
            *similarity > 0.8 && *distance <= name.len().div_ceil(3)
        })
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, _, name)| name)
}

/// `b` for ("a", "a.b").
fn child_of<'a>(section: &str, path: &'a str) -> Option<&'a str> {
    let child = if section.is_empty() {
        path
    } else {
        path.strip_prefix(section)?.strip_prefix('.')?
    };
    (!child.is_empty() && !child.contains('.')).then_some(child)
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
