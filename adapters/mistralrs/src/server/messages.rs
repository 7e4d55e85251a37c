//! Reads the messages of clients: checks every key, and converts them to what the model's chat template reads.

use serde_json::{Map, Value, json};

use super::api_error::ApiError;
use super::fields::{entries, object_at, refuse_others, wrong};
use crate::chat_template::ChatTemplate;

/// Keys of a message that have a meaning.
const KEYS: &[&str] = &[
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "prefix",
];

/// Keys that clients keep from an answer and send back with it. If the template does not read them they are dropped, as
/// in the training of the model.
const KEPT_BY_CLIENTS: &[&str] = &[
    "refusal",
    "annotations",
    "parsed",
    "reasoning",
    "reasoning_content",
    "provider_specific_fields",
];

/// Keys of a part of a message; `cache_control` has no effect.
const PART_KEYS: &[&str] = &["type", "text", "cache_control"];

/// Keys of a tool call. The keys after the first three belong to the client.
const CALL_KEYS: &[&str] = &[
    "id",
    "type",
    "function",
    "index",
    "provider_specific_fields",
];

/// Keys of a called function. The keys after the first two belong to the client.
const CALLED_KEYS: &[&str] = &[
    "name",
    "arguments",
    "parsed_arguments",
    "provider_specific_fields",
];

/// The messages of a conversation.
#[derive(Debug)]
pub(crate) struct Messages {
    pub(crate) list: Vec<Map<String, Value>>,
    /// Whether the answer must continue the last message.
    pub(crate) is_prefix: bool,
}

impl Messages {
    /// Reads the messages under the key `at`, for `template`.
    ///
    /// Text parts are joined by line feeds; parts other than text are refused.
    pub(crate) fn read(
        at: &str,
        messages: Option<Value>,
        template: &ChatTemplate,
        has_tools: bool,
    ) -> Result<Self, ApiError> {
        let Some(Value::Array(messages)) = messages else {
            return Err(wrong(at, "must be a list of messages"));
        };
        if messages.is_empty() {
            return Err(wrong(at, "must have at least one message"));
        }
        let reads = |key: &str| template.mentions(key, has_tools);
        let n_messages = messages.len();
        let mut read = Self {
            list: Vec::with_capacity(n_messages),
            is_prefix: false,
        };
        for (idx, message) in messages.into_iter().enumerate() {
            let at = format!("{at}[{idx}]");
            let (message, is_prefix) = read_message(&at, message, &reads)?;
            if is_prefix && (idx + 1 < n_messages || message["role"] != "assistant") {
                let must = "is for the last message, if it is the assistant's";
                return Err(wrong(&format!("{at}.prefix"), must));
            }
            read.is_prefix = is_prefix;
            read.list.push(message);
        }
        Ok(read)
    }
}

/// Reads a message, and whether it is a prefix of the answer.
fn read_message(
    at: &str,
    message: Value,
    reads: &dyn Fn(&str) -> bool,
) -> Result<(Map<String, Value>, bool), ApiError> {
    let mut fields = object_at(at, message)?;
    let key = |key: &str| format!("{at}.{key}");
    match fields.get("role") {
        Some(Value::String(role)) if role == "developer" => {
            // Reasoning models call a system message `developer`; templates know only `system`.
            fields.insert("role".to_owned(), json!("system"));
        }
        Some(Value::String(role)) if !role.is_empty() => {}
        _ => {
            return Err(wrong(
                &key("role"),
                "must be system, user, assistant or tool",
            ));
        }
    }
    let is_prefix = match fields.remove("prefix") {
        None => false,
        Some(Value::Bool(is_prefix)) => is_prefix,
        Some(_) => return Err(wrong(&key("prefix"), "must be true or false")),
    };
    for name in ["name", "tool_call_id"] {
        if fields.get(name).is_some_and(|value| !value.is_string()) {
            return Err(wrong(&key(name), "must be a text"));
        }
    }
    let calls = match fields.remove("tool_calls") {
        Some(calls) => read_calls(&key("tool_calls"), calls)?,
        None => Vec::new(),
    };
    let content = match fields.remove("content") {
        Some(content) => text(&key("content"), content)?,
        // An empty text: templates concatenate the content with other texts.
        None if !calls.is_empty() => String::new(),
        None => {
            return Err(wrong(
                &key("content"),
                "must be a text or a list of text parts",
            ));
        }
    };
    fields.insert("content".to_owned(), json!(content));
    if !calls.is_empty() {
        if !reads("tool_calls") {
            let message =
                "cannot be shown to this model: its chat template has no place for calls of tools";
            return Err(wrong(&key("tool_calls"), message));
        }
        fields.insert("tool_calls".to_owned(), json!(calls));
    }
    fields.retain(|key, _| !KEPT_BY_CLIENTS.contains(&key.as_str()) || reads(key));
    let unknown = |name: &&String| !KEYS.contains(&name.as_str()) && !reads(name);
    if let Some(name) = fields.keys().find(unknown) {
        let known = [KEYS, KEPT_BY_CLIENTS].concat();
        let alone = Map::from_iter([(name.clone(), Value::Null)]);
        refuse_others(at, &alone, &known)?;
    }
    Ok((fields, is_prefix))
}

/// Reads a content: a text, or a list of parts, which are joined.
pub(crate) fn text(at: &str, content: Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(wrong(at, "must be a text or a list of text parts")),
    };
    let mut texts = Vec::new();
    for (idx, part) in parts.into_iter().enumerate() {
        let at = format!("{at}[{idx}]");
        let mut fields = object_at(&at, part)?;
        match fields.get("type").map(Value::as_str) {
            None | Some(Some("text")) => {}
            Some(Some(kind)) => {
                let kind: String = kind.chars().take(64).collect();
                let message = format!("is `{kind}`; only text is supported");
                return Err(wrong(&format!("{at}.type"), &message));
            }
            Some(None) => return Err(wrong(&format!("{at}.type"), "must be a text")),
        }
        refuse_others(&at, &fields, PART_KEYS)?;
        match fields.remove("text") {
            Some(Value::String(text)) => texts.push(text),
            _ => return Err(wrong(&format!("{at}.text"), "must be a text")),
        }
    }
    Ok(texts.join("\n"))
}

/// Reads tool calls. Arguments that are JSON objects become JSON values, because templates serialise them.
fn read_calls(at: &str, calls: Value) -> Result<Vec<Value>, ApiError> {
    let mut read = Vec::new();
    for (at, call) in entries(at, calls)? {
        let mut call = object_at(&at, call)?;
        refuse_others(&at, &call, CALL_KEYS)?;
        call.retain(|key, _| CALL_KEYS[..3].contains(&key.as_str()));
        if call.get("type").is_some_and(|kind| kind != "function") {
            return Err(wrong(&format!("{at}.type"), "must be \"function\""));
        }
        if call.get("id").is_some_and(|id| !id.is_string()) {
            return Err(wrong(&format!("{at}.id"), "must be a text"));
        }
        call.insert("type".to_owned(), json!("function"));
        let at = format!("{at}.function");
        let function = call.remove("function").unwrap_or_default();
        let mut function = object_at(&at, function)?;
        refuse_others(&at, &function, CALLED_KEYS)?;
        function.retain(|key, _| CALLED_KEYS[..2].contains(&key.as_str()));
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong(&format!("{at}.name"), "must be a text"));
        }
        let arguments = match function.remove("arguments") {
            None => json!({}),
            Some(Value::Object(arguments)) => Value::Object(arguments),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Object(arguments)) => Value::Object(arguments),
                // A model may have generated anything.
                _ => Value::String(text),
            },
            Some(_) => {
                let must = "must be a JSON object written as a text";
                return Err(wrong(&format!("{at}.arguments"), must));
            }
        };
        function.insert("arguments".to_owned(), arguments);
        call.insert("function".to_owned(), Value::Object(function));
        read.push(Value::Object(call));
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(messages: Value) -> Result<Messages, ApiError> {
        let source = "{% for m in messages %}{{ m.role + m.content }}{{ m.tool_calls }}{{ m.thinking }}{% endfor %}";
        let template = ChatTemplate::compile("here", &json!(source), Default::default());
        Messages::read("messages", Some(messages), &template.expect("valid"), false)
    }

    fn one(message: Value) -> Map<String, Value> {
        let mut read = read(json!([message])).expect("sound");
        read.list.remove(0)
    }

    #[test]
    fn what_clients_send_back_is_taken_and_what_the_template_reads_reaches_it() {
        let parts = json!([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"text": "b"}]);
        let message = one(json!({"role": "developer", "content": parts, "name": null}));
        assert_eq!(
            Value::Object(message),
            json!({"role": "system", "content": "a\nb"})
        );
        let kept = json!({"role": "assistant", "content": "x", "refusal": null, "annotations": [], "audio": null,
            "function_call": null, "tool_calls": [], "reasoning_content": "r", "parsed": {"a": 1}, "thinking": "t", "name": "n"});
        let expected = json!({"role": "assistant", "content": "x", "thinking": "t", "name": "n"});
        assert_eq!(Value::Object(one(kept)), expected);
        let call = json!({"id": "c", "index": 0, "function": {"name": "f", "arguments": "{\"a\": 1}", "parsed_arguments": {"a": 1}}});
        let message = one(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        assert_eq!(message["content"], "");
        let expected = json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]);
        assert_eq!(message["tool_calls"], expected);
        let read = read(
            json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "prefix": true}]),
        );
        assert!(read.expect("sound").is_prefix);
    }

    #[test]
    fn what_is_wrong_is_named_where_it_is() {
        let user = |extra: Value| {
            let mut message = json!({"role": "user", "content": "x"});
            for (key, value) in extra.as_object().expect("an object") {
                message[key] = value.clone();
            }
            json!([message])
        };
        let called = |call: Value| user(json!({"tool_calls": [call]}));
        let image = json!({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}});
        for (messages, at) in [
            (json!("hello"), "messages"),
            (json!([]), "messages"),
            (json!(["hello"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (user(json!({"role": 3})), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (user(json!({"content": 3})), "messages[0].content"),
            (
                user(json!({"content": [image]})),
                "messages[0].content[0].type",
            ),
            (user(json!({"content": ["x"]})), "messages[0].content[0]"),
            (
                user(json!({"content": [{"type": "text"}]})),
                "messages[0].content[0].text",
            ),
            (
                user(json!({"content": [{"text": "x", "foo": 1}]})),
                "messages[0].content[0].foo",
            ),
            (user(json!({"foo": 1})), "messages[0].foo"),
            (user(json!({"name": 1})), "messages[0].name"),
            (user(json!({"audio": {"id": "x"}})), "messages[0].audio"),
            (user(json!({"prefix": true})), "messages[0].prefix"),
            (user(json!({"prefix": 1})), "messages[0].prefix"),
            (user(json!({"tool_calls": {}})), "messages[0].tool_calls"),
            (called(json!(1)), "messages[0].tool_calls[0]"),
            (called(json!({})), "messages[0].tool_calls[0].function"),
            (
                called(json!({"type": "x"})),
                "messages[0].tool_calls[0].type",
            ),
            (called(json!({"foo": "x"})), "messages[0].tool_calls[0].foo"),
            (
                called(json!({"function": {}})),
                "messages[0].tool_calls[0].function.name",
            ),
            (
                called(json!({"function": {"name": "f", "arguments": 3}})),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ] {
            let error = read(messages).expect_err("must be refused").body();
            assert_eq!(error["error"]["param"], at);
            let message = error["error"]["message"].as_str().expect("a text");
            assert!(message.starts_with(&format!("`{at}` ")), "{message}");
        }
    }
}
