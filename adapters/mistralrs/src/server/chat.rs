//! Sends a conversation to an engine: the model's template renders it, and constraints hold the answer to the requested
//! form.

use either::Either;
use mistralrs_core::{Constraint, NormalRequest, SamplingParams};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::channel;

use super::App;
use super::admission::Admission;
use super::api_error::ApiError;
use super::effort::Effort;
use super::fields::wrong;
use super::job::RunningJob;
use super::registry::Lease;
use super::request::{Asked, Prompt};
use super::structured::{Form, exclusive};
use super::tools;
use crate::chat_template::{ChatTemplate, Conversation, End, Refusal};
use crate::engine::plain_tokenization;
use crate::quirks_0_8::conversations::rendered;
use crate::quirks_0_8::forced_tools::ToolUse;
use crate::quirks_0_8::unreadable_calls;

/// The keys of an endpoint for the parts of a conversation.
pub(crate) struct Keys {
    pub(crate) messages: &'static str,
    pub(crate) format: &'static str,
}

/// A conversation and the requirements for its answer.
pub(crate) struct Chat {
    pub(crate) keys: Keys,
    pub(crate) conversation: Conversation,
    pub(crate) tool_choice: Option<ToolUse>,
    /// The schema that an answer in JSON must follow.
    pub(crate) schema: Option<Value>,
}

/// The chat template of the requested model.
pub(crate) fn template<'a>(lease: &'a Lease, messages: &str) -> Result<&'a ChatTemplate, ApiError> {
    lease.template.as_ref().ok_or_else(|| {
        let message = format!(
            "the model `{}` has no chat template, so that it continues texts only (`completions`); give it one with `chat_template` in \
             serve.toml or `--chat-template`",
            lease.name
        );
        ApiError::invalid(messages, message)
    })
}

impl Chat {
    /// Whether the answer must be a tool call.
    pub(crate) fn must_call(&self) -> bool {
        self.tool_choice.as_ref().is_some_and(ToolUse::must_call)
    }

    /// Sends the conversation to the engine.
    pub(crate) async fn start(
        self,
        app: &App,
        asked: &mut Asked,
        admission: Admission,
    ) -> Result<RunningJob, ApiError> {
        let template = template(&asked.lease, self.keys.messages)?;
        tools::refuse_unseen(&self.conversation.tools, template)?;
        if asked.posterior_draw.is_some() && !self.conversation.tools.is_empty() {
            let must = "are not offered by posterior draws, whose answers are texts; ask the adapter itself";
            return Err(wrong("tools", must));
        }
        let text = template
            .render(&self.conversation)
            .map_err(|Refusal(reason)| {
                let message = format!("the model's chat template {reason}");
                ApiError::invalid(self.keys.messages, message)
            })?;
        if !self.conversation.tools.is_empty() {
            asked.stop.push(unreadable_calls::BEGINNING.to_owned());
        }
        asked.form = self.form(asked.form.take())?;
        let prompt = Either::Right(text.clone());
        let request = |response| plain_tokenization(prompt, response);
        let tokens = asked
            .tokens(&admission, self.keys.messages, request)
            .await?;
        let continues = self.conversation.end == End::Open;
        let (nobody, _) = channel(1);
        let mut request = NormalRequest::new_simple(
            rendered(text),
            SamplingParams::neutral(),
            nobody,
            0,
            tools::told(self.conversation.tools)?,
            self.tool_choice.map(|choice| choice.told()),
        );
        // Needed for the leading white space of a continuation; see `first_white_space`.
        request.return_logprobs = continues;
        let prompt = Prompt {
            request,
            tokens,
            is_scored: false,
        };
        let key = self.keys.messages;
        asked.start(app, admission, key, vec![prompt]).await
    }

    /// The constraint on the answer: its schema, a forced tool call, or the form `asked`. At most one is allowed.
    fn form(&self, asked: Option<Form>) -> Result<Option<Form>, ApiError> {
        let held = |key: &str, schema| Form::new(key, Constraint::JsonSchema(schema));
        let schema = self.schema.clone();
        let format = schema.map(|schema| held(self.keys.format, schema));
        let call = match &self.tool_choice {
            Some(choice) if choice.must_call() => {
                let tools = json!(self.conversation.tools);
                Some(held("tool_choice", choice.schema(Some(&tools))?))
            }
            _ => None,
        };
        let mut forms = [asked, format, call].into_iter().flatten();
        match (forms.next(), forms.next()) {
            (Some(first), Some(second)) => Err(exclusive(&first.key, &second.key)),
            (form, _) => Ok(form),
        }
    }
}

/// Variables that every conversation has. A request cannot set them.
const FIXED_VARIABLES: &[&str] = &[
    "messages",
    "tools",
    "xml_tools",
    "builtin_tools",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "chat_template",
];

/// Checks the variables in `asked`, the value of the key `at`. It refuses variables that the template does not read.
pub(crate) fn variables(
    at: &str,
    asked: Option<Value>,
    template: &ChatTemplate,
    has_tools: bool,
) -> Result<Map<String, Value>, ApiError> {
    let fields = match asked {
        None => Map::new(),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(wrong(at, "must be an object of variables")),
    };
    for (name, value) in &fields {
        let shown: String = name.chars().take(64).collect();
        let place = format!("{at}.{shown}");
        if FIXED_VARIABLES.contains(&name.as_str()) {
            let message = "is set by the request itself and cannot be given as a variable";
            return Err(wrong(&place, message));
        }
        // `enable_thinking: false` is met by a model that does not think.
        let is_met = name == "enable_thinking" && *value == false;
        if !is_met && !template.reads(name, has_tools) {
            let message = "is not read by this model's chat template";
            return Err(wrong(&place, message));
        }
    }
    Ok(fields)
}

/// Sets the variables for the requested thinking.
pub(crate) fn set_thinking(
    variables: &mut Map<String, Value>,
    enable: Option<bool>,
    effort: Option<Effort>,
) -> Result<(), ApiError> {
    let enable = match (enable, effort) {
        (None, Some(Effort::Off)) => Some(false),
        (enable, _) => enable,
    };
    let told = [
        ("enable_thinking", enable.map(Value::from)),
        (
            "reasoning_effort",
            effort.and_then(Effort::told).map(Value::from),
        ),
    ];
    for (name, value) in told {
        let Some(value) = value else { continue };
        let other = variables.insert(name.to_owned(), value.clone());
        if other.is_some_and(|other| other != value) {
            let message = format!("`chat_template_kwargs.{name}` says otherwise");
            return Err(wrong(name, &message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[test]
    fn an_answer_is_held_to_one_thing() {
        let tool = json!({"type": "function", "function": {"name": "a"}});
        let hold = |choice: Value, tools: &[Value], schema: Option<Value>, grammar: bool| {
            let chat = Chat {
                keys: Keys {
                    messages: "messages",
                    format: "response_format",
                },
                conversation: Conversation {
                    tools: tools.to_vec(),
                    ..Conversation::default()
                },
                tool_choice: Some(ToolUse::deserialize(choice).expect("a choice")),
                schema,
            };
            let regex = || Form::new("grammar", Constraint::Regex("x".to_owned()));
            chat.form(grammar.then(regex))
        };
        let (tools, object) = (std::slice::from_ref(&tool), Some(json!({"type": "object"})));
        for (choice, schema, grammar) in [
            ("auto", None, true),
            ("auto", object.clone(), false),
            ("required", None, false),
        ] {
            let held = hold(json!(choice), tools, schema, grammar).expect("one thing");
            assert!(held.is_some());
        }
        assert!(matches!(hold(json!("none"), &[], None, false), Ok(None)));
        for (choice, tools, schema, grammar, at) in [
            (json!("required"), &[][..], None, false, "tool_choice"),
            (json!("required"), tools, None, true, "tool_choice"),
            (tool.clone(), tools, object.clone(), false, "tool_choice"),
            (json!("auto"), tools, object, true, "response_format"),
        ] {
            let error = hold(choice, tools, schema, grammar).err().expect("refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
    }
}
