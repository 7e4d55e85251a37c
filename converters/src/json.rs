//! JSON read strictly: bounded size, bounded depth, bounded number of values, no key twice.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::foreign;
use crate::problem::Problem;

/// Largest configuration or index file that is read, in bytes.
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;

/// What a text may hold at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Values in all. One takes many times the memory of the two bytes in which it can be written.
    pub values: usize,
    /// Keys of one object.
    pub keys: usize,
    /// Bytes of one key.
    pub key_bytes: usize,
}

impl Limits {
    /// For configuration files, whose length is bounded.
    pub const FILE: Self = Self {
        values: 1 << 20,
        ..Self::NONE
    };
    /// For text of the user's own.
    pub const NONE: Self = Self {
        values: usize::MAX,
        keys: usize::MAX,
        key_bytes: usize::MAX,
    };
}

/// Parses `text`, in whose objects no key may occur twice. Depth is bounded by `serde_json` (128).
///
/// # Errors
/// If it is not JSON, exceeds `limits`, has a key twice, or is no `T`.
pub fn parse<T: DeserializeOwned>(text: &str, limits: Limits) -> serde_json::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let n_left = Cell::new(limits.values);
    let walk = Walk {
        n_left: &n_left,
        limits,
    };
    walk.deserialize(&mut deserializer)?;
    deserializer.end()?;
    serde_json::from_str(text)
}

/// Looks at one value, and keeps nothing, while the number of those left is counted down.
#[derive(Clone, Copy)]
struct Walk<'a> {
    n_left: &'a Cell<usize>,
    limits: Limits,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let left = self.n_left.get().checked_sub(1);
        self.n_left.set(
            left.ok_or_else(|| {
                D::Error::custom(format!("more than {} values", self.limits.values))
            })?,
        );
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        let limits = self.limits;
        let refuse = |message: String| Err(A::Error::custom(message));
        while let Some(key) = access.next_key::<String>()? {
            if key.len() > limits.key_bytes {
                let (n, most) = (key.len(), limits.key_bytes);
                return refuse(format!("a name of {n} bytes; at most {most} are read"));
            }
            if keys.len() == limits.keys {
                return refuse(format!("more than {} keys in one object", limits.keys));
            }
            if keys.contains(&key) {
                return refuse(format!("key `{key}` occurs twice"));
            }
            access.next_value_seed(self)?;
            keys.insert(key);
        }
        Ok(())
    }
}

/// Parses `text`, which came from `origin`, as one JSON object. A byte order mark, which Windows' editors write, is passed over.
///
/// # Errors
/// `json` or what the text is instead, with the place; `malformed` if it is JSON and no object.
pub fn parse_object(text: &str, origin: &Path) -> Result<Map<String, Value>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match parse(text, Limits::FILE).map_err(|source| not_json(text, origin, &source))? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::malformed(origin, "expected a JSON object")),
    }
}

/// Parses `bytes`, which came from `origin`, as JSON of any length, such as a tokenizer's. A byte order mark is passed over.
///
/// # Errors
/// `json` or what the bytes are instead, with the place.
pub fn parse_value(bytes: &[u8], origin: &Path) -> Result<Value> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes).map_err(|source| match std::str::from_utf8(bytes) {
        Ok(text) => not_json(text, origin, &source),
        Err(_) => foreign::refusal(origin, bytes, "JSON", || Error::json(origin, &source)),
    })
}

/// Why `text` is not JSON: what it is instead, or what Python's `json` writes and JSON does not have, or else what the parser says.
fn not_json(text: &str, origin: &Path, source: &serde_json::Error) -> Error {
    if let Some((line, key, number)) = python_number(text) {
        let at = format!("`{}`:{line}: {key}", origin.display());
        let message = format!("{number} is no JSON, though Python's json writes it");
        let fix = "write a number or null in its place";
        return Problem::new("json", at, message, fix).into();
    }
    foreign::refusal(origin, text.as_bytes(), "JSON", || {
        Error::json(origin, source)
    })
}

/// The first number that Python's `json` writes and JSON does not have, with its line and the key before it.
fn python_number(text: &str) -> Option<(usize, &str, &str)> {
    let mut key = "";
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '"' => {
                let inside = rest.get(1..)?;
                let mut is_escaped = false;
                let end = inside.find(|c| {
                    let ends = c == '"' && !is_escaped;
                    is_escaped = c == '\\' && !is_escaped;
                    ends
                })?;
                if inside[end + 1..].trim_start().starts_with(':') {
                    key = &inside[..end];
                }
                end + 2
            }
            _ => {
                let found = ["NaN", "Infinity", "-Infinity"]
                    .into_iter()
                    .find(|word| rest.starts_with(word));
                if let Some(word) = found {
                    let before = &text[..text.len() - rest.len()];
                    return Some((before.matches('\n').count() + 1, key, word));
                }
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    None
}

/// Reads the JSON object in `path`, which may not be longer than 16 MiB.
///
/// # Errors
/// As [`parse_object`]; if the file cannot be read or is too long.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    parse_object(&read_text(path)?, path)
}

/// Reads a text file of at most [`MAX_JSON_BYTES`].
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        return Err(Error::malformed(path, "not a regular file"));
    }
    if metadata.len() > MAX_JSON_BYTES {
        let n_bytes = metadata.len();
        let message = format!("{n_bytes} bytes of JSON; at most {MAX_JSON_BYTES} are read");
        return Err(Error::malformed(path, message));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        foreign::refusal(path, error.as_bytes(), "JSON", || {
            Error::malformed(
                path,
                format!("byte {at} is not UTF-8; save the file as UTF-8"),
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Map<String, Value>> {
        parse_object(text, Path::new("x.json"))
    }

    #[test]
    fn agrees_with_serde_json_on_honest_text() {
        let text =
            r#"{"b": [1, -2, 2.5, null, true], "a": {"c": "\u00e9"}, "big": 18446744073709551615}"#;
        let expected: Value = serde_json::from_str(text).expect("valid");
        assert_eq!(Value::Object(parse(text).expect("valid")), expected);
    }

    #[test]
    fn a_byte_order_mark_says_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.json");
        std::fs::write(&path, b"\xef\xbb\xbf{\"a\": 1}").expect("writable");
        assert_eq!(read_object(&path).expect("marked")["a"], 1);
        for (bytes, code, expected) in [
            (
                &b"\xff\xfe{\0}\0"[..],
                "utf-16",
                "UTF-16 text, not JSON; save it as UTF-8",
            ),
            (b"{\0\"\0", "utf-16", "UTF-16"),
            (b"", "empty-file", "an empty file"),
            (
                b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
                "lfs-pointer",
                "of 12 bytes",
            ),
            (b"<!doctype html><p>", "not-weights", "an HTML page"),
            (b"{\"a\": \"\xe9\"}", "malformed", "byte 7 is not UTF-8"),
        ] {
            std::fs::write(&path, bytes).expect("writable");
            let error = read_object(&path).expect_err(expected);
            assert_eq!(error.code(), code, "{error}");
            assert!(error.to_string().contains(expected), "{error}");
            if code != "malformed" {
                let error = parse_value(bytes, &path).expect_err(expected);
                assert!(error.to_string().contains(expected), "{error}");
            }
        }
        assert_eq!(
            parse_value(b"\xef\xbb\xbf[1]", &path).expect("marked")[0],
            1
        );
    }

    #[test]
    fn numbers_that_python_alone_writes_are_named_with_their_key_and_line() {
        for (text, expected) in [
            (
                "{\"a\": 1,\n \"lora_dropout\": NaN}",
                "`x.json`:2: lora_dropout: NaN is no JSON",
            ),
            (
                "{\"a\": {\"b\": [1, -Infinity]}}",
                "`x.json`:1: b: -Infinity is",
            ),
            (
                "{\"x\": \"a \\\" NaN\", \"y\": Infinity}",
                "`x.json`:1: y: Infinity is",
            ),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let other = parse("{\"NaN\": \"NaN\", }").expect_err("a comma");
        assert!(other.to_string().contains("is not valid JSON"), "{other}");
    }

    #[test]
    fn repeated_keys_and_deep_nesting_are_refused() {
        let twice = parse(r#"{"a": {"k": 1, "k": 2}}"#).expect_err("twice");
        assert!(format!("{:#?}", twice).contains("`k` occurs twice"));
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
        assert!(parse(&deep).is_err());
        assert!(parse("[1]").is_err());
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let text = format!(r#"{{"a": [{}0]}}"#, "0,".repeat(Limits::FILE.values));
        let error = parse(&text).expect_err("too many");
        assert!(format!("{error:?}").contains("values"));
    }
}
