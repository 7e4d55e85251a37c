//! Requirements for tokenizer.json. Without them mistral.rs 0.8.1 would panic or answer with garbled spaces.

use monteclora_converters::Problem;
use serde_json::Value;

/// Returns every requirement that `tokenizer` does not meet.
pub(crate) fn problems(tokenizer: &Value) -> Vec<Problem> {
    let decoder = tokenizer["decoder"].to_string();
    let is_token = |token: &Value| token["id"].is_u64() && token["content"].is_string();
    let added = tokenizer["added_tokens"].as_array();
    [
        (
            tokenizer["model"]["vocab"].is_object(),
            "model.vocab",
            "expected an object from token to id",
        ),
        (
            added.is_some_and(|list| list.iter().all(is_token)),
            "added_tokens",
            "expected a list of tokens with id and content",
        ),
        (
            decoder.contains("\"ByteLevel\"") || decoder.contains("\"ByteFallback\""),
            "decoder",
            "neither ByteLevel nor ByteFallback, so that answers could not be decoded",
        ),
    ]
    .into_iter()
    .filter(|(is_sound, ..)| !is_sound)
    .map(|(_, key, message)| {
        Problem::new(
            "tokenizer",
            format!("tokenizer.json: {key}"),
            message,
            "save the tokenizer again with a current transformers, as a byte-level or byte-fallback BPE",
        )
    })
    .collect()
}
