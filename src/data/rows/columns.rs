//! Checks the columns that a row's format does not read. Columns that are context or control training are refused,
//! others noted.

use serde_json::Value;

use super::{
    read::Reader,
    row::RowFormat,
    turn::MEDIA,
    unknown::PREFERENCES,
    value::{is_empty, is_same_name, nearest},
};

/// Columns that every format with a conversation reads.
const BESIDE: [&str; 7] = [
    "system",
    "tools",
    "functions",
    "chat_template_kwargs",
    "documents",
    "choices",
    "answer",
];

impl RowFormat {
    /// The columns that make up the row.
    fn own_columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Sharegpt => &["conversations"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "input", "output", "history"],
            Self::Text => &["text"],
        }
    }

    /// The other columns that the format reads.
    fn columns_beside(self) -> &'static [&'static str] {
        match self {
            Self::Text => &BESIDE[5..],
            _ => &BESIDE,
        }
    }
}

impl Reader<'_> {
    /// Refuses or notes every column that `format` does not read.
    pub(super) fn columns(&mut self, format: RowFormat) {
        let has_choices = self.get("choices").is_some();
        let names = format.own_columns().iter().chain(format.columns_beside());
        let known: Vec<&'static str> = names
            .copied()
            .filter(|name| *name != "answer" || has_choices)
            .collect();
        for (key, value) in self.object {
            if known.contains(&key.as_str()) || is_empty(value) {
                continue;
            }
            if let Some((problem, fix)) = self.refused_column(format, key, value) {
                self.refuse::<()>(key, problem, &fix);
            } else if let Some(meant) = self.misspelt_column(&known, key, value) {
                let problem = format!("nothing reads this column (did you mean `{meant}`?)");
                self.refuse::<()>(key, problem, "rename or remove it");
            } else if is_followed(key, value) {
                // The column asks for what happens anyway.
            } else {
                self.note_unread(key.clone());
            }
        }
    }

    /// Why a column is refused, and how to fix it; `None` if it is not refused.
    fn refused_column(
        &self,
        format: RowFormat,
        key: &str,
        value: &Value,
    ) -> Option<(&'static str, String)> {
        const NOT_SUPPORTED: &str = "says what is trained, and is not supported";
        const CONTEXT: &str = "is context that nothing reads";
        const FOR_TEMPLATE: &str = "is for the chat template, which does not get it from here";
        let renamed = |field: &str| {
            format!(
                "name it: `fields = {{ {field} = \"{key}\" }}` under [data] of run.toml, or `--field {field}={key}` for the data commands; or remove the column"
            )
        };
        let meaning = Meaning::of(key)?;
        // A text row is complete: other columns are not context for it.
        if format == RowFormat::Text && (meaning.is_context() || meaning == Meaning::Label) {
            return None;
        }
        if !meaning.is_context() && !self.is_training() {
            return None;
        }
        let lacks = |field: &str| self.get(field).is_none();
        let (problem, fix) = match meaning {
            Meaning::Label if said(value) == Some(false) => (
                "false marks an answer to avoid (KTO), which is not supported",
                "remove the rows whose label is false",
            ),
            Meaning::Pair => (
                "is of a preference pair (DPO), which is not supported",
                "write the better answer alone, and remove the column",
            ),
            Meaning::Weight if number(value).is_some_and(|weight| weight != 1.0) => (
                NOT_SUPPORTED,
                "rows have no weights: leave out rows of weight 0, repeat rows that count more, and remove the column",
            ),
            Meaning::Train if said(value) == Some(false) => (
                NOT_SUPPORTED,
                "remove the row, or write `\"train\": false` beside a turn",
            ),
            Meaning::TrainOn if said(value).is_some() => (
                NOT_SUPPORTED,
                "choose with train_on for all rows, and remove the column",
            ),
            Meaning::Reward => (
                NOT_SUPPORTED,
                "keep the rows whose answers are to be learnt, and remove the column",
            ),
            Meaning::Reasoning
                if value.is_string()
                    && matches!(format, RowFormat::PromptCompletion | RowFormat::Alpaca) =>
            {
                (
                    "is a part of the answer that nothing reads",
                    "write the row as messages, with `reasoning_content` in the assistant turn, or remove the column",
                )
            }
            Meaning::Mask if value.is_array() => (
                NOT_SUPPORTED,
                "rows are tokenised and masked here: remove the column, and choose with train_on or with `\"train\": false` beside a turn",
            ),
            Meaning::Media => (
                "is not text",
                "only text can be trained; remove the column, or leave the row out",
            ),
            Meaning::System if value.is_string() && lacks("system") => {
                return Some((CONTEXT, renamed("system")));
            }
            Meaning::Tools if lacks("tools") => return Some((CONTEXT, renamed("tools"))),
            Meaning::History if value.is_array() => (CONTEXT, "write earlier turns as messages"),
            Meaning::Context if format == RowFormat::Alpaca && lacks("input") => {
                return Some((CONTEXT, renamed("input")));
            }
            Meaning::Context => (CONTEXT, "write it into the prompt, or remove the column"),
            Meaning::Input if format == RowFormat::PromptCompletion && value.is_string() => (
                CONTEXT,
                "write it into the prompt, or name the fields instruction, input and output; or remove the column",
            ),
            Meaning::Variable => {
                let fix = format!("write `\"chat_template_kwargs\": {{\"{key}\": {value}}}`");
                return Some((FOR_TEMPLATE, fix));
            }
            Meaning::Variables => (FOR_TEMPLATE, "call the column `chat_template_kwargs`"),
            _ => return None,
        };
        Some((problem, fix.to_owned()))
    }

    /// The column that a misspelt `key` probably means, if the row lacks that column and the value fits it.
    fn misspelt_column(
        &self,
        known: &[&'static str],
        key: &str,
        value: &Value,
    ) -> Option<&'static str> {
        let could_be = |name: &&&str| match **name {
            "choices" | "functions" | "history" => value.is_array(),
            "tools" => value.is_array() || value.is_string(),
            "chat_template_kwargs" => value.is_object() || value.is_string(),
            "system" | "input" => value.is_string(),
            // A column with a similar name may hold any list of things that the row refers to.
            "documents" => false,
            _ => true,
        };
        let absent = known
            .iter()
            .filter(|name| self.get(name).is_none())
            .filter(could_be)
            .copied();
        // A misspelt `label` must be refused like `label`.
        nearest(key, absent).or_else(|| {
            (self.is_training() && key != "label" && value.is_boolean())
                .then(|| nearest(key, ["label"]))
                .flatten()
        })
    }
}

/// The meaning of a column that no format reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    Label,
    Pair,
    Weight,
    Train,
    TrainOn,
    Reward,
    Reasoning,
    Mask,
    Media,
    System,
    Tools,
    History,
    Context,
    Input,
    Variable,
    Variables,
}

impl Meaning {
    /// Finds the meaning by the column's name. Case and separators do not matter.
    fn of(key: &str) -> Option<Self> {
        const NAMES: [(Meaning, &[&str]); 16] = [
            (Meaning::Label, &["label", "kto_tag"]),
            (Meaning::Pair, &PREFERENCES),
            (
                Meaning::Weight,
                &[
                    "weight",
                    "weights",
                    "sample_weight",
                    "loss_weight",
                    "loss_scale",
                ],
            ),
            (Meaning::Train, &["train", "training", "trainable"]),
            (
                Meaning::TrainOn,
                &[
                    "train_on_input",
                    "train_on_inputs",
                    "train_on_prompt",
                    "mask_prompt",
                    "mask_history",
                ],
            ),
            (
                Meaning::Reward,
                &["reward", "rewards", "advantage", "advantages"],
            ),
            (
                Meaning::Mask,
                &[
                    "input_ids",
                    "labels",
                    "mask",
                    "loss_mask",
                    "completion_mask",
                    "prompt_mask",
                    "assistant_masks",
                ],
            ),
            (
                Meaning::Reasoning,
                &["reasoning", "reasoning_content", "thinking"],
            ),
            (Meaning::Media, &MEDIA),
            (
                Meaning::System,
                &[
                    "system_prompt",
                    "system_message",
                    "system_instruction",
                    "sys_prompt",
                    "sys",
                ],
            ),
            (
                Meaning::Tools,
                &[
                    "tool_defs",
                    "tool_definitions",
                    "available_tools",
                    "function_definitions",
                ],
            ),
            (Meaning::History, &["history"]),
            (Meaning::Context, &["context"]),
            (Meaning::Input, &["input"]),
            (Meaning::Variable, &["enable_thinking", "reasoning_effort"]),
            (
                Meaning::Variables,
                &[
                    "chat_template_args",
                    "template_kwargs",
                    "template_variables",
                ],
            ),
        ];
        let named = |names: &[&str]| names.iter().any(|name| is_same_name(name, key));
        let (meaning, _) = NAMES.iter().find(|(_, names)| named(names))?;
        Some(*meaning)
    }

    /// Whether the column holds something that the model should see, not something that controls training.
    fn is_context(self) -> bool {
        matches!(
            self,
            Self::Media
                | Self::System
                | Self::Tools
                | Self::History
                | Self::Context
                | Self::Input
                | Self::Variable
                | Self::Variables
        )
    }
}

/// Reads a flag: a boolean, or the text `true` or `false` in any case.
fn said(value: &Value) -> Option<bool> {
    match value.as_str().map(str::to_ascii_lowercase).as_deref() {
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(_) => None,
        None => value.as_bool(),
    }
}

/// Reads a number, which may be written as text; true is 1 and false is 0.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    }
}

/// Whether a column asks for what happens anyway: every row is trained, with weight 1.
fn is_followed(key: &str, value: &Value) -> bool {
    match Meaning::of(key) {
        Some(Meaning::Label | Meaning::Train) => said(value) == Some(true),
        Some(Meaning::Weight) => number(value) == Some(1.0),
        _ => false,
    }
}
