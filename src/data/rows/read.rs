//! One JSON object -> a checked row; every problem is collected, none hides another.

use monteclora_converters::Problem;
use serde_json::{Map, Value};

use super::{Choices, FieldNames, Message, Role, Row, RowContent, RowFormat, json};
use crate::data::error::field_problem;

/// Parses and checks one row whose fields have their own names. With `format` absent it is detected by the keys.
///
/// # Errors
/// Every problem of the row.
pub fn parse_row(
    bytes: &[u8],
    format: Option<RowFormat>,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    parse_named_row(bytes, format, &FieldNames::default())
}

/// As [`parse_row`], with the names that the file gives to the fields.
///
/// # Errors
/// Every problem of the row, in the file's names.
pub fn parse_named_row(
    bytes: &[u8],
    format: Option<RowFormat>,
    names: &FieldNames,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    let mut object = object(bytes)?;
    names.apply(&mut object);
    checked_row(&mut object, format).map_err(|problems| {
        problems
            .into_iter()
            .map(|problem| names.in_file_words(problem))
            .collect()
    })
}

/// Parses a row that is to be answered: as [`parse_row`], but it need not hold the answer, and one that it holds means nothing.
///
/// # Errors
/// Every problem of the row.
pub fn parse_question(bytes: &[u8]) -> Result<Row, Vec<Problem>> {
    let mut object = object(bytes)?;
    let has_choices = object.get("choices").is_some_and(Value::is_array);
    if has_choices && object.get("answer").is_none_or(Value::is_null) {
        object.insert("answer".to_owned(), 0.into());
    } else if !has_choices {
        if object.contains_key("prompt") && !object.contains_key("completion") {
            object.insert("completion".to_owned(), UNKNOWN.into());
        }
        if object.contains_key("instruction") && !object.contains_key("output") {
            object.insert("output".to_owned(), UNKNOWN.into());
        }
        if let Some(Value::Array(messages)) = object.get_mut("messages")
            && is_unanswered(messages)
        {
            messages
                .push(serde_json::json!({ "role": Role::Assistant.name(), "content": UNKNOWN }));
        }
    }
    checked_row(&mut object, None).map(|(_, row)| row)
}

/// Stands in the place of an answer that nobody looks at.
const UNKNOWN: &str = "?";

fn object(bytes: &[u8]) -> Result<Map<String, Value>, Vec<Problem>> {
    match json::parse(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(vec![field_problem(
            "row",
            format!("found {}", kind(&other)),
            "expected one JSON object a line",
        )]),
        Err(problem) => Err(vec![problem]),
    }
}

/// Whether a conversation ends before the assistant's turn.
fn is_unanswered(messages: &[Value]) -> bool {
    messages
        .last()
        .and_then(|message| message.get("role"))
        .is_some_and(|role| role != Role::Assistant.name())
}

fn checked_row(
    object: &mut Map<String, Value>,
    format: Option<RowFormat>,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    complete_with_answer(object).map_err(|problem| vec![problem])?;
    let format = match format {
        Some(format) => format,
        None => RowFormat::detect(object).map_err(|problem| vec![problem])?,
    };
    let mut reader = Reader {
        object,
        problems: Vec::new(),
    };
    let content = reader.content(format);
    let choices = content.as_ref().and_then(|content| reader.choices(content));
    match (content, reader.problems) {
        (Some(content), problems) if problems.is_empty() => Ok((format, Row { content, choices })),
        (_, problems) => Err(problems),
    }
}

/// A row of `choices` and `answer` need not repeat the answer: it becomes the completion of a prompt that has none, or the
/// assistant turn of a conversation that ends before one.
fn complete_with_answer(object: &mut Map<String, Value>) -> Result<(), Problem> {
    let Some(Value::Array(choices)) = object.get("choices") else {
        return Ok(());
    };
    let prompt_alone = object.contains_key("prompt") && !object.contains_key("completion");
    let unanswered = match object.get("messages") {
        Some(Value::Array(messages)) => is_unanswered(messages),
        _ => false,
    };
    if !prompt_alone && !unanswered {
        return Ok(());
    }
    let right = match object.get("answer") {
        Some(Value::Number(number)) => number
            .as_u64()
            .and_then(|idx| choices.get(usize::try_from(idx).ok()?)),
        Some(answer) => choices.iter().find(|choice| *choice == answer),
        None => None,
    };
    let Some(right) = right.cloned() else {
        return Err(field_problem(
            "answer",
            match object.get("answer") {
                None => "is missing".to_owned(),
                Some(answer) => format!("found {answer}, which is none of the choices"),
            },
            "expected the index of the right choice, from 0, or its text",
        ));
    };
    if prompt_alone {
        object.insert("completion".to_owned(), right);
    } else if let Some(Value::Array(messages)) = object.get_mut("messages") {
        messages.push(serde_json::json!({ "role": Role::Assistant.name(), "content": right }));
    }
    Ok(())
}

/// Reads fields and collects what is wrong with them; `None` stands for a field with a problem.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn refuse(
        &mut self,
        field: impl Into<String>,
        problem: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problems.push(field_problem(field, problem, fix));
    }

    fn content(&mut self, format: RowFormat) -> Option<RowContent> {
        match format {
            RowFormat::Messages => {
                let messages = self.list("messages").map(|list| {
                    list.iter()
                        .enumerate()
                        .map(|(idx, value)| self.message("messages", idx, value))
                        .collect::<Vec<_>>()
                });
                let tools = self.tools();
                self.conversation(messages?, tools)
            }
            RowFormat::Sharegpt => {
                let turns = self.list("conversations").map(|list| {
                    list.iter()
                        .enumerate()
                        .map(|(idx, value)| self.turn(idx, value))
                        .collect::<Vec<_>>()
                });
                let system = self.optional_text("system");
                let tools = self.tools();
                let mut messages = turns?;
                if let Some(system) = system.filter(|text| !text.is_empty()) {
                    messages.insert(0, Some(Message::new(Role::System, system)));
                }
                self.conversation(messages, tools)
            }
            RowFormat::Alpaca => {
                let instruction = self.text("instruction");
                let input = self.optional_text("input").unwrap_or_default();
                let output = self.text("output");
                let system = self.optional_text("system").filter(|text| !text.is_empty());
                let mut user = instruction?;
                if !input.is_empty() {
                    user = format!("{user}\n\n{input}");
                }
                let mut messages = Vec::new();
                messages.extend(system.map(|text| Message::new(Role::System, text)));
                messages.push(Message::new(Role::User, user));
                messages.push(Message::new(Role::Assistant, output?));
                Some(RowContent::Conversation {
                    messages,
                    tools: Vec::new(),
                })
            }
            RowFormat::PromptCompletion
                if self.object.get("prompt").is_some_and(Value::is_array)
                    && self.object.get("completion").is_some_and(Value::is_array) =>
            {
                self.prompt_and_completion_messages()
            }
            RowFormat::PromptCompletion => {
                let prompt = self.text("prompt");
                let completion = self.text("completion");
                Some(RowContent::Prompt {
                    prompt: prompt?,
                    completion: completion?,
                })
            }
            RowFormat::Text => self.text("text").map(RowContent::Text),
        }
    }

    /// TRL's conversational form: two lists of messages, of which the prompt's are context.
    fn prompt_and_completion_messages(&mut self) -> Option<RowContent> {
        let mut messages = Vec::new();
        for key in ["prompt", "completion"] {
            for (idx, value) in self.list(key)?.iter().enumerate() {
                let message = self.message(key, idx, value).map(|message| Message {
                    trained: message.trained && key == "completion",
                    ..message
                });
                messages.push(message);
            }
        }
        let tools = self.tools();
        self.conversation(messages, tools)
    }

    fn conversation(
        &self,
        messages: Vec<Option<Message>>,
        tools: Option<Vec<Value>>,
    ) -> Option<RowContent> {
        Some(RowContent::Conversation {
            messages: messages.into_iter().collect::<Option<_>>()?,
            tools: tools?,
        })
    }

    fn message(&mut self, key: &str, idx: usize, value: &Value) -> Option<Message> {
        let field = |name: &str| format!("{key}[{idx}].{name}");
        let Value::Object(object) = value else {
            self.refuse(
                format!("{key}[{idx}]"),
                format!("found {}", kind(value)),
                "expected an object with role and content",
            );
            return None;
        };
        let role = match object.get("role") {
            Some(Value::String(name)) => {
                let role = Role::from_name(name);
                if role.is_none() {
                    self.refuse(
                        field("role"),
                        format!("unknown role \"{name}\""),
                        "expected system, user, assistant or tool",
                    );
                }
                role
            }
            other => {
                self.refuse(
                    field("role"),
                    missing_or_wrong(other),
                    "expected system, user, assistant or tool",
                );
                None
            }
        };
        let calls_tools = object
            .get("tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|calls| !calls.is_empty());
        let content = match object.get("content") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(parts)) => self.parts(&field("content"), parts),
            None | Some(Value::Null) if calls_tools => Some(String::new()),
            other => {
                self.refuse(
                    field("content"),
                    missing_or_wrong(other),
                    "expected a string, or tool_calls in its place",
                );
                None
            }
        };
        let trained = match object.get("weight").map(|weight| (weight, weight.as_f64())) {
            None | Some((Value::Null, _)) => true,
            Some((_, Some(weight))) if weight == 0.0 || weight == 1.0 => weight == 1.0,
            Some((other, _)) => {
                self.refuse(field("weight"), format!("found {other}"), "expected 0 or 1");
                true
            }
        };
        let mut fields = object.clone();
        fields.shift_remove("weight");
        fields.insert("content".to_owned(), content?.into());
        Some(Message {
            role: role?,
            fields,
            trained,
        })
    }

    /// OpenAI's content parts; only text can be trained.
    fn parts(&mut self, field: &str, parts: &[Value]) -> Option<String> {
        let mut text = String::new();
        for (idx, part) in parts.iter().enumerate() {
            match (
                part.get("type").and_then(Value::as_str),
                part.get("text").and_then(Value::as_str),
            ) {
                (Some("text"), Some(part)) => text.push_str(part),
                (part_type, _) => {
                    self.refuse(
                        format!("{field}[{idx}]"),
                        format!("part of type `{}`", part_type.unwrap_or("unknown")),
                        "only {\"type\": \"text\", \"text\": ...} can be trained",
                    );
                    return None;
                }
            }
        }
        Some(text)
    }

    fn turn(&mut self, idx: usize, value: &Value) -> Option<Message> {
        const ROLES: &str = "expected system, human, gpt or tool (also user, assistant, function_call, observation)";
        let field = |name: &str| format!("conversations[{idx}].{name}");
        if value.get("from").and_then(Value::as_str) == Some("function_call") {
            return self.tool_call(field("value"), value.get("value"));
        }
        let role = match value.get("from") {
            Some(Value::String(name)) => {
                let role = Role::from_sharegpt(name);
                if role.is_none() {
                    self.refuse(field("from"), format!("unknown role \"{name}\""), ROLES);
                }
                role
            }
            other => {
                self.refuse(field("from"), missing_or_wrong(other), ROLES);
                None
            }
        };
        let text = match value.get("value") {
            Some(Value::String(text)) => Some(text.clone()),
            other => {
                self.refuse(field("value"), missing_or_wrong(other), "expected a string");
                None
            }
        };
        Some(Message::new(role?, text?))
    }

    /// ShareGPT's `function_call` turn: `{"name", "arguments"}`, or a list of them, as text.
    fn tool_call(&mut self, field: String, value: Option<&Value>) -> Option<Message> {
        let calls = match value {
            Some(Value::String(text)) => serde_json::from_str(text).ok(),
            other => other.cloned(),
        };
        let calls = match calls {
            Some(Value::Array(calls)) => calls,
            Some(call) => vec![call],
            None => Vec::new(),
        };
        let named = |call: &Value| call.get("name").is_some_and(Value::is_string);
        if calls.is_empty() || !calls.iter().all(named) {
            self.refuse(
                field,
                "is not a function call",
                "expected {\"name\": ..., \"arguments\": ...} as a string",
            );
            return None;
        }
        let calls: Vec<Value> = calls
            .into_iter()
            .map(|call| serde_json::json!({"type": "function", "function": call}))
            .collect();
        let mut message = Message::new(Role::Assistant, "");
        message.fields.insert("tool_calls".to_owned(), calls.into());
        Some(message)
    }

    fn text(&mut self, key: &str) -> Option<String> {
        match self.object.get(key) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(_)) if key == "prompt" || key == "completion" => {
                self.refuse(
                    key,
                    "found an array",
                    "expected a string, or a list of messages in both prompt and completion",
                );
                None
            }
            other => {
                self.refuse(key, missing_or_wrong(other), "expected a string");
                None
            }
        }
    }

    fn optional_text(&mut self, key: &str) -> Option<String> {
        match self.object.get(key) {
            None | Some(Value::Null) => None,
            Some(_) => self.text(key),
        }
    }

    fn list(&mut self, key: &str) -> Option<Vec<Value>> {
        match self.object.get(key) {
            Some(Value::Array(list)) if !list.is_empty() => Some(list.clone()),
            Some(Value::Array(_)) => {
                self.refuse(key, "is empty", "expected at least one message");
                None
            }
            other => {
                self.refuse(key, missing_or_wrong(other), "expected a list of messages");
                None
            }
        }
    }

    fn tools(&mut self) -> Option<Vec<Value>> {
        match self.object.get("tools") {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(tools)) => Some(tools.clone()),
            Some(Value::String(text)) if text.trim().is_empty() => Some(Vec::new()),
            // Tables without nested columns keep them as text.
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Array(tools)) => Some(tools),
                _ => {
                    self.refuse(
                        "tools",
                        "found a string that is not a JSON list",
                        "expected a list of tools",
                    );
                    None
                }
            },
            other => {
                self.refuse("tools", missing_or_wrong(other), "expected a list of tools");
                None
            }
        }
    }

    /// The right answer is `answer` (an index or the text), or the trained text where that is one of the choices.
    fn choices(&mut self, content: &RowContent) -> Option<Choices> {
        let texts: Option<Vec<String>> = match self.object.get("choices") {
            None | Some(Value::Null) => return None,
            Some(Value::Array(list)) if list.len() >= 2 => list
                .iter()
                .map(|value| value.as_str().map(str::to_owned))
                .collect(),
            Some(_) => None,
        };
        let Some(texts) = texts else {
            self.refuse(
                "choices",
                "is not a list of answers",
                "expected at least two strings",
            );
            return None;
        };
        let trained = match content {
            RowContent::Prompt { completion, .. } => completion.as_str(),
            RowContent::Conversation { messages, .. } => messages
                .iter()
                .rev()
                .find(|message| message.role == Role::Assistant)
                .map_or("", Message::content),
            RowContent::Text(_) => "",
        };
        let answer = match self.object.get("answer") {
            Some(Value::Number(number)) => number
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .filter(|number| *number < texts.len()),
            Some(Value::String(text)) if texts.contains(text) => {
                texts.iter().position(|choice| choice == text)
            }
            _ => texts.iter().position(|choice| choice == trained),
        };
        if answer.is_none() {
            self.refuse(
                "choices",
                "none of them is the row's answer",
                "expected the completion among them, or `answer` with its index from 0",
            );
        }
        Some(Choices {
            answer: answer?,
            texts,
        })
    }
}

fn missing_or_wrong(value: Option<&Value>) -> String {
    value.map_or_else(
        || "is missing".to_owned(),
        |value| format!("found {}", kind(value)),
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
