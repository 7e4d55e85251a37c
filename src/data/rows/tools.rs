//! Reads tools and tool calls: lists or their JSON text, also OpenAI's older `functions` and `function_call`.

use monteclora_converters::json;
use serde_json::{Map, Value, json};

use super::{
    json_place::long_integers,
    read::Reader,
    value::{is_empty, kind, missing_or_wrong, nearest, without_indices},
};

impl Reader<'_> {
    /// The tools that the model may call: `tools` unchanged, or `functions` in the form of tools.
    pub(super) fn tools(&mut self) -> Option<Vec<Value>> {
        let tools = self.tool_list("tools");
        let functions = self.tool_list("functions");
        let (tools, functions) = (tools?, functions?);
        if functions.is_empty() {
            return Some(tools);
        }
        if !tools.is_empty() {
            let problem = "stands beside `tools`, which says the same";
            return self.refuse("functions", problem, "keep one of them");
        }
        let as_tool = |function: Value| match function.get("function") {
            Some(_) => function,
            None => json!({"type": "function", "function": function}),
        };
        Some(functions.into_iter().map(as_tool).collect())
    }

    fn tool_list(&mut self, key: &str) -> Option<Vec<Value>> {
        const FIX: &str = "expected a list of tools";
        let list = match self.get(key) {
            None => return Some(Vec::new()),
            Some(Value::Array(tools)) => tools.clone(),
            Some(Value::String(text)) if text.trim().is_empty() => return Some(Vec::new()),
            // Tables without nested columns keep lists as text.
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Array(tools)) => tools,
                _ => return self.refuse(key, "found a string that is not a JSON list", FIX),
            },
            other => return self.refuse(key, missing_or_wrong(other), FIX),
        };
        let mut tools = Vec::with_capacity(list.len());
        for (idx, tool) in list.into_iter().enumerate() {
            let decoded = match &tool {
                Value::String(text) => serde_json::from_str(text).unwrap_or(Value::Null),
                _ => tool,
            };
            match decoded {
                Value::Object(_) => tools.push(decoded),
                other => {
                    let found = format!("found {}", kind(&other));
                    self.refuse::<()>(
                        format!("{key}[{idx}]"),
                        found,
                        "expected the description of a tool: an object",
                    );
                }
            }
        }
        Some(tools)
    }

    /// Converts the calls of a message to the form that templates expect: `function_call` becomes a call, and arguments
    /// given as JSON text become an object.
    pub(super) fn calls(&mut self, at: &str, fields: &mut Map<String, Value>) {
        if fields
            .get("function_call")
            .is_some_and(|call| !is_empty(call))
        {
            if fields
                .get("tool_calls")
                .is_some_and(|calls| !is_empty(calls))
            {
                self.refuse::<()>(
                    format!("{at}.function_call"),
                    "stands beside `tool_calls`, which says the same",
                    "keep one of them",
                );
                return;
            }
            let mut call = fields.shift_remove("function_call").unwrap_or_default();
            self.arguments(&format!("{at}.function_call"), &mut call);
            let call = json!({"type": "function", "function": call});
            fields.insert("tool_calls".to_owned(), json!([call]));
            return;
        }
        let calls = match fields.get_mut("tool_calls") {
            None | Some(Value::Null) => return,
            Some(Value::Array(calls)) => calls,
            Some(other) => {
                let found = format!("found {}", kind(other));
                return self
                    .refuse(
                        format!("{at}.tool_calls"),
                        found,
                        "expected a list of calls",
                    )
                    .unwrap_or_default();
            }
        };
        for (idx, call) in calls.iter_mut().enumerate() {
            let at = format!("{at}.tool_calls[{idx}]");
            self.call_keys(&at, call, &["id", "type", "function", "name", "arguments"]);
            match call.get_mut("function") {
                Some(function) => {
                    let at = format!("{at}.function");
                    self.arguments(&at, function);
                    self.call_keys(&at, function, &["name", "arguments"]);
                }
                None => self.arguments(&at, call),
            }
        }
    }

    /// Checks the keys of a call that are not of the usual form. A misspelt key is refused; another is noted for the
    /// template.
    fn call_keys(&mut self, at: &str, call: &Value, known: &[&'static str]) {
        let Value::Object(object) = call else {
            let found = format!("found {}", kind(call));
            self.refuse::<()>(at, found, "expected a call: an object");
            return;
        };
        let odd =
            |(key, value): &(&String, &Value)| !known.contains(&key.as_str()) && !is_empty(value);
        for (key, _) in object.iter().filter(odd) {
            let absent = known
                .iter()
                .copied()
                .filter(|name| !object.contains_key(*name));
            match nearest(key, absent) {
                Some(meant) => self.refuse_misspelt(format!("{at}.{key}"), meant),
                None => self.note_for_template(format!("{}.{key}", without_indices(at))),
            }
        }
    }

    /// Decodes a call's arguments if they are JSON text. transformers' templates expect the object, but clients of
    /// OpenAI's interface send the text.
    pub(super) fn arguments(&mut self, at: &str, call: &mut Value) {
        const FIX: &str = "write the object itself, or its JSON text";
        let Some(arguments) = call.get_mut("arguments") else {
            return;
        };
        let Value::String(text) = arguments else {
            return;
        };
        // Calls without arguments often have an empty text.
        let object = if text.trim().is_empty() { "{}" } else { text };
        if let Some((_, number)) = long_integers(object).first() {
            let found = format!("the number {number} in it is too long to be kept exactly");
            self.refuse::<()>(format!("{at}.arguments"), found, "write it as a string");
            return;
        }
        let found = match json::parse(object, json::Limits::NONE) {
            Ok(decoded @ Value::Object(_)) => {
                *arguments = decoded;
                self.notes.n_decoded_arguments += 1;
                return;
            }
            Ok(other) => format!("found the JSON text of {}", kind(&other)),
            Err(error) => format!("found text that is not JSON: {error}"),
        };
        self.refuse::<()>(format!("{at}.arguments"), found, FIX);
    }

    /// Reads ShareGPT's `function_call` turn: `{"name", "arguments"}`, or a list of them, usually as text.
    pub(super) fn called(&mut self, field: &str, value: Option<&Value>) -> Option<Vec<Value>> {
        let calls = match value {
            Some(Value::String(text)) => serde_json::from_str(text).ok(),
            other => other.cloned(),
        };
        let mut calls = match calls {
            Some(Value::Array(calls)) => calls,
            call => call.into_iter().collect(),
        };
        let named = |call: &Value| call.get("name").is_some_and(Value::is_string);
        if calls.is_empty() || !calls.iter().all(named) {
            return self.refuse(
                field,
                "is not a function call",
                "expected {\"name\": ..., \"arguments\": ...} as a string",
            );
        }
        for call in &mut calls {
            self.arguments(field, call);
        }
        let typed = |call| json!({"type": "function", "function": call});
        Some(calls.into_iter().map(typed).collect())
    }
}
