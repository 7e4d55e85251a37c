//! Python's methods of texts, lists and dictionaries.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, FormatStyle, State, Value, format_filter};
use minijinja_contrib::pycompat;

use super::{python, values};

/// The longest text that a method makes.
const MOST_LENGTH: usize = 100_000_000;

/// What minijinja calls for a method that it does not know; slices are calls, too.
pub(super) fn call(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match method {
        "python_slice" => return slice(value, args),
        "python_percent" => {
            let (values,): (Value,) = from_args(args)?;
            let values: Vec<Value> = match values.kind() {
                ValueKind::Seq => values.try_iter()?.collect(),
                _ => vec![values],
            };
            return format_filter(FormatStyle::Printf, &python::text(value), &values)
                .map(Value::from);
        }
        "python_item" => {
            let (key,): (&str,) = from_args(args)?;
            return values::item(value, key);
        }
        _ => {}
    }
    let answer = match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => of_text(text, method, args)?,
            None => None,
        },
        ValueKind::Map => of_dict(value, method, args)?,
        ValueKind::Seq => of_list(value, method, args)?,
        _ => None,
    };
    match answer {
        Some(answer) => Ok(answer),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let every = |holds: fn(char) -> bool| !text.is_empty() && text.chars().all(holds);
    Ok(Some(match method {
        "strip" => stripped(text, args, true, true)?.into(),
        "lstrip" => stripped(text, args, true, false)?.into(),
        "rstrip" => stripped(text, args, false, true)?.into(),
        "split" => split(text, args, false)?,
        "rsplit" => split(text, args, true)?,
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
            values::list_of(lines(text, keep).into_iter().map(Value::from).collect())
        }
        "find" | "index" | "rfind" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = match method.starts_with('r') {
                true => text.rfind(part),
                false => text.find(part),
            };
            match found {
                Some(at) => text[..at].chars().count().into(),
                None if method.ends_with("find") => (-1).into(),
                None => return Err(python::error("substring not found")),
            }
        }
        "count" => {
            let (part,): (&str,) = from_args(args)?;
            match part.is_empty() {
                true => (text.chars().count() + 1).into(),
                false => text.matches(part).count().into(),
            }
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let texts: Result<Vec<String>, Error> = items
                .try_iter()?
                .map(|item| match item.as_str() {
                    Some(text) => Ok(text.to_owned()),
                    None => Err(python::error(format!(
                        "sequence item: expected str instance, {} found",
                        item.kind()
                    ))),
                })
                .collect();
            texts?.join(text).into()
        }
        "removeprefix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_prefix(part).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            text.strip_suffix(part).unwrap_or(text).into()
        }
        "partition" | "rpartition" => {
            let (part,): (&str,) = from_args(args)?;
            let is_last = method == "rpartition";
            let found = match is_last {
                true => text.rsplit_once(part),
                false => text.split_once(part),
            };
            let parts = match found {
                Some((before, after)) => [before, part, after],
                None if is_last => ["", "", text],
                None => [text, "", ""],
            };
            values::tuple_of(parts.map(Value::from).to_vec())
        }
        "capitalize" => capitalized(text).into(),
        "title" => titled(text).into(),
        "casefold" => text.to_lowercase().into(),
        "swapcase" => text.chars().map(swapped).collect::<String>().into(),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            let sign = &text[..text.len() - digits.len()];
            format!("{sign}{}{digits}", padding(text, width, '0')?).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let fill = fill.unwrap_or(' ');
            padded(method, text, width, fill)?.into()
        }
        "isspace" => every(python::is_space).into(),
        "isalpha" => every(char::is_alphabetic).into(),
        "isalnum" => every(char::is_alphanumeric).into(),
        "isdigit" | "isnumeric" | "isdecimal" => every(char::is_numeric).into(),
        "islower" | "isupper" => {
            let is_cased = |c: char| c.is_lowercase() || c.is_uppercase();
            let wrong = |c: char| match method {
                "islower" => c.is_uppercase(),
                _ => c.is_lowercase(),
            };
            (text.chars().any(is_cased) && !text.chars().any(wrong)).into()
        }
        _ => return Ok(None),
    }))
}

fn of_dict(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let pairs = || value.as_object().and_then(|map| map.try_iter_pairs());
    let pairs = || pairs().into_iter().flatten();
    Ok(Some(match method {
        "items" => {
            let items = pairs().map(|(key, value)| values::tuple_of(vec![key, value]));
            values::view_of(items.collect(), false)
        }
        "keys" => values::view_of(pairs().map(|(key, _)| key).collect(), false),
        "values" => values::view_of(pairs().map(|(_, value)| value).collect(), false),
        "copy" => value.clone(),
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(args)?;
            let found = value.get_item(&key)?;
            match found.is_undefined() {
                true => default.unwrap_or_else(|| Value::from(())),
                false => found,
            }
        }
        "clear" | "pop" | "popitem" | "setdefault" | "update" => return Err(unsafe_call(method)),
        _ => return Ok(None),
    }))
}

fn of_list(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| &item == wanted);
            found
                .ok_or_else(|| python::error("the value is not in the list"))?
                .into()
        }
        "copy" => value.clone(),
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            return Err(unsafe_call(method));
        }
        _ => return Ok(None),
    }))
}

/// Templates are run in a sandbox in which nothing is changed.
fn unsafe_call(method: &str) -> Error {
    python::error(format!("`{method}` is not safely callable"))
}

fn slice(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let bound = |idx: usize| -> Result<Option<i64>, Error> {
        match args.get(idx) {
            Some(value) if !value.is_none() => {
                Ok(Some(i64::try_from(value.clone()).map_err(|_| {
                    python::error("slice indices must be integers or None")
                })?))
            }
            _ => Ok(None),
        }
    };
    let (start, stop, step) = (bound(0)?, bound(1)?, bound(2)?.unwrap_or(1));
    if value.is_undefined() {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    if step == 0 {
        return Err(python::error("slice step cannot be zero"));
    }
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        let picked = indices(chars.len(), start, stop, step);
        return Ok(picked.map(|idx| chars[idx]).collect::<String>().into());
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            let picked = indices(items.len(), start, stop, step);
            Ok(values::list_of(
                picked.map(|idx| items[idx].clone()).collect(),
            ))
        }
        kind => Err(python::error(format!("{kind} is not subscriptable"))),
    }
}

/// The places that a slice takes of `len`, as Python's `slice.indices`.
fn indices(
    len: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = usize> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let bound = |bound: Option<i64>, otherwise: i64| match bound {
        None => otherwise,
        Some(bound) if bound < 0 => (bound.saturating_add(len)).max(low),
        Some(bound) => bound.min(high),
    };
    let (start, stop) = match step > 0 {
        true => (bound(start, low), bound(stop, high)),
        false => (bound(start, high), bound(stop, low)),
    };
    let more = move |at: &i64| if step > 0 { *at < stop } else { *at > stop };
    std::iter::successors(Some(start), move |at| at.checked_add(step))
        .take_while(more)
        .filter_map(|at| usize::try_from(at).ok())
}

fn stripped<'a>(text: &'a str, args: &[Value], left: bool, right: bool) -> Result<&'a str, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    Ok(strip(text, chars, left, right))
}

/// `text` without white space, or without `chars`, at its ends.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let taken = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => python::is_space(c),
    };
    let text = if left {
        text.trim_start_matches(taken)
    } else {
        text
    };
    if right {
        text.trim_end_matches(taken)
    } else {
        text
    }
}

fn split(text: &str, args: &[Value], from_end: bool) -> Result<Value, Error> {
    let (separator, most, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(kwargs.get("sep")?);
    let most = most.or(kwargs.get("maxsplit")?).unwrap_or(-1);
    let most = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(python::error("empty separator")),
        Some(separator) if from_end => text.rsplitn(most, separator).collect(),
        Some(separator) => text.splitn(most, separator).collect(),
        None => words(text, most, from_end),
    };
    if from_end {
        parts.reverse();
    }
    Ok(values::list_of(
        parts.into_iter().map(Value::from).collect(),
    ))
}

fn words(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = strip(text, None, !from_end, from_end);
    while !rest.is_empty() {
        let cut = match (words.len() + 1 >= most, from_end) {
            (true, _) => None,
            (false, true) => rest
                .rfind(python::is_space)
                .map(|at| rest.split_at(at + rest[at..].chars().next().map_or(0, char::len_utf8)))
                .map(|(before, word)| (word, before)),
            (false, false) => rest.find(python::is_space).map(|at| rest.split_at(at)),
        };
        let (word, after) = cut.unwrap_or((strip(rest, None, from_end, !from_end), ""));
        words.push(word);
        rest = strip(after, None, !from_end, from_end);
    }
    words
}

pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let n = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep { at + n } else { at }]);
        rest = &rest[at + n..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars
        .next()
        .into_iter()
        .flat_map(char::to_uppercase)
        .collect();
    first + &chars.as_str().to_lowercase()
}

/// `str.title`: every letter behind no letter is a capital.
fn titled(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = c.is_alphabetic();
    }
    out
}

fn swapped(c: char) -> char {
    let one = |mut chars: Box<dyn Iterator<Item = char>>| chars.next().unwrap_or(c);
    match c.is_uppercase() {
        true => one(Box::new(c.to_lowercase())),
        false => one(Box::new(c.to_uppercase())),
    }
}

/// `ljust`, `rjust` or `center`.
pub(super) fn padded(method: &str, text: &str, width: usize, fill: char) -> Result<String, Error> {
    let padding = padding(text, width, fill)?;
    Ok(match method {
        "ljust" => format!("{text}{padding}"),
        "rjust" => format!("{padding}{text}"),
        _ => {
            let n = padding.chars().count();
            let left = n / 2 + (n & width & 1);
            let fill = |n: usize| fill.to_string().repeat(n);
            format!("{}{text}{}", fill(left), fill(n - left))
        }
    })
}

fn padding(text: &str, width: usize, fill: char) -> Result<String, Error> {
    if width > MOST_LENGTH {
        return Err(python::error("the text would be too long"));
    }
    let n = width.saturating_sub(text.chars().count());
    Ok(fill.to_string().repeat(n))
}
