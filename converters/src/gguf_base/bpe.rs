//! A byte-level BPE vocabulary (`tokenizer.ggml.model = gpt2`) as the parts of a tokenizer.json.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::Findings;
use super::pre_tokenizer::{self, PreTokenizer};
use super::tokenizer::{Parts, Token, TokenKind};
use crate::tensors::gguf::GgufFile;

/// Reads merges and splitting rules; `None` if a problem leaves them incomplete.
pub(super) fn read(source: &GgufFile, tokens: &[Token], findings: &mut Findings) -> Option<Parts> {
    let rules = rules(source, findings)?;
    const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    if source.boolean(PREFIX) == Some(true) {
        let message = "a space before every text, which llama.cpp does not add to such a vocabulary and transformers does";
        findings.tokenizer(PREFIX, message);
    }
    let Some(merges) = source.texts("tokenizer.ggml.merges") else {
        findings.tokenizer("tokenizer.ggml.merges", "missing");
        return None;
    };
    // llama.cpp fills holes in the vocabulary with unused tokens of this form; they have no text.
    let holes = |token: &&Token| {
        !(token.kind == TokenKind::Unused && token.text == format!("[PAD{}]", token.id))
    };
    let mut vocab = Map::new();
    for token in tokens.iter().filter(holes) {
        vocab.insert(token.text.clone(), token.id.into());
    }
    let known: HashSet<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
    let bad = |merge: &&String| match merge.split_once(' ') {
        Some((left, right)) => {
            !(known.contains(left)
                && known.contains(right)
                && known.contains(format!("{left}{right}").as_str()))
        }
        None => true,
    };
    let n_bad = merges.iter().filter(bad).count();
    if let Some(first) = merges.iter().find(bad) {
        let message = format!("{n_bad} merges are not pairs of tokens, the first is `{first}`");
        findings.tokenizer("tokenizer.ggml.merges", message);
        return None;
    }
    Some(Parts {
        normalizer: rules.normalizer,
        pre_tokenizer: rules.pre_tokenizer,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rules.ignore_merges,
            "vocab": Value::Object(vocab),
            "merges": merges,
        }),
        adds_bos: rules.adds_bos,
        keeps_space_after: None,
    })
}

fn rules(source: &GgufFile, findings: &mut Findings) -> Option<PreTokenizer> {
    const KEY: &str = "tokenizer.ggml.pre";
    let Some(name) = source.text(KEY) else {
        let message = "missing: the file does not say how text is split before merging";
        findings.problem(
            "tokenizer",
            KEY,
            message,
            "convert the model again with a current llama.cpp",
        );
        return None;
    };
    let rules = pre_tokenizer::lookup(name);
    if rules.is_none() {
        let message = format!("pre-tokenizer `{name}` is not known");
        let fix = format!(
            "supported: {}; or use the model's original directory",
            pre_tokenizer::SUPPORTED
        );
        findings.problem("tokenizer", KEY, message, fix);
    }
    rules
}
