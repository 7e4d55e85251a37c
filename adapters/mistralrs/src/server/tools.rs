//! Reads the tools of a request: checks every key.

use mistralrs_core::Tool;
use serde_json::{Map, Value, json};

use super::api_error::ApiError;
use super::fields::{entries, object_at, refuse_others, theirs, wrong};
use crate::chat_template::ChatTemplate;

/// Keys of a tool; `cache_control` has no effect.
const TOOL_KEYS: &[&str] = &["type", "function", "cache_control"];

/// Keys of a function. A forced call always follows its schema, so `strict` has no effect.
pub(crate) const FUNCTION_KEYS: &[&str] = &["name", "description", "parameters", "strict"];

/// Reads the list of tools under `tools`.
pub(crate) fn read(tools: Option<Value>) -> Result<Vec<Value>, ApiError> {
    let Some(tools) = tools else {
        return Ok(Vec::new());
    };
    let mut read = Vec::new();
    for (at, tool) in entries("tools", tools)? {
        let mut tool = object_at(&at, tool)?;
        if tool.get("type").is_some_and(|kind| kind != "function") {
            let must = "must be \"function\": tools run at the client, none here";
            return Err(wrong(&format!("{at}.type"), must));
        }
        refuse_others(&at, &tool, TOOL_KEYS)?;
        let at = format!("{at}.function");
        let function = object_at(&at, tool.remove("function").unwrap_or_default())?;
        read.push(json!({"type": "function", "function": read_function(&at, function)?}));
    }
    Ok(read)
}

/// Reads a function in the form that templates know.
pub(crate) fn read_function(
    at: &str,
    mut function: Map<String, Value>,
) -> Result<Map<String, Value>, ApiError> {
    refuse_others(at, &function, FUNCTION_KEYS)?;
    function.remove("strict");
    let is_name = |name: &str| !name.is_empty();
    if !function
        .get("name")
        .and_then(Value::as_str)
        .is_some_and(is_name)
    {
        return Err(wrong(
            &format!("{at}.name"),
            "must be the name of the function",
        ));
    }
    if function
        .get("description")
        .is_some_and(|text| !text.is_string())
    {
        return Err(wrong(&format!("{at}.description"), "must be a text"));
    }
    if function
        .get("parameters")
        .is_some_and(|schema| !schema.is_object())
    {
        return Err(wrong(
            &format!("{at}.parameters"),
            "must be a JSON schema, an object",
        ));
    }
    Ok(function)
}

/// Refuses tools that the template would not show to the model.
pub(crate) fn refuse_unseen(tools: &[Value], template: &ChatTemplate) -> Result<(), ApiError> {
    if tools.is_empty() || template.takes_tools() {
        return Ok(());
    }
    let message = "this model's chat template has no place for `tools`, so that it would not see them; ask a model that was trained \
                   to call tools, or give a template that shows them with `chat_template` in serve.toml or `--chat-template`";
    Err(ApiError::invalid("tools", message))
}

/// Converts `tools` to the type of mistral.rs, which uses them to find calls in an answer.
pub(crate) fn told(tools: Vec<Value>) -> Result<Option<Vec<Tool>>, ApiError> {
    if tools.is_empty() {
        return Ok(None);
    }
    theirs("tools", Value::Array(tools)).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_tool_is_named_where_it_is() {
        let of = |function: Value| json!([{"type": "function", "function": function}]);
        for (tools, at) in [
            (json!({}), "tools"),
            (json!("x"), "tools"),
            (json!([1]), "tools[0]"),
            (json!([{}]), "tools[0].function"),
            (json!([{"type": "web_search"}]), "tools[0].type"),
            (json!([{"type": "function", "foo": 1}]), "tools[0].foo"),
            (of(json!(1)), "tools[0].function"),
            (of(json!({"name": ""})), "tools[0].function.name"),
            (of(json!({"name": "f", "foo": 1})), "tools[0].function.foo"),
            (
                of(json!({"name": "f", "description": 1})),
                "tools[0].function.description",
            ),
            (
                of(json!({"name": "f", "parameters": "x"})),
                "tools[0].function.parameters",
            ),
        ] {
            let error = read(Some(tools)).expect_err("must be refused").body();
            assert_eq!(error["error"]["param"], at);
        }
        let tools = of(
            json!({"name": "f", "strict": true, "parameters": {"type": "object"}, "description": null}),
        );
        let read = read(Some(tools)).expect("sound");
        assert_eq!(
            read,
            [
                json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})
            ]
        );
        assert_eq!(told(read).expect("sound").map(|tools| tools.len()), Some(1));
    }
}
