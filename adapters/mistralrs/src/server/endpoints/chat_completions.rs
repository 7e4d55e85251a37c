//! `POST /v1/chat/completions`: a conversation, by the model's own chat template.

use axum::extract::State;
use axum::response::Response as HttpResponse;
use either::Either;
use mistralrs_core::{
    Constraint, NormalRequest, Request, RequestMessage, Response, TokenizationRequest,
    ToolCallResponse,
};
use mistralrs_server_core::chat_completion::parse_request;
use mistralrs_server_core::openai::JsonSchemaResponseFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::channel;

use crate::engine::plain_tokenization;
use crate::quirks_0_8::dropped_efforts::Effort;
use crate::quirks_0_8::forced_tools::ToolUse;
use crate::server::App;
use crate::server::admission::Admission;
use crate::server::answers::{Form, Piece, answer};
use crate::server::api_error::ApiError;
use crate::server::fields::{flag, only, theirs};
use crate::server::guard::Payload;
use crate::server::request::Asked;

/// Keys that only this endpoint has.
#[derive(Deserialize)]
struct ChatKeys {
    messages: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<ToolUse>,
    response_format: Option<Value>,
    enable_thinking: Option<Value>,
    reasoning_effort: Option<Effort>,
    #[serde(default = "yes", deserialize_with = "flag")]
    parallel_tool_calls: bool,
    modalities: Option<Value>,
    verbosity: Option<Value>,
}

fn yes() -> bool {
    true
}

/// Answers a conversation, streamed or not.
pub(super) async fn handle(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let (mut asked, keys): (Asked, ChatKeys) = Asked::read(&app, &bytes)?;
    only("modalities", keys.modalities.as_ref(), &json!(["text"]))?;
    only("verbosity", keys.verbosity.as_ref(), &json!("medium"))?;
    let form = ChatForm {
        one_tool_call: !keys.parallel_tool_calls,
    };
    keys.hold(&mut asked.constraint)?;
    let request = keys.request(&asked).await?;
    if matches!(asked.constraint, Constraint::Llguidance(_)) {
        let message = "this kind of grammar is not supported";
        return Err(ApiError::invalid("grammar", message));
    }
    let n_prompt = count_prompt(&asked, &request, &admission).await?;
    let job = asked.start(&app, admission, "messages", n_prompt, request)?;
    answer(asked, job, form).await
}

impl ChatKeys {
    fn tools(&self) -> Option<&Value> {
        self.tools.as_ref().filter(|tools| **tools != json!([]))
    }

    /// Holds the answer to the response format, or to a call that must be made.
    fn hold(&self, constraint: &mut Constraint) -> Result<(), ApiError> {
        let format = self.response_format.as_ref();
        let is_free = format.is_none_or(|format| *format == json!({"type": "text"}));
        if let Some(choice) = &self.tool_choice
            && choice.must_call()
        {
            let other = match (is_free, &*constraint) {
                (false, _) => Some("response_format"),
                (true, Constraint::None) => None,
                (true, _) => Some("grammar"),
            };
            if let Some(key) = other {
                let message = format!(
                    "`{key}` and a `tool_choice` that insists on a call exclude each other"
                );
                return Err(ApiError::invalid("tool_choice", message));
            }
            *constraint = Constraint::JsonSchema(choice.schema(self.tools())?);
        } else if let Some(schema) = format.map(schema).transpose()?.flatten() {
            if !matches!(constraint, Constraint::None) {
                let message = "Request `grammar` and `response_format` were both provided but are mutually exclusive.";
                return Err(ApiError::invalid("body", message));
            }
            *constraint = Constraint::JsonSchema(schema);
        }
        Ok(())
    }

    /// mistral.rs's own reading of conversation and tools.
    async fn request(self, asked: &Asked) -> Result<NormalRequest, ApiError> {
        let thinking = match (self.enable_thinking.clone(), self.reasoning_effort) {
            (None, Some(Effort::Off)) => Some(json!(false)),
            (thinking, _) => thinking,
        };
        let request = json!({
            "model": "default",
            "tools": self.tools(),
            "enable_thinking": thinking,
            "reasoning_effort": self.reasoning_effort.and_then(Effort::told),
            "messages": text_messages(self.messages)?,
        });
        let (sender, _) = channel(1);
        let (request, _) = parse_request(theirs(request)?, asked.lease.host().clone(), sender)
            .await
            .map_err(|error| ApiError::invalid("body", error.root_cause().to_string()))?;
        match request {
            Request::Normal(mut request) => {
                request.tool_choice = self.tool_choice.map(|choice| choice.told());
                Ok(*request)
            }
            _ => Err(ApiError::internal(
                "a chat request became another kind of request",
            )),
        }
    }
}

/// The schema that `response_format` holds an answer to: any JSON object is one that fits an empty schema for objects.
fn schema(format: &Value) -> Result<Option<Value>, ApiError> {
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") if format["json_schema"]["schema"].is_object() => {
            let read: JsonSchemaResponseFormat = theirs(format["json_schema"].clone())?;
            Ok(Some(read.schema))
        }
        _ => Err(ApiError::invalid(
            "response_format",
            "`response_format` is text, json_object, or json_schema with a schema",
        )),
    }
}

/// Renders the conversation, which also shows whether the template takes it.
async fn count_prompt(
    asked: &Asked,
    request: &NormalRequest,
    admission: &Admission,
) -> Result<usize, ApiError> {
    let RequestMessage::Chat {
        messages,
        enable_thinking,
        reasoning_effort,
    } = &request.messages
    else {
        return Err(ApiError::invalid("messages", "only text is supported"));
    };
    let tokens = |response| TokenizationRequest {
        tools: request.tools.clone(),
        enable_thinking: *enable_thinking,
        reasoning_effort: *reasoning_effort,
        ..plain_tokenization(Either::Left(messages.clone()), response)
    };
    let tokens = asked.tokens(admission, "messages", tokens).await?;
    Ok(tokens.len())
}

/// The messages with their text parts joined; anything but text is refused, since mistral.rs would go and fetch it.
fn text_messages(messages: Option<Value>) -> Result<Value, ApiError> {
    let Some(Value::Array(mut messages)) = messages else {
        return Err(wrong("messages", "expected a list of messages"));
    };
    if messages.is_empty() {
        return Err(wrong("messages", "expected at least one message"));
    }
    for (idx, message) in messages.iter_mut().enumerate() {
        read_message(&format!("messages[{idx}]"), message)?;
    }
    Ok(Value::Array(messages))
}

fn wrong(at: &str, message: &str) -> ApiError {
    ApiError::invalid(at, format!("{at}: {message}"))
}

fn read_message(at: &str, message: &mut Value) -> Result<(), ApiError> {
    let Some(fields) = message.as_object_mut() else {
        return Err(wrong(at, "expected an object with role and content"));
    };
    fields.retain(|_, value| !value.is_null());
    match fields.get("role").and_then(Value::as_str) {
        None => {
            let expected = "expected system, user, assistant or tool";
            return Err(wrong(&format!("{at}.role"), expected));
        }
        // What reasoning models call a system message; templates know only that.
        Some("developer") => drop(fields.insert("role".to_owned(), json!("system"))),
        Some(_) => {}
    }
    let content = match fields.get("content") {
        Some(Value::String(_)) => return Ok(()),
        None if fields.contains_key("tool_calls") => return Ok(()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().map(|part| {
                let is_text = part["type"].as_str().is_none_or(|kind| kind == "text");
                part["text"].as_str().filter(|_| is_text)
            });
            let texts: Option<Vec<&str>> = texts.collect();
            texts.ok_or("only text parts are supported")
        }
        _ => Err("expected a text"),
    };
    let texts = content.map_err(|message| wrong(&format!("{at}.content"), message))?;
    let text = json!(texts.join("\n"));
    fields.insert("content".to_owned(), text);
    Ok(())
}

/// Answers as messages, and as deltas of one.
struct ChatForm {
    /// Whether only the first of several tool calls is wanted.
    one_tool_call: bool,
}

/// What a choice says, and what a chunk adds to it.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Message {
        role: &'static str,
        content: Option<String>,
        #[serde(flatten)]
        more: More,
    },
    Delta {
        content: String,
        /// Who speaks; only the first chunk says so, as clients add up what they get.
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        #[serde(flatten)]
        more: More,
    },
}

/// What goes along with a text.
#[derive(Serialize)]
struct More {
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<ToolCallResponse>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

const ROLE: &str = "assistant";

impl Form for ChatForm {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    type Said = Said;

    fn read(&self, response: Response, begun: &mut bool) -> Option<Vec<Piece>> {
        match response {
            Response::Done(done) => {
                let choices = done.choices.into_iter().map(|choice| Piece {
                    text: choice.message.content,
                    tool_calls: choice.message.tool_calls.map(|mut calls| {
                        calls.truncate(if self.one_tool_call { 1 } else { usize::MAX });
                        calls
                    }),
                    reasoning: choice.message.reasoning_content,
                    finish_reason: Some(choice.finish_reason),
                });
                Some(choices.collect())
            }
            Response::Chunk(chunk) => {
                let choices = chunk.choices.into_iter().map(|choice| {
                    let mut calls = choice.delta.tool_calls.unwrap_or_default();
                    calls.retain(|call| !self.one_tool_call || call.index == 0);
                    let text = choice.delta.content.unwrap_or_default();
                    // As in a whole answer, which begins with its first character that is no white space.
                    let text = if *begun { &*text } else { text.trim_start() };
                    *begun |= !text.is_empty();
                    Piece {
                        text: Some(text.to_owned()),
                        tool_calls: Some(calls).filter(|calls| !calls.is_empty()),
                        reasoning: choice.delta.reasoning_content,
                        finish_reason: choice.finish_reason,
                    }
                });
                Some(choices.collect())
            }
            _ => None,
        }
    }

    fn whole(&self, piece: Piece) -> Said {
        Said::Message {
            role: ROLE,
            content: piece.text,
            more: More {
                tool_calls: piece.tool_calls,
                reasoning_content: piece.reasoning,
            },
        }
    }

    fn chunk(&self, piece: Piece, is_first: bool) -> Said {
        Said::Delta {
            content: piece.text.unwrap_or_default(),
            role: is_first.then_some(ROLE),
            more: More {
                tool_calls: piece.tool_calls,
                reasoning_content: piece.reasoning,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_parts_are_joined_and_texts_kept() {
        let messages = json!([
            {"role": "system", "content": "s", "name": null},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]);
        let expected =
            json!([{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}]);
        assert_eq!(text_messages(Some(messages)).expect("text only"), expected);
    }

    #[test]
    fn what_is_not_a_conversation_in_text_is_refused_where_it_is() {
        let image = json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}});
        let cases = [
            (None, "messages"),
            (Some(json!("hello")), "messages"),
            (Some(json!([])), "messages"),
            (Some(json!(["hello"])), "messages[0]"),
            (Some(json!([{"content": "x"}])), "messages[0].role"),
            (Some(json!([{"role": "user"}])), "messages[0].content"),
            (
                Some(json!([{"role": "user", "content": 3}])),
                "messages[0].content",
            ),
            (
                Some(json!([{"role": "user", "content": [image]}])),
                "messages[0].content",
            ),
        ];
        for (messages, at) in cases {
            let error = text_messages(messages).expect_err("must be refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
    }

    fn keys(body: Value) -> Result<ChatKeys, ApiError> {
        let mut fields = crate::server::fields::object(body.to_string().as_bytes())?;
        crate::server::fields::take(&mut fields)
    }

    /// What an answer is held to.
    fn held(body: Value) -> Result<Constraint, ApiError> {
        let mut constraint = match body.get("grammar") {
            Some(_) => Constraint::Regex("x".to_owned()),
            None => Constraint::None,
        };
        keys(body)?.hold(&mut constraint)?;
        Ok(constraint)
    }

    #[test]
    fn formats_become_schemas_or_are_refused() {
        let schema = |body: Value| match held(body) {
            Ok(Constraint::JsonSchema(schema)) => Some(schema),
            Ok(Constraint::None) => None,
            _ => panic!("another constraint"),
        };
        let any = json!({"response_format": {"type": "json_object"}});
        assert_eq!(schema(any), Some(json!({"type": "object"})));
        let text = json!({"response_format": {"type": "text"}});
        assert_eq!(schema(text), None);
        let own = json!({"name": "n", "strict": true, "schema": {"enum": [1]}});
        let own = json!({"response_format": {"type": "json_schema", "json_schema": own}});
        assert_eq!(schema(own), Some(json!({"enum": [1]})));
        let tool = json!({"type": "function", "function": {"name": "a"}});
        let (both, none) = (json!([tool]), json!([]));
        let grammar = json!({"type": "regex", "value": "x"});
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "grammar": grammar}),
                "body",
            ),
            (
                json!({"tool_choice": "required", "tools": none}),
                "tool_choice",
            ),
            (
                json!({"tool_choice": "required", "tools": both, "grammar": grammar}),
                "tool_choice",
            ),
            (
                json!({"tool_choice": tool, "tools": both, "response_format": {"type": "json_object"}}),
                "tool_choice",
            ),
            (json!({"tool_choice": "any"}), "tool_choice"),
            (json!({"reasoning_effort": "utmost"}), "reasoning_effort"),
            (json!({"reasoning_effort": 3}), "reasoning_effort"),
        ] {
            let error = held(body).err().expect("refused");
            assert_eq!(error.body()["error"]["param"], param);
        }
        let forced =
            json!({"tool_choice": "required", "tools": both, "response_format": {"type": "text"}});
        assert!(schema(forced).is_some());
    }

    #[test]
    fn efforts_become_those_of_mistralrs() {
        for (asked, told) in [
            ("minimal", Some("low")),
            ("medium", Some("medium")),
            ("xhigh", Some("high")),
            ("none", None),
        ] {
            let keys = keys(json!({"reasoning_effort": asked})).expect("known");
            let effort = keys.reasoning_effort.expect("given");
            assert_eq!(effort.told(), told);
            assert_eq!(effort == Effort::Off, told.is_none());
        }
    }

    #[test]
    fn a_developer_is_the_system() {
        let messages = json!([{"role": "developer", "content": "be brief"}]);
        let read = text_messages(Some(messages)).expect("text only");
        assert_eq!(read[0]["role"], "system");
    }
}
