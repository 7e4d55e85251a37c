//! JSON read strictly: bounded size, bounded depth, bounded number of values, no key twice.

use std::cell::Cell;
use std::fmt;
use std::path::Path;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};

/// Largest configuration or index file that is read, in bytes.
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;

/// Most values of one text. A value takes many times the memory of the two bytes in which it can be written.
const MAX_VALUES: usize = 1 << 20;

/// A [`Value`] in whose objects no key occurs twice. Depth is bounded by `serde_json` (128).
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let n_left = Cell::new(MAX_VALUES);
        StrictSeed(&n_left).deserialize(deserializer).map(Strict)
    }
}

/// Reads one value while the number of those left is counted down.
#[derive(Clone, Copy)]
struct StrictSeed<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for StrictSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.0.get().checked_sub(1);
        self.0
            .set(left.ok_or_else(|| de::Error::custom(format!("more than {MAX_VALUES} values")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom(format!("key `{key}` occurs twice")));
            }
            let value = access.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Parses `text`, which came from `origin`, as one JSON object.
pub(crate) fn parse_object(text: &str, origin: &Path) -> Result<Map<String, Value>> {
    let Strict(value) =
        serde_json::from_str(text).map_err(|source| Error::json(origin, &source))?;
    match value {
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
        return Err(Error::malformed(
            path,
            format!(
                "{} bytes of JSON; at most {MAX_JSON_BYTES} are read",
                metadata.len()
            ),
        ));
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
        let text = format!(r#"{{"a": [{}0]}}"#, "0,".repeat(MAX_VALUES));
        let error = parse(&text).expect_err("too many");
        assert!(format!("{error:?}").contains("values"));
    }
}
