//! Checks one JSON object and turns it into a row. Every problem is collected, so that none hides another.

use monteclora_converters::Problem;
use serde_json::{Map, Value, json};

use super::{
    fields::FieldNames,
    json::parse,
    row::{Choices, Message, Notes, Role, Row, RowContent, RowFormat},
    unknown::by_columns,
    value::{kind, missing_or_wrong, nearest},
};
use crate::data::error::field_problem;

/// Parses and checks one row whose fields have their own names. If `format` is `None`, the keys decide the format.
///
/// # Errors
/// Returns every problem of the row.
pub fn parse_row(
    bytes: &[u8],
    format: Option<RowFormat>,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    parse_named_row(bytes, format, &FieldNames::default())
}

/// As [`parse_row`], with the names that the file gives to the fields.
///
/// # Errors
/// Returns every problem of the row, with the file's names.
pub fn parse_named_row(
    bytes: &[u8],
    format: Option<RowFormat>,
    names: &FieldNames,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    let mut object = object(bytes)?;
    let renamed = names.apply(&mut object);
    let in_file_words = |problem| names.in_file_words(problem);
    let (format, mut row) = checked_row(&mut object, format, Purpose::Training)
        .map_err(|problems| -> Vec<_> { problems.into_iter().map(in_file_words).collect() })?;
    let unread = row.notes.unread.iter_mut();
    unread.for_each(|column| names.put_in_file_words(column));
    row.notes.unread.extend(renamed.displaced);
    row.notes.named = renamed.fields;
    Ok((format, row))
}

/// Parses a row that is to be answered, as [`parse_row`]. The answer may be missing; a given answer has no effect.
///
/// # Errors
/// Returns every problem of the row.
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
    checked_row(&mut object, None, Purpose::Question).map(|(_, row)| row)
}

/// Placeholder for an answer that nothing reads.
const UNKNOWN: &str = "?";

fn object(bytes: &[u8]) -> Result<Map<String, Value>, Vec<Problem>> {
    match parse(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(vec![field_problem(
            "row",
            format!("found {}", kind(&other)),
            "expected one JSON object per line",
        )]),
        Err(problem) => Err(vec![problem]),
    }
}

/// The messages of a conversation that does not end with the assistant's turn.
fn unanswered(object: &mut Map<String, Value>) -> Option<&mut Vec<Value>> {
    let messages = object.get_mut("messages")?.as_array_mut()?;
    let last = messages.last()?.get("role")?;
    (last != Role::Assistant.name()).then_some(messages)
}

fn answer_turn(content: Value) -> Value {
    json!({ "role": Role::Assistant.name(), "content": content })
}

/// What a row is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Training,
    /// The row is to be answered, so settings of its training have no effect.
    Question,
}

fn checked_row(
    object: &mut Map<String, Value>,
    format: Option<RowFormat>,
    purpose: Purpose,
) -> Result<(RowFormat, Row), Vec<Problem>> {
    if let Some(problem) = by_columns(object) {
        return Err(vec![problem]);
    }
    complete_with_answer(object).map_err(|problem| vec![problem])?;
    let format = match format {
        Some(format) => format,
        None => RowFormat::detect(object).map_err(|problem| vec![problem])?,
    };
    let mut reader = Reader {
        object,
        purpose,
        problems: Vec::new(),
        notes: Notes::default(),
    };
    let content = reader.content(format);
    let variables = match format {
        RowFormat::Text => Map::new(),
        _ => reader.variables(),
    };
    let choices = content.as_ref().and_then(|content| reader.choices(content));
    reader.columns(format);
    let Reader {
        problems, notes, ..
    } = reader;
    match content {
        Some(content) if problems.is_empty() => {
            let row = Row {
                content,
                variables,
                choices,
                notes,
            };
            Ok((format, row))
        }
        _ if problems.is_empty() => {
            let found = format!("is no row of the format {}", format.name());
            let fix = "see docs/data.md for what a row holds";
            Err(vec![field_problem("row", found, fix)])
        }
        _ => Err(problems),
    }
}

/// Completes a row of `choices` and `answer` that does not repeat the answer. The answer becomes the completion of a
/// prompt that has none, or the assistant turn of a conversation that ends before one.
fn complete_with_answer(object: &mut Map<String, Value>) -> Result<(), Problem> {
    let Some(Value::Array(choices)) = object.get("choices") else {
        return Ok(());
    };
    let answer = object.get("answer");
    let right = right_choice(choices, answer).map(|idx| choices[idx].clone());
    let right = right.ok_or_else(|| {
        let found = match answer {
            None => match object.keys().find(|key| nearest(key, ["answer"]).is_some()) {
                Some(key) => format!("is missing (did you mean it by `{key}`?)"),
                None => "is missing".to_owned(),
            },
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

/// The index of the choice that `answer` names, by its index or by its text.
fn right_choice(choices: &[Value], answer: Option<&Value>) -> Option<usize> {
    match answer? {
        Value::Number(number) => usize::try_from(number.as_u64()?)
            .ok()
            .filter(|idx| *idx < choices.len()),
        answer => choices.iter().position(|choice| choice == answer),
    }
}

/// Reads fields and collects their problems. A method returns `None` for a field with a problem.
pub(super) struct Reader<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) notes: Notes,
    purpose: Purpose,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn is_training(&self) -> bool {
        self.purpose == Purpose::Training
    }

    pub(super) fn refuse<T>(
        &mut self,
        field: impl Into<String>,
        problem: impl Into<String>,
        fix: &str,
    ) -> Option<T> {
        self.problems.push(field_problem(field, problem, fix));
        None
    }

    pub(super) fn refuse_misspelt(&mut self, at: String, meant: &str) {
        let problem = format!("nothing reads it (did you mean `{meant}`?)");
        self.refuse::<()>(at, problem, "rename or remove the key");
    }

    pub(super) fn note_unread(&mut self, column: String) {
        if !self.notes.unread.contains(&column) {
            self.notes.unread.push(column);
        }
    }

    pub(super) fn note_for_template(&mut self, key: String) {
        if !self.notes.for_template.contains(&key) {
            self.notes.for_template.push(key);
        }
    }

    fn content(&mut self, format: RowFormat) -> Option<RowContent> {
        match format {
            RowFormat::Messages => {
                let messages = self.messages("messages", Self::message);
                self.conversation(messages, true)
            }
            RowFormat::Sharegpt => {
                let messages = self.messages("conversations", Self::turn);
                self.conversation(messages, true)
            }
            RowFormat::Alpaca => {
                let instruction = self.text("instruction");
                let input = self.optional_text("input");
                let output = self.text("output");
                let history = self.history();
                let user = instruction.map(|instruction| match input {
                    Some(input) => format!("{instruction}\n\n{input}"),
                    None => instruction,
                });
                let messages = match (history, user, output) {
                    (Some(mut messages), Some(user), Some(output)) => {
                        messages.push(Message::new(Role::User, user));
                        messages.push(Message::new(Role::Assistant, output));
                        Some(messages)
                    }
                    _ => None,
                };
                self.conversation(messages, true)
            }
            RowFormat::PromptCompletion
                if ["prompt", "completion"]
                    .iter()
                    .all(|key| self.object.get(*key).is_some_and(Value::is_array)) =>
            {
                // TRL's conversational form: two lists of messages. The messages of the prompt are context.
                let mut messages = self.messages("prompt", Self::message);
                for message in messages.iter_mut().flatten() {
                    message.trained = false;
                }
                let completion = self.messages("completion", Self::message);
                let messages = messages.zip(completion).map(|(mut messages, completion)| {
                    messages.extend(completion);
                    messages
                });
                self.conversation(messages, false)
            }
            RowFormat::PromptCompletion => {
                let prompt = self.text("prompt");
                let completion = self.text("completion");
                let system = self.optional_text("system");
                let tools = self.tools();
                Some(RowContent::Prompt {
                    system,
                    prompt: prompt?,
                    completion: completion?,
                    tools: tools?,
                })
            }
            RowFormat::Text => self.text("text").map(RowContent::Text),
        }
    }

    /// Adds the row's `system` and tools to the messages. `trained` says whether the added system turn may be trained.
    fn conversation(
        &mut self,
        messages: Option<Vec<Message>>,
        trained: bool,
    ) -> Option<RowContent> {
        let system = self.optional_text("system");
        let tools = self.tools();
        let mut messages = messages?;
        if let Some(text) = system {
            match messages.iter().find(|message| message.role == Role::System) {
                None => {
                    let mut system = Message::new(Role::System, text);
                    system.trained = trained;
                    messages.insert(0, system);
                }
                Some(first) if first.content() == text => {}
                Some(_) => {
                    let problem = "stands beside a system turn that says something else";
                    return self.refuse("system", problem, "keep one of them");
                }
            }
        }
        Some(RowContent::Conversation {
            messages,
            tools: tools?,
        })
    }

    pub(super) fn string(
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

    /// A text, or for `system` the joined text of its parts; `None` if it is missing or empty.
    fn optional_text(&mut self, key: &str) -> Option<String> {
        let text = match self.get(key)? {
            Value::Array(parts) if key == "system" => self.parts(key, parts),
            _ => self.text(key),
        };
        text.filter(|text| !text.is_empty())
    }

    /// Reads the choices. The right one is `answer` (an index or the text), or else the choice that equals the trained
    /// text.
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
        let repeats = |at: &usize| texts[..*at].contains(&texts[*at]);
        if let Some(at) = (1..texts.len()).find(repeats) {
            return self.refuse(
                format!("choices[{at}]"),
                "is there twice",
                "expected each answer once",
            );
        }
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
