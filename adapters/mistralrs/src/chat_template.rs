//! The chat template of a model. It is compiled when the model is loaded, and renders conversations to the text for the
//! engine.

mod analysis;

pub(crate) use self::analysis::code;

use std::collections::BTreeMap;
use std::time::SystemTime;

use monteclora_converters::Problem;
use monteclora_converters::jinja::{self, DEFAULT, TOOL_USE, Templates};
use serde_json::{Map, Value, json};

use self::analysis::Names;

/// A compiled chat template and the model's special tokens.
///
/// Besides the conversation, a template sees the variables that transformers provides, those that the adapter was
/// trained with, and those of the request. A variable of the request takes precedence.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    templates: Templates,
    special_tokens: Map<String, Value>,
    variables: Map<String, Value>,
    /// The names that each template reads, by template name.
    names: BTreeMap<&'static str, Names>,
}

/// The input of a template.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Map<String, Value>>,
    pub(crate) tools: Vec<Value>,
    /// Variables in addition to those that every conversation has.
    pub(crate) variables: Map<String, Value>,
    pub(crate) end: End,
}

/// How a rendered conversation ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum End {
    /// With the opening of the assistant's turn.
    #[default]
    Opening,
    /// With the last message.
    Closed,
    /// In the last message, which the answer continues.
    Open,
}

/// The reason why a conversation cannot be rendered; the text follows "the chat template".
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal(pub(crate) String);

impl ChatTemplate {
    /// Compiles `template`, a text or a list of named texts. `place` names its origin in errors.
    ///
    /// # Errors
    /// Returns every fault of the template.
    pub(crate) fn compile(
        place: &str,
        template: &Value,
        special_tokens: Map<String, Value>,
    ) -> Result<Self, Vec<Problem>> {
        let sources = sources(place, template).map_err(|problem| vec![problem])?;
        let sources = sources
            .into_iter()
            .map(|(name, text)| (name.to_owned(), text));
        let templates =
            Templates::compile(sources.collect(), SystemTime::now).map_err(|found| {
                let problems = found.into_iter().map(|(name, reason)| {
                    let at = match template {
                        Value::String(_) => place.to_owned(),
                        _ => format!("{place}: {name}"),
                    };
                    problem(at, format!("not valid Jinja: {reason}"))
                });
                problems.collect::<Vec<_>>()
            })?;
        let names = [DEFAULT, TOOL_USE].into_iter().filter_map(|name| {
            let template = templates.compiled(name)?;
            Some((name, Names::of(&template)))
        });
        Ok(Self {
            names: names.collect(),
            templates,
            special_tokens,
            variables: Map::new(),
        })
    }

    /// Adds variables that every conversation gets; the variables of a request take precedence.
    pub(crate) fn with_variables(mut self, variables: Map<String, Value>) -> Self {
        self.variables = variables;
        self
    }

    /// The concatenated text of all its templates.
    pub(crate) fn content(&self) -> String {
        self.templates
            .sources()
            .values()
            .map(String::as_str)
            .collect()
    }

    fn name(&self, has_tools: bool) -> &'static str {
        match has_tools && self.names.contains_key(TOOL_USE) {
            true => TOOL_USE,
            false => DEFAULT,
        }
    }

    /// Whether the template shows the available tools to the model.
    pub(crate) fn takes_tools(&self) -> bool {
        self.names[self.name(true)].reads("tools") || self.names.contains_key(TOOL_USE)
    }

    /// Whether the template for conversations with or without tools reads the variable `name`.
    pub(crate) fn reads(&self, name: &str, has_tools: bool) -> bool {
        self.names[self.name(has_tools)].reads(name)
    }

    /// Whether the template may read the message key `key`.
    pub(crate) fn mentions(&self, key: &str, has_tools: bool) -> bool {
        self.names[self.name(has_tools)].mentions(key)
    }

    /// Renders a conversation to text.
    ///
    /// # Errors
    /// Returns the template's own message if it refuses the conversation, or a refusal if the last message cannot be
    /// continued.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<String, Refusal> {
        let marker = match conversation.end {
            End::Open => Some(Marker::new()),
            End::Opening | End::Closed => None,
        };
        let mut messages = conversation.messages.clone();
        let mut continued = String::new();
        if let (Some(marker), Some(last)) = (&marker, messages.last_mut()) {
            let content = last.get("content").and_then(Value::as_str);
            continued = content.unwrap_or_default().to_owned();
            last.insert("content".to_owned(), json!(marker.after(&continued)));
        }
        let tools = &conversation.tools;
        let shown = jinja::Conversation {
            messages: &messages,
            tools,
            add_generation_prompt: conversation.end == End::Opening,
        };
        let more = self.variables.iter().chain(&conversation.variables);
        let variables = shown.variables(&self.special_tokens, more);
        let name = self.name(!tools.is_empty());
        let rendered = self.templates.render(name, &variables);
        let text = rendered
            .map_err(|reason| Refusal(format!("refuses the conversation: {reason}")))?
            .text;
        match marker {
            Some(marker) => marker.cut(&text, &continued).ok_or_else(|| {
                Refusal(
                    "does not show the last message as it is, so that it cannot be continued"
                        .to_owned(),
                )
            }),
            None => Ok(text),
        }
    }
}

/// A text that marks the end of a continued message. What the template writes after it is cut off, as in transformers
/// (`continue_final_message` in its `chat_template_utils`).
struct Marker(String);

impl Marker {
    fn new() -> Self {
        Self(format!("END-OF-MESSAGE-{}", uuid::Uuid::new_v4().simple()))
    }

    /// Appends the marker and a space; the space shows whether the template keeps white space at the end of a message.
    fn after(&self, content: &str) -> String {
        format!("{content}{} ", self.0)
    }

    /// Returns `text` up to the marker, if that part contains `continued`.
    fn cut(&self, text: &str, continued: &str) -> Option<String> {
        let (before, after) = text.rsplit_once(&self.0)?;
        let before = match after.starts_with(' ') {
            true => before,
            false => before.trim_end(),
        };
        before.contains(continued.trim()).then(|| before.to_owned())
    }
}

fn problem(at: impl Into<String>, message: impl Into<String>) -> Problem {
    let fix =
        "correct it, or give another one with `chat_template` in serve.toml or `--chat-template`";
    Problem::new("chat-template", at, message, fix)
}

/// The templates in the value of `chat_template`, by name.
fn sources(place: &str, template: &Value) -> Result<Vec<(&'static str, String)>, Problem> {
    let list = match template {
        Value::String(text) => return Ok(vec![(DEFAULT, text.clone())]),
        Value::Array(list) => list,
        _ => {
            let message = "neither a text nor a list of named templates";
            return Err(problem(place, message));
        }
    };
    let mut sources = Vec::new();
    for name in [DEFAULT, TOOL_USE] {
        let Some(entry) = list.iter().find(|entry| entry["name"] == name) else {
            continue;
        };
        match entry["template"].as_str() {
            Some(text) => sources.push((name, text.to_owned())),
            None => {
                let message = format!("the template named `{name}` is no text");
                return Err(problem(place, message));
            }
        }
    }
    if sources.first().is_none_or(|(name, _)| *name != DEFAULT) {
        return Err(problem(place, "a list without a template named `default`"));
    }
    Ok(sources)
}

#[cfg(test)]
mod tests;
