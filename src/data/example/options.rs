//! Options that decide how rows become examples, and whether a fix names keys or flags.

use serde::{Deserialize, Serialize};

/// Which turns of a conversation carry loss. Prompt rows train the completion and text rows everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TrainOn {
    /// Every assistant turn.
    Assistant,
    /// The last assistant turn.
    LastAssistant,
    /// Every assistant turn after the last user message.
    Completion,
    /// Every token of the conversation.
    All,
}

/// What happens to an example of more than `max_seq_length` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Overlong {
    /// Report the row as an error.
    Error,
    /// Leave out the example and count it.
    Drop,
    /// Keep the first `max_seq_length` tokens and count the example.
    Truncate,
}

/// Whether a suggested fix names configuration keys or flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Remedies {
    /// Keys of run.toml.
    #[default]
    Keys,
    /// Flags of a command that has no run.toml. Fixes that only run.toml offers are left out.
    Flags,
}

impl Remedies {
    /// The remedy, and for [`Self::Keys`] a setting of run.toml as the alternative.
    pub(super) fn or_set(self, remedy: &str, setting: &str) -> String {
        match self {
            Self::Keys => format!("{remedy}, or set data.{setting}"),
            Self::Flags => remedy.to_owned(),
        }
    }

    /// The advice to raise the length limit, and for [`Self::Keys`] a setting as the alternative.
    pub(super) fn raise_limit(self, setting: &str) -> String {
        match self {
            Self::Keys => self.or_set("raise data.max_seq_length", setting),
            Self::Flags => "raise --max-seq-length".to_owned(),
        }
    }
}

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Which turns carry loss.
    pub train_on: TrainOn,
    /// Whether prompt rows become one user and one assistant turn. Otherwise prompt, completion and end token are
    /// tokenised separately.
    pub apply_chat_template: bool,
    /// Longest example, in tokens.
    pub max_seq_length: usize,
    /// What happens to a longer example.
    pub overlong: Overlong,
    /// Whether a suggested fix names keys or flags.
    pub remedies: Remedies,
}

impl EncodeOptions {
    /// Options for questions and texts that are scored or answered, not trained on. Each is kept whole, up to `limit`
    /// tokens.
    pub fn whole(apply_chat_template: bool, limit: usize) -> Self {
        Self {
            train_on: TrainOn::Assistant,
            apply_chat_template,
            max_seq_length: limit,
            overlong: Overlong::Error,
            remedies: Remedies::Flags,
        }
    }
}
