//! Writes the tokenizer, chat template and end-of-turn tokens for mistral.rs. mistral.rs then makes the same tokens of
//! a conversation as transformers.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use monteclora_converters::Problem;
use monteclora_converters::jinja::{self, DEFAULT, Sources};
use serde_json::{Map, Value, json};

use crate::chat_template::ChatTemplate;
use crate::error::{Error, Result};
use crate::quirks_0_8::conversations::Rendering;
use crate::quirks_0_8::special_tokens::TextFrame;
use crate::quirks_0_8::{conversations, special_tokens, template_variables, tokenizer_panics};

/// The files written; all are in the staging directory.
pub(crate) struct ChatFiles {
    pub(crate) tokenizer: PathBuf,
    pub(crate) template: PathBuf,
    pub(crate) generation: PathBuf,
}

/// Reads the tokenizer and chat files of the model in `base` and writes them, normalised, to `out`.
///
/// - `tokenizer.json` without post-processor, padding and truncation.
/// - `tokenizer_config.json` with only the template and the special tokens; an unset token is the empty text. With
///   [`Rendering::Before`], the template passes on a conversation that is already rendered.
/// - `generation_config.json` with every end-of-sequence id of the model.
pub(crate) fn write_chat_files(
    base: &Path,
    template_override: Option<&Path>,
    rendering: Rendering,
    config: &Map<String, Value>,
    out: &Path,
) -> Result<ChatFiles> {
    let mut problems = Vec::new();
    let mut tokenizer = read_json(&base.join("tokenizer.json"))?.ok_or_else(|| {
        Error::not_found(
            &base.join("tokenizer.json"),
            "missing; a model directory needs its tokenizer in this form",
        )
    })?;
    problems.extend(tokenizer_panics::problems(&tokenizer));
    special_tokens::leave_out(&mut tokenizer);
    let vocabulary = Vocabulary::new(&tokenizer);

    let settings = Settings::read(base)?;
    let token = |key| settings.token(key);
    let eos = token("eos_token");
    if let Some(eos) = eos
        .as_deref()
        .filter(|eos| !vocabulary.tokens.contains(*eos))
    {
        problems.push(Problem::new(
            "eos-token",
            "tokenizer_config.json: eos_token",
            format!("`{eos}` is not in tokenizer.json"),
            "correct tokenizer_config.json",
        ));
    }
    let mut chat = json!({
        "bos_token": token("bos_token").unwrap_or_default(),
        "unk_token": token("unk_token").unwrap_or_default(),
    });
    if let Some(eos) = &eos {
        chat["eos_token"] = json!(eos);
    }
    if let Some((place, mut template)) = find_template(base, template_override)? {
        if let Err(found) = ChatTemplate::compile(&place, &template, Map::new()) {
            problems.extend(found);
        }
        match rendering {
            Rendering::Before => template = conversations::passing_on(template),
            Rendering::InEngine => {
                template_variables::keep_to_transformers(&mut template, eos.is_some());
            }
            Rendering::AsFound => {}
        }
        chat["chat_template"] = template;
    }
    let generation = generation_config(base, config, &vocabulary, &mut problems)?;
    if !problems.is_empty() {
        return Err(Error::unsupported(base, problems));
    }

    let files = ChatFiles {
        tokenizer: out.join("tokenizer.json"),
        template: out.join("tokenizer_config.json"),
        generation: out.join("generation_config.json"),
    };
    write_json(&files.tokenizer, &tokenizer)?;
    write_json(&files.template, &chat)?;
    write_json(&files.generation, &generation)?;
    Ok(files)
}

/// The texts of all tokens, and the texts of the added tokens by id.
struct Vocabulary {
    tokens: HashSet<String>,
    by_id: Vec<(u64, String)>,
}

impl Vocabulary {
    fn new(tokenizer: &Value) -> Self {
        let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let mut by_id: Vec<_> = added
            .filter_map(|token| {
                Some((token["id"].as_u64()?, token["content"].as_str()?.to_owned()))
            })
            .collect();
        let mut tokens: HashSet<String> = by_id.iter().map(|(_, text)| text.clone()).collect();
        for (text, id) in tokenizer["model"]["vocab"]
            .as_object()
            .into_iter()
            .flatten()
        {
            // Only texts that decode to themselves: mistral.rs looks up an id by its decoded text.
            if let Some(id) = id
                .as_u64()
                .filter(|_| text.chars().all(|c| c.is_ascii_graphic()))
            {
                by_id.push((id, text.clone()));
            }
            tokens.insert(text.clone());
        }
        Self { tokens, by_id }
    }

    fn knows(&self, id: u64) -> bool {
        self.by_id.iter().any(|(known, _)| *known == id)
    }
}

/// The text of a special token, which is a string or an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// The files of a model that describe its special tokens.
struct Settings {
    config: Value,
    special: Value,
}

impl Settings {
    fn read(base: &Path) -> Result<Self> {
        let read = |name| -> Result<Value> {
            let file = read_json(&base.join(name))?;
            Ok(file.unwrap_or_else(|| json!({})))
        };
        Ok(Self {
            config: read("tokenizer_config.json")?,
            special: read("special_tokens_map.json")?,
        })
    }

    fn token(&self, key: &str) -> Option<String> {
        let mut files = [&self.config, &self.special].into_iter();
        files.find_map(|file| token_text(file.get(key)?))
    }
}

/// The chat template of the model in `base`, or the one in `template_override`; none if there is no template.
///
/// # Errors
/// Returns [`Error::Unsupported`] if the template does not compile, or an error if a file cannot be read.
pub(crate) fn chat_template(
    base: &Path,
    template_override: Option<&Path>,
) -> Result<Option<ChatTemplate>> {
    let Some((place, template)) = find_template(base, template_override)? else {
        return Ok(None);
    };
    let settings = Settings::read(base)?;
    let tokens = jinja::special_tokens(Some(&settings.config), Some(&settings.special));
    ChatTemplate::compile(&place, &template, tokens)
        .map(Some)
        .map_err(|problems| Error::unsupported(base, problems))
}

/// The template in the form of `tokenizer_config.json` (a text or a list of named texts), and where it was found.
fn find_template(base: &Path, explicit: Option<&Path>) -> Result<Option<(String, Value)>> {
    let found = jinja::find(base, explicit).map_err(|error| match explicit {
        Some(path) if !path.exists() => Error::not_found(path, "the chat template does not exist"),
        _ => error.into(),
    })?;
    let Some(Sources { origin, named }) = found else {
        return Ok(None);
    };
    let name = match explicit {
        Some(path) => path.display().to_string(),
        None => origin
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    };
    let is_json = origin.extension().is_some_and(|kind| kind == "json");
    let place = if is_json {
        format!("{name}: chat_template")
    } else {
        name
    };
    let template = match named.get(DEFAULT) {
        Some(text) if named.len() == 1 => json!(text),
        _ => {
            let entries = named.iter();
            entries
                .map(|(name, text)| json!({"name": name, "template": text}))
                .collect()
        }
    };
    Ok(Some((place, template)))
}

/// The generation settings that mistral.rs reads. The end-of-sequence ids come from config.json if
/// generation_config.json has none.
fn generation_config(
    base: &Path,
    config: &Map<String, Value>,
    vocabulary: &Vocabulary,
    problems: &mut Vec<Problem>,
) -> Result<Value> {
    let file = read_json(&base.join("generation_config.json"))?;
    let (name, source) = match file.as_ref().and_then(Value::as_object) {
        Some(map) if map.get("eos_token_id").is_some_and(|ids| !ids.is_null()) => {
            ("generation_config.json", map)
        }
        _ => ("config.json", config),
    };
    let ids = match source.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.clone(),
        Some(Value::Null) | None => Vec::new(),
        Some(id) => vec![id.clone()],
    };
    let mut kept = Vec::new();
    for id in ids {
        match id.as_u64() {
            Some(id) if vocabulary.knows(id) => kept.push(id),
            _ => problems.push(Problem::new(
                "eos-token",
                format!("{name}: eos_token_id"),
                format!("{id} is not the id of a plain-text token of tokenizer.json"),
                "correct the id, or tokenizer.json",
            )),
        }
    }
    let mut generation = json!({});
    if !kept.is_empty() {
        generation["eos_token_id"] = json!(kept);
    }
    let defaults = [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "do_sample",
    ];
    for key in defaults {
        let value = file.as_ref().and_then(|file| file.get(key));
        if let Some(value) = value.filter(|value| value.is_number() || value.is_boolean()) {
            generation[key] = value.clone();
        }
    }
    Ok(generation)
}

/// The tokens that the model's own `tokenizer.json` puts around plain text. mistral.rs does not see that file.
pub(crate) fn text_frame(base: &Path) -> Result<TextFrame> {
    let tokenizer = read_json(&base.join("tokenizer.json"))?.unwrap_or(Value::Null);
    Ok(TextFrame::of(&tokenizer))
}

fn read_text(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn parse_json(path: &Path, text: &str) -> Result<Value> {
    Ok(monteclora_converters::json::parse_value(
        text.as_bytes(),
        path,
    )?)
}

pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    read_text(path)?
        .map(|text| parse_json(path, &text))
        .transpose()
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, value.to_string()).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stages a model directory with a small byte-level tokenizer that `change` has modified.
    fn staged(change: impl FnOnce(&Path, &mut Value)) -> Result<(Value, Value, Value)> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (base, out) = (dir.path().join("base"), dir.path().join("out"));
        fs::create_dir(&base).expect("created");
        fs::create_dir(&out).expect("created");
        let mut tokenizer = json!({
            "truncation": {"max_length": 3}, "padding": null,
            "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}],
            "decoder": {"type": "ByteLevel"},
            "post_processor": {"type": "Sequence", "processors": [
                {"type": "ByteLevel"},
                {"type": "TemplateProcessing",
                 "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [0]}}}]},
            "model": {"type": "BPE", "vocab": {"a": 2, "Ġ": 3}, "merges": []},
        });
        let settings = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}x"});
        write_json(&base.join("tokenizer_config.json"), &settings).expect("written");
        change(&base, &mut tokenizer);
        write_json(&base.join("tokenizer.json"), &tokenizer).expect("written");
        let config = json!({"eos_token_id": [1]});
        let files = write_chat_files(
            &base,
            None,
            Rendering::InEngine,
            config.as_object().expect("an object"),
            &out,
        )?;
        let read = |path: &Path| read_json(path).expect("readable").expect("written");
        Ok((
            read(&files.tokenizer),
            read(&files.template),
            read(&files.generation),
        ))
    }

    fn refused(change: impl FnOnce(&Path, &mut Value), location: &str) {
        let error = staged(change).expect_err("must be refused");
        let found = error
            .problems()
            .iter()
            .any(|problem| problem.at == location);
        assert!(found, "{location} is not named in {error}");
    }

    #[test]
    fn nothing_is_added_to_a_rendered_conversation() {
        let (tokenizer, template, generation) = staged(|_, _| {}).expect("a sound model");
        assert!(tokenizer["post_processor"].is_null() && tokenizer["truncation"].is_null());
        assert_eq!(
            template,
            json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "", "chat_template": "{{ bos_token }}x"})
        );
        assert_eq!(generation, json!({"eos_token_id": [1]}));
    }

    #[test]
    fn a_template_file_wins_and_a_missing_eos_is_the_empty_text() {
        let (_, template, _) = staged(|base, _| {
            fs::write(base.join("chat_template.jinja"), "from file").expect("written");
            write_json(
                &base.join("tokenizer_config.json"),
                &json!({"chat_template": "from settings"}),
            )
            .expect("written");
        })
        .expect("a sound model");
        assert_eq!(
            template["chat_template"],
            "{% set eos_token = '' %}from file"
        );
        assert!(template.get("eos_token").is_none());
    }

    #[test]
    fn what_mistralrs_would_panic_on_is_refused() {
        refused(
            |_, t| t["model"]["vocab"] = json!([["a", 0.0]]),
            "tokenizer.json: model.vocab",
        );
        refused(
            |_, t| t["added_tokens"] = Value::Null,
            "tokenizer.json: added_tokens",
        );
        refused(|_, t| t["decoder"] = Value::Null, "tokenizer.json: decoder");
        refused(
            |_, t| t["added_tokens"][1]["content"] = json!("<x>"),
            "tokenizer_config.json: eos_token",
        );
        refused(
            |_, t| t["added_tokens"][1]["id"] = json!(99),
            "config.json: eos_token_id",
        );
    }
}
