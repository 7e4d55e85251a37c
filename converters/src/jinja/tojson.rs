//! `tojson` as transformers has it: Python's `json.dumps` with `ensure_ascii=False`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, Value};

use super::{python, values};

/// The most spaces that a level is indented by; Python has no limit, and memory has.
const MOST_INDENT: usize = 64;

/// The most that is nested.
const MOST_DEPTH: usize = 200;

struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn filter(value: &Value, rest: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if rest.len() > names.len() {
        return Err(python::error("tojson: too many arguments"));
    }
    let argument = |idx: usize| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(names[idx])?;
        Ok(named.or_else(|| rest.get(idx).cloned()))
    };
    let is_set = |idx| Ok::<_, Error>(argument(idx)?.is_some_and(|value| value.is_true()));
    let indent = match argument(1)? {
        Some(indent) if !indent.is_none() => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let n = i64::try_from(indent)?.max(0);
                " ".repeat(usize::try_from(n).map_or(MOST_INDENT, |n| n.min(MOST_INDENT)))
            }
        }),
        _ => None,
    };
    let (mut item, mut key) = (", ".to_owned(), ": ".to_owned());
    if indent.is_some() {
        item = ",".to_owned();
    }
    if let Some(separators) = argument(2)?.filter(|value| !value.is_none()) {
        let texts: Vec<Value> = separators.try_iter()?.collect();
        match texts.as_slice() {
            [first, second] => (item, key) = (python::text(first), python::text(second)),
            _ => return Err(python::error("tojson: separators are two texts")),
        }
    }
    let style = Style {
        ensure_ascii: is_set(0)?,
        indent,
        item,
        key,
        sort_keys: is_set(3)?,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if values::view(value).is_some() {
            let message = "tojson: a generator or a view of a dictionary is not JSON serializable; use `| list`";
            return Err(python::error(message));
        }
        if depth > MOST_DEPTH {
            return Err(python::error("tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.sequence(out, ['[', ']'], &items, depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let pairs = value.as_object().and_then(|map| map.try_iter_pairs());
                let mut pairs: Vec<(Value, Value)> = pairs.into_iter().flatten().collect();
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.sequence(out, ['{', '}'], &pairs, depth, |out, (name, value)| {
                    self.text(out, &key(name)?);
                    out.push_str(&self.key);
                    self.write(out, value, depth + 1)
                })?;
            }
            kind => {
                let message = format!("Object of type {kind} is not JSON serializable");
                return Err(python::error(message));
            }
        }
        Ok(())
    }

    fn sequence<T>(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (idx, item) in items.iter().enumerate() {
            if idx > 0 {
                out.push_str(&self.item);
            }
            self.line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            self.line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn text(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' => out.write_str("\\\""),
                '\\' => out.write_str("\\\\"),
                '\n' => out.write_str("\\n"),
                '\r' => out.write_str("\\r"),
                '\t' => out.write_str("\\t"),
                '\u{8}' => out.write_str("\\b"),
                '\u{c}' => out.write_str("\\f"),
                c if u32::from(c) < 0x20 => write!(out, "\\u{:04x}", u32::from(c)),
                c if self.ensure_ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    let mut units = c.encode_utf16(&mut units).iter();
                    units.try_for_each(|unit| write!(out, "\\u{unit:04x}"))
                }
                c => out.write_char(c),
            };
        }
        out.push('"');
    }
}

/// A key of a dictionary: what is no text is written as `json.dumps` does it.
fn key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(python::text(key)),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.to_string().to_lowercase()),
        ValueKind::Number => Ok(number(key)),
        kind => Err(python::error(format!(
            "keys must be str, int, float, bool or None, not {kind}"
        ))),
    }
}

fn number(value: &Value) -> String {
    let text = python::repr(value);
    match text.as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        _ => text,
    }
}
