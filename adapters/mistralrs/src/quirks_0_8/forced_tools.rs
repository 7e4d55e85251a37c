//! Forced tool calls. mistral.rs 0.8.1 accepts a function as `tool_choice` but does not constrain the answer to it. If
//! such an answer has no call, it fails the whole batch. It does not know `required`.

use mistralrs_core::ToolChoice;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use crate::server::api_error::ApiError;
use crate::server::fields::checked;

/// The value of `tool_choice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolUse {
    None,
    Auto,
    Any,
    Function(String),
}

impl<'de> Deserialize<'de> for ToolUse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let must =
            "is none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}";
        checked(deserializer, must, |value| match value.as_str() {
            Some("none") => Some(Self::None),
            Some("auto") => Some(Self::Auto),
            Some("required") => Some(Self::Any),
            _ => Some(Self::Function(
                value["function"]["name"].as_str()?.to_owned(),
            )),
        })
    }
}

impl ToolUse {
    /// The tool choice for mistral.rs. It does not get a forced call, because the [`schema`](Self::schema) enforces the
    /// call.
    pub(crate) fn told(&self) -> ToolChoice {
        match self {
            Self::None => ToolChoice::None,
            _ => ToolChoice::Auto,
        }
    }

    /// Whether the answer must be a call.
    pub(crate) fn must_call(&self) -> bool {
        matches!(self, Self::Any | Self::Function(_))
    }

    /// The schema of an answer that must call one of `tools`. mistral.rs reads such an answer as a call; an answer that
    /// is cut off stays text.
    pub(crate) fn schema(&self, tools: Option<&Value>) -> Result<Value, ApiError> {
        let wanted = match self {
            Self::Function(name) => Some(name.as_str()),
            _ => None,
        };
        let tools = tools.and_then(Value::as_array).into_iter().flatten();
        let called: Vec<&Value> = tools
            .map(|tool| &tool["function"])
            .filter(|function| wanted.is_none() || function["name"].as_str() == wanted)
            .collect();
        if called.is_empty() {
            let wanted = wanted.map_or("a tool".to_owned(), |name| format!("`{name}`"));
            return Err(ApiError::invalid(
                "tool_choice",
                format!("`tool_choice` asks for {wanted}, which `tools` does not have"),
            ));
        }
        let mut calls = Vec::new();
        let mut definitions = Map::new();
        for (idx, function) in called.into_iter().enumerate() {
            let place = format!("#/$defs/{idx}");
            calls.push(call_schema(function, &place));
            definitions.insert(idx.to_string(), parameters(function, &place));
        }
        // At most a space between the parts of the JSON: a small model may otherwise generate white space up to its
        // limit.
        Ok(json!({
            "anyOf": calls,
            "$defs": definitions,
            "x-guidance": {"whitespace_pattern": " "},
        }))
    }
}

/// The name and the available arguments of a call whose text was cut off; none if the text ends in the name.
///
/// mistral.rs treats an incomplete call as text.
pub(crate) fn cut_call(text: &str) -> Option<(String, String)> {
    let after =
        |text: &'_ str, part: &str| Some(text.trim_start().strip_prefix(part)?.trim_start().len());
    let rest = |text: &str, part: &str| after(text, part).map(|length| text.len() - length);
    let mut at = 0;
    for part in ["{", "\"name\"", ":"] {
        at += rest(&text[at..], part)?;
    }
    let mut names = serde_json::Deserializer::from_str(&text[at..]).into_iter::<String>();
    let name = names.next()?.ok()?;
    at += names.byte_offset();
    for part in [",", "\"arguments\"", ":"] {
        match rest(&text[at..], part) {
            Some(length) => at += length,
            None => return Some((name, String::new())),
        }
    }
    Some((name, text[at..].to_owned()))
}

/// The schema of a call of `function`; its parameters are the definition at `place` of the whole schema.
fn call_schema(function: &Value, place: &str) -> Value {
    json!({
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": place}},
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

/// The schema of the parameters of `function`, moved to `place` of a larger schema. References within it are changed
/// accordingly.
fn parameters(function: &Value, place: &str) -> Value {
    fn move_references(value: &mut Value, place: &str) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    match value {
                        Value::String(text) if key == "$ref" && text.starts_with('#') => {
                            text.replace_range(..1, place);
                        }
                        value => move_references(value, place),
                    }
                }
            }
            Value::Array(list) => {
                for value in list {
                    move_references(value, place);
                }
            }
            _ => {}
        }
    }
    match &function["parameters"] {
        Value::Null => json!({"type": "object"}),
        parameters => {
            let mut parameters = parameters.clone();
            move_references(&mut parameters, place);
            parameters
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(choice: &Value) -> Result<Value, ApiError> {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
        let choice = ToolUse::deserialize(choice).expect("a choice");
        choice.schema(Some(&json!([tool("a"), tool("b")])))
    }

    #[test]
    fn a_schema_is_moved_with_what_it_says_about_itself() {
        let function = json!({"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/A"},
            "b": {"items": [{"$ref": "#"}, {"$ref": "https://a.example/b"}]}}, "$defs": {"A": {"enum": ["#/"]}}}});
        let moved = json!({"properties": {"a": {"$ref": "#/$defs/3/$defs/A"},
            "b": {"items": [{"$ref": "#/$defs/3"}, {"$ref": "https://a.example/b"}]}}, "$defs": {"A": {"enum": ["#/"]}}});
        assert_eq!(parameters(&function, "#/$defs/3"), moved);
        assert_eq!(
            parameters(&json!({}), "#/$defs/0"),
            json!({"type": "object"})
        );
    }

    #[test]
    fn a_cut_call_is_a_call_as_far_as_it_goes() {
        let call = |name: &str, arguments: &str| Some((name.to_owned(), arguments.to_owned()));
        for (text, expected) in [
            (
                "{\"name\": \"a\", \"arguments\": {\"k\": \"x",
                call("a", "{\"k\": \"x"),
            ),
            ("{\"name\":\"a\",\"arguments\":", call("a", "")),
            ("{ \"name\" : \"a\\\"b\" , \"argu", call("a\"b", "")),
            ("{\"name\": \"a\"", call("a", "")),
            ("{\"name\": \"a", None),
            ("{\"nam", None),
            ("", None),
            ("text", None),
        ] {
            assert_eq!(cut_call(text), expected, "{text}");
        }
    }

    #[test]
    fn a_call_that_must_be_made_becomes_a_schema() {
        for (choice, must_call) in [("auto", false), ("none", false), ("required", true)] {
            let choice = ToolUse::deserialize(json!(choice)).expect("a choice");
            assert_eq!(choice.must_call(), must_call);
        }
        let one = json!({"type": "function", "function": {"name": "b"}});
        let schema = held(&one).expect("known");
        assert_eq!(schema["anyOf"][0]["properties"]["name"]["const"], "b");
        let any = held(&json!("required")).expect("known");
        assert_eq!(any["anyOf"].as_array().map(Vec::len), Some(2));
        for wrong in [json!("any"), json!({"type": "function"}), json!(3)] {
            assert!(ToolUse::deserialize(&wrong).is_err(), "{wrong}");
        }
        let unknown = json!({"type": "function", "function": {"name": "c"}});
        let nothing = ToolUse::Any.schema(None);
        for error in [held(&unknown), nothing] {
            let error = error.expect_err("refused");
            assert_eq!(error.body()["error"]["param"], "tool_choice");
        }
    }
}
