//! Conversations. mistral.rs 0.8.1 renders them in its engine, where a missing template, an invalid date format or a
//! value without a JSON form is a panic that ends the engine. It gives a template no variables of the request, always
//! opens a new turn, and takes the calls of a message without text as its text. So this crate renders conversations
//! first, and the engine's template passes the text on.

use either::Either;
use mistralrs_core::RequestMessage;
use serde_json::{Value, json};

/// Who renders conversations, and with which template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rendering {
    /// This crate renders, before the engine gets the text.
    Before,
    /// The engine renders, with a template that has the variables of transformers.
    InEngine,
    /// The engine renders, with the model's template unchanged.
    AsFound,
}

/// A template that passes on the content of [`rendered`]. It lists the texts of `template` after it, because mistral.rs
/// finds in them how the model ends its turns and marks its reasoning.
pub(crate) fn passing_on(template: Value) -> Value {
    let text = |name: &str| json!({"name": name, "template": "{{ messages[0]['content'] }}"});
    let mut list = vec![text("tool_use"), text("default")];
    let sources = match template {
        Value::Array(named) => named
            .iter()
            .map(|entry| entry["template"].clone())
            .collect(),
        source => vec![source],
    };
    let sources = sources.iter().enumerate();
    list.extend(
        sources.map(|(idx, source)| json!({"name": format!("model-{idx}"), "template": source})),
    );
    Value::Array(list)
}

/// Makes the request message of a rendered conversation.
pub(crate) fn rendered(text: String) -> RequestMessage {
    let message = [("role", "user".to_owned()), ("content", text)]
        .into_iter()
        .map(|(key, text)| (key.to_owned(), Either::Left(text)));
    RequestMessage::Chat {
        messages: vec![message.collect()],
        enable_thinking: None,
        reasoning_effort: None,
    }
}
