//! JSON as strictly as a data file needs it: repeated keys are refused, and what is wrong is said in the reader's words.

use monteclora_converters::{Problem, json};
use serde_json::Value;

use crate::data::error::field_problem;

const FIX: &str = "expected one JSON object a line";

/// Parses one row.
///
/// # Errors
/// What is wrong, with the column in bytes from 1 (and the line within the row, where the row spans several).
pub(super) fn parse(bytes: &[u8]) -> Result<Value, Problem> {
    let refuse = |problem: String, fix: &str| field_problem("row", problem, fix);
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(refuse(
            "the file is UTF-16".to_owned(),
            "save it as UTF-8: `iconv -f UTF-16 -t UTF-8 FILE`",
        ));
    }
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        return Err(refuse(
            format!("a NUL byte at column {}", at + 1),
            "the file is damaged or not UTF-8 text; write it again",
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        refuse(
            format!("not valid UTF-8 at column {}", error.valid_up_to() + 1),
            "save the file as UTF-8: `iconv -f LATIN1 -t UTF-8 FILE` if it is Latin-1",
        )
    })?;
    json::parse(text, json::Limits::NONE).map_err(|error| {
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        let place = match error.line() {
            0 | 1 => format!("column {}", error.column()),
            line => format!("column {} of the row's line {line}", error.column()),
        };
        if error.is_data() {
            return refuse(
                format!("{} at {place}", message.replace('`', "\"")),
                "keep one of them; which one was meant cannot be told",
            );
        }
        let (hint, fix) = explain(text, error.line(), error.column());
        refuse(format!("not valid JSON at {place}: {message}{hint}"), fix)
    })
}

/// What people write where JSON is wanted: what it begins with, how it is called, and the remedy.
const HABITS: [(&[&str], &str, &str); 3] = [
    (
        &["NaN", "Infinity"],
        " (NaN and Infinity are not JSON)",
        "write null or a string in its place",
    ),
    (
        &["None", "True", "False"],
        " (a Python literal)",
        "write null, true or false: use json.dumps, not str",
    ),
    (
        &["'"],
        " (single quotes)",
        "write strings in double quotes: use json.dumps, not str",
    ),
];

/// What the text at an error's place suggests.
fn explain(text: &str, line: usize, column: usize) -> (&'static str, &'static str) {
    let line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or("");
    // The column may point at the last byte that was looked at, or one past it.
    let around = |name: &&str| {
        (column.saturating_sub(name.len() + 1)..=column)
            .any(|at| line.get(at..).is_some_and(|rest| rest.starts_with(name)))
    };
    HABITS
        .iter()
        .find(|(names, ..)| names.iter().any(around))
        .map_or(("", FIX), |(_, hint, fix)| (hint, fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(bytes: &[u8]) -> String {
        let problem = parse(bytes).expect_err("refused");
        format!("{}; {}", problem.message, problem.fix)
    }

    #[test]
    fn good_json_is_what_serde_reads() {
        let text = r#"{"b":[1,-2,0.5,"é\n",null,true,{"a":{}}],"a":18446744073709551615}"#;
        assert_eq!(
            parse(text.as_bytes()).expect("parses"),
            serde_json::from_str::<Value>(text).expect("parses")
        );
    }

    #[test]
    fn usual_mistakes_are_named() {
        for (bytes, part) in [
            (
                &b"{\"a\":1,}"[..],
                "not valid JSON at column 8: trailing comma",
            ),
            (
                b"{\"a\":NaN}",
                "(NaN and Infinity are not JSON); write null",
            ),
            (b"{\"a\":-Infinity}", "(NaN and Infinity are not JSON)"),
            (b"{\"a\": None}", "(a Python literal)"),
            (b"{'a': 1}", "(single quotes)"),
            (b"{\"a\":\"\xe9\"}", "not valid UTF-8 at column 7"),
            (b"{\"a\":\"\x00\"}", "a NUL byte at column 7"),
            (b"\xff\xfe{\x00", "the file is UTF-16"),
            (
                b"{\"a\":{\"b\":1,\"b\":2}}",
                "key \"b\" occurs twice at column 15; keep one of them",
            ),
            (b"{\"a\":\"b", "EOF while parsing a string"),
            (b"{\"a\":1} {\"a\":1}", "trailing characters"),
            (b"{\n\"a\": x}", "column 6 of the row's line 2"),
        ] {
            let found = problem(bytes);
            assert!(found.contains(part), "{found} does not say `{part}`");
        }
    }
}
