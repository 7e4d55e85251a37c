//! Whether an adapter brings another tokenizer or chat template than its base has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::Beside;
use super::carried::read_large;
use crate::error::Result;
use crate::files::{file_sha256, sha256};
use crate::jinja;
use crate::model_files::ModelFiles;
use crate::problem::Problem;
use crate::trained_base::training_record;

/// How conversations with a base are written out, apart from its own files.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConversationSettings<'a> {
    /// The chat template that was chosen in place of the base's.
    pub template: Option<&'a Path>,
    /// Whether prompts without turns are written with the template; none if there are none.
    pub prompts_as_chats: Option<bool>,
}

/// Warnings if the adapter at `path` brings a chat template or a tokenizer that differs from that of the base in `base`, which is
/// used; and if the run.json beside it records another template, tokenizer or `apply_chat_template` than conversations are
/// `written` with now.
///
/// # Errors
/// As [`Beside::of`], or if the base's chat template cannot be read.
pub fn other_conversation(
    path: &Path,
    base: &Path,
    written: ConversationSettings<'_>,
) -> Result<Vec<Problem>> {
    let carried = Beside::of(path)?.carried;
    let dir = carried.dir();
    let mut warnings = Vec::new();
    if let Some((file, own)) =
        template(dir).filter(|_| carried.has_template() && written.template.is_none())
        && template(base).is_none_or(|(_, theirs)| !are_equal(&own, &theirs))
    {
        let at = format!("`{}`", dir.join(file).display());
        let message =
            "the adapter has a chat template of its own, and the base's, another one, is used";
        let fix = format!(
            "use the adapter's with --chat-template {} (run.toml: model.chat_template, serve.toml: chat_template)",
            dir.join(file).display()
        );
        warnings.push(Problem::new("other-template", at, message, fix));
    }
    let tokens = |dir: &Path| read_large(&dir.join("tokenizer.json")).map(|read| tokens(&read));
    if let Some(own) =
        tokens(dir).filter(|_| carried.names().iter().any(|name| name == "tokenizer.json"))
        && tokens(base).is_some_and(|theirs| theirs != own)
    {
        let beyond = ModelFiles::open(base)
            .ok()
            .and_then(|base| carried.beyond(&base));
        warnings.push(beyond.unwrap_or_else(|| {
            let at = format!("`{}`", dir.join("tokenizer.json").display());
            let message = "the adapter has a tokenizer of its own with other tokens than the base's, which is used";
            let fix = "monteclora merge makes a model with the adapter's";
            Problem::new("other-tokenizer", at, message, fix)
        }));
    }
    if let Some(record) = training_record(path)? {
        for warning in against_record(&record, base, written)? {
            if !warnings.iter().any(|known| known.code == warning.code) {
                warnings.push(warning);
            }
        }
    }
    Ok(warnings)
}

/// Where what training recorded differs from how conversations are `written` with `base` now.
fn against_record(
    record: &Value,
    base: &Path,
    written: ConversationSettings<'_>,
) -> Result<Vec<Problem>> {
    let mut warnings = Vec::new();
    let differs = |key: &str, found: Option<&str>| {
        // Records of former versions lack the key.
        let recorded = record.get(key)?;
        (recorded.as_str() != found).then(|| {
            let short = |hash: &str| hash.chars().take(12).collect::<String>();
            let trained = recorded.as_str().map_or("none".to_owned(), short);
            format!(
                "trained with SHA-256 {trained}, now {}",
                found.map_or("none".to_owned(), short)
            )
        })
    };
    let template = jinja::find(base, written.template)?;
    let hash = template
        .as_ref()
        .map(|found| sha256(found.content().as_bytes()));
    if let Some(difference) = differs("chat_template_sha256", hash.as_deref()) {
        let at = template.map_or(base.to_owned(), |found| found.origin);
        let message =
            format!("not the chat template that the adapter was trained with: {difference}");
        let fix = "give the one it was trained with: --chat-template FILE (run.toml: model.chat_template, serve.toml: chat_template)";
        warnings.push(Problem::new(
            "other-template",
            at.display().to_string(),
            message,
            fix,
        ));
    }
    let tokenizer = base.join("tokenizer.json");
    let hash = file_sha256(&tokenizer);
    if let Some(difference) = differs("tokenizer_sha256", hash.as_deref()) {
        let message = format!("not the tokenizer that the adapter was trained with: {difference}");
        let fix = "give the base it was trained on";
        warnings.push(Problem::new(
            "other-tokenizer",
            tokenizer.display().to_string(),
            message,
            fix,
        ));
    }
    let data = &record["config"]["data"];
    let format = record["train"]["format"]
        .as_str()
        .or_else(|| data["format"].as_str());
    if let (Some(trained), Some(now)) = (
        data["apply_chat_template"].as_bool(),
        written.prompts_as_chats,
    ) && trained != now
        && !matches!(format, Some("messages" | "sharegpt" | "text"))
    {
        let (message, fix) = match trained {
            true => (
                "the adapter was trained with prompts written out with the chat template, and prompts are given without it now",
                "evaluate without --no-chat-template, on a base that has its chat template",
            ),
            false => (
                "the adapter was trained with apply_chat_template = false: prompts without the chat template, which is applied now",
                "evaluate with --no-chat-template, and ask a server by /v1/completions",
            ),
        };
        warnings.push(Problem::new(
            "other-prompts",
            "apply_chat_template",
            message,
            fix,
        ));
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
        let codes = |path: &Path, is_given: bool| {
            let chosen = base.join("chat_template.jinja");
            let written = ConversationSettings {
                template: is_given.then_some(chosen.as_path()),
                ..ConversationSettings::default()
            };
            let warnings = other_conversation(path, &base, written).expect("readable");
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

    #[test]
    fn another_setting_than_the_one_of_training_is_said() {
        let base = fixtures::named("plain-lora").model_dir;
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        fixtures::small_adapter(52, false)
            .write_peft(&out, true)
            .expect("written");
        let text = fs::read_to_string(base.join("chat_template.jinja")).expect("readable");
        let tokenizer = fs::read(base.join("tokenizer.json")).expect("readable");
        let record = |template: Value, tokenizer: &str, applies: bool, format: &str| {
            let record = serde_json::json!({
                "chat_template_sha256": template, "tokenizer_sha256": tokenizer,
                "config": {"data": {"apply_chat_template": applies, "format": format}},
            });
            fs::write(out.join("run.json"), record.to_string()).expect("written");
        };
        let codes = |template: Option<&Path>, prompts_as_chats: Option<bool>| {
            let written = ConversationSettings {
                template,
                prompts_as_chats,
            };
            let warnings = other_conversation(&out, &base, written).expect("readable");
            warnings
                .iter()
                .map(|warning| warning.code)
                .collect::<Vec<_>>()
        };
        let (of_base, of_tokenizer) = (Value::String(sha256(text.as_bytes())), sha256(&tokenizer));
        record(of_base.clone(), &of_tokenizer, true, "auto");
        assert_eq!(codes(None, Some(true)), [""; 0]);
        assert_eq!(codes(None, Some(false)), ["other-prompts"]);
        let chosen = dir.path().join("mine.jinja");
        fs::write(&chosen, "{{ messages[0].content }}").expect("written");
        assert_eq!(codes(Some(&chosen), None), ["other-template"]);
        record(Value::Null, "0123", false, "prompt_completion");
        assert_eq!(
            codes(None, Some(true)),
            ["other-template", "other-tokenizer", "other-prompts"]
        );
        // Conversations have the template whatever prompts have.
        record(of_base, &of_tokenizer, false, "messages");
        assert_eq!(codes(None, Some(true)), [""; 0]);
        fs::write(out.join("run.json"), "{}").expect("written");
        assert_eq!(codes(Some(&chosen), Some(true)), [""; 0]);
    }
}
