//! The model's tokenizer: converts text to ids and back, and knows the special tokens and the ids that end an answer.

use std::{
    collections::HashSet,
    ops::Range,
    path::{Path, PathBuf},
};

use monteclora_converters::{Error, foreign, json};
use serde_json::Value;

use super::error::bad_data;

/// A token, with the byte range of the text that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SpannedToken {
    pub(super) id: u32,
    pub(super) bytes: Range<usize>,
}

/// A Hugging Face tokenizer of one model directory.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    prefix_ids: Vec<u32>,
    /// The special tokens and the end tokens.
    special_ids: HashSet<u32>,
    /// The texts of `special_ids`, by their first byte.
    special_texts: [Vec<String>; 256],
    eos_ids: Vec<u32>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`. The end tokens come from `tokenizer_config.json` and `generation_config.json`, or from
    /// `config.json` if `generation_config.json` has none. Truncation and padding stored in the file are switched off.
    ///
    /// # Errors
    /// Returns an error if `tokenizer.json` is missing, if a file is malformed, or if an end token is not in the
    /// vocabulary.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let malformed = |message: String| Error::malformed(&path, message);
        let bytes = std::fs::read(&path).map_err(|error| {
            let others = ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"];
            let other = others.into_iter().find(|name| dir.join(name).is_file());
            let other = other.map_or_else(String::new, |name| {
                format!(
                    ", which AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes of the {name} that is there"
                )
            });
            malformed(format!(
                "cannot be read ({error}); a model directory needs a tokenizer.json{other}"
            ))
        })?;
        let plain = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let mut inner =
            tokenizers::Tokenizer::from_bytes(plain).map_err(|error| match foreign::not_wanted(
                &path, plain, "JSON",
            ) {
                Some(problem) => Error::from(problem),
                None => malformed(format!("not a Hugging Face tokenizer: {error}")),
            })?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| malformed(error.to_string()))?;
        let added = inner.get_added_tokens_decoder().into_iter();
        let special_ids = added.filter_map(|(id, token)| token.special.then_some(id));

        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let mut eos_ids = Vec::new();
        if let Some(token) = special_token(config.as_ref(), "eos_token") {
            eos_ids.push(inner.token_to_id(&token).ok_or_else(|| {
                malformed(format!(
                    "has no token `{token}`, which tokenizer_config.json names as eos_token"
                ))
            })?);
        }
        for name in ["generation_config.json", "config.json"] {
            let ids = end_ids(read_json(&dir.join(name))?.as_ref());
            for &id in &ids {
                if inner.id_to_token(id).is_none() {
                    return Err(malformed(format!(
                        "has no token {id}, which {name} names as eos_token_id"
                    )));
                }
                if !eos_ids.contains(&id) {
                    eos_ids.push(id);
                }
            }
            if !ids.is_empty() {
                break;
            }
        }
        let special_ids: HashSet<u32> = special_ids.chain(eos_ids.iter().copied()).collect();
        let special_texts =
            by_first_byte(special_ids.iter().filter_map(|id| inner.id_to_token(*id)));
        let mut tokenizer = Self {
            inner,
            path,
            prefix_ids: Vec::new(),
            special_ids,
            special_texts,
            eos_ids,
        };
        tokenizer.prefix_ids = tokenizer.find_prefix()?;
        Ok(tokenizer)
    }

    /// The ids that the tokenizer puts before a text (BOS), found by encoding a text with and without special tokens.
    fn find_prefix(&self) -> Result<Vec<u32>, Error> {
        let plain = self.encode("a", false)?;
        let full = self.encode("a", true)?;
        let start = full
            .windows(plain.len().max(1))
            .position(|window| window == plain)
            .unwrap_or(0);
        Ok(full[..start].to_vec())
    }

    /// The ids of a text. `add_special_tokens` works as in Hugging Face's tokenizers.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(failed)?.get_ids().to_vec())
    }

    /// The ids of a text with the byte ranges that they stand for. No special tokens are added.
    pub(super) fn encode_spans(&self, text: &str) -> Result<Vec<SpannedToken>, Error> {
        let encoding = self.inner.encode(text, false).map_err(failed)?;
        let spans = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(spans
            .map(|(&id, &(start, end))| SpannedToken {
                id,
                bytes: start..end,
            })
            .collect())
    }

    /// The text of ids.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special_tokens).map_err(failed)
    }

    /// The ids that this tokenizer puts before every text: BOS, or nothing.
    pub fn prefix_ids(&self) -> &[u32] {
        &self.prefix_ids
    }

    /// The token that ends a plain completion or text in training: `eos_token` of tokenizer_config.json,
    /// else the first `eos_token_id`.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_ids.first().copied()
    }

    /// Every id that the model's files name as an end token.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether an id is a special token or an end token.
    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The first control token whose text occurs in `text`. The tokenizer would turn that text into the token.
    pub(super) fn special_in(&self, text: &str) -> Option<&str> {
        text.bytes().enumerate().find_map(|(at, byte)| {
            let texts = self.special_texts[usize::from(byte)].iter();
            let here = &text.as_bytes()[at..];
            texts
                .map(String::as_str)
                .find(|special| here.starts_with(special.as_bytes()))
        })
    }

    /// The text without the begin token at its start, and without the end token and white space at its end.
    pub(super) fn without_ends<'a>(&self, text: &'a str) -> &'a str {
        let mut inner = text;
        if let Some(begin) = self.begin_text()
            && let Some(rest) = inner.strip_prefix(&begin)
        {
            inner = rest;
        }
        self.end_in(inner).map_or(inner, |at| &inner[..at])
    }

    /// Whether a text already begins with the begin token that the tokenizer would add.
    pub(super) fn begins_itself(&self, text: &str) -> bool {
        self.begin_text()
            .is_some_and(|begin| text.starts_with(&begin))
    }

    /// The byte offset of the end token at the end of a text; white space may follow the token.
    pub(super) fn end_in(&self, text: &str) -> Option<usize> {
        let text = text.trim_end();
        let ends = self
            .eos_ids
            .iter()
            .filter_map(|id| self.inner.id_to_token(*id));
        ends.filter(|end| !end.is_empty())
            .find_map(|end| text.strip_suffix(&end).map(str::len))
    }

    fn begin_text(&self) -> Option<String> {
        let text: String = self
            .prefix_ids
            .iter()
            .filter_map(|id| self.inner.id_to_token(*id))
            .collect();
        (!text.is_empty()).then_some(text)
    }

    /// The id of a token, given its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Checks that the model has an embedding for every id.
    ///
    /// # Errors
    /// Returns an error that names the token with the largest id, if the model has no embedding for it.
    pub fn check_vocab(&self, model_vocab: usize) -> Result<(), Error> {
        let vocabulary = self.inner.get_vocab(true).into_iter();
        match vocabulary.max_by_key(|(_, id)| *id) {
            Some((token, id)) if id as usize >= model_vocab => Err(Error::malformed(
                &self.path,
                format!(
                    "token `{token}` has id {id}, but the model has {model_vocab} embeddings; the tokenizer belongs to another model"
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Texts of tokens by their first byte, longest first.
fn by_first_byte(texts: impl Iterator<Item = String>) -> [Vec<String>; 256] {
    let mut found = [const { Vec::new() }; 256];
    for text in texts {
        if let Some(&byte) = text.as_bytes().first() {
            found[usize::from(byte)].push(text);
        }
    }
    for texts in &mut found {
        texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    }
    found
}

/// The error of a text or of tokens that the tokenizer cannot handle.
fn failed(error: tokenizers::Error) -> Error {
    bad_data("tokenizer", format!("the tokenizer failed: {error}"))
}

/// Reads a JSON file of the model; `None` if it does not exist.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    let malformed = |message: String| Err(Error::malformed(path, message));
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(json::parse_value(&bytes, path)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => malformed(format!("cannot be read: {error}")),
    }
}

/// A special token, written as a string or as an object with `content`.
pub(super) fn special_token(config: Option<&Value>, key: &str) -> Option<String> {
    let value = config?.get(key)?;
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
        .map(str::to_owned)
}

/// The ids of `eos_token_id`, which is one id or a list.
fn end_ids(config: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.and_then(|config| config.get("eos_token_id")) {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::{LLAMA3_LIKE, model_with_template, tiny_llama};

    #[test]
    fn files_that_git_did_not_fetch_are_named() {
        let dir = tempfile::tempdir().expect("a directory");
        for entry in std::fs::read_dir(tiny_llama()).expect("listed") {
            let path = entry.expect("readable").path();
            let name = path.file_name().expect("a name");
            std::fs::copy(&path, dir.path().join(name)).expect("copied");
        }
        let tokenizer = dir.path().join("tokenizer.json");
        let marked = [
            b"\xef\xbb\xbf",
            &std::fs::read(&tokenizer).expect("readable")[..],
        ]
        .concat();
        std::fs::write(&tokenizer, marked).expect("written");
        Tokenizer::from_dir(dir.path()).expect("a byte order mark says nothing");
        let pointer = "version https://git-lfs.github.com/spec/v1\nsize 17\n";
        for name in ["tokenizer_config.json", "tokenizer.json"] {
            std::fs::write(dir.path().join(name), pointer).expect("written");
            let error = Tokenizer::from_dir(dir.path())
                .expect_err("a pointer")
                .to_string();
            assert!(
                error.contains(name) && error.contains("Git LFS pointer"),
                "{error}"
            );
        }
    }

    #[test]
    fn encode_then_decode_is_the_identity() {
        let tokenizer = Tokenizer::from_dir(&tiny_llama()).expect("loads");
        for text in [
            "",
            "two  spaces\n\nlines",
            "naïve 漢字 🦀",
            "<|im_start|>user\nhi<|im_end|>\n",
        ] {
            let ids = tokenizer.encode(text, false).expect("encodes");
            assert_eq!(tokenizer.decode(&ids, false).expect("decodes"), text);
        }
    }

    #[test]
    fn ends_and_prefix_come_from_the_model() {
        let tokenizer = Tokenizer::from_dir(&tiny_llama()).expect("loads");
        assert_eq!(
            (tokenizer.eos_id(), tokenizer.eos_ids()),
            (Some(2), &[2][..])
        );
        assert!(tokenizer.prefix_ids().is_empty());
        let dir = model_with_template(LLAMA3_LIKE, true);
        std::fs::write(
            dir.path().join("generation_config.json"),
            r#"{"eos_token_id": [0, 2]}"#,
        )
        .expect("writes");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
        assert_eq!(tokenizer.prefix_ids(), [259]);
        assert_eq!(tokenizer.eos_ids(), [2, 0]);
    }

    #[test]
    fn truncation_in_the_file_is_ignored() {
        let dir = model_with_template("", false);
        let path = dir.path().join("tokenizer.json");
        let mut json = read_json(&path).expect("reads").expect("exists");
        json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        std::fs::write(&path, json.to_string()).expect("writes");
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
        assert_eq!(tokenizer.encode("abcdef", false).expect("encodes").len(), 6);
    }

    #[test]
    fn a_vocabulary_larger_than_the_model_is_refused() {
        let tokenizer = Tokenizer::from_dir(&tiny_llama()).expect("loads");
        assert!(tokenizer.check_vocab(tokenizer.vocab_size()).is_ok());
        let error = tokenizer.check_vocab(100).expect_err("too small");
        assert!(
            error
                .to_string()
                .contains("has id 258, but the model has 100 embeddings"),
            "{error}"
        );
        assert_eq!(monteclora_converters::exit_code(&error, |_| None), 4);
    }

    #[test]
    fn missing_and_malformed_files_are_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = Tokenizer::from_dir(dir.path()).expect_err("missing");
        assert!(
            error
                .to_string()
                .contains("a model directory needs a tokenizer.json"),
            "{error}"
        );
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9085698\n";
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let dir = model_with_template("", false);
            std::fs::write(dir.path().join(name), pointer).expect("writes");
            let error = Tokenizer::from_dir(dir.path()).expect_err("a pointer");
            let text = error.to_string();
            assert!(
                text.contains(name)
                    && text.contains("Git LFS pointer")
                    && text.contains("git lfs pull"),
                "{text}"
            );
        }
        std::fs::write(dir.path().join("tokenizer.json"), "{}").expect("writes");
        let error = Tokenizer::from_dir(dir.path()).expect_err("malformed");
        assert!(
            error.to_string().contains("not a Hugging Face tokenizer"),
            "{error}"
        );
        let dir = model_with_template("", false);
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            r#"{"eos_token": "</s>"}"#,
        )
        .expect("writes");
        let error = Tokenizer::from_dir(dir.path()).expect_err("no such token");
        assert!(error.to_string().contains("has no token `</s>`"), "{error}");
    }
}
