//! How each value of `tokenizer.ggml.pre` splits text before merging, as the tokenizer.json of the models it names does.

use serde_json::{Value, json};

/// What belongs to one value of `tokenizer.ggml.pre`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PreTokenizer {
    /// `normalizer` of tokenizer.json.
    pub(super) normalizer: Value,
    /// `pre_tokenizer` of tokenizer.json; ends in the byte-level alphabet.
    pub(super) pre_tokenizer: Value,
    /// Whether a word that is a token as a whole is taken as it is, without merging.
    pub(super) ignore_merges: bool,
    /// llama.cpp's default for files without `tokenizer.ggml.add_bos_token`.
    pub(super) adds_bos: bool,
}

/// The values supported, for messages.
pub(super) const SUPPORTED: &str = "gpt-2, smollm, starcoder, refact, llama-bpe, qwen2, tekken, dbrx, smaug-bpe, glm4, chatglm-bpe, gpt-4o, llama4";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Looks a name up; `None` if its rules are not known here.
pub(super) fn lookup(name: &str) -> Option<PreTokenizer> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |first: Value, use_regex: bool| json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]});
    let split = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        sequence(split, false)
    };
    // GPT-2's own expression is the one that ByteLevel has built in.
    let (normalizer, pre_tokenizer, ignore_merges, adds_bos) = match name {
        "gpt-2" => (Value::Null, byte_level(true), false, false),
        "smollm" | "starcoder" | "refact" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, sequence(digits, true), false, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, split(LLAMA3), true, true),
        // These split as Llama 3 does, and merge every word.
        "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => (Value::Null, split(LLAMA3), false, false),
        "gpt-4o" | "llama4" => (Value::Null, split(GPT_4O), false, false),
        "qwen2" => (json!({"type": "NFC"}), split(QWEN2), false, false),
        "tekken" => (Value::Null, split(TEKKEN), true, true),
        _ => return None,
    };
    Some(PreTokenizer {
        normalizer,
        pre_tokenizer,
        ignore_merges,
        adds_bos,
    })
}
