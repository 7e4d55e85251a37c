//! The model's chat template: found, normalised and rendered as mistral.rs and transformers do.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use minijinja::{Environment, Value};
use monteclora_converters::{
    Error, Problem,
    jinja::{add_variables, describe, environment, strftime, to_minijinja},
};
use serde_json::Value as Json;

use super::{
    error::{RENDER, bad_data},
    rows::Message,
    tokenizer::{read_json, special_token},
};

/// A compiled chat template with the model's special tokens.
///
/// It is compiled in [`environment`]. What a template can see besides the messages is what mistral.rs gives it, so that a
/// model is trained on the text it will be served with: `enable_thinking` is true, `reasoning_effort` "medium",
/// `date_string` today.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: PathBuf,
    source: String,
    special_tokens: BTreeMap<&'static str, String>,
    date_string: String,
}

impl ChatTemplate {
    /// Finds the template of a model directory: `override_file` if given (Jinja text, or JSON with `chat_template`),
    /// then `chat_template.jinja`, `tokenizer_config.json`, `chat_template.json`. `None` if the model has none.
    ///
    /// `now` is what the template takes for the current time; a resumed run passes the time of its first start.
    ///
    /// # Errors
    /// For an override that cannot be read, or a malformed file.
    pub fn from_dir(
        dir: &Path,
        override_file: Option<&Path>,
        now: SystemTime,
    ) -> Result<Option<Self>, Error> {
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let special_map = read_json(&dir.join("special_tokens_map.json"))?;
        let special_tokens = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .into_iter()
            .filter_map(|key| {
                let token = special_token(config.as_ref(), key)
                    .or_else(|| special_token(special_map.as_ref(), key));
                Some((key, token?))
            })
            .collect();
        let Some((origin, sources)) = find_sources(dir, override_file, config.as_ref())? else {
            return Ok(None);
        };
        Self::compile(origin, sources, special_tokens, now).map(Some)
    }

    fn compile(
        origin: PathBuf,
        sources: Sources,
        special_tokens: BTreeMap<&'static str, String>,
        now: SystemTime,
    ) -> Result<Self, Error> {
        let mut environment = environment(move || now);
        let source = to_minijinja(&sources.default);
        let tool_use = sources.tool_use.as_deref().map(to_minijinja);
        for (name, source) in [("default", Some(source.clone())), ("tool_use", tool_use)] {
            let Some(source) = source else { continue };
            environment
                .add_template_owned(name, source)
                .map_err(|error| {
                    let problem = describe(&error);
                    Error::malformed(
                        &origin,
                        format!("the chat template is not valid Jinja: {problem}; give a corrected one with --chat-template"),
                    )
                })?;
        }
        Ok(Self {
            environment,
            origin,
            source,
            special_tokens,
            date_string: strftime(now, "%d, %B, %Y").unwrap_or_default(),
        })
    }

    /// The file that the template was read from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The default template's text as it is compiled: Python's `[::-1]`, descending ranges and `generation` blocks
    /// rewritten to what minijinja knows.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether any of its templates has a variable's name, as a whole word.
    pub(super) fn mentions(&self, name: &str) -> bool {
        self.has_word(name, |_| true)
    }

    /// Whether any of its templates has a key's name behind a dot or a quote.
    pub(super) fn mentions_key(&self, name: &str) -> bool {
        self.has_word(name, |before| before.ends_with(['.', '\'', '"']))
    }

    fn has_word(&self, name: &str, follows: fn(&str) -> bool) -> bool {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        self.environment.templates().any(|(_, template)| {
            let source = template.source();
            source.match_indices(name).any(|(start, _)| {
                let (before, after) = (&source[..start], &source[start + name.len()..]);
                !before.ends_with(is_word) && !after.starts_with(is_word) && follows(before)
            })
        })
    }

    /// Whether the rendered text depends on the date, so that a resumed run has to keep the first start's.
    pub fn depends_on_date(&self) -> bool {
        self.environment.templates().any(|(_, template)| {
            ["strftime_now", "date_string"]
                .iter()
                .any(|name| template.source().contains(name))
        })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// With the template's own message.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Json],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let messages: Vec<_> = messages.iter().map(Message::fields_of_text).collect();
        let mut context: BTreeMap<&str, Value> = self
            .special_tokens
            .iter()
            .map(|(key, token)| (*key, Value::from(token.as_str())))
            .collect();
        context.insert("messages", Value::from_serialize(&messages));
        context.insert("add_generation_prompt", add_generation_prompt.into());
        context.insert("date_string", self.date_string.as_str().into());
        add_variables(&mut context, tools);
        let named = match tools {
            [] => "default",
            _ => "tool_use",
        };
        self.environment
            .get_template(named)
            .or_else(|_| self.environment.get_template("default"))
            .and_then(|template| template.render(Value::from_serialize(context)))
            .map_err(|error| {
                let refusal = describe(&error);
                bad_data(
                    RENDER,
                    format!("the chat template refuses the conversation: {refusal}"),
                )
            })
    }
}

/// The template's text, and the variant for conversations with tools.
struct Sources {
    default: String,
    tool_use: Option<String>,
}

impl Sources {
    fn text(default: String) -> Self {
        Self {
            default,
            tool_use: None,
        }
    }

    /// What a file of the model has as `chat_template`: a string, or a list of `{"name", "template"}`.
    fn from_json(json: Option<&Json>) -> Result<Option<Self>, &'static str> {
        match json.and_then(|json| json.get("chat_template")) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(text)) => Ok(Some(Self::text(text.clone()))),
            Some(Json::Array(list)) => {
                let named = |wanted: &str| {
                    let entry = list.iter().find(|entry| entry["name"] == wanted)?;
                    Some(entry["template"].as_str()?.to_owned())
                };
                let default = named("default").ok_or("chat_template lists no template named `default`; give one with --chat-template")?;
                Ok(Some(Self {
                    default,
                    tool_use: named("tool_use"),
                }))
            }
            Some(_) => Err("chat_template is neither a string nor a list of named templates"),
        }
    }
}

fn find_sources(
    dir: &Path,
    override_file: Option<&Path>,
    config: Option<&Json>,
) -> Result<Option<(PathBuf, Sources)>, Error> {
    let from_json = |path: &Path, json: Option<&Json>| match Sources::from_json(json) {
        Ok(sources) => Ok(sources.map(|sources| (path.to_owned(), sources))),
        Err(message) => Err(Error::malformed(path, message)),
    };
    if let Some(path) = override_file {
        let text = std::fs::read_to_string(path).map_err(|source| {
            Problem::usage(format!("cannot read `{}`: {source}", path.display()))
        })?;
        if path.extension().is_none_or(|extension| extension != "json") {
            return Ok(Some((path.to_owned(), Sources::text(text))));
        }
        let found = from_json(path, read_json(path)?.as_ref())?;
        return found
            .map(Some)
            .ok_or_else(|| Error::malformed(path, "has no key `chat_template`"));
    }
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(text) => return Ok(Some((path, Sources::text(text)))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::malformed(&path, format!("cannot be read: {error}"))),
    }
    if let Some(found) = from_json(&dir.join("tokenizer_config.json"), config)? {
        return Ok(Some(found));
    }
    let path = dir.join("chat_template.json");
    from_json(&path, read_json(&path)?.as_ref())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::data::{
        rows::Role,
        test_support::{LLAMA3_LIKE, NO_SYSTEM, model_with_template, tiny_llama},
    };

    fn load(template: &str) -> ChatTemplate {
        let dir = model_with_template(template, true);
        // 2024-07-26 12:00:00 UTC.
        let now = UNIX_EPOCH + Duration::from_secs(1_721_995_200);
        ChatTemplate::from_dir(dir.path(), None, now)
            .expect("loads")
            .expect("has one")
    }

    fn hello() -> Vec<Message> {
        vec![
            Message::new(Role::User, "Hello"),
            Message::new(Role::Assistant, "Hi"),
        ]
    }

    #[test]
    fn chatml_renders() {
        let template = ChatTemplate::from_dir(&tiny_llama(), None, UNIX_EPOCH)
            .expect("loads")
            .expect("has one");
        assert_eq!(
            template.render(&hello(), &[], false).expect("renders"),
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        );
        assert_eq!(
            template.render(&hello()[..1], &[], true).expect("renders"),
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn special_tokens_reach_the_template_and_absent_ones_print_nothing() {
        assert!(
            load(LLAMA3_LIKE)
                .render(&hello(), &[], false)
                .expect("renders")
                .starts_with("<s><|im_start|>user")
        );
        let dir = model_with_template("[{{ bos_token }}]{{ eos_token }}", false);
        let template = ChatTemplate::from_dir(dir.path(), None, UNIX_EPOCH)
            .expect("loads")
            .expect("has one");
        assert_eq!(
            template.render(&hello(), &[], false).expect("renders"),
            "[]<|im_end|>"
        );
    }

    #[test]
    fn a_refusal_carries_the_templates_words() {
        let error = load(NO_SYSTEM)
            .render(&[Message::new(Role::System, "s")], &[], false)
            .expect_err("refused");
        assert!(
            error.to_string().starts_with("the chat template refuses the conversation: Conversation roles must alternate user/assistant"),
            "{error}"
        );
    }

    #[test]
    fn order_of_the_places() {
        let dir = model_with_template("jinja", false);
        let path = dir.path();
        let read = |override_file: Option<&Path>| {
            ChatTemplate::from_dir(path, override_file, UNIX_EPOCH)
                .expect("loads")
                .map(|template| template.source().to_owned())
        };
        let write = |name: &str, text: &str| std::fs::write(path.join(name), text).expect("writes");
        write("chat_template.json", r#"{"chat_template": "json"}"#);
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "config"}]}"#,
        );
        write("mine.jinja", "mine");
        assert_eq!(
            read(Some(&path.join("mine.jinja"))).as_deref(),
            Some("mine")
        );
        assert_eq!(
            read(Some(&path.join("chat_template.json"))).as_deref(),
            Some("json")
        );
        assert_eq!(read(None).as_deref(), Some("jinja"));
        std::fs::remove_file(path.join("chat_template.jinja")).expect("removes");
        assert_eq!(read(None).as_deref(), Some("config"));
        write("tokenizer_config.json", "{}");
        assert_eq!(read(None).as_deref(), Some("json"));
        write("chat_template.json", "{}");
        assert_eq!(read(None), None);
    }

    #[test]
    fn named_templates_serve_tools() {
        let dir = model_with_template("", false);
        std::fs::remove_file(dir.path().join("chat_template.jinja")).expect("removes");
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            r#"{"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]}"#,
        )
        .expect("writes");
        let template = ChatTemplate::from_dir(dir.path(), None, UNIX_EPOCH)
            .expect("loads")
            .expect("has one");
        assert_eq!(
            template.render(&hello(), &[], false).expect("renders"),
            "plain"
        );
        let tools = [serde_json::json!({"a": "<it's>"})];
        assert_eq!(
            template.render(&hello(), &tools, false).expect("renders"),
            r#"[{"a":"\u003cit\u0027s\u003e"}]"#
        );
    }

    #[test]
    fn python_habits_are_understood() {
        let template = load(
            "{%- for m in messages[::-1] %}{{ m.content.strip().upper() }}{% endfor %}\
             {% for i in range(messages|length, -1, -1) %}{{ i }}{% endfor %}\n\
             {%- generation -%}  x {%- endgeneration -%} {{ strftime_now('%d %b %Y') }} {{ date_string }}",
        );
        assert_eq!(
            template.render(&hello(), &[], false).expect("renders"),
            "HIHELLO210x26 Jul 2024 26, July, 2024"
        );
        assert!(template.depends_on_date());
        assert!(!load(LLAMA3_LIKE).depends_on_date());
        let error = load("{{ strftime_now('%Q') }}")
            .render(&hello(), &[], false)
            .expect_err("refused");
        assert!(error.to_string().contains("bad format `%Q`"), "{error}");
    }

    #[test]
    fn broken_files_are_named() {
        let dir = model_with_template("{% for %}", false);
        let error = ChatTemplate::from_dir(dir.path(), None, UNIX_EPOCH).expect_err("syntax");
        assert_eq!(monteclora_converters::exit_code(&error, |_| None), 4);
        assert!(error.to_string().contains("is not valid Jinja"), "{error}");
        let error = ChatTemplate::from_dir(dir.path(), Some(Path::new("no.jinja")), UNIX_EPOCH)
            .expect_err("missing");
        assert_eq!(
            error.to_string(),
            "cannot read `no.jinja`: No such file or directory (os error 2)"
        );
        assert_eq!(monteclora_converters::exit_code(&error, |_| None), 2);
    }
}
