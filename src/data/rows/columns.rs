//! The columns of a row that its format does not read: refused where they say what is trained or are context, noted otherwise.

use serde_json::Value;

use super::{
    read::Reader,
    row::RowFormat,
    turn::MEDIA,
    unknown::PREFERENCES,
    value::{flag, is_empty, nearest},
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
    /// The columns that are the row.
    fn own_columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Sharegpt => &["conversations"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "input", "output", "history"],
            Self::Text => &["text"],
        }
    }

    /// The columns beside them that are read, too.
    fn columns_beside(self) -> &'static [&'static str] {
        match self {
            Self::Text => &BESIDE[5..],
            _ => &BESIDE,
        }
    }
}

impl Reader<'_> {
    /// Looks at every column that `format` does not read.
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
                // It says what happens anyway.
            } else {
                self.note_unread(key.clone());
            }
        }
    }

    /// What a column says that is not followed, and the remedy.
    fn refused_column(
        &self,
        format: RowFormat,
        key: &str,
        value: &Value,
    ) -> Option<(&'static str, String)> {
        const NOT_SUPPORTED: &str = "says what is trained, and is not supported";
        const CONTEXT: &str = "is context that nothing reads";
        let owned = |problem, fix: &str| Some((problem, fix.to_owned()));
        let renamed = |field: &str| {
            format!(
                "name it: `fields = {{ {field} = \"{key}\" }}` under [data] of run.toml, or `--field {field}={key}` for the data commands; or remove the column"
            )
        };
        let is_text_row = format == RowFormat::Text;
        match key {
            key if MEDIA.contains(&key) && !is_text_row => owned(
                "is not text",
                "only text can be trained; remove the column, or leave the row out",
            ),
            "label" | "kto_tag" if value == &Value::Bool(false) && !is_text_row => {
                self.is_training().then(|| {
                    (
                        "false marks an answer to avoid (KTO), which is not supported",
                        "remove the rows whose label is false".to_owned(),
                    )
                })
            }
            key if PREFERENCES.contains(&key) && self.is_training() => owned(
                "is of a preference pair (DPO), which is not supported",
                "write the better answer alone, and remove the column",
            ),
            "weight" | "weights" | "sample_weight" | "loss_weight" | "loss_scale"
                if self.is_training() && value.is_number() && flag(value) != Some(true) =>
            {
                owned(
                    NOT_SUPPORTED,
                    "rows have no weights: leave out rows of weight 0, repeat rows that count more, and remove the column",
                )
            }
            "train" | "training" | "trainable"
                if self.is_training() && flag(value) == Some(false) =>
            {
                owned(
                    NOT_SUPPORTED,
                    "remove the row, or write `\"train\": false` beside a turn",
                )
            }
            "reward" | "rewards" | "advantage" | "advantages" if self.is_training() => owned(
                NOT_SUPPORTED,
                "keep the rows whose answers are to be learnt, and remove the column",
            ),
            "input_ids" | "labels" | "loss_mask" | "completion_mask" | "assistant_masks"
                if self.is_training() && value.is_array() =>
            {
                owned(
                    NOT_SUPPORTED,
                    "rows are tokenised and masked here: remove the column, and choose with train_on or with `\"train\": false` beside a turn",
                )
            }
            // A text is whole: what stands beside it is no context of it.
            _ if is_text_row => None,
            "system_prompt" | "system_message" | "system_instruction" | "sys_prompt" | "sys"
                if value.is_string() && self.get("system").is_none() =>
            {
                Some((CONTEXT, renamed("system")))
            }
            "tool_defs" | "tool_definitions" | "available_tools" | "function_definitions"
                if self.get("tools").is_none() =>
            {
                Some((CONTEXT, renamed("tools")))
            }
            "history" if value.is_array() => owned(CONTEXT, "write earlier turns as messages"),
            "context" if format == RowFormat::Alpaca && self.get("input").is_none() => {
                Some((CONTEXT, renamed("input")))
            }
            "context" => owned(CONTEXT, "write it into the prompt, or remove the column"),
            "input" if format == RowFormat::PromptCompletion && value.is_string() => owned(
                CONTEXT,
                "write it into the prompt, or name the fields instruction, input and output; or remove the column",
            ),
            "enable_thinking" | "reasoning_effort" => Some((
                "is for the chat template, which does not get it from here",
                format!("write `\"chat_template_kwargs\": {{\"{key}\": {value}}}`"),
            )),
            "chat_template_args" | "template_kwargs" | "template_variables" => owned(
                "is for the chat template, which does not get it from here",
                "call the column `chat_template_kwargs`",
            ),
            _ => None,
        }
    }

    /// The column that was meant, if the row lacks it and the value could be one of it.
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
            // Any list of things that a row refers to.
            "documents" => false,
            _ => true,
        };
        let absent = known
            .iter()
            .filter(|name| self.get(name).is_none())
            .filter(could_be)
            .copied();
        // A misspelt `label` is as bad as a label.
        nearest(key, absent).or_else(|| {
            (self.is_training() && key != "label" && value.is_boolean())
                .then(|| nearest(key, ["label"]))
                .flatten()
        })
    }
}

/// Whether a column says what is done anyway: rows count alike, and every row is trained.
fn is_followed(key: &str, value: &Value) -> bool {
    match key {
        "label" | "kto_tag" => value == &Value::Bool(true),
        "weight" | "weights" | "sample_weight" | "loss_weight" | "loss_scale" | "train"
        | "training" | "trainable" => flag(value) == Some(true),
        _ => false,
    }
}
