//! Explains a row of no known format: what it probably is, and how to change it so that it can be read.

use monteclora_converters::Problem;
use serde_json::{Map, Value};

use super::value::nearest;
use crate::data::error::field_problem;

/// The keys that identify the formats.
const TELLING: [&str; 7] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "output",
    "text",
];

/// Names that other data sets use for the question, the answer and a plain text.
const PROMPTS: [&str; 6] = ["question", "query", "user", "human", "input", "inputs"];
const COMPLETIONS: [&str; 9] = [
    "answer",
    "response",
    "output",
    "target",
    "targets",
    "reply",
    "assistant",
    "outputs",
    "label",
];
const TEXTS: [&str; 5] = ["content", "document", "body", "article", "passage"];

/// Keys of pairs of a better and a worse answer.
pub(super) const PREFERENCES: [&str; 6] = [
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
    "chosen_response",
    "rejected_response",
];

/// The problem of a row whose keys fit no format.
pub(super) fn unknown_format(object: &Map<String, Value>) -> Problem {
    const FORMATS: &str =
        "expected messages, prompt and completion, instruction and output, conversations, or text";
    let keys: Vec<_> = object.keys().map(|key| format!("`{key}`")).collect();
    let found = match keys.as_slice() {
        [] => "the object is empty".to_owned(),
        keys => format!("no known format has the keys {}", keys.join(", ")),
    };
    match likely(object) {
        None => field_problem("row", found, FORMATS),
        Some((hint, fix)) => field_problem("row", format!("{found}{hint}"), fix),
    }
}

/// What the row probably is, and the fix.
fn likely(object: &Map<String, Value>) -> Option<(String, String)> {
    let has = |key: &str| object.contains_key(key);
    if let Some(key) = PREFERENCES.iter().find(|key| has(key)) {
        let hint = format!("; `{key}` is of a preference pair (DPO), which is not supported");
        let fix = "write the better answer alone, as a completion or as an assistant turn";
        return Some((hint, fix.to_owned()));
    }
    if has("input_ids") {
        let fix = "give the text instead: rows are tokenised here";
        return Some(("; the row is tokenised already".to_owned(), fix.to_owned()));
    }
    let turns = turns(object);
    let known = TELLING.iter().copied().filter(|name| !has(name));
    let misspelt: Vec<_> = object
        .keys()
        .filter(|key| !TELLING.contains(&key.as_str()))
        .filter_map(|key| Some((key.as_str(), nearest(key, known.clone())?)))
        .collect();
    let is_misspelt = match turns {
        // A list of turns counts as misspelt only if its key resembles the field for its kind of turns.
        Some((field, key)) => misspelt.contains(&(key, field)),
        None => !misspelt.is_empty(),
    };
    if is_misspelt {
        let meant = misspelt
            .iter()
            .map(|(key, name)| format!("`{name}` for `{key}`"));
        let hint = format!(
            "; did you mean {}?",
            meant.collect::<Vec<_>>().join(" and ")
        );
        return Some((hint, "rename the key".to_owned()));
    }
    if turns.is_none()
        && let Some((key, n_rows)) = wrapped(object)
    {
        let hint = format!("; `{key}` is a list of {n_rows} objects, which may be the rows");
        let fix = format!("write them one a line: `jq -c '.[\"{key}\"][]' FILE > rows.jsonl`");
        return Some((hint, fix));
    }
    let named = turns.map(|pair| vec![pair]).or_else(|| renames(object))?;
    let fields: Vec<_> = named
        .iter()
        .map(|(field, name)| format!("{field} = \"{name}\""))
        .collect();
    let flags: Vec<_> = named
        .iter()
        .map(|(field, name)| format!("--field {field}={name}"))
        .collect();
    Some((
        String::new(),
        format!(
            "name the fields: `fields = {{ {} }}` under [data] of run.toml, or `{}` for the data commands",
            fields.join(", "),
            flags.join(" ")
        ),
    ))
}

/// The key and length of a list of objects that may hold all rows: an API response, or a data set with its name and
/// version.
fn wrapped(object: &Map<String, Value>) -> Option<(&str, usize)> {
    object.iter().find_map(|(key, value)| {
        let list = value.as_array().filter(|list| !list.is_empty())?;
        (!TELLING.contains(&key.as_str()) && list.iter().all(Value::is_object))
            .then_some((key.as_str(), list.len()))
    })
}

/// The field and the key of a list of turns, if the row has one.
fn turns(object: &Map<String, Value>) -> Option<(&'static str, &str)> {
    object.iter().find_map(|(key, value)| {
        let first = value.as_array()?.first()?;
        let is_turn = |speaker: &str| first.get(speaker).is_some();
        let field = match () {
            () if is_turn("role") => "messages",
            () if is_turn("from") => "conversations",
            () => return None,
        };
        Some((field, key.as_str()))
    })
}

/// Fields, with the keys that probably hold them.
fn renames(object: &Map<String, Value>) -> Option<Vec<(&'static str, &str)>> {
    let text_in = |names: &[&'static str]| {
        let is_text = |name: &&&str| object.get(**name).is_some_and(Value::is_string);
        names.iter().find(is_text).copied()
    };
    let own = |name: &'static str| object.contains_key(name).then_some(name);
    if own("instruction").is_some() {
        return Some(vec![("output", text_in(&COMPLETIONS)?)]);
    }
    let prompt = own("prompt").or_else(|| text_in(&PROMPTS));
    let completion = own("completion").or_else(|| text_in(&COMPLETIONS));
    if let (Some(prompt), Some(completion)) = (prompt, completion) {
        let pairs = match object.contains_key("history") {
            // Only an instruction row can have earlier turns beside it.
            true => [("instruction", prompt), ("output", completion)],
            false => [("prompt", prompt), ("completion", completion)],
        };
        return Some(
            pairs
                .into_iter()
                .filter(|(field, name)| field != name)
                .collect(),
        );
    }
    Some(vec![("text", text_in(&TEXTS)?)])
}

/// The problem of an object that holds a whole table by columns instead of one row.
pub(super) fn by_columns(object: &Map<String, Value>) -> Option<Problem> {
    const TEXTS: [&str; 5] = ["prompt", "completion", "instruction", "output", "text"];
    let is_index = |key: &String| key.bytes().all(|byte| byte.is_ascii_digit());
    let is_column = |value: &Value| match value {
        Value::Object(column) => !column.is_empty() && column.keys().all(is_index),
        Value::Array(column) => !column.is_empty() && column.iter().all(Value::is_string),
        _ => false,
    };
    let held: Vec<_> = TEXTS.iter().filter_map(|key| object.get(*key)).collect();
    (!held.is_empty() && held.into_iter().all(is_column)).then(|| {
        field_problem(
            "row",
            "is a table by columns, not one row",
            "write one object a row: `pandas.read_json(FILE).to_json(\"rows.jsonl\", orient=\"records\", lines=True)`",
        )
    })
}
