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

/// Parses `text`, which came from `origin`, as one JSON object.
pub(crate) fn parse_object(text: &str, origin: &Path) -> Result<Map<String, Value>> {
    match parse(text, Limits::FILE).map_err(|source| Error::json(origin, &source))? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::malformed(origin, "expected a JSON object")),
    }
}

/// Reads the JSON object in `path`, which may not be longer than [`MAX_JSON_BYTES`].
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
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
    std::fs::read_to_string(path).map_err(Error::io("read", path))
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
