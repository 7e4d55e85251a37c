//! Parses JSON strictly. Repeated keys are refused, and messages are written for the person who made the file.

use monteclora_converters::{Problem, json};
use serde::de::IgnoredAny;
use serde_json::Value;

use super::json_place::{lone_surrogate, long_integers, place};
use crate::data::error::field_problem;

const FIX: &str = "expected one JSON object per line";

/// Columns whose numbers reach the model.
const READ: [&str; 8] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "tools",
    "functions",
    "chat_template_kwargs",
    "documents",
];

/// Parses one row.
///
/// # Errors
/// Returns what is wrong and the column in bytes from 1. If the row spans several lines, also the line within the row.
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
    if text.starts_with('\u{feff}') {
        return Err(refuse(
            "a byte order mark at the start of the line, as files that were joined have it"
                .to_owned(),
            "remove it: `sed 's/^\\xEF\\xBB\\xBF//' FILE > rows.jsonl`",
        ));
    }
    if let Some((at, number)) = (long_integers(text).into_iter())
        .map(|(at, number)| (place(text, at), number))
        .find(|(at, _)| {
            let column = at.split(['.', '[']).next().unwrap_or(at);
            READ.contains(&column)
        })
    {
        let problem = format!("{number} is too long to be kept exactly");
        return Err(field_problem(at, problem, "write it as a string"));
    }
    json::parse(text, json::Limits::NONE).map_err(|error| {
        if let Some((at, escape)) = lone_surrogate(text) {
            return field_problem(
                place_or_row(text, at),
                format!("`{escape}` at column {} is half a character (a lone surrogate), which is no text", at + 1),
                "write the whole character: cut strings between characters, or replace it (Python: text.encode(\"utf-16\", \"surrogatepass\").decode(\"utf-16\", \"replace\"))",
            );
        }
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        let at = match error.line() {
            0 | 1 => format!("column {}", error.column()),
            line => format!("column {} of the row's line {line}", error.column()),
        };
        if error.is_data() {
            return refuse(
                format!("{} at {at}", message.replace('`', "\"")),
                "keep one of them; which one was meant cannot be told",
            );
        }
        if let Some((problem, fix)) = more_than_one(text) {
            return refuse(format!("not valid JSON at {at}: {problem}"), fix);
        }
        let (hint, fix) = if error.is_eof() {
            (" (the row is cut off)", "fetch or write the file again; a row is one line")
        } else if message.starts_with("control character") {
            ("", "write \\t, \\n or \\u0000 in its place: use json.dumps")
        } else {
            explain(text, error.line(), error.column())
        };
        let within = match place(text, offset(text, error.line(), error.column())) {
            key if key.is_empty() => String::new(),
            key => format!(", in `{key}`"),
        };
        refuse(format!("not valid JSON at {at}{within}: {message}{hint}"), fix)
    })
}

/// The byte offset of a line and column, both from 1.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before = text.split_inclusive('\n').take(line.saturating_sub(1));
    before.map(str::len).sum::<usize>() + column.saturating_sub(1)
}

fn place_or_row(text: &str, at: usize) -> String {
    match place(text, at) {
        key if key.is_empty() => "row".to_owned(),
        key => key,
    }
}

/// What follows a complete value in the row's text, and the fix.
fn more_than_one(text: &str) -> Option<(&'static str, &'static str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    let rest = &text[values.byte_offset()..];
    let next = rest.trim_start().chars().next()?;
    if rest.starts_with('\r') {
        let fix = "end lines in LF: `tr '\\r' '\\n' < FILE > rows.jsonl`";
        return Some(("another line follows, for lines end in CR alone", fix));
    }
    match next {
        '{' | '[' => Some((
            "another value follows in the same line",
            "write one object a line: `jq -c . FILE > rows.jsonl`",
        )),
        ',' => Some((
            "a comma follows the object",
            "remove the commas between lines, or write one array: [ ... ]",
        )),
        '#' | '/' => Some((
            "a comment follows the object",
            "remove it: JSON has no comments",
        )),
        _ => None,
    }
}

/// Common mistakes in place of JSON: how each begins, a hint, and the fix.
const HABITS: [(&[&str], &str, &str); 4] = [
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
        &["//", "/*", "#"],
        " (a comment)",
        "remove it: JSON has no comments",
    ),
    (
        &["'"],
        " (single quotes)",
        "write strings in double quotes: use json.dumps, not str",
    ),
];

/// The hint and the fix that the text at an error's place suggests.
fn explain(text: &str, line: usize, column: usize) -> (&'static str, &'static str) {
    let line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or("");
    // The column may point at the last byte that the parser read, or one past it.
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

    #[test]
    fn half_a_character_is_named_by_its_key() {
        let text = r#"{"messages":[{"role":"user","content":"cut \ud83d here"}]}"#;
        let problem = parse(text.as_bytes()).expect_err("refused");
        assert_eq!(problem.at, "messages[0].content");
        assert!(
            problem
                .message
                .starts_with("`\\ud83d` at column 44 is half a character"),
            "{problem}"
        );
        let whole = r#"{"text":"\ud83d\ude00"}"#;
        assert_eq!(
            parse(whole.as_bytes()).expect("parses")["text"],
            "\u{1f600}"
        );
    }

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
            (
                b"{\"a\":1} {\"a\":1}",
                "column 9: another value follows in the same line; write one object a line: `jq -c . FILE",
            ),
            (
                b"{\"a\":1}\r{\"a\":1}",
                "lines end in CR alone; end lines in LF",
            ),
            (b"{\"a\":1},", "a comma follows the object"),
            (b"{\"a\":1} # x", "a comment follows the object"),
            (b"{\"a\":1} x", "trailing characters"),
            (b"\xef\xbb\xbf{\"a\":1}", "a byte order mark at the start"),
            (
                b"{\"a\":[1,{\"b\":NaN}]}",
                "in `a[1].b`: expected value (NaN",
            ),
            (b"// x", "(a comment)"),
            (b"{\"a\":\"x\ty\"}", "parsing a string; write \\t, \\n"),
            (b"{\"a\":\"x", "(the row is cut off); fetch"),
            (b"{\n\"a\": x}", "column 6 of the row's line 2"),
        ] {
            let found = problem(bytes);
            assert!(found.contains(part), "{found} does not say `{part}`");
        }
    }
}
