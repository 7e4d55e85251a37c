//! Conversations: mistral.rs 0.8.1 renders them in its engine, where a model without a template, a bad format of a date and a value
//! without a JSON form are panics that end it. It gives a template no variables of the request, always opens a new turn, and takes
//! the calls of a message without text for its text. So they are rendered before, and its own template passes the text on.

use either::Either;
use mistralrs_core::RequestMessage;
use serde_json::{Value, json};

/// Who writes conversations out, and by which text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rendering {
    /// This crate, before the engine gets them.
    Before,
    /// The engine, with a template that has the variables of transformers.
    InEngine,
    /// The engine, with the model's template as it is.
    AsFound,
}

/// A template that passes on what [`rendered`] holds. By the texts of `template`, which it lists behind, mistral.rs still finds out
/// how the model ends its turns and marks its reasoning.
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

/// A conversation that is written out.
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
