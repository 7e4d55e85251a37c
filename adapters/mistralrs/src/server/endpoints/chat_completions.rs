//! `POST /v1/chat/completions`: answers a conversation with the model's own chat template.

use axum::extract::State;
use axum::response::Response as HttpResponse;
use mistralrs_core::{CalledFunction, Response, ToolCallResponse, ToolCallType};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chat_template::{ChatTemplate, Conversation, End};
use crate::quirks_0_8::first_white_space::{restore, token_text};
use crate::quirks_0_8::forced_tools::{ToolUse, cut_call};
use crate::server::App;
use crate::server::admission::Admission;
use crate::server::answers::{Form, Piece, answer};
use crate::server::api_error::ApiError;
use crate::server::chat::{Chat, Keys, set_thinking, template, variables};
use crate::server::common_keys::scores_of_chat;
use crate::server::effort::Effort;
use crate::server::fields::{flag, maybe, object_at, only, refuse_others, wrong};
use crate::server::guard::Payload;
use crate::server::logprobs::{Shown, for_chat};
use crate::server::messages::Messages;
use crate::server::request::Asked;
use crate::server::tools;

/// Keys that only this endpoint has.
#[derive(Deserialize)]
struct ChatKeys {
    messages: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<ToolUse>,
    response_format: Option<Value>,
    #[serde(default, deserialize_with = "maybe")]
    enable_thinking: Option<bool>,
    reasoning_effort: Option<Effort>,
    chat_template_kwargs: Option<Value>,
    #[serde(default, deserialize_with = "maybe")]
    add_generation_prompt: Option<bool>,
    #[serde(default, deserialize_with = "flag")]
    continue_final_message: bool,
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
    let (mut asked, keys): (Asked, ChatKeys) = Asked::read(&app, &bytes, scores_of_chat)?;
    only("modalities", keys.modalities.as_ref(), &json!(["text"]))?;
    only("verbosity", keys.verbosity.as_ref(), &json!("medium"))?;
    let one_tool_call = !keys.parallel_tool_calls;
    let chat = keys.chat(template(&asked.lease, "messages")?)?;
    let form = ChatForm {
        one_tool_call,
        must_call: chat.must_call(),
        continues: chat.conversation.end == End::Open,
    };
    let job = chat.start(&app, &mut asked, admission).await?;
    answer(asked, job, form).await
}

impl ChatKeys {
    fn chat(self, template: &ChatTemplate) -> Result<Chat, ApiError> {
        let tools = tools::read(self.tools)?;
        let has_tools = !tools.is_empty();
        let messages = Messages::read("messages", self.messages, template, has_tools)?;
        let at = "chat_template_kwargs";
        let mut variables = variables(at, self.chat_template_kwargs, template, has_tools)?;
        set_thinking(&mut variables, self.enable_thinking, self.reasoning_effort)?;
        let end = end(
            self.add_generation_prompt,
            self.continue_final_message,
            &messages,
        )?;
        Ok(Chat {
            keys: Keys {
                messages: "messages",
                format: "response_format",
            },
            conversation: Conversation {
                messages: messages.list,
                tools,
                variables,
                end,
            },
            tool_choice: self.tool_choice,
            schema: self.response_format.map(schema).transpose()?.flatten(),
        })
    }
}

/// How the prompt ends: reads vLLM's keys, and `prefix` as in the interfaces of Mistral and DeepSeek.
fn end(opens: Option<bool>, continues: bool, messages: &Messages) -> Result<End, ApiError> {
    if !continues && !messages.is_prefix {
        return Ok(match opens {
            Some(false) => End::Closed,
            _ => End::Opening,
        });
    }
    let key = match continues {
        true => "continue_final_message",
        false => "prefix",
    };
    if opens == Some(true) {
        let message =
            format!("excludes `{key}`: the answer is a new turn, or continues the last one");
        return Err(wrong("add_generation_prompt", &message));
    }
    let last = messages.list.last();
    let is_text =
        last.is_some_and(|last| last["role"] == "assistant" && !last.contains_key("tool_calls"));
    match is_text {
        true => Ok(End::Open),
        false => Err(wrong(
            key,
            "needs a text of the assistant as the last message",
        )),
    }
}

/// The schema of `response_format`. For any JSON object it is an empty schema for objects.
fn schema(format: Value) -> Result<Option<Value>, ApiError> {
    let at = "response_format";
    let mut format = object_at(at, format)?;
    let kind = format.get("type").cloned().unwrap_or_default();
    let known: &[&str] = match kind.as_str() {
        Some("json_schema") => &["type", "json_schema"],
        Some("text" | "json_object") => &["type"],
        _ => {
            let must = "must be \"text\", \"json_object\" or \"json_schema\"";
            return Err(wrong(&format!("{at}.type"), must));
        }
    };
    refuse_others(at, &format, known)?;
    match kind.as_str() {
        Some("json_schema") => {
            let at = format!("{at}.json_schema");
            let mut named = object_at(&at, format.remove("json_schema").unwrap_or_default())?;
            refuse_others(&at, &named, &["name", "description", "schema", "strict"])?;
            match named.remove("schema") {
                Some(schema @ Value::Object(_)) => Ok(Some(schema)),
                _ => Err(wrong(
                    &format!("{at}.schema"),
                    "must be a JSON schema, an object",
                )),
            }
        }
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        _ => Ok(None),
    }
}

/// Formats answers as messages, and chunks as deltas.
pub(super) struct ChatForm {
    /// Whether only the first of several tool calls is returned.
    pub(super) one_tool_call: bool,
    /// Whether the answer must be a tool call.
    pub(super) must_call: bool,
    /// Whether the answer continues a text. White space at its beginning then belongs to it.
    pub(super) continues: bool,
}

/// The content of a choice or of a chunk.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Said {
    Message {
        role: &'static str,
        content: Option<String>,
        #[serde(flatten)]
        more: More,
    },
    Delta {
        content: String,
        /// The role. Only the first chunk has it, because clients concatenate the chunks.
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        #[serde(flatten)]
        more: More,
    },
}

/// The fields besides the text.
#[derive(Serialize)]
pub(super) struct More {
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<ToolCallResponse>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
}

const ROLE: &str = "assistant";

impl ChatForm {
    /// Returns `piece`; a tool call that the token limit has cut is returned as a call.
    fn with_cut_call(&self, mut piece: Piece) -> Piece {
        let is_cut = self.must_call && piece.finish_reason.as_deref() == Some("length");
        // An incomplete call is not shown as text.
        let cut = piece.text.take_if(|_| is_cut);
        if let Some((name, arguments)) = cut.as_deref().and_then(cut_call) {
            piece.tool_calls = Some(vec![ToolCallResponse {
                index: 0,
                id: format!("call_{}", uuid::Uuid::new_v4().simple()),
                tp: ToolCallType::Function,
                function: CalledFunction { name, arguments },
            }]);
        }
        piece
    }
}

impl Form for ChatForm {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    type Said = Said;

    fn scores_end(&self) -> bool {
        false
    }

    fn is_trimmed(&self) -> bool {
        !self.continues
    }

    fn logprobs(&self, scores: &[Shown], _n_before: &mut usize) -> Value {
        for_chat(scores)
    }

    fn read(&self, response: Response, begun: &mut bool) -> Option<Vec<Piece>> {
        match response {
            Response::Done(done) => {
                let choices = done.choices.into_iter().map(|choice| {
                    self.with_cut_call(Piece {
                        text: choice.message.content.map(|text| {
                            let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
                            let tokens = tokens.iter().flatten().filter_map(token_text);
                            match self.continues {
                                true => restore(&text, tokens),
                                false => text,
                            }
                        }),
                        tool_calls: choice.message.tool_calls.map(|mut calls| {
                            calls.truncate(if self.one_tool_call { 1 } else { usize::MAX });
                            calls
                        }),
                        reasoning: choice.message.reasoning_content,
                        finish_reason: Some(choice.finish_reason),
                        scores: Vec::new(),
                    })
                });
                Some(choices.collect())
            }
            Response::Chunk(chunk) => {
                let choices = chunk.choices.into_iter().map(|choice| {
                    let mut calls = choice.delta.tool_calls.unwrap_or_default();
                    calls.retain(|call| !self.one_tool_call || call.index == 0);
                    let text = choice.delta.content.unwrap_or_default();
                    let is_first = !*begun;
                    let text = match choice
                        .logprobs
                        .as_ref()
                        .filter(|_| self.continues && is_first)
                    {
                        Some(token) => restore(&text, token_text(token)),
                        None if self.continues => text,
                        // As in a whole answer, which begins with its first character that is not white space.
                        None if is_first => text.trim_start().to_owned(),
                        None => text,
                    };
                    *begun |= self.continues || !text.is_empty();
                    self.with_cut_call(Piece {
                        text: Some(text),
                        tool_calls: Some(calls).filter(|calls| !calls.is_empty()),
                        reasoning: choice.delta.reasoning_content,
                        finish_reason: choice.finish_reason,
                        scores: Vec::new(),
                    })
                });
                Some(choices.collect())
            }
            _ => None,
        }
    }

    fn whole(&self, _idx: usize, piece: Piece) -> Said {
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

    fn keys(body: Value) -> Result<ChatKeys, ApiError> {
        let mut fields = crate::server::fields::object(body.to_string().as_bytes())?;
        crate::server::fields::take(&mut fields)
    }

    fn plain() -> ChatTemplate {
        let source =
            json!("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{{ day }}");
        ChatTemplate::compile("here", &source, Default::default()).expect("valid")
    }

    fn read(mut body: Value) -> Result<Chat, ApiError> {
        if body["messages"].is_null() {
            body["messages"] =
                json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]);
        }
        keys(body)?.chat(&plain())
    }

    #[test]
    fn formats_become_schemas_or_are_refused() {
        let schema = |format: Value| {
            read(json!({"response_format": format}))
                .expect("sound")
                .schema
        };
        assert_eq!(
            schema(json!({"type": "json_object"})),
            Some(json!({"type": "object"}))
        );
        assert_eq!(schema(json!({"type": "text"})), None);
        let own = json!({"name": "n", "strict": true, "schema": {"enum": [1]}});
        assert_eq!(
            schema(json!({"type": "json_schema", "json_schema": own})),
            Some(json!({"enum": [1]}))
        );
        for (format, at) in [
            (json!("json"), "response_format"),
            (json!({}), "response_format.type"),
            (json!({"type": "xml"}), "response_format.type"),
            (
                json!({"type": "json_object", "schema": {}}),
                "response_format.schema",
            ),
            (
                json!({"type": "json_schema"}),
                "response_format.json_schema",
            ),
            (
                json!({"type": "json_schema", "json_schema": {"name": "n"}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"type": "json_schema", "json_schema": {"schema": {}, "foo": 1}}),
                "response_format.json_schema.foo",
            ),
        ] {
            let error = read(json!({"response_format": format}))
                .err()
                .expect("refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
    }

    #[test]
    fn a_prompt_ends_as_it_is_asked_to() {
        let prefix = json!([{"role": "assistant", "content": "y", "prefix": true}]);
        for (body, expected) in [
            (json!({}), End::Opening),
            (json!({"add_generation_prompt": true}), End::Opening),
            (json!({"add_generation_prompt": false}), End::Closed),
            (json!({"continue_final_message": true}), End::Open),
            (
                json!({"continue_final_message": true, "add_generation_prompt": false}),
                End::Open,
            ),
            (json!({"messages": prefix}), End::Open),
        ] {
            assert_eq!(read(body).expect("sound").conversation.end, expected);
        }
        let user = json!([{"role": "user", "content": "x"}]);
        for (body, at) in [
            (
                json!({"continue_final_message": true, "add_generation_prompt": true}),
                "add_generation_prompt",
            ),
            (
                json!({"messages": prefix, "add_generation_prompt": true}),
                "add_generation_prompt",
            ),
            (
                json!({"continue_final_message": true, "messages": user}),
                "continue_final_message",
            ),
            (
                json!({"continue_final_message": 1}),
                "continue_final_message",
            ),
            (
                json!({"add_generation_prompt": "no"}),
                "add_generation_prompt",
            ),
        ] {
            let error = read(body).err().expect("refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
    }

    #[test]
    fn variables_reach_templates_that_read_them() {
        let of = |kwargs: Value| read(json!({"chat_template_kwargs": kwargs}));
        let read_day = of(json!({"day": ["Monday"], "enable_thinking": false})).expect("sound");
        assert_eq!(read_day.conversation.variables["day"], json!(["Monday"]));
        for (kwargs, at) in [
            (json!([]), "chat_template_kwargs"),
            (json!({"night": 1}), "chat_template_kwargs.night"),
            (
                json!({"enable_thinking": true}),
                "chat_template_kwargs.enable_thinking",
            ),
            (json!({"tools": []}), "chat_template_kwargs.tools"),
        ] {
            let error = of(kwargs).err().expect("refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
        let twice =
            json!({"enable_thinking": true, "chat_template_kwargs": {"enable_thinking": false}});
        let error = read(twice).err().expect("refused");
        assert_eq!(error.body()["error"]["param"], "enable_thinking");
    }

    #[test]
    fn values_of_a_wrong_type_are_named() {
        for (body, at) in [
            (json!({"tool_choice": "any"}), "tool_choice"),
            (json!({"reasoning_effort": "utmost"}), "reasoning_effort"),
            (json!({"reasoning_effort": 3}), "reasoning_effort"),
            (json!({"enable_thinking": "yes"}), "enable_thinking"),
            (json!({"parallel_tool_calls": 1}), "parallel_tool_calls"),
        ] {
            let error = keys(body).err().expect("refused");
            assert_eq!(error.body()["error"]["param"], at);
        }
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
}
