//! Finds the keys and indices that lead to a place in the text of a JSON value.

/// The place of byte `at`, such as `messages[1].content`; empty for the value itself. Only the text before `at` must be
/// JSON.
pub(super) fn place(text: &str, at: usize) -> String {
    let mut path: Vec<Step> = Vec::new();
    let bytes = text.as_bytes();
    let mut idx = 0;
    while idx < at.min(bytes.len()) {
        match bytes[idx] {
            b'"' => {
                let end = string_end(bytes, idx);
                if let Some(Step::Key { name, is_open }) = path.last_mut()
                    && *is_open
                    && end <= at
                {
                    *name = text[idx + 1..end.max(idx + 2) - 1].to_owned();
                }
                idx = end;
                continue;
            }
            b'{' => path.push(Step::Key {
                name: String::new(),
                is_open: true,
            }),
            b'[' => path.push(Step::Index(0)),
            b'}' | b']' => {
                path.pop();
            }
            b':' => {
                if let Some(Step::Key { is_open, .. }) = path.last_mut() {
                    *is_open = false;
                }
            }
            b',' => match path.last_mut() {
                Some(Step::Index(element)) => *element += 1,
                Some(Step::Key { name, is_open }) => {
                    name.clear();
                    *is_open = true;
                }
                None => {}
            },
            _ => {}
        }
        idx += 1;
    }
    let mut found = String::new();
    for step in path {
        match step {
            Step::Index(element) => found.push_str(&format!("[{element}]")),
            Step::Key { name, .. } if name.is_empty() => {}
            Step::Key { name, .. } => {
                if !found.is_empty() {
                    found.push('.');
                }
                found.push_str(&name);
            }
        }
    }
    found
}

enum Step {
    Index(usize),
    /// The current key of an object. While `is_open`, the next string is the key.
    Key {
        name: String,
        is_open: bool,
    },
}

/// The byte offset after the closing quote of the string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut idx = start + 1;
    while idx < bytes.len() {
        match bytes[idx] {
            b'\\' => idx += 2,
            b'"' => return idx + 1,
            _ => idx += 1,
        }
    }
    bytes.len()
}

/// The integers of a text that do not fit in 64 bits, each with its byte offset.
pub(super) fn long_integers(text: &str) -> Vec<(usize, &str)> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut idx = 0;
    while idx < bytes.len() {
        match bytes[idx] {
            b'"' => idx = string_end(bytes, idx),
            b'-' | b'0'..=b'9' => {
                let is_of_number =
                    |byte: &u8| matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
                let length = bytes[idx..]
                    .iter()
                    .take_while(|byte| is_of_number(byte))
                    .count();
                let number = &text[idx..idx + length];
                let is_integer = !number.contains(['.', 'e', 'E']);
                if is_integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                    found.push((idx, number));
                }
                idx += length;
            }
            _ => idx += 1,
        }
    }
    found
}

/// The first escape of half a character, such as `\ud83d` without its second half, with its byte offset.
pub(super) fn lone_surrogate(text: &str) -> Option<(usize, &str)> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let bytes = text.as_bytes();
    let mut idx = 0;
    while idx < bytes.len() {
        if bytes[idx] != b'\\' {
            idx += 1;
            continue;
        }
        idx += match unit(idx) {
            Some(0xd800..=0xdbff) if matches!(unit(idx + 6), Some(0xdc00..=0xdfff)) => 12,
            Some(0xd800..=0xdfff) => return Some((idx, &text[idx..idx + 6])),
            Some(_) => 6,
            None => 2,
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_keys_and_indices() {
        let text = r#"{"a": "x, {y}", "m": [{"role": "u"}, {"content": "é\"z", "n": {"k": [1, 2]}}], "t": 3}"#;
        for (part, expected) in [
            ("x, {y}", "a"),
            ("\"u\"", "m[0].role"),
            ("z\"", "m[1].content"),
            ("1, 2", "m[1].n.k[0]"),
            ("2]", "m[1].n.k[1]"),
            ("3}", "t"),
        ] {
            let at = text.find(part).expect("a part");
            assert_eq!(place(text, at), expected, "{part}");
        }
        assert_eq!(place("x", 0), "");
        assert_eq!(place("{\"a\": \"b", 99), "a");
    }

    #[test]
    fn halves_of_characters_are_found() {
        assert_eq!(
            lone_surrogate(r#"{"a":"\ud83d\ude00 \u00e9 \\ud83d"}"#),
            None
        );
        for (text, expected) in [
            (r#""cut \ud83d here""#, (5, "\\ud83d")),
            (r#""\ud83d\ud83d\ude00""#, (1, "\\ud83d")),
            (r#""\uDE00""#, (1, "\\uDE00")),
            (r#""\\\ud83d""#, (3, "\\ud83d")),
        ] {
            assert_eq!(lone_surrogate(text), Some(expected), "{text}");
        }
    }
}
