//! The model's chat template. It is found, compiled and rendered as in transformers.

use std::{path::Path, sync::OnceLock, time::SystemTime};

use monteclora_converters::{
    Error,
    files::sha256,
    jinja::{self, Conversation, Rendered, Sources, TOOL_USE, Templates},
};
use serde_json::{Map, Value as Json, json};

use super::{
    error::{RENDER, bad_data},
    rows::Message,
    tokenizer::read_json,
};

/// A compiled chat template with the model's special tokens.
///
/// A template gets what transformers gives it, and nothing else: the messages with their own keys, `tools` and
/// `documents` (none if the row has none), `add_generation_prompt`, the special tokens, and the variables that are set.
#[derive(Debug)]
pub struct ChatTemplate {
    templates: Templates,
    sources: Sources,
    special_tokens: Map<String, Json>,
    variables: Map<String, Json>,
    takes_parts: OnceLock<bool>,
}

/// What a template gets besides the messages of a conversation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside<'a> {
    /// The tools that the model may call.
    pub(super) tools: &'a [Json],
    /// The row's variables, which override those of the run.
    pub(super) variables: &'a Map<String, Json>,
}

impl ChatTemplate {
    /// Finds the template of a model directory: `override_file` if given (Jinja text, or JSON with `chat_template`),
    /// then `chat_template.jinja` with `additional_chat_templates/`, `tokenizer_config.json`, `chat_template.json`.
    /// `None` if the model has none.
    ///
    /// `now` is the current time for the template.
    ///
    /// # Errors
    /// Returns an error if the override cannot be read, or if a file is malformed.
    pub fn from_dir(
        dir: &Path,
        override_file: Option<&Path>,
        now: SystemTime,
    ) -> Result<Option<Self>, Error> {
        Self::with_clock(dir, override_file, move || now)
    }

    /// As [`Self::from_dir`], with a clock instead of a fixed time.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn with_clock(
        dir: &Path,
        override_file: Option<&Path>,
        clock: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Result<Option<Self>, Error> {
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let special_map = read_json(&dir.join("special_tokens_map.json"))?;
        let special_tokens = jinja::special_tokens(config.as_ref(), special_map.as_ref());
        let Some(sources) = jinja::find(dir, override_file)? else {
            return Ok(None);
        };
        let templates = Templates::compile(sources.named.clone(), clock).map_err(|found| {
            let reasons: Vec<String> = found
                .into_iter()
                .map(|(name, reason)| match sources.named.len() {
                    1 => reason,
                    _ => format!("`{name}`: {reason}"),
                })
                .collect();
            Error::malformed(
                &sources.origin,
                format!(
                    "the chat template is not valid Jinja: {}; give a corrected one with --chat-template",
                    reasons.join("; ")
                ),
            )
        })?;
        Ok(Some(Self {
            templates,
            sources,
            special_tokens,
            variables: Map::new(),
            takes_parts: OnceLock::new(),
        }))
    }

    /// Sets variables that every conversation gets. A row's own variables override them.
    pub fn with_variables(mut self, variables: Map<String, Json>) -> Self {
        self.variables = variables;
        self.takes_parts = OnceLock::new();
        self
    }

    /// The file that the template was read from.
    pub fn origin(&self) -> &Path {
        &self.sources.origin
    }

    /// The text of the template for conversations without tools, or of the only one.
    pub fn source(&self) -> &str {
        let named = &self.sources.named;
        let source = named.get(jinja::DEFAULT);
        source
            .or_else(|| named.values().next())
            .map_or("", String::as_str)
    }

    /// The text of all templates, on which the rendered text depends.
    pub fn content(&self) -> String {
        self.sources.content()
    }

    /// SHA-256 of the templates and their variables. The variables of a row, `of_row`, override the template's own.
    pub fn sha256(&self, of_row: &Map<String, Json>) -> String {
        let mut variables = self.variables.clone();
        variables.extend(of_row.clone());
        let variables = Json::Object(variables);
        sha256(format!("{variables}\n{}", self.content()).as_bytes())
    }

    /// The template's own variables whose names do not occur in any of its texts.
    pub(super) fn unread_variables(&self) -> impl Iterator<Item = &str> {
        let names = self.variables.keys().map(String::as_str);
        names.filter(|name| !self.mentions(name))
    }

    /// Whether any of the templates contains a variable's name as a whole word.
    pub(super) fn mentions(&self, name: &str) -> bool {
        self.has_word(name, |_| true)
    }

    /// Whether any of the templates contains a key's name after a dot or a quote.
    pub(super) fn mentions_key(&self, name: &str) -> bool {
        self.has_word(name, |before| before.ends_with(['.', '\'', '"']))
    }

    fn has_word(&self, name: &str, follows: fn(&str) -> bool) -> bool {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        self.sources.named.values().any(|source| {
            source.match_indices(name).any(|(start, _)| {
                let (before, after) = (&source[..start], &source[start + name.len()..]);
                !before.ends_with(is_word) && !after.starts_with(is_word) && follows(before)
            })
        })
    }

    /// Whether `{% generation %}` blocks decide what is trained in a conversation with tools, or without.
    pub fn marks_generation(&self, has_tools: bool) -> bool {
        self.templates
            .marks_generation(self.sources.name_for(has_tools))
    }

    /// Whether the rendered text depends on the date.
    pub fn depends_on_date(&self) -> bool {
        self.sources
            .named
            .values()
            .any(|source| source.contains("strftime_now"))
    }

    /// The text of a conversation, without variables of a row.
    ///
    /// # Errors
    /// Returns an error with the template's own message if the template refuses the conversation.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Json],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let variables = Map::new();
        let beside = Beside {
            tools,
            variables: &variables,
        };
        let rendered = self.render_with(messages, beside, add_generation_prompt)?;
        Ok(rendered.text)
    }

    /// The text of a conversation, and the ranges that its generation markers mark.
    pub(super) fn render_with(
        &self,
        messages: &[Message],
        beside: Beside<'_>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, Error> {
        let fields: Vec<_> = messages.iter().map(|m| self.fields(m)).collect();
        self.render_fields(&fields, beside, add_generation_prompt)
    }

    /// A message's keys as the template gets them. Content parts are joined if the template takes only texts.
    pub(super) fn fields(&self, message: &Message) -> Map<String, Json> {
        let is_list = message.fields().get("content").is_some_and(Json::is_array);
        match is_list && !self.takes_parts() {
            true => message.fields_of_text(),
            false => message.fields().clone(),
        }
    }

    /// Whether the template prints the text of a content part, and not the part in Python's notation.
    fn takes_parts(&self) -> bool {
        *self.takes_parts.get_or_init(|| {
            let content = json!([{"type": "text", "text": "first-part"}]);
            let mut message = Map::new();
            message.insert("role".to_owned(), "user".into());
            message.insert("content".to_owned(), content);
            let variables = Map::new();
            let beside = Beside {
                tools: &[],
                variables: &variables,
            };
            let rendered = self.render_fields(&[message], beside, false);
            rendered.is_ok_and(|rendered| {
                rendered.text.contains("first-part") && !rendered.text.contains("'first-part'")
            })
        })
    }

    /// As [`Self::render_with`], for messages as the template gets them.
    pub(super) fn render_fields(
        &self,
        messages: &[Map<String, Json>],
        beside: Beside<'_>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, Error> {
        let name = self.sources.name_for(!beside.tools.is_empty());
        self.render_named(name, messages, beside, add_generation_prompt)
    }

    /// Renders the template for conversations with tools, but without any tools.
    pub(super) fn render_without_tools(
        &self,
        messages: &[Map<String, Json>],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, Error> {
        let beside = Beside {
            tools: &[],
            variables,
        };
        let name = self.sources.name_for(true);
        self.render_named(name, messages, beside, add_generation_prompt)
    }

    fn render_named(
        &self,
        name: &str,
        messages: &[Map<String, Json>],
        beside: Beside<'_>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, Error> {
        let conversation = Conversation {
            messages,
            tools: beside.tools,
            add_generation_prompt,
        };
        let more = self.variables.iter().chain(beside.variables);
        let variables = conversation.variables(&self.special_tokens, more);
        if !self.sources.named.contains_key(name) {
            return Err(bad_data(
                RENDER,
                format!(
                    "the model has no chat template named `{name}`, only {}, and `{TOOL_USE}` is for rows with tools",
                    list(self.sources.named.keys())
                ),
            ));
        }
        self.templates.render(name, &variables).map_err(|refusal| {
            bad_data(
                RENDER,
                format!("the chat template refuses the conversation: {refusal}"),
            )
        })
    }
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.map(|name| format!("`{name}`")).collect();
    names.join(", ")
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
            r#"[{"a": "<it's>"}]"#
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
            "HIHELLO210x26 Jul 2024 "
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
