//! Imports GGUF base models or refers to them. Tests their tokenizer before anything is written.

use std::path::Path;

use monteclora_converters::Result;
use monteclora_converters::gguf_base::{self, Tools};
use serde_json::Value;
use tokenizers::Tokenizer;

pub use monteclora_converters::gguf_base::{ImportOptions, ImportReport};

/// Text that any tokenizer must decode unchanged. It is in normal form C, for tokenizers that normalise.
const PROBE: &str = "Hello  world,\n\n\tit's 12345 na\u{ef}ve caf\u{e9}s in \u{6771}\u{4eac} \u{1f642}! { \"a\": [1.5] }  \r\n end";

/// Imports the model in `file` into the new directory `out_dir`. `progress` gets the number of bytes written and their
/// total.
///
/// # Errors
/// As [`gguf_base::import_gguf`].
pub fn import_gguf(
    file: &Path,
    out_dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport> {
    gguf_base::import_gguf(file, out_dir, options, &TOOLS, progress)
}

/// Writes everything but the weights of `file` into the new directory `out_dir`. `progress` gets the number of bytes
/// read and their total.
///
/// # Errors
/// As [`gguf_base::refer_to_gguf`].
pub fn refer_to_gguf(
    file: &Path,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport> {
    gguf_base::refer_to_gguf(file, out_dir, &TOOLS, progress)
}

const TOOLS: Tools<'static> = Tools {
    check_tokenizer: &check_tokenizer,
};

/// Checks that a tokenizer.json loads, keeps the ids of its added tokens, and decodes text unchanged. Returns the
/// problems.
fn check_tokenizer(json: &Value) -> Vec<String> {
    let tokenizer = match Tokenizer::from_bytes(json.to_string()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![format!("the tokenizer does not load: {error}")],
    };
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let mut problems: Vec<String> = added
        .map(|token| {
            (
                token["content"].as_str().unwrap_or_default(),
                token["id"].as_u64(),
            )
        })
        .filter(|(content, id)| tokenizer.token_to_id(content).map(u64::from) != *id)
        .map(|(content, _)| format!("token `{content}` does not keep its number"))
        .collect();
    let read_back = tokenizer
        .encode(PROBE, false)
        .and_then(|encoding| tokenizer.decode(encoding.get_ids(), false));
    match read_back {
        Ok(text) if text == PROBE => {}
        Ok(text) => problems.push(format!("the tokenizer turns {PROBE:?} into {text:?}")),
        Err(error) => problems.push(format!("the tokenizer fails: {error}")),
    }
    problems
}

#[cfg(test)]
mod tests;
