//! What a template sees: the conversation, the model's special tokens, and what is set besides.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::problem::Problem;
use crate::trained_base::training_record;

/// The special tokens that every tokenizer of transformers may have.
const STANDARD: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Variables that the conversation itself sets.
pub const FIXED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// A conversation that a template is to write out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conversation<'a> {
    /// The messages, each with the keys that it has.
    pub messages: &'a [Map<String, Value>],
    /// The tools on offer; the template's variable is none where there are none.
    pub tools: &'a [Value],
    /// Whether the assistant's turn is opened at the end.
    pub add_generation_prompt: bool,
}

impl Conversation<'_> {
    /// The variables that transformers gives a template, with `special_tokens`; those in `more` win.
    pub fn variables<'a>(
        &self,
        special_tokens: &Map<String, Value>,
        more: impl IntoIterator<Item = (&'a String, &'a Value)>,
    ) -> Map<String, Value> {
        let mut variables = special_tokens.clone();
        for (name, value) in more {
            variables.insert(name.clone(), value.clone());
        }
        let messages = self.messages.iter().cloned().map(Value::Object);
        variables.insert("messages".to_owned(), messages.collect());
        let tools = match self.tools {
            [] => Value::Null,
            tools => tools.iter().cloned().collect(),
        };
        variables.insert("tools".to_owned(), tools);
        variables
            .entry("documents".to_owned())
            .or_insert(Value::Null);
        variables.insert(
            "add_generation_prompt".to_owned(),
            self.add_generation_prompt.into(),
        );
        variables
    }
}

/// The special tokens in `tokenizer_config.json`, by the names that a template has for them; what is missing is taken from
/// `special_tokens_map.json`.
pub fn special_tokens(config: Option<&Value>, map: Option<&Value>) -> Map<String, Value> {
    let mut tokens = Map::new();
    for file in [config, map].into_iter().flatten() {
        let named = file.as_object().into_iter().flatten();
        let named = named.filter(|(name, value)| {
            let is_own = name.ends_with("_token") && value.is_string();
            is_own || STANDARD.contains(&name.as_str())
        });
        let more = ["extra_special_tokens", "model_specific_special_tokens"]
            .into_iter()
            .filter_map(|key| file.get(key)?.as_object())
            .flatten();
        for (name, value) in named.chain(more) {
            let text = value.as_str().or_else(|| value.get("content")?.as_str());
            if let Some(text) = text.filter(|_| !tokens.contains_key(name)) {
                tokens.insert(name.clone(), text.into());
            }
        }
    }
    tokens
}

/// The `data.template_variables` that an adapter was trained with, from the run.json beside it or, for a checkpoint, above it.
///
/// # Errors
/// A record that is there and cannot be read: without it other prompts would be written.
pub fn recorded_variables(adapter: &Path) -> Result<Map<String, Value>> {
    let Some(mut record) = training_record(adapter)? else {
        return Ok(Map::new());
    };
    let found = record.pointer_mut("/config/data/template_variables");
    match found.map(Value::take) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(variables)) => Ok(variables),
        Some(other) => {
            let at = format!("the run.json of `{}`", adapter.display());
            let message = format!("config.data.template_variables is {other}, expected an object");
            let fix = "bring the file back as training wrote it, or remove it";
            Err(Problem::new("record", at, message, fix).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn special_tokens_are_those_of_transformers() {
        let config = json!({
            "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null, "image_token": "<image>", "add_bos_token": true,
            "extra_special_tokens": {"audio_token": "<audio>"}, "tokenizer_class": "x"
        });
        let map = json!({"eos_token": "</s>", "bos_token": "other"});
        assert_eq!(
            Value::Object(special_tokens(Some(&config), Some(&map))),
            json!({"bos_token": "<s>", "image_token": "<image>", "audio_token": "<audio>", "eos_token": "</s>"})
        );
        assert!(special_tokens(None, None).is_empty());
    }
}
