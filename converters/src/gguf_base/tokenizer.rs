//! The vocabulary of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Findings, Tools, bpe, sentencepiece, write_json};
use crate::error::{Error, Result};
use crate::files::write_text;
use crate::problem::listed;
use crate::tensors::gguf::GgufFile;

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// One entry of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) text: String,
    pub(super) kind: TokenKind,
}

/// The parts of a tokenizer.json that depend on the kind of vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
    /// Whether a file that does not say so begins every text with the BOS token.
    pub(super) adds_bos: bool,
    /// The special tokens after which white space is kept, where it is dropped after all others.
    pub(super) keeps_space_after: Option<&'static [&'static str]>,
}

/// All that is written about text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Vocabulary {
    n_tokens: usize,
    tokenizer: Value,
    /// tokenizer_config.json without the length.
    config: Value,
    pub(super) generation: Value,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
    chat_template: Option<String>,
    /// Further templates by their names.
    templates: BTreeMap<String, String>,
}

/// Where transformers keeps templates that have names.
pub(super) const TEMPLATES: &str = "additional_chat_templates";

/// Ends of a turn; of those that are control tokens, the ones in the chat template end an answer.
const TURN_ENDS: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"];

/// Reads the vocabulary; `None` if a problem leaves it incomplete.
pub(super) fn read(source: &GgufFile, findings: &mut Findings) -> Option<Vocabulary> {
    let n_problems = findings.problems.len();
    let tokens = tokens(source, findings)?;
    for key in [
        "tokenizer.ggml.remove_extra_whitespaces",
        "tokenizer.ggml.precompiled_charsmap",
    ] {
        if source.has(key) && source.boolean(key) != Some(false) {
            findings.tokenizer(key, "this normalisation is not supported");
        }
    }
    let mut special = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        special_id(source, &key, &tokens, findings)
    };
    let (bos, eos, pad) = (special("bos"), special("eos"), special("padding"));
    let mut unknowns = tokens
        .iter()
        .filter(|token| token.kind == TokenKind::Unknown);
    let unknown = special("unknown").or_else(|| Some(unknowns.next()?.id));
    let turn_ends = [special("eot"), special("eom")];
    let parts = match source.text("tokenizer.ggml.model") {
        Some("gpt2") => bpe::read(source, &tokens, findings)?,
        Some("llama") => sentencepiece::read(source, &tokens, unknown, findings)?,
        other => {
            let message = format!(
                "tokenizer model `{}` is not supported",
                other.unwrap_or("(none)")
            );
            findings.problem(
                "tokenizer",
                "tokenizer.ggml.model",
                message,
                "supported: gpt2, llama",
            );
            return None;
        }
    };
    let (chat_template, templates) = templates(source, findings);

    let ends_turns = |token: &&Token| {
        let text = token.text.as_str();
        let mut templates = chat_template.iter();
        token.kind == TokenKind::Control
            && TURN_ENDS.contains(&text)
            && templates.any(|template| template.contains(text))
    };
    let in_template = tokens.iter().filter(ends_turns).map(|token| token.id);
    let named = eos.into_iter().chain(turn_ends.into_iter().flatten());
    let mut ends: Vec<u32> = Vec::new();
    for end in named.chain(in_template) {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }

    let mut wanted = |key: &str, default: bool, id: Option<u32>| {
        let key = format!("tokenizer.ggml.{key}");
        let add = source.boolean(&key).unwrap_or(default);
        if source.has(&key) && source.boolean(&key).is_none() {
            findings.tokenizer(&key, "is neither true nor false");
        }
        if add && id.is_none() {
            findings.tokenizer(&key, "set, but there is no such token");
        }
        add
    };
    let add_bos = wanted("add_bos_token", parts.adds_bos && bos.is_some(), bos);
    let add_eos = wanted("add_eos_token", false, eos);
    describe(chat_template.as_deref(), pad, findings);
    if findings.problems.len() > n_problems {
        return None;
    }

    let named = [bos, eos, pad, unknown];
    let text_of = |id: u32| {
        tokens
            .get(id as usize)
            .map(|token| (token.text.as_str(), id))
    };
    let first = bos.filter(|_| add_bos).and_then(text_of);
    let last = eos.filter(|_| add_eos).and_then(text_of);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(&tokens, &named, parts.keeps_space_after),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(first, last),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    let token = |id: Option<u32>| id.and_then(text_of).map(|(text, _)| text);
    let config = json!({
        // The class that takes tokenizer.json as it is, in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "bos_token": token(bos),
        "eos_token": token(eos),
        "pad_token": token(pad),
        "unk_token": token(unknown),
        "clean_up_tokenization_spaces": false,
    });
    let ends = match ends.as_slice() {
        [] => Value::Null,
        [end] => json!(end),
        ends => json!(ends),
    };
    Some(Vocabulary {
        n_tokens: tokens.len(),
        tokenizer,
        config,
        generation: json!({"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}),
        bos,
        eos,
        pad,
        chat_template,
        templates,
    })
}

fn tokens(source: &GgufFile, findings: &mut Findings) -> Option<Vec<Token>> {
    const KEY: &str = "tokenizer.ggml.tokens";
    const TYPES: &str = "tokenizer.ggml.token_type";
    let Some(texts) = source.texts(KEY).filter(|texts| !texts.is_empty()) else {
        findings.tokenizer(KEY, "missing: the file holds no vocabulary");
        return None;
    };
    let kinds = match source.integers(TYPES) {
        Some(kinds) if kinds.len() == texts.len() => kinds,
        None if !source.has(TYPES) => vec![1; texts.len()],
        _ => {
            findings.tokenizer(TYPES, "is not one whole number for each token");
            return None;
        }
    };
    let mut seen = HashSet::new();
    let mut tokens = Vec::with_capacity(texts.len());
    for ((id, text), kind) in (0u32..).zip(texts).zip(kinds) {
        if !seen.insert(text) {
            findings.tokenizer(KEY, format!("token {id} `{text}` occurs twice"));
        }
        let kind = match kind {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        };
        tokens.push(Token {
            id,
            text: text.clone(),
            kind,
        });
    }
    Some(tokens)
}

/// A token id of the metadata; all ones means none.
fn special_id(
    source: &GgufFile,
    key: &str,
    tokens: &[Token],
    findings: &mut Findings,
) -> Option<u32> {
    if !source.has(key) {
        return None;
    }
    match source.integer(key).map(u32::try_from) {
        Some(Ok(u32::MAX)) => None,
        Some(Ok(id)) if (id as usize) < tokens.len() => Some(id),
        _ => {
            findings.tokenizer(key, "is not the number of a token");
            None
        }
    }
}

/// The chat template, and those with names. One that is called `default` is the first if that is not there.
fn templates(
    source: &GgufFile,
    findings: &mut Findings,
) -> (Option<String>, BTreeMap<String, String>) {
    const KEY: &str = "tokenizer.chat_template";
    let mut main = source.text(KEY).map(str::to_owned);
    if source.has(KEY) && main.is_none() {
        findings.tokenizer(KEY, "is no text");
    }
    let mut named = BTreeMap::new();
    for key in source.metadata().keys() {
        let Some(name) = key
            .strip_prefix(KEY)
            .and_then(|rest| rest.strip_prefix('.'))
        else {
            continue;
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        match source.text(key) {
            Some(text) if !name.is_empty() && name.chars().all(is_plain) => {
                named.insert(name.to_owned(), text.to_owned());
            }
            Some(_) => findings.tokenizer(
                key,
                "a template's name is made of letters, digits, `_` and `-`",
            ),
            None => findings.tokenizer(key, "is no text"),
        }
    }
    if let Some(default) = named.remove("default")
        && *main.get_or_insert_with(|| default.clone()) != default
    {
        findings.tokenizer(
            "tokenizer.chat_template.default",
            "differs from tokenizer.chat_template",
        );
    }
    if !named.is_empty() {
        let names: Vec<&str> = named.keys().map(String::as_str).collect();
        findings.note(format!(
            "further chat templates are written to {TEMPLATES}: {}",
            listed(&names)
        ));
    }
    (main, named)
}

fn describe(template: Option<&str>, pad: Option<u32>, findings: &mut Findings) {
    if template.is_none() {
        findings.note("the file has no chat template: conversations cannot be rendered");
    }
    if pad.is_none() {
        findings.note("the file names no padding token");
    }
}

/// Tokens that are recognised in text as they stand: control tokens and named ones (special), user-defined ones (not). With
/// `keeps_space_after`, white space behind all special ones but these is dropped.
fn added_tokens(
    tokens: &[Token],
    named: &[Option<u32>],
    keeps_space_after: Option<&[&str]>,
) -> Vec<Value> {
    tokens
        .iter()
        .filter_map(|token| {
            let special = matches!(token.kind, TokenKind::Control | TokenKind::Unknown)
                || named.contains(&Some(token.id));
            let strips = special
                && keeps_space_after.is_some_and(|keeps| !keeps.contains(&token.text.as_str()));
            (special || token.kind == TokenKind::UserDefined).then(|| {
                json!({
                    "id": token.id,
                    "content": token.text,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": strips,
                    "normalized": false,
                    "special": special,
                })
            })
        })
        .collect()
}

fn post_processor(first: Option<(&str, u32)>, last: Option<(&str, u32)>) -> Value {
    if first.is_none() && last.is_none() {
        return Value::Null;
    }
    let piece = |part: Option<(&str, u32)>, type_id: u32| {
        part.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
    };
    let part = |name: &str, type_id: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": type_id}});
        piece(first, type_id)
            .into_iter()
            .chain([text])
            .chain(piece(last, type_id))
            .collect::<Vec<_>>()
    };
    let special: Map<String, Value> = [first, last]
        .into_iter()
        .flatten()
        .map(|(text, id)| {
            (
                text.to_owned(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            )
        })
        .collect();
    let pair: Vec<Value> = part("A", 0).into_iter().chain(part("B", 1)).collect();
    json!({"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": special})
}

/// Checks that the tokenizer works and fits the embedding.
pub(super) fn check(
    vocabulary: &Vocabulary,
    n_rows: usize,
    tools: &Tools<'_>,
    findings: &mut Findings,
) {
    if vocabulary.n_tokens > n_rows {
        let n_tokens = vocabulary.n_tokens;
        let message = format!("{n_tokens} tokens, but the embedding has {n_rows} rows");
        findings.tokenizer("tokenizer.ggml.tokens", message);
    }
    for message in (tools.check_tokenizer)(&vocabulary.tokenizer) {
        findings.problem("tokenizer", "tokenizer.ggml", message, "");
    }
}

/// Writes the files.
pub(super) fn write(dir: &Path, vocabulary: &Vocabulary, context_length: usize) -> Result<()> {
    let mut config = vocabulary.config.clone();
    config["model_max_length"] = context_length.into();
    write_json(dir, "tokenizer.json", &vocabulary.tokenizer)?;
    write_json(dir, "tokenizer_config.json", &config)?;
    if let Some(template) = &vocabulary.chat_template {
        write_text(&dir.join("chat_template.jinja"), template)?;
    }
    let templates = dir.join(TEMPLATES);
    if !vocabulary.templates.is_empty() {
        std::fs::create_dir(&templates).map_err(Error::io("create", &templates))?;
    }
    for (name, template) in &vocabulary.templates {
        write_text(&templates.join(format!("{name}.jinja")), template)?;
    }
    Ok(())
}
