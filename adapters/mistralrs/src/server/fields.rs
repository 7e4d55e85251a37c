//! Which keys of a request's body are understood, which change nothing, and what is said about the others.

use serde_json::{Map, Value};

use super::answer::ApiError;

/// Keys that both endpoints understand.
const COMMON: &[&str] = &[
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "best_of",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
    "grammar",
];

/// Keys that change nothing about an answer: what a client keeps for itself, where a provider runs it, or how fast it comes.
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

/// Takes keys without effect out, and refuses those that neither the endpoint nor mistral.rs understands, rather than drop them.
pub(crate) fn keep_understood(
    fields: &mut Map<String, Value>,
    own: &[&str],
) -> Result<(), ApiError> {
    refuse_unknown(fields, own)?;
    fields.retain(|key, _| !WITHOUT_EFFECT.contains(&key.as_str()));
    Ok(())
}

/// Takes `key` out if it asks for what is done anyway; anything else is refused.
pub(crate) fn only(
    fields: &mut Map<String, Value>,
    key: &str,
    done: &Value,
) -> Result<(), ApiError> {
    match fields.remove(key) {
        Some(value) if value != *done => Err(ApiError::invalid(
            key,
            format!("`{key}` is supported as {done} only"),
        )),
        _ => Ok(()),
    }
}

fn refuse_unknown(fields: &Map<String, Value>, own: &[&str]) -> Result<(), ApiError> {
    let known = || COMMON.iter().chain(own).chain(WITHOUT_EFFECT).copied();
    let unknown = fields.keys().find(|key| !known().any(|name| name == *key));
    let Some(key) = unknown else {
        return Ok(());
    };
    let nearest = known()
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(likeness, _)| *likeness > 0.85);
    let hint = nearest
        .map(|(_, name)| format!("; did you mean `{name}`?"))
        .unwrap_or_default();
    let shown: String = key.chars().take(64).collect();
    Err(ApiError::invalid(
        &shown,
        format!("`{shown}` is not supported{hint}"),
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// The fields of an object, for tests of this folder.
    pub(crate) fn fields(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(fields) => fields,
            other => unreachable!("not an object: {other}"),
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_the_nearest_name() {
        let mut some = fields(json!({"user": "u", "top_k": 3}));
        keep_understood(&mut some, &[]).expect("known");
        assert_eq!(Value::Object(some), json!({"top_k": 3}));
        refuse_unknown(&fields(json!({"prompt": "p"})), &["prompt"]).expect("known");
        let error = refuse_unknown(&fields(json!({"max_token": 3})), &[]).expect_err("unknown");
        assert_eq!(error.body()["error"]["param"], "max_token");
        let message = error.body()["error"]["message"].to_string();
        assert!(message.contains("did you mean `max_tokens`?"), "{message}");
        let long = "x".repeat(10_000);
        let error = refuse_unknown(&fields(json!({ long: 1 })), &[]).expect_err("unknown");
        assert!(error.body().to_string().len() < 500);
    }

    #[test]
    fn what_is_done_anyway_may_be_asked_for() {
        let mut body = fields(json!({"verbosity": "medium"}));
        only(&mut body, "verbosity", &json!("medium")).expect("the usual");
        only(&mut body, "verbosity", &json!("medium")).expect("nothing asked");
        let mut body = fields(json!({"verbosity": "high"}));
        let error = only(&mut body, "verbosity", &json!("medium")).expect_err("another");
        assert_eq!(error.body()["error"]["param"], "verbosity");
    }
}
