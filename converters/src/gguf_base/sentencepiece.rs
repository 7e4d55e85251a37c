//! A SentencePiece BPE vocabulary (`tokenizer.ggml.model = llama`) as the parts of a tokenizer.json.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::Findings;
use super::tokenizer::{Parts, Token, TokenKind};
use crate::architecture::Family;
use crate::tensors::gguf::GgufFile;

const SPACE: &str = "\u{2581}";

/// Reads scores and the rules around them; `None` if a problem leaves them incomplete. `unknown` stands for text without a token.
pub(super) fn read(
    source: &GgufFile,
    tokens: &[Token],
    unknown: Option<u32>,
    findings: &mut Findings,
) -> Option<Parts> {
    let scores = match source.floats("tokenizer.ggml.scores") {
        Some(scores)
            if scores.len() == tokens.len() && scores.iter().all(|score| !score.is_nan()) =>
        {
            scores
        }
        _ => {
            findings.tokenizer(
                "tokenizer.ggml.scores",
                "missing, or not one number for each token",
            );
            return None;
        }
    };
    let unknown = unknown.and_then(|id| tokens.get(id as usize));
    let architecture = source.text("general.architecture");
    let family = architecture.and_then(|name| Family::of_gguf(name).next());
    let byte_fallback = tokens
        .iter()
        .filter(|token| token.kind == TokenKind::Byte)
        .count()
        == 256;
    const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    if source.has(PREFIX) && source.boolean(PREFIX).is_none() {
        findings.tokenizer(PREFIX, "is neither true nor false");
    }
    let prefix = source.boolean(PREFIX).unwrap_or(true);

    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        replace(SPACE, " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(replace(" ", SPACE));
    let vocab: Map<String, Value> = tokens
        .iter()
        .map(|token| (token.text.clone(), token.id.into()))
        .collect();
    Some(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.map(|token| &token.text),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": byte_fallback,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges(tokens, scores),
        }),
        adds_bos: true,
        keeps_space_after: family.and_then(|family| family.gguf.keeps_space_after),
    })
}

/// The merges that scores imply: every way to put a piece together from two others, best score first.
///
/// SentencePiece merges the neighbours whose union has the highest score, which is the order of BPE merges when they
/// are ranked by the score of what they make. Control, byte and user-defined tokens are never made by merging.
fn merges(tokens: &[Token], scores: &[f64]) -> Vec<String> {
    let ordinary = |token: &&Token| token.kind == TokenKind::Normal;
    let ids: HashMap<&str, u32> = tokens
        .iter()
        .filter(ordinary)
        .map(|token| (token.text.as_str(), token.id))
        .collect();
    let mut ranked = Vec::new();
    for (token, score) in tokens
        .iter()
        .zip(scores)
        .filter(|(token, _)| ordinary(token))
    {
        for (split, _) in token.text.char_indices().skip(1) {
            let (left, right) = token.text.split_at(split);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                // Of several ways to make one piece, the longer left part first, as in transformers' conversion.
                let order = (
                    Reverse(left.chars().count()),
                    Reverse(right.chars().count()),
                    *left_id,
                    *right_id,
                );
                ranked.push((*score, order, left, right));
            }
        }
    }
    ranked.sort_by(|one, other| other.0.total_cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
    ranked
        .into_iter()
        .map(|(_, _, left, right)| format!("{left} {right}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_ranked_by_the_score_of_what_they_make() {
        let texts = ["a", "b", "c", "ab", "bc", "abc"];
        let scores = [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0];
        let tokens: Vec<Token> = (0u32..)
            .zip(texts)
            .map(|(id, text)| Token {
                id,
                text: text.into(),
                kind: TokenKind::Normal,
            })
            .collect();
        assert_eq!(merges(&tokens, &scores), ["b c", "a b", "ab c", "a bc"]);
    }
}
