//! Values as Python writes them.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::values;

/// An error of a template.
pub(super) fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `str(value)`; what is undefined prints nothing.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// `repr(value)`.
pub(super) fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => repr_of_text(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => float(number),
            Err(_) => value.to_string(),
        },
        ValueKind::Seq | ValueKind::Iterable if !values::writes_itself(value) => {
            match value.try_iter() {
                Ok(items) => repr_of_list(items.collect::<Vec<_>>().iter()),
                Err(_) => value.to_string(),
            }
        }
        ValueKind::Map => match value.as_object().and_then(|map| map.try_iter_pairs()) {
            Some(pairs) => repr_of_dict(pairs),
            None => value.to_string(),
        },
        _ => value.to_string(),
    }
}

pub(super) fn repr_of_list<'a>(items: impl Iterator<Item = &'a Value>) -> String {
    let items: Vec<String> = items.map(repr).collect();
    format!("[{}]", items.join(", "))
}

pub(super) fn repr_of_tuple<'a>(items: impl Iterator<Item = &'a Value>) -> String {
    let items: Vec<String> = items.map(repr).collect();
    match items.as_slice() {
        [only] => format!("({only},)"),
        items => format!("({})", items.join(", ")),
    }
}

pub(super) fn repr_of_dict(pairs: impl Iterator<Item = (Value, Value)>) -> String {
    let pairs: Vec<String> = pairs
        .map(|(key, value)| format!("{}: {}", repr(&key), repr(&value)))
        .collect();
    format!("{{{}}}", pairs.join(", "))
}

/// The shortest text that reads back as `number`, as Python's `repr` has it.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let text = format!("{number}");
        return if text.contains('.') {
            text
        } else {
            text + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

fn repr_of_text(text: &str) -> String {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        let _ = match c {
            '\\' => out.write_str("\\\\"),
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            c if c == quote => write!(out, "\\{c}"),
            c if is_printable(c) => out.write_char(c),
            c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c)),
            c if u32::from(c) < 0x1_0000 => write!(out, "\\u{:04x}", u32::from(c)),
            c => write!(out, "\\U{:08x}", u32::from(c)),
        };
    }
    out.push(quote);
    out
}

/// `str.isprintable`: Rust's `escape_debug` goes by the same categories of Unicode, once marks may stand behind a letter.
fn is_printable(c: char) -> bool {
    !c.is_control() && (c.is_ascii() || !format!("a{c}").escape_debug().any(|c| c == '{'))
}

/// Whether `str.strip` takes it away.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_are_pythons() {
        for (number, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123_456_789_012_345.0, "123456789012345.0"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-0.0, "-0.0"),
            (1e300, "1e+300"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(float(number), text);
        }
        for (text, expected) in [
            ("it's", "\"it's\""),
            ("a\"'b", "'a\"\\'b'"),
            ("\n\t\\", "'\\n\\t\\\\'"),
            ("é漢e\u{301}", "'é漢e\u{301}'"),
            ("\u{200b}\u{a0}\u{7f}", "'\\u200b\\xa0\\x7f'"),
        ] {
            assert_eq!(repr_of_text(text), expected);
        }
    }
}
