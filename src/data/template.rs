//! The model's chat template: found, normalised and rendered as mistral.rs and transformers do.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, Utc};
use minijinja::{Environment, Error, ErrorKind, Value, value::Kwargs};
use monteclora_converters::Problem;
use serde::Serialize;

use super::{
    error::{DataError, bad_data, model_file},
    rows::Message,
    tokenizer::{read_json, special_token},
};

/// Tool names that Llama 3 and Harmony templates treat as built in.
const BUILTIN_TOOLS: [&str; 6] = [
    "browser",
    "python",
    "code_interpreter",
    "web_search",
    "brave_search",
    "wolfram_alpha",
];

/// A compiled chat template with the model's special tokens.
///
/// Blocks are trimmed as in transformers; Python's string methods, `raise_exception`, `strftime_now` and `tojson`
/// exist. What a template can see besides the messages is what mistral.rs gives it, so that a model is trained on the
/// text it will be served with: `enable_thinking` is true, `reasoning_effort` "medium", `date_string` today, and `tojson`
/// escapes `<`, `>`, `&` and `'` (transformers does not).
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
    /// An override that cannot be read; a malformed file.
    pub fn from_dir(
        dir: &Path,
        override_file: Option<&Path>,
        now: SystemTime,
    ) -> Result<Option<Self>, DataError> {
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let special_map = read_json(&dir.join("special_tokens_map.json"))?;
        let special_tokens = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .into_iter()
            .filter_map(|key| {
                special_token(config.as_ref(), key)
                    .or_else(|| special_token(special_map.as_ref(), key))
                    .map(|token| (key, token))
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
    ) -> Result<Self, DataError> {
        let now = utc(now);
        let mut environment = Environment::new();
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_lstrip_blocks(true);
        environment.set_trim_blocks(true);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| strftime(now, &format));
        let source = normalise(&sources.default);
        let mut add = |name: &'static str, source: String| {
            environment
                .add_template_owned(name, source)
                .map_err(|error| {
                    let message = format!(
                        "the chat template is not valid Jinja: {}; give a corrected one with --chat-template",
                        describe(&error)
                    );
                    model_file(&origin, message)
                })
        };
        add("default", source.clone())?;
        if let Some(tool_use) = sources.tool_use {
            add("tool_use", normalise(&tool_use))?;
        }
        let date_string = strftime(now, "%d, %B, %Y").unwrap_or_default();
        Ok(Self {
            environment,
            origin,
            source,
            special_tokens,
            date_string,
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
    /// The template's own message.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let messages: Vec<_> = messages.iter().map(Message::fields).collect();
        let mut context: BTreeMap<&str, Value> = self
            .special_tokens
            .iter()
            .map(|(key, token)| (*key, Value::from(token.as_str())))
            .collect();
        context.insert("messages", Value::from_serialize(&messages));
        context.insert("add_generation_prompt", add_generation_prompt.into());
        context.insert("enable_thinking", true.into());
        context.insert("reasoning_effort", "medium".into());
        context.insert("date_string", self.date_string.as_str().into());
        if !tools.is_empty() {
            let builtin: Vec<&str> = tools
                .iter()
                .filter_map(|tool| tool.get("function")?.get("name")?.as_str())
                .filter(|name| BUILTIN_TOOLS.contains(name))
                .collect();
            context.insert("tools", Value::from_serialize(tools));
            context.insert("xml_tools", Value::from_serialize(tools));
            context.insert("builtin_tools", Value::from_serialize(builtin));
        }
        let named = if tools.is_empty() {
            "default"
        } else {
            "tool_use"
        };
        self.environment
            .get_template(named)
            .or_else(|_| self.environment.get_template("default"))
            .and_then(|template| template.render(Value::from_serialize(context)))
            .map_err(|error| {
                let reason = describe(&error);
                bad_data(
                    "render",
                    format!("the chat template refuses the conversation: {reason}"),
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
    /// A string, or a list of `{"name", "template"}`.
    fn from_json(value: &serde_json::Value) -> Result<Option<Self>, String> {
        match value {
            serde_json::Value::Null => Ok(None),
            serde_json::Value::String(text) => Ok(Some(Self {
                default: text.clone(),
                tool_use: None,
            })),
            serde_json::Value::Array(list) => {
                let named = |wanted: &str| {
                    list.iter()
                        .find(|entry| {
                            entry.get("name").and_then(|name| name.as_str()) == Some(wanted)
                        })
                        .and_then(|entry| entry.get("template")?.as_str())
                        .map(str::to_owned)
                };
                match named("default") {
                    Some(default) => Ok(Some(Self {
                        default,
                        tool_use: named("tool_use"),
                    })),
                    None => Err("chat_template lists no template named `default`; give one with --chat-template".to_owned()),
                }
            }
            _ => Err("chat_template is neither a string nor a list of named templates".to_owned()),
        }
    }
}

fn find_sources(
    dir: &Path,
    override_file: Option<&Path>,
    config: Option<&serde_json::Value>,
) -> Result<Option<(PathBuf, Sources)>, DataError> {
    let from_json = |path: PathBuf, json: Option<&serde_json::Value>| match json
        .and_then(|json| json.get("chat_template"))
        .map(Sources::from_json)
    {
        None | Some(Ok(None)) => Ok(None),
        Some(Ok(Some(sources))) => Ok(Some((path, sources))),
        Some(Err(message)) => Err(model_file(&path, message)),
    };
    if let Some(path) = override_file {
        let text = std::fs::read_to_string(path).map_err(|source| {
            Problem::usage(format!("cannot read `{}`: {source}", path.display()))
        })?;
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let json = read_json(path)?;
            return from_json(path.to_owned(), json.as_ref())?
                .map(Some)
                .ok_or_else(|| model_file(path, "has no key `chat_template`"));
        }
        return Ok(Some((
            path.to_owned(),
            Sources {
                default: text,
                tool_use: None,
            },
        )));
    }
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(default) => {
            return Ok(Some((
                path,
                Sources {
                    default,
                    tool_use: None,
                },
            )));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(model_file(&path, format!("cannot be read: {error}")));
        }
    }
    if let Some(found) = from_json(dir.join("tokenizer_config.json"), config)? {
        return Ok(Some(found));
    }
    let path = dir.join("chat_template.json");
    let json = read_json(&path)?;
    from_json(path, json.as_ref())
}

/// Rewrites what Jinja2 allows and minijinja does not.
fn normalise(source: &str) -> String {
    let source = source.replace("[::-1]", "|reverse");
    let source = rewrite_descending_ranges(&source);
    rewrite_generation_blocks(&source)
}

/// `range(x, -1, -1)` -> `range((x) + 1)|reverse`: minijinja has no negative steps. mistral.rs leaves out `x` itself,
/// which Python does not.
fn rewrite_descending_ranges(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("range(") {
        let (before, call) = rest.split_at(start);
        rewritten.push_str(before);
        let inner = &call["range(".len()..];
        let tail = inner.find(',').and_then(|comma| {
            let compact: String = inner[comma..]
                .chars()
                .take(24)
                .filter(|c| !c.is_whitespace())
                .collect();
            compact.starts_with(",-1,-1)").then_some(comma)
        });
        match tail {
            Some(comma) => {
                let end = inner[comma..]
                    .find(')')
                    .map_or(inner.len(), |end| comma + end + 1);
                let _ = write!(rewritten, "range(({}) + 1)|reverse", &inner[..comma]);
                rest = &inner[end..];
            }
            None => {
                rewritten.push_str("range(");
                rest = inner;
            }
        }
    }
    rewritten.push_str(rest);
    rewritten
}

/// `{% generation %}` marks trained text for transformers and prints nothing: it becomes a block that is always
/// taken, so that whitespace control stays what it was.
fn rewrite_generation_blocks(source: &str) -> String {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        rewritten.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let body = &tag[2..end];
        let name = body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(replacement) => {
                let _ = write!(rewritten, "{{%{}%}}", body.replace(name, replacement));
            }
            None => rewritten.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    rewritten.push_str(rest);
    rewritten
}

fn utc(now: SystemTime) -> DateTime<Utc> {
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| i64::try_from(elapsed.as_secs()).ok())
        .unwrap_or_default();
    DateTime::from_timestamp(seconds, 0).unwrap_or_default()
}

fn strftime(now: DateTime<Utc>, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", now.format(format)).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: bad format `{format}`"),
        )
    })?;
    Ok(text)
}

/// mistral.rs's `tojson`: compact, or indented by `indent`, with HTML's characters escaped.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let serialisation = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "cannot serialise to JSON").with_source(error)
    };
    let json = match kwargs.get::<Option<usize>>("indent")? {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut bytes = Vec::new();
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            value.serialize(&mut serializer).map_err(serialisation)?;
            String::from_utf8_lossy(&bytes).into_owned()
        }
        None => serde_json::to_string(value).map_err(serialisation)?,
    };
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '<' | '>' | '&' | '\'' => {
                let _ = write!(escaped, "\\u{:04x}", u32::from(character));
            }
            other => escaped.push(other),
        }
    }
    Ok(Value::from_safe_string(escaped))
}

/// The template's own words where it raised them, the engine's and the line otherwise.
fn describe(error: &Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (template line {line})"),
        None => detail,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::data::{
        rows::Role,
        test_support::{LLAMA3_LIKE, NO_SYSTEM, model_with_template, tiny_llama},
    };
    use monteclora_converters::exit_code;

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
        assert_eq!(exit_code(&error, |_| None), 4);
        assert!(error.to_string().contains("is not valid Jinja"), "{error}");
        let error = ChatTemplate::from_dir(dir.path(), Some(Path::new("no.jinja")), UNIX_EPOCH)
            .expect_err("missing");
        assert!(
            error
                .to_string()
                .starts_with("cannot read `no.jinja`: No such"),
            "{error}"
        );
        assert_eq!(exit_code(&error, |_| None), 2);
    }
}
