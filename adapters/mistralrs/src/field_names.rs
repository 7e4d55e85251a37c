//! The names of the fields of a structure, as serde reads them.

use serde::de::{DeserializeOwned, IntoDeserializer, Visitor, value};
use serde::{Deserializer, forward_to_deserialize_any};

/// The names of the fields of the structure `T`, as serde reads them.
pub(crate) fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &[&str] = &[];
    // The result is an error: only the names are of interest.
    let _ = T::deserialize(Names(&mut names));
    names
}

/// A hint that names the [`nearest`] one of `names`.
pub(crate) fn suggestion<'a>(
    key: &str,
    names: impl IntoIterator<Item = &'a &'a str>,
    least: f64,
) -> String {
    nearest(key, names, least)
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default()
}

/// The one of `names` that is most similar to `key`, if the similarity is above `least`. 0 is no similarity, 1 is
/// equality.
pub(crate) fn nearest<'a>(
    key: &str,
    names: impl IntoIterator<Item = &'a &'a str>,
    least: f64,
) -> Option<&'a str> {
    names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(key, name), *name))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(likeness, _)| *likeness > least)
        .map(|(_, name)| name)
}

/// Records the field names that a structure passes to its deserializer.
struct Names<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        ().into_deserializer().deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
