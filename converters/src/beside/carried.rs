//! Tokenizer, chat template and what else goes with an adapter from one directory to the next.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::entries;
use crate::error::{Error, Result};
use crate::files;
use crate::foreign;
use crate::model_files::ModelFiles;
use crate::problem::Problem;

/// Directory of named chat templates.
pub(crate) const TEMPLATES_DIR: &str = "additional_chat_templates";
/// What was measured with an adapter and holds for it alone.
pub(super) const MEASURED: [&str; 2] = ["fit.json", "calibration.json"];
/// Of an adapter alone: not of a model into which it is merged.
pub(super) const OF_ADAPTER: [&str; 3] = ["README.md", "fit.json", "calibration.json"];
/// Files that hold the vocabulary.
const VOCABULARIES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
];
/// What goes with a vocabulary.
const WITH_VOCABULARY: [&str; 2] = ["merges.txt", "added_tokens.json"];
/// Largest tokenizer that is read for its ids, in bytes.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Files of one directory, by their names in it, that go where the adapter goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Carried {
    dir: PathBuf,
    names: Vec<String>,
}

impl Serialize for Carried {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.names.serialize(serializer)
    }
}

impl Carried {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            names: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, name: &str) {
        self.names.push(name.to_owned());
    }

    /// The templates of a directory of them.
    pub(super) fn push_dir(&mut self, name: &str, path: &Path) -> Result<()> {
        for (inner, path) in entries(path)? {
            if path.is_file() && inner.ends_with(".jinja") {
                self.names.push(format!("{name}/{inner}"));
            }
        }
        Ok(())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names below the adapter's directory.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn into_names(self) -> Vec<String> {
        self.names
    }

    /// Takes those of `wanted` out.
    pub(super) fn take(&mut self, wanted: &[&str]) -> Vec<String> {
        let names = std::mem::take(&mut self.names).into_iter();
        let (taken, kept) = names.partition(|name| wanted.contains(&name.as_str()));
        self.names = kept;
        taken
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|carried| carried == name)
    }

    /// Copies every file into `dir`, each complete or absent.
    pub(crate) fn copy_into(&self, dir: &Path) -> Result<()> {
        for name in &self.names {
            let (from, to) = (self.dir.join(name), dir.join(name));
            let bytes = fs::read(&from).map_err(Error::io("read", &from))?;
            files::write_file(&to, |writer| {
                writer.write_all(&bytes).map_err(Error::io("write", &to))
            })?;
        }
        Ok(())
    }

    /// Files that are not what their names say, such as Git LFS pointers.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let json = self.names.iter().filter(|name| name.ends_with(".json"));
        json.filter_map(|name| {
            let mut head = Vec::new();
            let file = fs::File::open(self.dir.join(name)).ok()?;
            std::io::Read::read_to_end(&mut std::io::Read::take(file, 1 << 12), &mut head).ok()?;
            let mut problem = foreign::not_wanted(Path::new(name), &head, "JSON")?;
            problem.at.clone_from(name);
            Some(problem)
        })
        .collect()
    }

    /// Whether a chat template is among the files, in any of its forms.
    pub fn has_template(&self) -> bool {
        let file = ["chat_template.jinja", "chat_template.json"];
        file.iter().any(|name| self.has(name)) || self.config_template().is_some()
    }

    fn config_template(&self) -> Option<Value> {
        if !self.has("tokenizer_config.json") {
            return None;
        }
        let mut config = read_large(&self.dir.join("tokenizer_config.json"))?;
        Some(config["chat_template"].take()).filter(|template| !template.is_null())
    }

    /// Whether a file of the base called `name` gives way to those carried: the same file, another form of the tokenizer, or a
    /// chat template that would be read before the adapter's.
    pub(crate) fn replaces(&self, name: &str) -> bool {
        if self.has(name) {
            return true;
        }
        if name.starts_with("chat_template.") || name.starts_with(TEMPLATES_DIR) {
            return self.has_template();
        }
        let is_of_vocabulary = VOCABULARIES.contains(&name) || WITH_VOCABULARY.contains(&name);
        is_of_vocabulary && VOCABULARIES.iter().any(|vocabulary| self.has(vocabulary))
    }

    /// The problem of a tokenizer that has more tokens than `base` has embeddings.
    pub(crate) fn beyond(&self, base: &ModelFiles) -> Option<Problem> {
        let size = self.vocabulary_size()?;
        let mut embeddings = base.names().filter(|name| {
            ["embed_tokens.weight", "wte.weight"]
                .iter()
                .any(|end| name.ends_with(end))
        });
        let rows = *base.info(embeddings.next()?)?.1.first()? as u64;
        if size <= rows {
            return None;
        }
        let message = format!(
            "the tokenizer beside the adapter has {size} tokens, by the largest id, and the base has embeddings for {rows}"
        );
        let fix = "use the base with the embeddings it was trained on; to use the base's tokenizer, move the adapter's out of the directory";
        Some(Problem::new("vocabulary", "tokenizer.json", message, fix))
    }

    /// One more than the largest id of the tokenizer's tokens; none if no file says. `tokenizer.json` says it for all, since it is
    /// what is read where it is there; see [`Self::unread_tokens`].
    pub fn vocabulary_size(&self) -> Option<u64> {
        let largest = match self.read("tokenizer.json") {
            Some(tokenizer) => vocabulary_ids(&tokenizer).max(),
            None => self.tokens_beside().into_iter().map(|(_, id)| id).max(),
        };
        Some(largest? + 1)
    }

    /// The warning that tokens are added in files beside `tokenizer.json` which it does not have: what reads it alone, as mistral.rs
    /// and this program do, does not know them.
    pub fn unread_tokens(&self) -> Option<Problem> {
        let known = vocabulary_ids(&self.read("tokenizer.json")?).max()?;
        let tokens = self
            .tokens_beside()
            .into_iter()
            .filter(|(_, id)| *id > known);
        let tokens: Vec<String> = tokens.map(|(name, id)| format!("{name} {id}")).collect();
        if tokens.is_empty() {
            return None;
        }
        let message = format!(
            "added tokens that tokenizer.json does not have ({}): what reads it alone does not know them",
            tokens.join(", ")
        );
        let fix = "save the tokenizer again (save_pretrained), so that tokenizer.json has them";
        Some(Problem::new(
            "unread-tokens",
            "added_tokens.json",
            message,
            fix,
        ))
    }

    fn read(&self, name: &str) -> Option<Value> {
        let value = self.has(name).then(|| read_large(&self.dir.join(name)));
        value.flatten()
    }

    /// The largest id of each file of tokens beside `tokenizer.json`.
    fn tokens_beside(&self) -> Vec<(&'static str, u64)> {
        let mut tokens = Vec::new();
        for name in ["vocab.json", "added_tokens.json"] {
            let file = self.read(name);
            let ids = file
                .as_ref()
                .and_then(Value::as_object)
                .into_iter()
                .flatten();
            let largest = ids.filter_map(|(_, id)| id.as_u64()).max();
            tokens.extend(largest.map(|id| (name, id)));
        }
        let config = self.read("tokenizer_config.json").unwrap_or_default();
        let added = config["added_tokens_decoder"]
            .as_object()
            .into_iter()
            .flatten();
        let largest = added.filter_map(|(id, _)| id.parse::<u64>().ok()).max();
        tokens.extend(largest.map(|id| ("tokenizer_config.json", id)));
        tokens
    }
}

/// The largest ids that a `tokenizer.json` gives.
fn vocabulary_ids(tokenizer: &Value) -> impl Iterator<Item = u64> {
    let largest = match &tokenizer["model"]["vocab"] {
        Value::Object(tokens) => tokens.values().filter_map(Value::as_u64).max(),
        // Unigram: pieces with their scores, in the order of their ids.
        Value::Array(pieces) => (pieces.len() as u64).checked_sub(1),
        _ => None,
    };
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter_map(|token| token["id"].as_u64()).max();
    largest.into_iter().chain(added)
}

/// A JSON file that may be as large as a tokenizer; none if it is not there or cannot be read.
pub(super) fn read_large(path: &Path) -> Option<Value> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_TOKENIZER {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text)).ok()
}
