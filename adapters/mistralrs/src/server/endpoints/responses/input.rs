//! Reads the items of a conversation: messages, function calls and their outputs, reasoning.

use serde_json::{Map, Value, json};

use crate::server::api_error::ApiError;
use crate::server::fields::{entries, object_at, refuse_others, wrong};

/// Keys that a client sends back with an item of an earlier answer.
const KEPT: [&str; 2] = ["id", "status"];

/// Converts `input` and `instructions` to messages in the format of chat completions.
pub(super) fn messages(
    instructions: Option<Value>,
    input: Option<Value>,
) -> Result<Vec<Value>, ApiError> {
    let mut messages = Vec::new();
    match instructions {
        None => {}
        Some(Value::String(text)) => messages.push(json!({"role": "system", "content": text})),
        Some(_) => return Err(wrong("instructions", "must be a text")),
    }
    let items = match input {
        Some(Value::String(text)) => {
            messages.push(json!({"role": "user", "content": text}));
            return Ok(messages);
        }
        Some(items @ Value::Array(_)) => entries("input", items)?,
        _ => return Err(wrong("input", "must be a text or a list of items")),
    };
    if items.is_empty() {
        return Err(wrong("input", "must have at least one item"));
    }
    let mut thoughts = Vec::new();
    for (at, item) in items {
        let mut item = object_at(&at, item)?;
        let kind = match item.remove("type") {
            None => "message".to_owned(),
            Some(Value::String(kind)) => kind,
            Some(_) => return Err(wrong(&format!("{at}.type"), "must be a text")),
        };
        match kind.as_str() {
            "message" => messages.push(message(&at, item, &mut thoughts)?),
            "function_call" => {
                let call = call(&at, item)?;
                let last = messages
                    .last_mut()
                    .filter(|last| last["role"] == "assistant");
                // In a chat, the text and the calls of one assistant turn are one message.
                match last.map(|last| &mut last["tool_calls"]) {
                    Some(Value::Array(calls)) => calls.push(call),
                    Some(calls) => *calls = json!([call]),
                    None => {
                        let mut message = json!({"role": "assistant", "tool_calls": [call]});
                        think(&mut message, &mut thoughts);
                        messages.push(message);
                    }
                }
            }
            "function_call_output" => messages.push(outcome(&at, item)?),
            "reasoning" => thoughts.extend(thought(&at, item)?),
            "item_reference" => {
                let message = "refers to what was stored, and nothing is stored here; set `store` to false, so that the client sends \
                               whole items";
                return Err(wrong(&at, message));
            }
            other => {
                let other: String = other.chars().take(64).collect();
                let message = format!(
                    "is `{other}`; message, function_call, function_call_output and reasoning are supported"
                );
                return Err(wrong(&format!("{at}.type"), &message));
            }
        }
    }
    Ok(messages)
}

fn known<'a>(own: &[&'a str]) -> Vec<&'a str> {
    [own, &KEPT[..]].concat()
}

fn message(
    at: &str,
    mut item: Map<String, Value>,
    thoughts: &mut Vec<String>,
) -> Result<Value, ApiError> {
    refuse_others(at, &item, &known(&["role", "content", "phase"]))?;
    let role = item.remove("role").unwrap_or_default();
    let roles = ["system", "developer", "user", "assistant"];
    if !role.as_str().is_some_and(|role| roles.contains(&role)) {
        let must = "must be system, developer, user or assistant";
        return Err(wrong(&format!("{at}.role"), must));
    }
    let content = item.remove("content").unwrap_or_default();
    let content = text(&format!("{at}.content"), content)?;
    let mut message = json!({"role": role, "content": content});
    if message["role"] == "assistant" {
        think(&mut message, thoughts);
    }
    Ok(message)
}

/// Adds reasoning to the message that follows it, for templates that show reasoning.
fn think(message: &mut Value, thoughts: &mut Vec<String>) {
    if !thoughts.is_empty() {
        message["reasoning_content"] = json!(thoughts.join("\n"));
        thoughts.clear();
    }
}

/// Reads a text, or a list of parts, which are joined by line feeds.
fn text(at: &str, content: Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        parts @ Value::Array(_) => entries(at, parts)?,
        _ => return Err(wrong(at, "must be a text or a list of parts")),
    };
    let mut texts = Vec::new();
    for (at, part) in parts {
        let mut part = object_at(&at, part)?;
        let kind = part.remove("type").unwrap_or_default();
        let kinds = ["input_text", "output_text", "text"];
        if !kind.as_str().is_some_and(|kind| kinds.contains(&kind)) {
            let message = "must be input_text or output_text: only text is supported";
            return Err(wrong(&format!("{at}.type"), message));
        }
        refuse_others(&at, &part, &["text", "annotations", "logprobs", "parsed"])?;
        match part.remove("text") {
            Some(Value::String(text)) => texts.push(text),
            _ => return Err(wrong(&format!("{at}.text"), "must be a text")),
        }
    }
    Ok(texts.join("\n"))
}

fn named(at: &str, item: &mut Map<String, Value>, key: &str) -> Result<String, ApiError> {
    match item.remove(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        _ => Err(wrong(&format!("{at}.{key}"), "must be a text")),
    }
}

fn call(at: &str, mut item: Map<String, Value>) -> Result<Value, ApiError> {
    refuse_others(
        at,
        &item,
        &known(&["call_id", "name", "arguments", "parsed_arguments"]),
    )?;
    let (id, name) = (
        named(at, &mut item, "call_id")?,
        named(at, &mut item, "name")?,
    );
    let arguments = named(at, &mut item, "arguments")?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn outcome(at: &str, mut item: Map<String, Value>) -> Result<Value, ApiError> {
    refuse_others(at, &item, &known(&["call_id", "output"]))?;
    let id = named(at, &mut item, "call_id")?;
    let output = item.remove("output").unwrap_or_default();
    let output = text(&format!("{at}.output"), output)?;
    Ok(json!({"role": "tool", "tool_call_id": id, "content": output}))
}

/// Reads the text of a reasoning item; summaries are ignored.
fn thought(at: &str, mut item: Map<String, Value>) -> Result<Option<String>, ApiError> {
    refuse_others(at, &item, &known(&["summary", "content"]))?;
    let Some(content) = item.remove("content") else {
        return Ok(None);
    };
    let mut texts = Vec::new();
    for (at, part) in entries(&format!("{at}.content"), content)? {
        match &part["text"] {
            Value::String(text) => texts.push(text.clone()),
            _ => return Err(wrong(&format!("{at}.text"), "must be a text")),
        }
    }
    Ok((!texts.is_empty()).then(|| texts.join("\n")))
}
