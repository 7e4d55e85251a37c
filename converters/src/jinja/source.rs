//! Where a model's templates stand.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::Value;

use crate::foreign::{self, FileKind};
use crate::json;
use crate::{Error, Problem};

/// The template for conversations without tools, and for those with tools where there is no other.
pub const DEFAULT: &str = "default";
/// The template for conversations with tools.
pub const TOOL_USE: &str = "tool_use";

/// The directory of a model's further templates.
const ADDITIONAL: &str = "additional_chat_templates";

/// The texts of a model's templates, by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// The file that the first was read from.
    pub origin: PathBuf,
    /// Name and text; not empty.
    pub named: IndexMap<String, String>,
}

impl Sources {
    /// The template that transformers takes: `tool_use` for tools where there is one, else `default`.
    pub fn name_for(&self, has_tools: bool) -> &'static str {
        match has_tools && self.named.contains_key(TOOL_USE) {
            true => TOOL_USE,
            false => DEFAULT,
        }
    }

    /// The text of the template, or of all of them where there are several: what the rendered text depends on.
    pub fn content(&self) -> String {
        match self.named.len() {
            1 => self.named.values().cloned().collect(),
            _ => {
                let named = self.named.iter();
                named
                    .map(|(name, text)| format!("{name}\n{text}\n"))
                    .collect()
            }
        }
    }

    /// What a file has as `chat_template`: a text, or a list of `{"name", "template"}`.
    ///
    /// # Errors
    /// For anything else.
    fn from_json(path: &Path, json: &Value) -> Result<Option<Self>, Error> {
        let named = match json.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => IndexMap::from([(DEFAULT.to_owned(), text.clone())]),
            Some(Value::Array(list)) => {
                let entries = list.iter().map(|entry| {
                    let name = entry.get("name")?.as_str()?;
                    Some((name.to_owned(), entry.get("template")?.as_str()?.to_owned()))
                });
                entries.collect::<Option<_>>().ok_or_else(|| {
                    Error::malformed(path, "chat_template: an entry of the list has no `name` or no `template`; give a template with --chat-template")
                })?
            }
            Some(_) => {
                return Err(Error::malformed(
                    path,
                    "chat_template is neither a text nor a list of named templates; give one with --chat-template",
                ));
            }
        };
        if named.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            origin: path.to_owned(),
            named,
        }))
    }
}

/// The templates of the model in `dir`, in transformers' order: `explicit` (Jinja text, or JSON with `chat_template`), then
/// `chat_template.jinja` with the files in `additional_chat_templates/`, `tokenizer_config.json`, `chat_template.json`.
/// `None` if the model has none.
///
/// # Errors
/// A file that cannot be read, or one that holds no template where it should.
pub fn find(dir: &Path, explicit: Option<&Path>) -> Result<Option<Sources>, Error> {
    if let Some(path) = explicit {
        let text = std::fs::read_to_string(path).map_err(|source| {
            Problem::usage(format!("cannot read `{}`: {source}", path.display()))
        })?;
        if path.extension().is_none_or(|extension| extension != "json") {
            is_template(path, &text)?;
            return Ok(Some(one(path.to_owned(), DEFAULT, text)));
        }
        let json = parse(path, &text)?;
        return match Sources::from_json(path, &json)? {
            Some(found) => Ok(Some(found)),
            None => Err(Error::malformed(path, "has no key `chat_template`")),
        };
    }
    let config = from_file(&dir.join("tokenizer_config.json"))?;
    let path = dir.join("chat_template.jinja");
    let mut found = read_template(&path)?.map(|text| one(path, DEFAULT, text));
    for path in additional(&dir.join(ADDITIONAL))? {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let Some(text) = read_template(&path)? else {
            continue;
        };
        match &mut found {
            Some(found) => {
                found.named.insert(name, text);
            }
            None => found = Some(one(path, &name, text)),
        }
    }
    if let Some(mut found) = found {
        // transformers forgets the default of tokenizer_config.json here; it is the model's all the same.
        for (name, text) in config.map(|config| config.named).unwrap_or_default() {
            if name == DEFAULT {
                found.named.entry(name).or_insert(text);
            }
        }
        return Ok(Some(found));
    }
    match config {
        Some(found) => Ok(Some(found)),
        None => from_file(&dir.join("chat_template.json")),
    }
}

fn one(origin: PathBuf, name: &str, text: String) -> Sources {
    Sources {
        origin,
        named: IndexMap::from([(name.to_owned(), text)]),
    }
}

fn from_file(path: &Path) -> Result<Option<Sources>, Error> {
    match read(path)? {
        Some(text) => Sources::from_json(path, &parse(path, &text)?),
        None => Ok(None),
    }
}

fn read_template(path: &Path) -> Result<Option<String>, Error> {
    let text = read(path)?;
    if let Some(text) = &text {
        is_template(path, text)?;
    }
    Ok(text)
}

/// Refuses what stands for a file or came in its place: taken for a template it would print itself.
fn is_template(path: &Path, text: &str) -> Result<(), Error> {
    let is_other = matches!(
        FileKind::of(text.as_bytes()),
        FileKind::LfsPointer(_) | FileKind::AnnexPointer | FileKind::Html | FileKind::Xml
    );
    match foreign::not_wanted(path, text.as_bytes(), "a chat template").filter(|_| is_other) {
        Some(problem) => Err(problem.into()),
        None => Ok(()),
    }
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::malformed(path, format!("cannot be read: {error}"))),
    }
}

/// A byte order mark, which Windows' editors write, is passed over.
fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    json::parse_value(text.as_bytes(), path)
}

/// The `.jinja` files in `dir`, sorted.
fn additional(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::malformed(dir, format!("cannot be read: {error}"))),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jinja")
        })
        .collect();
    paths.sort();
    Ok(paths)
}
