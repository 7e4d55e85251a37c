//! Formats the answer as an object: its items, why it ended, and the settings of its request.

use mistralrs_core::ToolCallResponse;
use serde_json::{Map, Value, json};

use super::settings::Settings;
use crate::server::answers::{Piece, now};
use crate::server::api_error::ApiError;
use crate::server::job::Usage;
use crate::server::stop::whole_characters;

/// Makes a new id that begins with `prefix`.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// The parts of an answer received so far.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) reasoning: Option<String>,
    pub(super) text: Option<String>,
    pub(super) calls: Vec<ToolCallResponse>,
    /// Log-probabilities of the text, if they are wanted.
    pub(super) logprobs: Vec<Value>,
}

impl Parts {
    /// Adds a piece. Returns the finish reason if the piece is the last one.
    pub(super) fn take(&mut self, piece: Piece) -> Option<String> {
        let parts = [
            (&mut self.reasoning, piece.reasoning),
            (&mut self.text, piece.text),
        ];
        for (part, more) in parts {
            if let Some(more) = more.filter(|more| !more.is_empty()) {
                part.get_or_insert_default().push_str(&more);
            }
        }
        self.calls.extend(piece.tool_calls.unwrap_or_default());
        piece.finish_reason
    }

    /// The items of a finished answer.
    fn items(&self, status: &str) -> Vec<Value> {
        let mut items = Vec::new();
        if let Some(reasoning) = &self.reasoning {
            items.push(thought(
                &new_id("rs"),
                whole_characters(reasoning),
                "completed",
            ));
        }
        if self.text.is_some() || self.calls.is_empty() {
            let text = self.text.as_deref().unwrap_or_default();
            let part = text_part(text, &self.logprobs);
            items.push(message(&new_id("msg"), Some(part), status));
        }
        let calls = self.calls.iter();
        items.extend(calls.map(|called| call(&new_id("fc"), called, true, "completed")));
        items
    }
}

/// Formats a message; without a part, a message that begins.
pub(super) fn message(id: &str, part: Option<Value>, status: &str) -> Value {
    let content: Vec<Value> = part.into_iter().collect();
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

pub(super) fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

pub(super) fn thought(id: &str, text: &str, status: &str) -> Value {
    let content: Vec<Value> = match status {
        "in_progress" => Vec::new(),
        _ => vec![json!({"type": "reasoning_text", "text": text})],
    };
    json!({"id": id, "type": "reasoning", "summary": [], "content": content, "status": status})
}

/// Formats a function call, with its arguments if `whole`.
pub(super) fn call(id: &str, call: &ToolCallResponse, whole: bool, status: &str) -> Value {
    let arguments = if whole { &*call.function.arguments } else { "" };
    json!({"id": id, "type": "function_call", "status": status, "call_id": call.id, "name": call.function.name, "arguments": arguments})
}

/// The answer to one request.
#[derive(Debug)]
pub(super) struct Answer {
    id: String,
    created: u64,
    model: String,
    shown: Map<String, Value>,
}

/// The status of an answer that ended for `reason`, and of its last item.
pub(super) fn status(reason: &str) -> &'static str {
    match reason {
        "length" => "incomplete",
        _ => "completed",
    }
}

impl Answer {
    pub(super) fn new(settings: Settings, model: String) -> Self {
        Self {
            id: new_id("resp"),
            created: now(),
            model,
            shown: settings.shown,
        }
    }

    pub(super) fn begun(&self) -> Value {
        self.object("in_progress", Vec::new(), Map::new())
    }

    pub(super) fn ended(&self, parts: &Parts, reason: &str, usage: Usage) -> Value {
        self.ended_with(parts.items(status(reason)), reason, usage)
    }

    pub(super) fn ended_with(&self, items: Vec<Value>, reason: &str, usage: Usage) -> Value {
        let mut more = Map::new();
        if status(reason) == "incomplete" {
            let details = json!({"reason": "max_output_tokens"});
            more.insert("incomplete_details".to_owned(), details);
        } else {
            more.insert("completed_at".to_owned(), json!(now()));
        }
        let usage = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        });
        more.insert("usage".to_owned(), usage);
        self.object(status(reason), items, more)
    }

    pub(super) fn failed(&self, items: Vec<Value>, error: &ApiError) -> Value {
        let message = error.body()["error"]["message"].clone();
        let error = json!({"code": "server_error", "message": message});
        self.object(
            "failed",
            items,
            Map::from_iter([("error".to_owned(), error)]),
        )
    }

    fn object(&self, status: &str, output: Vec<Value>, more: Map<String, Value>) -> Value {
        let head = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "completed_at": null,
            "error": null,
            "incomplete_details": null,
            "model": self.model,
            "output": output,
            "usage": null,
        });
        let mut object = self.shown.clone();
        object.extend(head.as_object().cloned().unwrap_or_default());
        object.extend(more);
        Value::Object(object)
    }
}
