//! Findings: properties of rows that are no error but that the user should know. Each is counted, with its first place.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value};

use super::{
    example::{Encoder, Example, TrainOn},
    printed::printed_null,
    rows::{Message, Notes, Role, Row, RowContent, is_for_templates},
    template::Beside,
};

/// One kind of finding.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// A column, a key of a turn or a template variable that holds something and that nothing reads.
    Unread(String),
    /// A configured field name that no row has.
    NameWithoutColumn(String),
    /// A file of the directory that may hold rows but belongs to no split.
    UnreadFile(String),
    /// The text of a control token within a row's own text; the tokenizer turns it into that token.
    ControlToken,
    /// Two begin tokens, one directly after the other.
    DoubledBegin,
    /// A trained end token that follows the same token, with at most white space between them.
    DoubledEnd,
    /// An answer without text.
    EmptyAnswer,
    /// A bare text with its own begin token; no second one is added.
    OwnBegin,
    /// A bare text with its own end token; no second one is added.
    OwnEnd,
    /// Arguments of a tool call that were JSON text and were decoded to an object.
    DecodedArguments,
    /// Null content that the chat template prints as the word None.
    PrintedNull,
    /// The chat template's generation markers decide what is trained.
    Marked,
}

impl Finding {
    /// The kinds with a fixed name, and their names in JSON.
    pub const COUNTS: [(Self, &'static str); 9] = [
        (Self::ControlToken, "control_tokens"),
        (Self::DoubledBegin, "doubled_begins"),
        (Self::DoubledEnd, "doubled_ends"),
        (Self::EmptyAnswer, "empty_answers"),
        (Self::OwnBegin, "own_begins"),
        (Self::OwnEnd, "own_ends"),
        (Self::DecodedArguments, "decoded_arguments"),
        (Self::PrintedNull, "printed_nulls"),
        (Self::Marked, "generation_markers"),
    ];

    /// Whether the finding is also reported before a run. The other findings are harmless.
    fn is_warning(&self) -> bool {
        !matches!(
            self,
            Self::OwnBegin | Self::OwnEnd | Self::DecodedArguments | Self::Marked
        )
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Unread(name) => return write!(f, "nothing reads `{name}`"),
            Self::NameWithoutColumn(name) => return write!(f, "no row has the column `{name}`"),
            Self::UnreadFile(name) => return write!(f, "nothing reads the file `{name}`"),
            Self::ControlToken => "control tokens in a row's own text",
            Self::DoubledBegin => "two begin tokens",
            Self::DoubledEnd => "two end tokens trained",
            Self::EmptyAnswer => "an empty answer",
            Self::OwnBegin => "text with its own begin token, which gets no other",
            Self::OwnEnd => "text with its own end token, which gets no other",
            Self::DecodedArguments => "tool arguments as JSON text, decoded",
            Self::PrintedNull => {
                "null content that the chat template prints as the word None: write \"\" for it"
            }
            Self::Marked => "the chat template's generation markers say what is trained",
        };
        f.write_str(text)
    }
}

/// How often something was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of rows that have it.
    pub n_rows: usize,
    /// Line of the first such row, from 1; 0 for a finding that belongs to no row.
    pub line: usize,
    /// Detail of the first such row, such as a token; may be empty.
    pub detail: String,
}

/// The findings in the rows of a source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings(BTreeMap<Finding, Tally>);

impl Findings {
    /// Adds the findings of one row.
    pub fn add(&mut self, line: usize, found: Vec<(Finding, String)>) {
        for (finding, detail) in found {
            let tally = self.0.entry(finding).or_insert_with(|| Tally {
                line,
                detail,
                ..Tally::default()
            });
            tally.n_rows += 1;
        }
    }

    /// Adds a finding that belongs to the source, not to a row.
    pub(super) fn add_of_source(&mut self, finding: Finding) {
        self.0.entry(finding).or_default();
    }

    /// The number of rows that have one kind of finding.
    pub fn n_rows(&self, finding: &Finding) -> usize {
        self.0.get(finding).map_or(0, |tally| tally.n_rows)
    }

    /// Every finding with its tally.
    pub fn iter(&self) -> impl Iterator<Item = (&Finding, &Tally)> {
        self.0.iter()
    }

    /// One line per finding.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(finding, tally)| line(finding, tally))
    }

    /// The findings to report before a run, in one line; `None` if there are none.
    pub fn warning(&self) -> Option<String> {
        const MOST: usize = 20;
        let mut lines: Vec<_> = self
            .0
            .iter()
            .filter(|(found, _)| found.is_warning())
            .collect();
        let n_more = lines.len().saturating_sub(MOST);
        lines.truncate(MOST);
        let mut texts: Vec<_> = lines
            .into_iter()
            .map(|(finding, tally)| line(finding, tally))
            .collect();
        if n_more > 0 {
            texts.push(format!("and {n_more} more"));
        }
        (!texts.is_empty()).then(|| texts.join("; "))
    }
}

fn line(finding: &Finding, tally: &Tally) -> String {
    let Tally {
        n_rows,
        line,
        detail,
    } = tally;
    let detail = match detail.as_str() {
        "" => String::new(),
        detail => format!(": {detail}"),
    };
    match n_rows {
        0 => finding.to_string(),
        1 => format!("{finding}, in 1 row (line {line}{detail})"),
        n => format!("{finding}, in {n} rows (first in line {line}{detail})"),
    }
}

/// Findings of a row itself, without its examples. Without an encoder, keys that templates usually know are not
/// reported.
pub(super) fn of_row(row: &Row, encoder: Option<&Encoder>) -> Vec<(Finding, String)> {
    let plain = |finding| (finding, String::new());
    let Notes {
        unread,
        for_template,
        n_decoded_arguments,
        ..
    } = &row.notes;
    let mut found: Vec<_> = unread
        .iter()
        .map(|name| plain(Finding::Unread(name.clone())))
        .collect();
    if *n_decoded_arguments > 0 {
        found.push(plain(Finding::DecodedArguments));
    }
    let name_of = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let Some(encoder) = encoder else {
        let odd = for_template
            .iter()
            .filter(|key| !is_for_templates(&name_of(key)));
        found.extend(odd.map(|key| plain(Finding::Unread(key.clone()))));
        return found;
    };
    let is_rendered = match &row.content {
        RowContent::Conversation { .. } => true,
        RowContent::Prompt { .. } => encoder.options().apply_chat_template,
        RowContent::Text(_) => false,
    };
    let template = encoder.template().filter(|_| is_rendered);
    let is_mentioned = |name: &str| template.is_some_and(|template| template.mentions(name));
    let is_read = |key: &str| template.is_some_and(|template| template.mentions_key(key));
    let unread = for_template.iter().filter(|key| !is_read(&name_of(key)));
    found.extend(unread.map(|key| plain(Finding::Unread(key.clone()))));
    let has_tools = match &row.content {
        RowContent::Conversation { tools, .. } | RowContent::Prompt { tools, .. } => {
            !tools.is_empty()
        }
        RowContent::Text(_) => false,
    };
    if let (Some(template), RowContent::Conversation { messages, tools }) = (template, &row.content)
    {
        let variables = &row.variables;
        if let Some(turn) = printed_null(template, messages, Beside { tools, variables }) {
            found.push((Finding::PrintedNull, format!("messages[{turn}]")));
        }
    }
    let is_marked = template.is_some_and(|template| template.marks_generation(has_tools));
    if is_marked && encoder.options().train_on != TrainOn::All {
        found.push(plain(Finding::Marked));
    }
    for name in row.variables.keys().filter(|name| !is_mentioned(name)) {
        let column = match name.as_str() {
            "documents" => name.clone(),
            name => format!("chat_template_kwargs.{name}"),
        };
        found.push(plain(Finding::Unread(column)));
    }
    found.extend(control_token(row, encoder).map(|detail| (Finding::ControlToken, detail)));
    if has_empty_answer(row) {
        found.push(plain(Finding::EmptyAnswer));
    }
    if let Some(text) = bare_text(row, encoder) {
        if encoder.tokenizer().begins_itself(text.begin) {
            found.push(plain(Finding::OwnBegin));
        }
        if encoder.tokenizer().end_in(text.end).is_some() {
            found.push(plain(Finding::OwnEnd));
        }
    }
    found
}

/// Findings of a row that is to be answered. Settings of its training have no effect, so an empty answer is no finding.
pub fn of_question(row: &Row, encoder: &Encoder) -> Vec<(Finding, String)> {
    let mut found = of_row(row, Some(encoder));
    found.retain(|(finding, _)| *finding != Finding::EmptyAnswer);
    found
}

/// Findings of an example of a row.
pub(super) fn of_example(example: &Example, encoder: &Encoder) -> Vec<Finding> {
    let (ids, tokenizer) = (&example.input_ids, encoder.tokenizer());
    let mut found = Vec::new();
    if let [first, second, ..] = ids[..]
        && first == second
        && tokenizer.is_special(first)
    {
        found.push(Finding::DoubledBegin);
    }
    // End tokens are those that the model's files name, and the special token that ends this example.
    let own = (ids.iter().zip(&example.loss_mask))
        .rfind(|(_, trained)| **trained)
        .map(|(id, _)| *id)
        .filter(|id| tokenizer.is_special(*id));
    let is_end = |id: u32| tokenizer.eos_ids().contains(&id) || own == Some(id);
    let is_blank = |id: u32| {
        let text = tokenizer.decode(&[id], false);
        text.is_ok_and(|text| text.trim().is_empty() && !tokenizer.is_special(id))
    };
    let follows_itself = |idx: usize| {
        let before = (0..idx).rev().find(|before| !is_blank(ids[*before]));
        before.is_some_and(|before| ids[before] == ids[idx])
    };
    let trained_ends = (1..ids.len()).filter(|idx| example.loss_mask[*idx] && is_end(ids[*idx]));
    if trained_ends.into_iter().any(follows_itself) {
        found.push(Finding::DoubledEnd);
    }
    found
}

/// The first control token that a row's own text spells, with its place.
fn control_token(row: &Row, encoder: &Encoder) -> Option<String> {
    let in_text = |text: &str| {
        encoder
            .tokenizer()
            .special_in(text)
            .map(|token| format!("`{token}`"))
    };
    let in_values = |values: &[Value]| values.iter().find_map(|value| in_value(value, &in_text));
    let at = |place: &str, token: Option<String>| token.map(|token| format!("{place} {token}"));
    match &row.content {
        RowContent::Conversation { messages, tools } => messages
            .iter()
            .find_map(|message| at(message.role().name(), in_message(message, &in_text)))
            .or_else(|| at("tools", in_values(tools))),
        RowContent::Prompt {
            system,
            prompt,
            completion,
            tools,
        } => at("system", system.as_deref().and_then(in_text))
            .or_else(|| at("prompt", in_text(prompt)))
            .or_else(|| at("completion", in_text(completion)))
            .or_else(|| at("tools", in_values(tools))),
        RowContent::Text(text) => at("text", in_text(encoder.tokenizer().without_ends(text))),
    }
}

fn in_message(message: &Message, in_text: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let rest = |fields: &Map<String, Value>| {
        let said = fields.iter().filter(|(key, _)| *key != "role");
        said.map(|(_, value)| value)
            .find_map(|value| in_value(value, in_text))
    };
    in_text(message.content()).or_else(|| rest(message.fields()))
}

fn in_value(value: &Value, in_text: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    match value {
        Value::String(text) => in_text(text),
        Value::Array(list) => list.iter().find_map(|value| in_value(value, in_text)),
        Value::Object(object) => object.values().find_map(|value| in_value(value, in_text)),
        _ => None,
    }
}

fn has_empty_answer(row: &Row) -> bool {
    let is_blank = |text: &str| text.trim().is_empty();
    let says_otherwise = |message: &Message| {
        let keys = ["tool_calls", "reasoning_content", "reasoning", "thinking"];
        keys.iter().any(|key| {
            message
                .fields()
                .get(*key)
                .is_some_and(|value| !value.is_null())
        })
    };
    match &row.content {
        RowContent::Conversation { messages, .. } => messages.iter().any(|message| {
            message.role() == Role::Assistant
                && message.trained()
                && is_blank(message.content())
                && !says_otherwise(message)
        }),
        RowContent::Prompt { completion, .. } => is_blank(completion),
        RowContent::Text(text) => is_blank(text),
    }
}

/// The texts at the beginning and at the end of a row that is encoded without a template.
struct BareText<'a> {
    begin: &'a str,
    end: &'a str,
}

fn bare_text<'a>(row: &'a Row, encoder: &Encoder) -> Option<BareText<'a>> {
    match &row.content {
        RowContent::Text(text) => Some(BareText {
            begin: text,
            end: text,
        }),
        RowContent::Prompt {
            prompt, completion, ..
        } if !encoder.options().apply_chat_template => Some(BareText {
            begin: prompt,
            end: completion,
        }),
        _ => None,
    }
}
