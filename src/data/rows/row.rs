//! A checked row: its format, its messages or texts, and its choices.

use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::unknown::unknown_format;

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name that chat templates use.
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

    /// Finds a role by ShareGPT's names or by the usual ones.
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
    pub(super) text: String,
    pub(super) trained: bool,
    pub(super) must_train: bool,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let text = content.into();
        let mut fields = Map::new();
        fields.insert("role".to_owned(), role.name().into());
        fields.insert("content".to_owned(), text.as_str().into());
        Self {
            role,
            fields,
            text,
            trained: true,
            must_train: false,
        }
    }

    /// The same message with another text.
    pub(in crate::data) fn with_content(&self, content: &str) -> Self {
        let mut message = self.clone();
        message.fields.insert("content".to_owned(), content.into());
        content.clone_into(&mut message.text);
        message
    }

    /// Who speaks.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The text. Text parts are joined; the text is empty for a message that holds only tool calls.
    pub fn content(&self) -> &str {
        &self.text
    }

    /// Every field as in the row: `content` may be a list of parts, null or absent. The keys that say whether the turn
    /// is trained are left out.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// Every field, with [`Self::content`] as the content.
    pub fn fields_of_text(&self) -> Map<String, Value> {
        let mut fields = self.fields.clone();
        fields.insert("content".to_owned(), self.text.as_str().into());
        fields
    }

    /// False if the turn is never trained, whatever `train_on` says: it has weight 0, or `train`, `training` or `loss`
    /// false, or it belongs to the prompt of a row of prompt and completion.
    pub fn trained(&self) -> bool {
        self.trained
    }

    /// Whether the row requires by `train`, `training` or `loss` that the turn is trained.
    pub fn must_train(&self) -> bool {
        self.must_train
    }
}

/// The formats of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `{"messages": [{"role", "content"}]}`.
    Messages,
    /// `{"prompt", "completion"}`, two strings, or two lists of messages.
    PromptCompletion,
    /// `{"instruction", "input"?, "output", "history"?}`, read as a conversation.
    Alpaca,
    /// `{"conversations": [{"from", "value"}]}`.
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

    /// Detects the format by its keys; the first format that fits wins. Keys with a null value count only if no format
    /// fits without them.
    pub(super) fn detect(object: &Map<String, Value>) -> Result<Self, Problem> {
        const KEYS: [(RowFormat, &[&str]); 5] = [
            (RowFormat::Messages, &["messages"]),
            (RowFormat::Sharegpt, &["conversations"]),
            (RowFormat::PromptCompletion, &["prompt", "completion"]),
            (RowFormat::Alpaca, &["instruction", "output"]),
            (RowFormat::Text, &["text"]),
        ];
        let with_value = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let there = |key: &str| object.contains_key(key);
        let first = |has: &dyn Fn(&str) -> bool| {
            let fits = |keys: &[&str]| keys.iter().all(|key| has(key));
            let found = KEYS.iter().find(|(_, keys)| fits(keys));
            found.map(|(format, _)| *format)
        };
        first(&with_value)
            .or_else(|| first(&there))
            .ok_or_else(|| unknown_format(object))
    }
}

/// The answers to choose from, for evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// The answers, at least two.
    pub texts: Vec<String>,
    /// Index of the right answer.
    pub answer: usize,
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum RowContent {
    /// Messages, and the tools that the model may call.
    Conversation {
        /// At least one message.
        messages: Vec<Message>,
        /// Tool descriptions as the chat template sees them.
        tools: Vec<Value>,
    },
    /// A prompt and the completion that should follow it.
    Prompt {
        /// A system turn before the prompt. Only a chat template can print it.
        system: Option<String>,
        /// The text that the model is given.
        prompt: String,
        /// The text that is trained.
        completion: String,
        /// Tool descriptions as the chat template sees them.
        tools: Vec<Value>,
    },
    /// Plain text, all of it trained.
    Text(String),
}

/// A checked row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The content that becomes tokens.
    pub content: RowContent,
    /// The chat template's variables for this row: those of `chat_template_kwargs`, and `documents`.
    pub variables: Map<String, Value>,
    /// The optional `choices`.
    pub choices: Option<Choices>,
    /// What reading the row ignored or changed.
    pub notes: Notes,
}

impl Row {
    /// The system message, if there is one.
    pub fn system(&self) -> Option<&str> {
        match &self.content {
            RowContent::Conversation { messages, .. } => {
                let first = messages.first()?;
                (first.role() == Role::System).then(|| first.content())
            }
            RowContent::Prompt { system, .. } => system.as_deref(),
            RowContent::Text(_) => None,
        }
    }

    /// The question: the prompt, or the user's last turn; `None` for a text row.
    pub fn question(&self) -> Option<&str> {
        match &self.content {
            RowContent::Conversation { messages, .. } => {
                let mut turns = messages.iter().rev();
                turns
                    .find(|turn| turn.role() == Role::User)
                    .map(Message::content)
            }
            RowContent::Prompt { prompt, .. } => Some(prompt),
            RowContent::Text(_) => None,
        }
    }
}

/// What reading a row ignored or changed, if that is no reason to refuse the row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// Columns that hold something and that nothing reads, with the file's names; keys of turns as `messages[].mood`.
    pub unread: Vec<String>,
    /// Keys of turns that only a chat template can read, as `messages[].name`.
    pub for_template: Vec<String>,
    /// Fields that the row has under the name that the file gives them.
    pub named: Vec<String>,
    /// Number of tool-call arguments that were JSON text and were decoded to an object.
    pub n_decoded_arguments: usize,
}
