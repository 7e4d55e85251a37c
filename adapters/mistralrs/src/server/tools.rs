//! Calls of tools that a request insists on.

use serde_json::{Map, Value, json};

use super::answer::ApiError;

/// Makes a call certain where `tool_choice` is `required` or a function: the answer is held to the JSON of one, which mistral.rs
/// reads as a call. What is cut off before its end stays text.
///
/// mistral.rs 0.8.1 takes a function as `tool_choice` without holding the answer to it, and fails the whole batch of an answer
/// that calls none; it does not know `required`.
pub(crate) fn hold_to_call(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    let wrong = |message: String| ApiError::invalid("tool_choice", message);
    let wanted = match fields.get("tool_choice") {
        None => return Ok(()),
        Some(Value::String(choice)) if ["auto", "none"].contains(&choice.as_str()) => {
            return Ok(());
        }
        Some(Value::String(choice)) if choice == "required" => None,
        Some(choice) => match choice["function"]["name"].as_str() {
            Some(name) => Some(name.to_owned()),
            None => {
                return Err(wrong(
                    "`tool_choice` is none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}"
                        .to_owned(),
                ));
            }
        },
    };
    let text = json!({"type": "text"});
    if let Some(key) = ["response_format", "grammar"]
        .iter()
        .find(|key| fields.get(**key).is_some_and(|value| *value != text))
    {
        return Err(wrong(format!(
            "`{key}` and a `tool_choice` that insists on a call exclude each other"
        )));
    }
    let tools = fields.get("tools").and_then(Value::as_array);
    let functions = tools.into_iter().flatten().map(|tool| &tool["function"]);
    let called: Vec<&Value> = functions
        .filter(|function| wanted.is_none() || function["name"].as_str() == wanted.as_deref())
        .collect();
    if called.is_empty() {
        let wanted = wanted.map_or("a tool".to_owned(), |name| format!("`{name}`"));
        return Err(wrong(format!(
            "`tool_choice` asks for {wanted}, which `tools` does not have"
        )));
    }
    let mut calls = Vec::new();
    let mut definitions = Map::new();
    for (idx, function) in called.into_iter().enumerate() {
        let place = format!("#/$defs/{idx}");
        calls.push(call_schema(function, &place));
        definitions.insert(idx.to_string(), parameters(function, &place));
    }
    let mut schema = json!({"anyOf": calls, "$defs": definitions});
    // Between the pieces of JSON at most a space: a small model may otherwise go on with white space to its limit.
    schema["x-guidance"] = json!({"whitespace_pattern": " "});
    fields.insert("tool_choice".to_owned(), json!("auto"));
    fields.insert(
        "response_format".to_owned(),
        json!({"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}),
    );
    Ok(())
}

/// The schema of a call of `function`, whose parameters are the definition `place` of the whole.
fn call_schema(function: &Value, place: &str) -> Value {
    json!({
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": place}},
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

/// The schema of the parameters of `function`, moved to `place` of a larger one: what it says about itself is said from there.
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
    use super::super::fields::tests::fields;
    use super::*;

    fn held(choice: Value, extra: Value) -> Result<Value, ApiError> {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
        let mut body = fields(json!({"tools": [tool("a"), tool("b")], "tool_choice": choice}));
        body.extend(fields(extra));
        hold_to_call(&mut body)?;
        Ok(Value::Object(body))
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
    fn a_call_that_must_be_made_becomes_a_schema() {
        for free in [json!("auto"), json!("none")] {
            let body = held(free.clone(), json!({"response_format": {"type": "text"}}));
            let body = body.expect("nothing to hold to");
            assert_eq!(body["tool_choice"], free);
            assert_eq!(body["response_format"], json!({"type": "text"}));
        }
        let one = json!({"type": "function", "function": {"name": "b"}});
        let body = held(one.clone(), json!({})).expect("known");
        assert_eq!(body["tool_choice"], "auto");
        let schema = &body["response_format"]["json_schema"]["schema"];
        assert_eq!(schema["anyOf"][0]["properties"]["name"]["const"], "b");
        let text = json!({"response_format": {"type": "text"}});
        let any = held(json!("required"), text).expect("known");
        let schema = &any["response_format"]["json_schema"]["schema"];
        assert_eq!(schema["anyOf"].as_array().map(Vec::len), Some(2));
        for (choice, extra) in [
            (json!("any"), json!({})),
            (json!({"type": "function"}), json!({})),
            (
                json!({"type": "function", "function": {"name": "c"}}),
                json!({}),
            ),
            (json!("required"), json!({"tools": []})),
            (one, json!({"grammar": {"type": "regex", "value": "x"}})),
        ] {
            let error = held(choice, extra).expect_err("refused");
            assert_eq!(error.body()["error"]["param"], "tool_choice");
        }
    }
}
