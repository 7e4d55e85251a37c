//! One JSON object -> a checked row; every problem is collected, none hides another.

use monteclora_converters::Problem;
use serde_json::{Map, Value, json};

use super::{
    fields::FieldNames,
    json::parse,
    row::{Choices, Message, Role, Row, RowContent, RowFormat},
};
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
    let in_file_words = |problem| names.in_file_words(problem);
    checked_row(&mut object, format)
        .map_err(|problems| problems.into_iter().map(in_file_words).collect())
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
        for (question, answer) in [("prompt", "completion"), ("instruction", "output")] {
            if object.contains_key(question) && !object.contains_key(answer) {
                object.insert(answer.to_owned(), UNKNOWN.into());
            }
        }
        if let Some(messages) = unanswered(&mut object) {
            messages.push(answer_turn(UNKNOWN.into()));
        }
    }
    checked_row(&mut object, None).map(|(_, row)| row)
}

/// Stands in the place of an answer that nobody looks at.
const UNKNOWN: &str = "?";

fn object(bytes: &[u8]) -> Result<Map<String, Value>, Vec<Problem>> {
    match parse(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(vec![field_problem(
            "row",
            format!("found {}", kind(&other)),
            "expected one JSON object a line",
        )]),
        Err(problem) => Err(vec![problem]),
    }
}

/// The messages of a conversation that ends before the assistant's turn.
fn unanswered(object: &mut Map<String, Value>) -> Option<&mut Vec<Value>> {
    let messages = object.get_mut("messages")?.as_array_mut()?;
    let last = messages.last()?.get("role")?;
    (last != Role::Assistant.name()).then_some(messages)
}

fn answer_turn(content: Value) -> Value {
    json!({ "role": Role::Assistant.name(), "content": content })
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
    let answer = object.get("answer");
    let right = right_choice(choices, answer).map(|idx| choices[idx].clone());
    let right = right.ok_or_else(|| {
        let found = match answer {
            None => "is missing".to_owned(),
            Some(answer) => format!("found {answer}, which is none of the choices"),
        };
        let fix = "expected the index of the right choice, from 0, or its text";
        field_problem("answer", found, fix)
    });
    if object.contains_key("prompt") && !object.contains_key("completion") {
        object.insert("completion".to_owned(), right?);
    } else if let Some(messages) = unanswered(object) {
        messages.push(answer_turn(right?));
    }
    Ok(())
}

/// The choice that `answer` means, by its index or by being it.
fn right_choice(choices: &[Value], answer: Option<&Value>) -> Option<usize> {
    match answer? {
        Value::Number(number) => usize::try_from(number.as_u64()?)
            .ok()
            .filter(|idx| *idx < choices.len()),
        answer => choices.iter().position(|choice| choice == answer),
    }
}

/// Reads fields and collects what is wrong with them; `None` stands for a field with a problem.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn refuse<T>(
        &mut self,
        field: impl Into<String>,
        problem: impl Into<String>,
        fix: &str,
    ) -> Option<T> {
        self.problems.push(field_problem(field, problem, fix));
        None
    }

    fn content(&mut self, format: RowFormat) -> Option<RowContent> {
        match format {
            RowFormat::Messages => {
                let messages = self.messages("messages", Self::message);
                let tools = self.tools();
                Some(RowContent::Conversation {
                    messages: messages?,
                    tools: tools?,
                })
            }
            RowFormat::Sharegpt => {
                let turns = self.messages("conversations", Self::turn);
                let system = self.system();
                let tools = self.tools();
                Some(RowContent::Conversation {
                    messages: system.into_iter().chain(turns?).collect(),
                    tools: tools?,
                })
            }
            RowFormat::Alpaca => {
                let instruction = self.text("instruction");
                let input = self.optional_text("input");
                let output = self.text("output");
                let system = self.system();
                let user = match (instruction?, input) {
                    (instruction, Some(input)) => format!("{instruction}\n\n{input}"),
                    (instruction, None) => instruction,
                };
                let mut messages: Vec<_> = system.into_iter().collect();
                messages.push(Message::new(Role::User, user));
                messages.push(Message::new(Role::Assistant, output?));
                Some(RowContent::Conversation {
                    messages,
                    tools: Vec::new(),
                })
            }
            RowFormat::PromptCompletion
                if ["prompt", "completion"]
                    .iter()
                    .all(|key| self.object.get(*key).is_some_and(Value::is_array)) =>
            {
                // TRL's conversational form: two lists of messages, of which the prompt's are context.
                let mut messages = self.messages("prompt", Self::message);
                for message in messages.iter_mut().flatten() {
                    message.trained = false;
                }
                let completion = self.messages("completion", Self::message);
                let tools = self.tools();
                let mut messages = messages?;
                messages.extend(completion?);
                Some(RowContent::Conversation {
                    messages,
                    tools: tools?,
                })
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

    /// The messages of a list, each by `read`, which is told its place.
    fn messages(
        &mut self,
        key: &str,
        read: fn(&mut Self, &str, &Value) -> Option<Message>,
    ) -> Option<Vec<Message>> {
        const FIX: &str = "expected a list of messages";
        let list = match self.object.get(key) {
            Some(Value::Array(list)) if list.is_empty() => {
                return self.refuse(key, "is empty", "expected at least one message");
            }
            Some(Value::Array(list)) => list,
            other => return self.refuse(key, missing_or_wrong(other), FIX),
        };
        let places = list.iter().enumerate();
        // All are read before the first bad one is given up.
        let messages: Vec<_> = places
            .map(|(idx, value)| read(self, &format!("{key}[{idx}]"), value))
            .collect();
        messages.into_iter().collect()
    }

    fn message(&mut self, at: &str, value: &Value) -> Option<Message> {
        let field = |name: &str| format!("{at}.{name}");
        let Value::Object(object) = value else {
            return self.refuse(
                at,
                format!("found {}", kind(value)),
                "expected an object with role and content",
            );
        };
        let role = self.role(
            field("role"),
            object.get("role"),
            Role::from_name,
            "expected system, user, assistant or tool",
        );
        let calls_tools = object
            .get("tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|calls| !calls.is_empty());
        let content = match object.get("content") {
            Some(Value::Array(parts)) => self.parts(&field("content"), parts),
            None | Some(Value::Null) if calls_tools => Some(String::new()),
            other => self.string(
                field("content"),
                other,
                "expected a string, or tool_calls in its place",
            ),
        };
        let trained = match object.get("weight") {
            None | Some(Value::Null) => true,
            Some(weight) if weight.as_f64() == Some(0.0) => false,
            Some(weight) if weight.as_f64() == Some(1.0) => true,
            Some(other) => self
                .refuse(field("weight"), format!("found {other}"), "expected 0 or 1")
                .unwrap_or(true),
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
            let named = |key: &str| part.get(key).and_then(Value::as_str);
            match (named("type"), named("text")) {
                (Some("text"), Some(part)) => text.push_str(part),
                (part_type, _) => {
                    return self.refuse(
                        format!("{field}[{idx}]"),
                        format!("part of type `{}`", part_type.unwrap_or("unknown")),
                        "only {\"type\": \"text\", \"text\": ...} can be trained",
                    );
                }
            }
        }
        Some(text)
    }

    fn turn(&mut self, at: &str, value: &Value) -> Option<Message> {
        let field = |name: &str| format!("{at}.{name}");
        let (from, said) = (value.get("from"), value.get("value"));
        if from.is_some_and(|from| from == "function_call") {
            return self.tool_call(field("value"), said);
        }
        let role = self.role(
            field("from"),
            from,
            Role::from_sharegpt,
            "expected system, human, gpt or tool (also user, assistant, function_call, observation)",
        );
        let text = self.string(field("value"), said, "expected a string");
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
        let typed = |call| json!({"type": "function", "function": call});
        let calls: Vec<Value> = calls.into_iter().map(typed).collect();
        let mut message = Message::new(Role::Assistant, "");
        message.fields.insert("tool_calls".to_owned(), calls.into());
        Some(message)
    }

    fn role(
        &mut self,
        field: String,
        value: Option<&Value>,
        named: fn(&str) -> Option<Role>,
        fix: &str,
    ) -> Option<Role> {
        let name = self.string(field.clone(), value, fix)?;
        named(&name).or_else(|| self.refuse(field, format!("unknown role \"{name}\""), fix))
    }

    fn string(
        &mut self,
        field: impl Into<String>,
        value: Option<&Value>,
        fix: &str,
    ) -> Option<String> {
        match value {
            Some(Value::String(text)) => Some(text.clone()),
            other => self.refuse(field, missing_or_wrong(other), fix),
        }
    }

    fn text(&mut self, key: &str) -> Option<String> {
        let value = self.object.get(key);
        let may_be_messages = key == "prompt" || key == "completion";
        let fix = if may_be_messages && value.is_some_and(Value::is_array) {
            "expected a string, or a list of messages in both prompt and completion"
        } else {
            "expected a string"
        };
        self.string(key, value, fix)
    }

    /// A text that is there and not empty.
    fn optional_text(&mut self, key: &str) -> Option<String> {
        self.get(key)?;
        self.text(key).filter(|text| !text.is_empty())
    }

    fn system(&mut self) -> Option<Message> {
        let text = self.optional_text("system")?;
        Some(Message::new(Role::System, text))
    }

    fn tools(&mut self) -> Option<Vec<Value>> {
        const FIX: &str = "expected a list of tools";
        match self.get("tools") {
            None => Some(Vec::new()),
            Some(Value::Array(tools)) => Some(tools.clone()),
            Some(Value::String(text)) if text.trim().is_empty() => Some(Vec::new()),
            // Tables without nested columns keep them as text.
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Array(tools)) => Some(tools),
                _ => self.refuse("tools", "found a string that is not a JSON list", FIX),
            },
            other => self.refuse("tools", missing_or_wrong(other), FIX),
        }
    }

    /// The right answer is `answer` (an index or the text), or the trained text where that is one of the choices.
    fn choices(&mut self, content: &RowContent) -> Option<Choices> {
        let choices = self.get("choices")?;
        let list = choices.as_array().filter(|list| list.len() >= 2);
        let texts = list.and_then(|list| {
            let texts = list.iter().map(|value| value.as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>()
        });
        let (Some(list), Some(texts)) = (list, texts) else {
            return self.refuse(
                "choices",
                "is not a list of answers",
                "expected at least two strings",
            );
        };
        let trained = match content {
            RowContent::Prompt { completion, .. } => completion.as_str(),
            RowContent::Conversation { messages, .. } => messages
                .iter()
                .rfind(|message| message.role == Role::Assistant)
                .map_or("", Message::content),
            RowContent::Text(_) => "",
        };
        let named = self.get("answer");
        let mut answer = right_choice(list, named);
        if !named.is_some_and(Value::is_number) {
            answer = answer.or_else(|| texts.iter().position(|choice| choice == trained));
        }
        let Some(answer) = answer else {
            return self.refuse(
                "choices",
                "none of them is the row's answer",
                "expected the completion among them, or `answer` with its index from 0",
            );
        };
        Some(Choices { answer, texts })
    }
}

fn missing_or_wrong(value: Option<&Value>) -> String {
    match value {
        None => "is missing".to_owned(),
        Some(value) => format!("found {}", kind(value)),
    }
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
