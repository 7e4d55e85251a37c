//! Reads what accompanies the turns of a row: alpaca's earlier turns, and the chat template's variables.

use serde_json::{Map, Value};

use super::{
    read::Reader,
    row::{Message, Role},
    value::missing_or_wrong,
};

impl Reader<'_> {
    /// Reads alpaca's earlier turns, `[[user, assistant], ...]`, which LLaMA-Factory trains like the last one.
    pub(super) fn history(&mut self) -> Option<Vec<Message>> {
        const FIX: &str = "expected a list of earlier turns, each [user, assistant]";
        let text;
        let list = match self.get("history") {
            None => return Some(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(Value::String(string)) if string.trim().is_empty() => return Some(Vec::new()),
            Some(Value::String(string)) => match serde_json::from_str(string) {
                Ok(Value::Array(list)) => {
                    text = list;
                    &text
                }
                _ => {
                    let found = "found a string that is not a JSON list";
                    return self.refuse("history", found, FIX);
                }
            },
            other => return self.refuse("history", missing_or_wrong(other), FIX),
        };
        let mut messages = Vec::with_capacity(2 * list.len());
        for (idx, pair) in list.iter().enumerate() {
            match pair.as_array().map(Vec::as_slice) {
                Some([Value::String(user), Value::String(assistant)]) => {
                    messages.push(Message::new(Role::User, user));
                    messages.push(Message::new(Role::Assistant, assistant));
                }
                _ => return self.refuse(format!("history[{idx}]"), "is no pair of texts", FIX),
            }
        }
        Some(messages)
    }

    /// Reads the chat template's variables (an object or its JSON text) and the documents.
    pub(super) fn variables(&mut self) -> Map<String, Value> {
        const KWARGS: &str = "chat_template_kwargs";
        /// Variables that the row's other columns or the trainer set.
        const TAKEN: [&str; 5] = [
            "messages",
            "tools",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
        ];
        let decoded = |value: &Value| match value {
            Value::String(text) if text.trim().is_empty() => Some(Value::Null),
            Value::String(text) => serde_json::from_str(text).ok(),
            other => Some(other.clone()),
        };
        let mut variables = match self.get(KWARGS).map(decoded) {
            None | Some(Some(Value::Null)) => Map::new(),
            Some(Some(Value::Object(variables))) => variables,
            Some(_) => {
                let found = "is neither an object nor the JSON text of one";
                self.refuse(KWARGS, found, "expected the template's variables by name")
                    .unwrap_or_default()
            }
        };
        for name in TAKEN.iter().filter(|name| variables.contains_key(**name)) {
            let problem = "is not for a row to say here";
            self.refuse::<()>(format!("{KWARGS}.{name}"), problem, "remove it");
        }
        variables.retain(|_, value| !value.is_null());
        match self.get("documents").map(decoded) {
            None | Some(Some(Value::Null)) => {}
            Some(Some(documents @ Value::Array(_))) => {
                variables.insert("documents".to_owned(), documents);
            }
            Some(_) => {
                let fix = "expected a list of documents, for the chat template";
                self.refuse::<()>("documents", "is not a list", fix);
            }
        }
        variables
    }
}
