//! Filters of texts.

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error, Value};

use crate::jinja::{methods, python};

pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("string", python::text);
    environment.add_filter("trim", trim);
    environment.add_filter("upper", |value: &Value| python::text(value).to_uppercase());
    environment.add_filter("lower", |value: &Value| python::text(value).to_lowercase());
    environment.add_filter("capitalize", |value: &Value| {
        methods::capitalized(&python::text(value))
    });
    environment.add_filter("title", |value: &Value| titled(&python::text(value)));
    environment.add_filter("replace", replace);
    environment.add_filter("indent", indent);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("forceescape", |value: &Value| {
        Value::from_safe_string(escaped(&python::text(value)))
    });
    environment.add_filter("safe", |value: &Value| {
        Value::from_safe_string(python::text(value))
    });
    environment.add_function("marked_sum", |values: Rest<Value>| marked_sum(&values));
    environment.add_filter("center", |value: &Value, width: Option<usize>| {
        let width = width.unwrap_or(80);
        methods::padded("center", &python::text(value), width, ' ')
    });
    environment.add_filter("urlencode", |value: &Value| {
        let text = python::text(value);
        let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~/".contains(&byte);
        text.bytes().fold(String::new(), |mut out, byte| {
            match kept(byte) {
                true => out.push(char::from(byte)),
                false => out.push_str(&format!("%{byte:02X}")),
            }
            out
        })
    });
    environment.add_filter("wordcount", |value: &Value| {
        let text = python::text(value);
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        words.filter(|word| !word.is_empty()).count()
    });
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    methods::strip(&python::text(value), chars, true, true).to_owned()
}

fn replace(value: &Value, old: &Value, new: &Value, count: Option<usize>) -> String {
    let (text, old, new) = (python::text(value), python::text(old), python::text(new));
    match count {
        Some(count) => text.replacen(&old, &new, count),
        None => text.replace(&old, &new),
    }
}

fn escape(value: &Value) -> Value {
    if value.is_safe() {
        return value.clone();
    }
    Value::from_safe_string(escaped(&python::text(value)))
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// A sum with a part that is marked as safe: from there on, what is not is escaped.
fn marked_sum(values: &[Value]) -> Result<Value, Error> {
    let mut sum = String::new();
    let mut is_safe = false;
    for (idx, value) in values.iter().enumerate() {
        let Some(text) = value.as_str() else {
            let message = format!("a text and a {} cannot be added", value.kind());
            return Err(python::error(message));
        };
        if idx > 0 && value.is_safe() && !is_safe {
            sum = escaped(&sum);
        }
        match is_safe && !value.is_safe() {
            true => sum.push_str(&escaped(text)),
            false => sum.push_str(text),
        }
        is_safe |= value.is_safe();
    }
    Ok(match is_safe {
        true => Value::from_safe_string(sum),
        false => sum.into(),
    })
}

/// A word begins behind white space, `-`, `(`, `{`, `[` and `<`.
fn titled(text: &str) -> String {
    let mut out = String::new();
    let mut begins = true;
    for c in text.chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = c.is_whitespace() || "-({[<".contains(c);
    }
    out
}

/// `indent(width=4, first=False, blank=False)`; the width is a number of spaces, or the text itself.
fn indent(value: &Value, rest: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["width", "first", "blank"];
    let argument = |idx: usize| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(names[idx])?;
        Ok(named.or_else(|| rest.get(idx).cloned()))
    };
    let is_set = |idx| Ok::<_, Error>(argument(idx)?.is_some_and(|value| value.is_true()));
    let indention = match argument(0)? {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => match usize::try_from(width)? {
                width if width > MOST_WIDTH => return Err(python::error("indent: too wide")),
                width => " ".repeat(width),
            },
        },
    };
    let (first, blank) = (is_set(1)?, is_set(2)?);
    kwargs.assert_all_used()?;
    let text = python::text(value) + "\n";
    let mut out = String::new();
    for (idx, line) in methods::lines(&text, false).into_iter().enumerate() {
        let is_indented = match idx {
            0 => first,
            _ => blank || !line.is_empty(),
        };
        if idx > 0 {
            out.push('\n');
        }
        if is_indented {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

const MOST_WIDTH: usize = 1000;
