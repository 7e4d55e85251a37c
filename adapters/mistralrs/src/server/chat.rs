//! `POST /v1/chat/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response as HttpResponse};
use mistralrs_core::{
    Constraint, NormalRequest, Request, RequestMessage, Response, TokenizationRequest,
};
use mistralrs_server_core::chat_completion::parse_request;
use mistralrs_server_core::openai::ChatCompletionRequest;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::channel;

use super::App;
use super::answer::ApiError;
use super::exchange::Admission;
use super::fields::only;
use super::guard::Payload;
use super::request::{Body, flag};
use super::stop::StopFilter;
use super::stream::{Kind, Streamed, now};
use crate::engine::submit_tokenization;

/// Keys that only this endpoint has.
const OWN_KEYS: &[&str] = &[
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "enable_thinking",
    "reasoning_effort",
    "parallel_tool_calls",
    "modalities",
    "verbosity",
];

/// Answers a conversation, streamed or not.
pub(crate) async fn chat_completions(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let mut body = Body::read(&app, &bytes, OWN_KEYS)?;
    only(&mut body.fields, "modalities", &json!(["text"]))?;
    only(&mut body.fields, "verbosity", &json!("medium"))?;
    let one_tool_call = body.fields.contains_key("parallel_tool_calls")
        && !flag(&body.fields, "parallel_tool_calls")?;
    body.fields.remove("parallel_tool_calls");
    read_response_format(&mut body.fields)?;
    read_effort(&mut body.fields)?;
    let messages = body.fields.get_mut("messages").map(Value::take);
    body.fields
        .insert("messages".to_owned(), text_messages(messages)?);
    let request = prepare(&app, &body).await?;
    let prompt_tokens = admission
        .within(&app, count_prompt(&app, &body, &request, &admission))
        .await?;
    let mut exchange = body
        .hand_over(&app, admission, "messages", prompt_tokens)?
        .send(&app, request)?;
    if body.stream {
        return Ok(Streamed {
            kind: Kind::Chat,
            lease: body.lease,
            exchange,
            stop: body.stop,
            include_usage: body.include_usage,
            lead: String::new(),
            one_tool_call,
        }
        .into_response());
    }
    let choices = exchange
        .choices(|response| match response {
            Response::Done(done) => Some(done.choices),
            _ => None,
        })
        .await?;
    let choices: Vec<Value> = choices
        .into_iter()
        .map(|(idx, choice)| {
            let full = choice.message.content.as_deref();
            let cut = full.map(|text| StopFilter::cut(&body.stop, text));
            let stopped = cut.as_ref().is_some_and(|(_, stopped)| *stopped);
            let mut message = json!({"role": "assistant", "content": cut.map(|(text, _)| text)});
            if let Some(mut calls) = choice.message.tool_calls {
                if one_tool_call {
                    calls.truncate(1);
                }
                message["tool_calls"] = json!(calls);
            }
            if let Some(reasoning) = &choice.message.reasoning_content {
                message["reasoning_content"] = json!(reasoning);
            }
            let reason = if stopped {
                "stop"
            } else {
                &choice.finish_reason
            };
            json!({"index": idx, "message": message, "logprobs": null, "finish_reason": reason})
        })
        .collect();
    Ok(Json(json!({
        "id": Kind::Chat.id(),
        "object": "chat.completion",
        "created": now(),
        "model": body.lease.name,
        "system_fingerprint": body.lease.hash,
        "choices": choices,
        "usage": exchange.usage(),
    }))
    .into_response())
}

/// mistral.rs's own reading of tools, response format, grammar and sampling.
async fn prepare(app: &App, body: &Body) -> Result<NormalRequest, ApiError> {
    let parsed: ChatCompletionRequest = body.parse()?;
    let (sender, _) = channel(1);
    let (request, _) = parse_request(parsed, app.registry.host().clone(), sender)
        .await
        .map_err(|error| ApiError::invalid("body", error.root_cause().to_string()))?;
    match request {
        Request::Normal(request) => Ok(*request),
        _ => Err(ApiError::internal(
            "a chat request became another kind of request",
        )),
    }
}

/// Renders the conversation, which also shows whether the template takes it.
async fn count_prompt(
    app: &App,
    body: &Body,
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
    if matches!(request.constraint, Constraint::Llguidance(_)) {
        return Err(ApiError::invalid(
            "grammar",
            "this kind of grammar is not supported",
        ));
    }
    let (response, receiver) = channel(1);
    let tokenization = TokenizationRequest {
        text: either::Either::Left(messages.clone()),
        tools: request.tools.clone(),
        add_generation_prompt: true,
        add_special_tokens: true,
        enable_thinking: *enable_thinking,
        reasoning_effort: *reasoning_effort,
        response,
    };
    let engine_id = body.lease.engine_id();
    let held = (body.lease.clone(), admission.places());
    let host = app.registry.host();
    let tokens = submit_tokenization(host, Some(engine_id), tokenization, receiver, held)
        .await
        .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    Ok(tokens.len())
}

/// Makes `response_format` what mistral.rs knows: any JSON object is one that fits an empty schema for objects.
fn read_response_format(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(format) = fields.get("response_format") else {
        return Ok(());
    };
    match format["type"].as_str() {
        Some("text") => {
            fields.remove("response_format");
        }
        Some("json_object") => {
            let schema = json!({"name": "object", "schema": {"type": "object"}});
            let format = json!({"type": "json_schema", "json_schema": schema});
            fields.insert("response_format".to_owned(), format);
        }
        Some("json_schema") if format["json_schema"]["schema"].is_object() => {}
        _ => {
            return Err(ApiError::invalid(
                "response_format",
                "`response_format` is text, json_object, or json_schema with a schema",
            ));
        }
    }
    Ok(())
}

/// Makes `reasoning_effort` one of the three efforts of mistral.rs, which drops any other; `none` turns thinking off.
fn read_effort(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    let effort = match fields.get("reasoning_effort").map(Value::as_str) {
        None | Some(Some("low" | "medium" | "high")) => return Ok(()),
        Some(Some("none")) => {
            fields.entry("enable_thinking").or_insert(json!(false));
            fields.remove("reasoning_effort");
            return Ok(());
        }
        Some(Some("minimal")) => "low",
        Some(Some("xhigh")) => "high",
        Some(_) => {
            return Err(ApiError::invalid(
                "reasoning_effort",
                "`reasoning_effort` is none, minimal, low, medium, high or xhigh",
            ));
        }
    };
    fields.insert("reasoning_effort".to_owned(), json!(effort));
    Ok(())
}

/// The messages with their text parts joined; anything but text is refused, since mistral.rs would go and fetch it.
fn text_messages(messages: Option<Value>) -> Result<Value, ApiError> {
    let wrong = |at: &str, message: &str| ApiError::invalid(at, format!("{at}: {message}"));
    let Some(Value::Array(mut messages)) = messages else {
        return Err(wrong("messages", "expected a list of messages"));
    };
    if messages.is_empty() {
        return Err(wrong("messages", "expected at least one message"));
    }
    for (idx, message) in messages.iter_mut().enumerate() {
        let at = format!("messages[{idx}]");
        let Some(fields) = message.as_object_mut() else {
            return Err(wrong(&at, "expected an object with role and content"));
        };
        fields.retain(|_, value| !value.is_null());
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(wrong(
                &format!("{at}.role"),
                "expected system, user, assistant or tool",
            ));
        }
        // What reasoning models call a system message; templates know only that.
        if fields["role"] == "developer" {
            fields.insert("role".to_owned(), json!("system"));
        }
        match fields.get("content") {
            Some(Value::String(_)) => {}
            None if fields.contains_key("tool_calls") => {}
            Some(Value::Array(parts)) => {
                let texts: Option<Vec<&str>> = parts
                    .iter()
                    .map(|part| {
                        let is_text = part["type"].as_str().is_none_or(|kind| kind == "text");
                        part["text"].as_str().filter(|_| is_text)
                    })
                    .collect();
                match texts {
                    Some(texts) => {
                        let text = texts.join("\n");
                        fields.insert("content".to_owned(), json!(text));
                    }
                    None => {
                        return Err(wrong(
                            &format!("{at}.content"),
                            "only text parts are supported",
                        ));
                    }
                }
            }
            _ => return Err(wrong(&format!("{at}.content"), "expected a text")),
        }
    }
    Ok(Value::Array(messages))
}

#[cfg(test)]
mod tests {
    use super::super::fields::tests::fields;
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

    #[test]
    fn formats_and_efforts_become_those_of_mistralrs_or_are_refused() {
        let read = |body: Value| {
            let mut fields = fields(body);
            read_response_format(&mut fields).and_then(|()| read_effort(&mut fields))?;
            Ok::<_, ApiError>(Value::Object(fields))
        };
        let same = json!({"reasoning_effort": "low", "response_format":
            {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {}}}});
        assert_eq!(read(same.clone()).expect("known"), same);
        let changed = read(
            json!({"reasoning_effort": "minimal", "response_format": {"type": "json_object"}}),
        );
        let changed = changed.expect("known");
        assert_eq!(changed["reasoning_effort"], "low");
        assert_eq!(
            changed["response_format"]["json_schema"]["schema"]["type"],
            "object"
        );
        let off = read(json!({"reasoning_effort": "none", "response_format": {"type": "text"}}));
        assert_eq!(off.expect("known"), json!({"enable_thinking": false}));
        for (key, value) in [
            ("response_format", json!("json")),
            ("response_format", json!({"type": "xml"})),
            ("response_format", json!({"type": "json_schema"})),
            ("reasoning_effort", json!("utmost")),
            ("reasoning_effort", json!(3)),
        ] {
            let error = read(json!({ key: value })).expect_err("unknown");
            assert_eq!(error.body()["error"]["param"], key);
        }
    }

    #[test]
    fn a_developer_is_the_system() {
        let messages = json!([{"role": "developer", "content": "be brief"}]);
        let read = text_messages(Some(messages)).expect("text only");
        assert_eq!(read[0]["role"], "system");
    }
}
