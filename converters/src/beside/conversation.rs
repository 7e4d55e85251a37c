//! Whether an adapter brings another tokenizer or chat template than its base has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::Beside;
use super::carried::read_large;
use crate::error::Result;
use crate::problem::Problem;

/// Warnings if the adapter at `path` brings a chat template or a tokenizer that differs from that of the base in `base`: what it is
/// asked with is the base's. With `template_given` the user has chosen a template.
///
/// # Errors
/// As [`Beside::of`].
pub fn other_conversation(path: &Path, base: &Path, template_given: bool) -> Result<Vec<Problem>> {
    let carried = Beside::of(path)?.carried;
    let dir = carried.dir();
    let mut warnings = Vec::new();
    if let Some((file, own)) = template(dir).filter(|_| carried.has_template() && !template_given)
        && template(base).is_none_or(|(_, theirs)| !are_equal(&own, &theirs))
    {
        let at = format!("`{}`", dir.join(file).display());
        let message =
            "the adapter has a chat template of its own, and the base's, another one, is used";
        let fix = format!(
            "use the adapter's with --chat-template {} (serve.toml: chat_template)",
            dir.join(file).display()
        );
        warnings.push(Problem::new("other-template", at, message, fix));
    }
    let tokens = |dir: &Path| read_large(&dir.join("tokenizer.json")).map(|read| tokens(&read));
    if let Some(own) =
        tokens(dir).filter(|_| carried.names().iter().any(|name| name == "tokenizer.json"))
        && tokens(base).is_some_and(|theirs| theirs != own)
    {
        let at = format!("`{}`", dir.join("tokenizer.json").display());
        let message = "the adapter has a tokenizer of its own with other tokens than the base's, which is used";
        let fix = "monteclora merge makes a model with the adapter's";
        warnings.push(Problem::new("other-tokenizer", at, message, fix));
    }
    Ok(warnings)
}

/// The chat template in `dir` and its file, in the order in which transformers looks.
fn template(dir: &Path) -> Option<(&'static str, Value)> {
    const FILE: &str = "chat_template.jinja";
    if let Ok(text) = fs::read_to_string(dir.join(FILE)) {
        return Some((FILE, Value::String(text)));
    }
    ["tokenizer_config.json", "chat_template.json"]
        .into_iter()
        .find_map(|name| {
            let mut file = read_large(&dir.join(name))?;
            let template = file.get_mut("chat_template")?.take();
            (!template.is_null()).then_some((name, template))
        })
}

/// Whether two templates print the same: a line's end and the file's end say nothing.
fn are_equal(one: &Value, other: &Value) -> bool {
    match (one.as_str(), other.as_str()) {
        (Some(one), Some(other)) => {
            let plain = |text: &str| text.replace("\r\n", "\n").trim_end().to_owned();
            plain(one) == plain(other)
        }
        _ => one == other,
    }
}

/// Ids by their texts, those of added tokens included.
fn tokens(tokenizer: &Value) -> BTreeMap<String, u64> {
    let model = match &tokenizer["model"]["vocab"] {
        Value::Object(tokens) => {
            let tokens = tokens.iter();
            tokens
                .filter_map(|(text, id)| Some((text.clone(), id.as_u64()?)))
                .collect()
        }
        Value::Array(pieces) => {
            let pieces = pieces.iter().zip(0u64..);
            pieces
                .filter_map(|(piece, id)| Some((piece[0].as_str()?.to_owned(), id)))
                .collect()
        }
        _ => BTreeMap::new(),
    };
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added = added
        .filter_map(|token| Some((token["content"].as_str()?.to_owned(), token["id"].as_u64()?)));
    model.into_iter().chain(added).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::case;
    use crate::fixtures;

    #[test]
    fn another_template_or_tokenizer_than_the_base_s_is_said() {
        let base = fixtures::named("plain-lora").model_dir;
        let own = case("formats/own-chat-template");
        let codes = |path: &Path, given| {
            let warnings = other_conversation(path, &base, given).expect("readable");
            warnings
                .iter()
                .map(|warning| warning.code)
                .collect::<Vec<_>>()
        };
        assert_eq!(codes(&own, false), ["other-template"]);
        assert_eq!(codes(&own, true), [""; 0]);
        assert_eq!(codes(&case("formats/bom"), false), [""; 0]);
        let dir = tempfile::tempdir().expect("temporary directory");
        fixtures::small_adapter(51, false)
            .write_peft(dir.path(), true)
            .expect("written");
        // The base's own template, with the ends of lines of Windows, is no other one.
        let text = fs::read_to_string(base.join("chat_template.jinja")).expect("readable");
        fs::write(
            dir.path().join("chat_template.jinja"),
            text.replace('\n', "\r\n") + "\n",
        )
        .expect("written");
        let tokenizer = fs::read_to_string(base.join("tokenizer.json")).expect("readable");
        let place = dir.path().join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_str(&tokenizer).expect("JSON");
        fs::write(
            &place,
            serde_json::to_string_pretty(&tokenizer).expect("text"),
        )
        .expect("written");
        assert_eq!(codes(dir.path(), false), [""; 0]);
        tokenizer["added_tokens"][0]["content"] = "<other>".into();
        fs::write(&place, tokenizer.to_string()).expect("written");
        assert_eq!(codes(dir.path(), false), ["other-tokenizer"]);
    }
}
