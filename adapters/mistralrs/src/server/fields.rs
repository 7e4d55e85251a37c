//! The keys of a request's body: the known keys, the keys without effect, and the errors for all others.

use std::fmt::Display;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::api_error::ApiError;
use crate::field_names::{field_names, suggestion};

/// Keys that do not change an answer. They concern the client's own records, the provider's choice of machine, or
/// speed.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
];

/// Reads the object in `bytes`, without keys whose value is null: clients write null for "not given".
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::invalid("body", format!("not valid JSON: {error}")))?;
    let Value::Object(mut fields) = value else {
        return Err(ApiError::invalid("body", "expected a JSON object"));
    };
    fields.retain(|_, value| !value.is_null());
    Ok(fields)
}

/// Returns an error for keys that are neither `known` nor without effect, so that no key is ignored silently.
pub(crate) fn refuse_unknown(
    fields: &Map<String, Value>,
    known: &[&[&str]],
) -> Result<(), ApiError> {
    let known = || known.iter().copied().flatten().chain(WITHOUT_EFFECT);
    let Some(key) = fields.keys().find(|key| !known().any(|name| name == key)) else {
        return Ok(());
    };
    let hint = suggestion(key, known(), 0.85);
    let shown: String = key.chars().take(64).collect();
    let message = format!("`{shown}` is not supported{hint}");
    Err(ApiError::invalid(&shown, message))
}

/// Removes the keys of `T` from `fields` and reads them. The error names the first wrong key.
pub(crate) fn take<T: DeserializeOwned>(fields: &mut Map<String, Value>) -> Result<T, ApiError> {
    let own = take_keys::<T>(fields);
    T::deserialize(&own).map_err(|error| {
        // serde does not report the key of the error.
        let wrong = own
            .as_object()
            .into_iter()
            .flatten()
            .find_map(|(key, value)| {
                let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
                Some((key, T::deserialize(&alone).err()?))
            });
        match wrong {
            Some((key, error)) => ApiError::invalid(key, format!("`{key}` {error}")),
            None => ApiError::invalid("body", error.to_string()),
        }
    })
}

/// Reads `value`, given under the key `at`, as a type of mistral.rs.
pub(crate) fn theirs<T: DeserializeOwned>(at: &str, value: Value) -> Result<T, ApiError> {
    serde_json::from_value(value).map_err(|error| ApiError::invalid(at, format!("`{at}`: {error}")))
}

/// Makes the error for a wrong value at `at`; `must` says what the value must be.
pub(crate) fn wrong(at: &str, must: &str) -> ApiError {
    ApiError::invalid(at, format!("`{at}` {must}"))
}

/// Reads the object at `at`, without keys whose value is null.
pub(crate) fn object_at(at: &str, value: Value) -> Result<Map<String, Value>, ApiError> {
    let Value::Object(mut fields) = value else {
        return Err(wrong(at, "must be an object"));
    };
    fields.retain(|_, value| !value.is_null());
    Ok(fields)
}

/// The entries of the list at `at`, each with its path.
pub(crate) fn entries(at: &str, value: Value) -> Result<Vec<(String, Value)>, ApiError> {
    let Value::Array(list) = value else {
        return Err(wrong(at, "must be a list"));
    };
    let entries = list.into_iter().enumerate();
    Ok(entries
        .map(|(idx, entry)| (format!("{at}[{idx}]"), entry))
        .collect())
}

/// Returns an error for keys of the object at `at` that are not `known`, so that no key is ignored silently.
pub(crate) fn refuse_others(
    at: &str,
    fields: &Map<String, Value>,
    known: &[&str],
) -> Result<(), ApiError> {
    let Some(key) = fields.keys().find(|key| !known.contains(&key.as_str())) else {
        return Ok(());
    };
    let hint = suggestion(key, known, 0.85);
    let shown: String = key.chars().take(64).collect();
    Err(wrong(
        &format!("{at}.{shown}"),
        &format!("is not supported{hint}"),
    ))
}

fn take_keys<T: DeserializeOwned>(fields: &mut Map<String, Value>) -> Value {
    let own = field_names::<T>()
        .iter()
        .filter_map(|key| fields.remove_entry(*key));
    Value::Object(own.collect())
}

/// Reads a value with `read`. The error is `must`, a text that follows the key.
pub(crate) fn checked<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    must: impl Display,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Result<T, D::Error> {
    let value = Value::deserialize(deserializer)?;
    read(&value).ok_or_else(|| D::Error::custom(must))
}

pub(crate) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    checked(deserializer, "must be true or false", Value::as_bool)
}

pub(crate) fn maybe<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    flag(deserializer).map(Some)
}

/// Accepts only the value `done`, which describes the fixed behaviour, or no value.
pub(crate) fn only(key: &str, value: Option<&Value>, done: &Value) -> Result<(), ApiError> {
    match value {
        Some(value) if value != done => Err(ApiError::invalid(
            key,
            format!("`{key}` is supported as {done} only"),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Map<String, Value> {
        object(value.to_string().as_bytes()).expect("an object")
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Some {
        #[serde(default, deserialize_with = "flag")]
        first: bool,
        #[serde(default, rename = "2nd")]
        second: Option<usize>,
    }

    #[test]
    fn what_is_not_understood_is_refused_with_the_nearest_name() {
        let known = [&["max_tokens"][..], &["top_k"][..]];
        refuse_unknown(&fields(json!({"user": "u", "top_k": 3})), &known).expect("known");
        let error = refuse_unknown(&fields(json!({"max_token": 3})), &known).expect_err("unknown");
        assert_eq!(error.body()["error"]["param"], "max_token");
        let message = error.body()["error"]["message"].to_string();
        assert!(message.contains("did you mean `max_tokens`?"), "{message}");
        let long = "x".repeat(10_000);
        let error = refuse_unknown(&fields(json!({ long: 1 })), &known).expect_err("unknown");
        assert!(error.body().to_string().len() < 500);
    }

    #[test]
    fn a_structures_keys_are_taken_and_a_wrong_one_is_named() {
        assert_eq!(field_names::<Some>(), ["first", "2nd"]);
        let mut body = fields(json!({"first": true, "third": 3, "2nd": null}));
        let (first, second) = (true, None);
        assert_eq!(
            take::<Some>(&mut body).expect("sound"),
            Some { first, second }
        );
        assert_eq!(Value::Object(body), json!({"third": 3}));
        let error = take::<Some>(&mut fields(json!({"2nd": 1, "first": 3}))).expect_err("wrong");
        assert_eq!(error.body()["error"]["param"], "first");
        let message = &error.body()["error"]["message"];
        assert_eq!(message, "`first` must be true or false");
        let error = take::<Some>(&mut fields(json!({"2nd": "x"}))).expect_err("wrong");
        assert_eq!(error.body()["error"]["param"], "2nd");
    }

    #[test]
    fn what_is_done_anyway_may_be_asked_for() {
        let medium = json!("medium");
        only("verbosity", Some(&medium), &medium).expect("the usual");
        only("verbosity", None, &medium).expect("nothing asked");
        let error = only("verbosity", Some(&json!("high")), &medium).expect_err("another");
        assert_eq!(error.body()["error"]["param"], "verbosity");
    }
}
