//! Helpers for values and names in a data file: the kind of a value, whether it is empty, and which name was probably
//! meant.

use serde_json::Value;

/// The kind of a value, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Says that a field is missing, or which wrong kind it has.
pub(super) fn missing_or_wrong(value: Option<&Value>) -> String {
    match value {
        None => "is missing".to_owned(),
        Some(value) => format!("found {}", kind(value)),
    }
}

/// Whether a value holds nothing. Tables fill missing fields with null, also within nested values.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(is_empty),
        Value::Object(object) => object.values().all(is_empty),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The letters and digits of a name, in lower case.
fn plain(name: &str) -> impl Iterator<Item = char> + '_ {
    let letters = name.chars().filter(|letter| letter.is_alphanumeric());
    letters.flat_map(char::to_lowercase)
}

/// Whether two names are equal except for case and separators.
pub(super) fn is_same_name(left: &str, right: &str) -> bool {
    plain(left).eq(plain(right))
}

/// The name that `key` probably means: it differs in case or separators, or by one letter, or by two in a name of 9 or
/// more.
pub(super) fn nearest<'a>(key: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // This runs for every row of a file, so names of a very different length are skipped first.
    const SEPARATORS: usize = 4;
    let letters: String = plain(key).collect();
    names
        .into_iter()
        .filter(|name| name.len().abs_diff(key.len()) <= SEPARATORS)
        .map(|name| {
            let distance = strsim::damerau_levenshtein(&letters, &plain(name).collect::<String>());
            (distance, name)
        })
        .filter(|(distance, name)| *distance <= if name.len() < 9 { 1 } else { 2 })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// A place without its indices: `messages[2].role` as `messages[].role`.
pub(super) fn without_indices(at: &str) -> String {
    let parts = at
        .split('[')
        .map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()));
    parts.collect::<Vec<_>>().join("[")
}

/// A flag: a boolean, or 0 or 1.
pub(super) fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn misspelt_names_are_told_from_other_names() {
        let names = ["messages", "choices", "answer", "tools", "text"];
        for (key, expected) in [
            ("mesages", Some("messages")),
            ("choises", Some("choices")),
            ("answr", Some("answer")),
            ("Messages", Some("messages")),
            ("tolos", Some("tools")),
            ("message_id", None),
            ("context", None),
            ("source", None),
        ] {
            assert_eq!(nearest(key, names), expected, "{key}");
        }
    }

    #[test]
    fn indices_are_taken_out_of_places() {
        assert_eq!(
            without_indices("messages[12].content[0].x2"),
            "messages[].content[].x2"
        );
        assert_eq!(without_indices("text"), "text");
    }

    #[test]
    fn what_tables_fill_in_is_nothing() {
        for value in [
            json!(null),
            json!(""),
            json!([]),
            json!({"a": null, "b": [""]}),
        ] {
            assert!(is_empty(&value), "{value}");
        }
        for value in [json!(false), json!(0), json!(" "), json!([{"a": 0}])] {
            assert!(!is_empty(&value), "{value}");
        }
    }
}
