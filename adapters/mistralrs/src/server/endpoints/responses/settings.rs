//! The checked settings of a request, and the form in which its answer repeats them.

use serde_json::{Map, Value, json};

use super::{ResponseKeys, input};
use crate::quirks_0_8::forced_tools::ToolUse;
use crate::server::api_error::ApiError;
use crate::server::effort::Effort;
use crate::server::fields::{entries, object_at, only, refuse_others, wrong};
use crate::server::registry::Generation;
use crate::server::tools::{FUNCTION_KEYS, read_function};

#[derive(Debug)]
pub(super) struct Settings {
    /// Messages in the format of chat completions.
    pub(super) messages: Vec<Value>,
    pub(super) tools: Vec<Value>,
    pub(super) tool_choice: Option<ToolUse>,
    pub(super) parallel_tool_calls: bool,
    /// The schema that an answer in JSON must follow.
    pub(super) schema: Option<Value>,
    pub(super) effort: Option<Effort>,
    /// The fields that the answer repeats.
    pub(super) shown: Map<String, Value>,
}

impl Settings {
    pub(super) fn read(
        keys: ResponseKeys,
        shared: &Value,
        model: &Generation,
    ) -> Result<Self, ApiError> {
        refuse_stored(&keys)?;
        only(
            "background",
            keys.background.map(Value::from).as_ref(),
            &json!(false),
        )?;
        only("truncation", keys.truncation.as_ref(), &json!("disabled"))?;
        if let Some(options) = keys.stream_options {
            let options = object_at("stream_options", options)?;
            refuse_others("stream_options", &options, &["include_obfuscation"])?;
        }
        if keys.metadata.as_ref().is_some_and(|data| !data.is_object()) {
            return Err(wrong("metadata", "must be an object"));
        }
        let parallel_tool_calls = keys.parallel_tool_calls.unwrap_or(true);
        let (format, schema) = format(keys.text)?;
        let effort = effort(keys.reasoning.as_ref())?;
        let tools_shown = keys.tools.clone().unwrap_or_else(|| json!([]));
        let choice_shown = keys.tool_choice.clone().unwrap_or_else(|| json!("auto"));
        let shown = json!({
            "instructions": keys.instructions,
            "max_output_tokens": keys.max_output_tokens,
            "max_tool_calls": keys.max_tool_calls,
            "metadata": keys.metadata.unwrap_or_else(|| json!({})),
            "parallel_tool_calls": parallel_tool_calls,
            "previous_response_id": null,
            "reasoning": {"effort": keys.reasoning.as_ref().map(|asked| &asked["effort"]), "summary": null},
            "service_tier": "default",
            "store": false,
            "temperature": shared.get("temperature").cloned().or_else(|| model.sampling.temperature.map(Value::from)),
            "text": {"format": format, "verbosity": "medium"},
            "tool_choice": choice_shown,
            "tools": tools_shown,
            "top_logprobs": keys.top_logprobs.unwrap_or_else(|| json!(0)),
            "top_p": shared.get("top_p").cloned().or_else(|| Some(model.sampling.top_p.unwrap_or(1.0).into())),
            "truncation": "disabled",
            "user": keys.user,
        });
        let Value::Object(shown) = shown else {
            unreachable!("written as an object");
        };
        Ok(Self {
            messages: input::messages(keys.instructions, keys.input)?,
            tools: tools(keys.tools)?,
            tool_choice: keys.tool_choice.map(tool_choice).transpose()?,
            parallel_tool_calls,
            schema,
            effort,
            shown,
        })
    }
}

/// Whether `include` requests log-probabilities, the only supported entry.
pub(super) fn wants_logprobs(include: Option<&Value>) -> Result<bool, ApiError> {
    const LOGPROBS: &str = "message.output_text.logprobs";
    match include {
        None => Ok(false),
        Some(Value::Array(list)) if list.iter().all(|entry| entry == LOGPROBS) => {
            Ok(!list.is_empty())
        }
        Some(_) => {
            let must = format!("must be a list that has \"{LOGPROBS}\" or nothing");
            Err(wrong("include", &must))
        }
    }
}

/// Refuses keys that need stored answers, conversations or prompts.
fn refuse_stored(keys: &ResponseKeys) -> Result<(), ApiError> {
    let stored = [
        ("previous_response_id", &keys.previous_response_id),
        ("conversation", &keys.conversation),
        ("prompt", &keys.prompt),
    ];
    match stored.into_iter().find(|(_, value)| value.is_some()) {
        Some((key, _)) => {
            let message =
                "is not supported: nothing is stored here; send the whole conversation in `input`";
            Err(wrong(key, message))
        }
        None => Ok(()),
    }
}

/// Reads the format in `text`. Returns it as the answer repeats it, and its schema.
fn format(text: Option<Value>) -> Result<(Value, Option<Value>), ApiError> {
    let plain = || (json!({"type": "text"}), None);
    let Some(text) = text else { return Ok(plain()) };
    let mut text = object_at("text", text)?;
    refuse_others("text", &text, &["format", "verbosity"])?;
    only("text.verbosity", text.get("verbosity"), &json!("medium"))?;
    let Some(shown) = text.remove("format") else {
        return Ok(plain());
    };
    let at = "text.format";
    let mut format = object_at(at, shown.clone())?;
    let kind = format
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    match kind {
        "text" | "json_object" => {
            let schema = (kind == "json_object").then(|| json!({"type": "object"}));
            refuse_others(at, &format, &["type"])?;
            Ok((shown, schema))
        }
        "json_schema" => {
            refuse_others(
                at,
                &format,
                &["type", "name", "description", "schema", "strict"],
            )?;
            match format.remove("schema") {
                Some(schema @ Value::Object(_)) => Ok((shown, Some(schema))),
                _ => Err(wrong(
                    "text.format.schema",
                    "must be a JSON schema, an object",
                )),
            }
        }
        _ => {
            let must = "must be \"text\", \"json_object\" or \"json_schema\"";
            Err(wrong("text.format.type", must))
        }
    }
}

fn effort(reasoning: Option<&Value>) -> Result<Option<Effort>, ApiError> {
    let Some(reasoning) = reasoning else {
        return Ok(None);
    };
    let reasoning = object_at("reasoning", reasoning.clone())?;
    refuse_others("reasoning", &reasoning, &["effort"])?;
    let effort = reasoning.get("effort").map(serde::Deserialize::deserialize);
    effort
        .transpose()
        .map_err(|error: serde_json::Error| wrong("reasoning.effort", &error.to_string()))
}

/// Converts functions to the format of chat completions. In this endpoint, the keys of a function are beside its type.
fn tools(tools: Option<Value>) -> Result<Vec<Value>, ApiError> {
    let Some(tools) = tools else {
        return Ok(Vec::new());
    };
    let mut read = Vec::new();
    for (at, tool) in entries("tools", tools)? {
        let mut tool = object_at(&at, tool)?;
        let kind = tool.remove("type").unwrap_or_default();
        if kind != "function" {
            let shown: String = kind.as_str().unwrap_or("?").chars().take(64).collect();
            let message = format!("is `{shown}`; only `function` is supported: no tool runs here");
            return Err(wrong(&format!("{at}.type"), &message));
        }
        refuse_others(&at, &tool, FUNCTION_KEYS)?;
        read.push(json!({"type": "function", "function": read_function(&at, tool)?}));
    }
    Ok(read)
}

fn tool_choice(choice: Value) -> Result<ToolUse, ApiError> {
    let named = |choice: &Value| {
        let name = choice["name"]
            .as_str()
            .filter(|_| choice["type"] == "function")?;
        Some(ToolUse::Function(name.to_owned()))
    };
    match choice.as_str() {
        Some("none") => Ok(ToolUse::None),
        Some("auto") => Ok(ToolUse::Auto),
        Some("required") => Ok(ToolUse::Any),
        _ => named(&choice).ok_or_else(|| {
            let must = "must be none, auto, required, or {\"type\": \"function\", \"name\": ...}";
            wrong("tool_choice", must)
        }),
    }
}
