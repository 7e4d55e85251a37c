//! A checked row: its format, its messages or texts, its choices.

use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::error::field_problem;

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that hold for the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name templates know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::System, Self::User, Self::Assistant, Self::Tool]
            .into_iter()
            .find(|role| role.name() == name)
    }

    /// ShareGPT's names, and the usual ones.
    pub(super) fn from_sharegpt(name: &str) -> Option<Self> {
        match name {
            "human" => Some(Self::User),
            "gpt" => Some(Self::Assistant),
            "observation" => Some(Self::Tool),
            _ => Self::from_name(name),
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub(super) role: Role,
    pub(super) fields: Map<String, Value>,
    pub(super) trained: bool,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), role.name().into());
        fields.insert("content".to_owned(), content.into().into());
        Self {
            role,
            fields,
            trained: true,
        }
    }

    /// The same message with another text.
    pub(in crate::data) fn with_content(&self, content: &str) -> Self {
        let mut message = self.clone();
        message.fields.insert("content".to_owned(), content.into());
        message
    }

    /// Who speaks.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The text; empty for a message that holds tool calls alone.
    pub fn content(&self) -> &str {
        self.fields
            .get("content")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// Every field as the chat template sees it.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// False for `"weight": 0`: never trained, whatever `train_on` says.
    pub fn trained(&self) -> bool {
        self.trained
    }
}

/// The formats of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `{"messages": [{"role", "content"}], "tools"?}`.
    Messages,
    /// `{"prompt", "completion"}`, two strings, or two lists of messages.
    PromptCompletion,
    /// `{"instruction", "input"?, "output", "system"?}`, read as a conversation of one turn.
    Alpaca,
    /// `{"conversations": [{"from", "value"}], "system"?, "tools"?}`.
    Sharegpt,
    /// `{"text"}`.
    Text,
}

impl RowFormat {
    /// The name used in `data.format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt_completion",
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Text => "text",
        }
    }

    /// Decides by keys; the first that fits.
    pub(super) fn detect(object: &Map<String, Value>) -> Result<Self, Problem> {
        const KEYS: [(RowFormat, &[&str]); 5] = [
            (RowFormat::Messages, &["messages"]),
            (RowFormat::Sharegpt, &["conversations"]),
            (RowFormat::PromptCompletion, &["prompt", "completion"]),
            (RowFormat::Alpaca, &["instruction", "output"]),
            (RowFormat::Text, &["text"]),
        ];
        let fits = |keys: &[&str]| keys.iter().all(|key| object.contains_key(*key));
        if let Some((format, _)) = KEYS.iter().find(|(_, keys)| fits(keys)) {
            return Ok(*format);
        }
        let keys: Vec<_> = object.keys().map(|key| format!("`{key}`")).collect();
        let found = match keys.as_slice() {
            [] => "the object is empty".to_owned(),
            keys => format!("no known format has the keys {}", keys.join(", ")),
        };
        Err(field_problem(
            "row",
            found,
            "expected messages, prompt and completion, instruction and output, conversations, or text",
        ))
    }
}

/// The answers to choose from, for evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// The answers, at least two.
    pub texts: Vec<String>,
    /// Which of them is right.
    pub answer: usize,
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum RowContent {
    /// Messages, and the tools that were on offer.
    Conversation {
        /// At least one message.
        messages: Vec<Message>,
        /// Tool descriptions as the chat template sees them.
        tools: Vec<Value>,
    },
    /// A prompt and what should follow it.
    Prompt {
        /// Given.
        prompt: String,
        /// Trained.
        completion: String,
    },
    /// Plain text, trained whole.
    Text(String),
}

/// A checked row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What is turned into tokens.
    pub content: RowContent,
    /// The optional `choices`.
    pub choices: Option<Choices>,
}
