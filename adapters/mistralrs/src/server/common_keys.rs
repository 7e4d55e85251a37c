//! The keys that every request for generated text may have, and how their values are parsed.

use std::collections::HashMap;

use mistralrs_core::DrySamplingParams;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::api_error::ApiError;
use super::fields::{checked, flag};
use super::logprobs::MOST_ALTERNATIVES;

/// Maximum number of choices per request.
const MAX_CHOICES: usize = 16;

/// Keys that every endpoint for generated text understands.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct CommonKeys {
    #[serde(deserialize_with = "flag")]
    pub(super) stream: bool,
    pub(super) stream_options: Option<Value>,
    #[serde(deserialize_with = "whole_number")]
    pub(super) max_tokens: Option<usize>,
    /// The newer name of `max_tokens`; it takes precedence.
    #[serde(deserialize_with = "whole_number")]
    pub(super) max_completion_tokens: Option<usize>,
    #[serde(deserialize_with = "whole_number")]
    pub(super) min_tokens: Option<usize>,
    #[serde(deserialize_with = "n_choices")]
    pub(super) n: Option<usize>,
    #[serde(deserialize_with = "n_choices")]
    pub(super) best_of: Option<usize>,
    #[serde(deserialize_with = "stop_list")]
    pub(super) stop: Vec<String>,
    #[serde(deserialize_with = "token_list")]
    pub(super) stop_token_ids: Vec<u32>,
    #[serde(deserialize_with = "flag")]
    pub(super) ignore_eos: bool,
    #[serde(deserialize_with = "seed")]
    pub(super) seed: Option<u64>,
    #[serde(deserialize_with = "temperature")]
    pub(super) temperature: Option<f64>,
    #[serde(deserialize_with = "share")]
    pub(super) top_p: Option<f64>,
    #[serde(deserialize_with = "top_k")]
    pub(super) top_k: Option<usize>,
    #[serde(deserialize_with = "share")]
    pub(super) min_p: Option<f64>,
    #[serde(deserialize_with = "penalty")]
    pub(super) presence_penalty: Option<f32>,
    #[serde(deserialize_with = "penalty")]
    pub(super) frequency_penalty: Option<f32>,
    #[serde(deserialize_with = "factor")]
    pub(super) repetition_penalty: Option<f32>,
    #[serde(deserialize_with = "token_bias")]
    pub(super) logit_bias: HashMap<u32, f32>,
    pub(super) logprobs: Option<Value>,
    pub(super) top_logprobs: Option<Value>,
}

/// Keys of the penalty on repeated sequences (DRY).
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct DryKeys {
    #[serde(deserialize_with = "factor_or_none")]
    dry_multiplier: Option<f32>,
    #[serde(deserialize_with = "factor")]
    dry_base: Option<f32>,
    #[serde(deserialize_with = "whole_number")]
    dry_allowed_length: Option<usize>,
    #[serde(deserialize_with = "breakers")]
    dry_sequence_breakers: Option<Vec<String>>,
}

/// How an endpoint reads the keys for log-probabilities. The result is the number of alternatives, or none without
/// log-probabilities.
pub(crate) type AskedScores = fn(Option<&Value>, Option<&Value>) -> Result<Option<usize>, ApiError>;

impl CommonKeys {
    /// Refuses tokens that are not in the vocabulary.
    pub(super) fn check_tokens(&self, tokenizer: &Tokenizer) -> Result<(), ApiError> {
        let biased = self.logit_bias.keys().map(|token| ("logit_bias", token));
        let stops = self
            .stop_token_ids
            .iter()
            .map(|token| ("stop_token_ids", token));
        match biased
            .chain(stops)
            .find(|(_, token)| tokenizer.id_to_token(**token).is_none())
        {
            Some((key, token)) => {
                let message =
                    format!("`{key}` has the token id {token}, which this model does not have");
                Err(ApiError::invalid(key, message))
            }
            None => Ok(()),
        }
    }

    /// Refuses combinations of keys that exclude each other.
    pub(super) fn check(
        &self,
        n_top: Option<usize>,
        dry: Option<&DrySamplingParams>,
    ) -> Result<(), ApiError> {
        if n_top.is_some() && dry.is_some_and(|dry| dry.multiplier != 0.0) {
            let message = "`logprobs` and `dry_multiplier` exclude each other: what the model says is not known under that penalty";
            return Err(ApiError::invalid("dry_multiplier", message));
        }
        if self.min_tokens.is_some_and(|least| least > 0) && !self.stop.is_empty() {
            let message =
                "`min_tokens` and `stop` exclude each other; `stop_token_ids` goes with it";
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(())
    }

    /// Keys that need a hook into the sampling steps, and whether each is in use. `n_top` is the number of alternatives
    /// per token, if log-probabilities are wanted.
    pub(super) fn hooks(&self, n_top: Option<usize>) -> [(&'static str, bool); 5] {
        [
            ("logprobs", n_top.is_some()),
            ("min_tokens", self.min_tokens.is_some_and(|least| least > 0)),
            ("ignore_eos", self.ignore_eos),
            ("stop_token_ids", !self.stop_token_ids.is_empty()),
            ("logit_bias", !self.logit_bias.is_empty()),
        ]
    }
}

impl DryKeys {
    pub(super) fn params(self) -> Result<Option<DrySamplingParams>, ApiError> {
        let Some(multiplier) = self.dry_multiplier else {
            return Ok(None);
        };
        let (base, length) = (self.dry_base, self.dry_allowed_length);
        DrySamplingParams::new_with_defaults(multiplier, self.dry_sequence_breakers, base, length)
            .map(Some)
            .map_err(|error| ApiError::invalid("dry_multiplier", error.root_cause().to_string()))
    }
}

/// Reads the keys of chats: `logprobs` is true or false, and `top_logprobs` is the number of alternatives.
pub(crate) fn scores_of_chat(
    logprobs: Option<&Value>,
    top: Option<&Value>,
) -> Result<Option<usize>, ApiError> {
    let wanted = match logprobs {
        None | Some(Value::Bool(false)) => false,
        Some(Value::Bool(true)) => true,
        Some(_) => {
            let message = "`logprobs` must be true or false";
            return Err(ApiError::invalid("logprobs", message));
        }
    };
    let n_top = n_alternatives("top_logprobs", top)?;
    if n_top.is_some_and(|n| n > 0) && !wanted {
        let message = "`top_logprobs` needs `logprobs`: true";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    Ok(wanted.then(|| n_top.unwrap_or(0)))
}

/// Reads the key of completions: `logprobs` is the number of alternatives.
pub(crate) fn scores_of_completion(
    logprobs: Option<&Value>,
    top: Option<&Value>,
) -> Result<Option<usize>, ApiError> {
    if top.is_some() {
        let message =
            "`top_logprobs` belongs to chats; here `logprobs` is the number of alternatives";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    n_alternatives("logprobs", logprobs.filter(|value| **value != false))
}

fn n_alternatives(key: &str, value: Option<&Value>) -> Result<Option<usize>, ApiError> {
    let Some(value) = value else {
        return Ok(None);
    };
    let number = whole(value).filter(|number| *number <= MOST_ALTERNATIVES);
    number.map(Some).ok_or_else(|| {
        ApiError::invalid(
            key,
            format!("`{key}` must be an integer from 0 to {MOST_ALTERNATIVES}"),
        )
    })
}

/// Whether the `stream_options` of a request ask for the usage.
pub(super) fn usage_wanted(options: &Value, stream: bool) -> Result<bool, ApiError> {
    let wrong = |message: &str| ApiError::invalid("stream_options", message);
    if !stream {
        return Err(wrong("`stream_options` needs `stream`: true"));
    }
    let fields = options
        .as_object()
        .ok_or_else(|| wrong("`stream_options` must be an object"))?;
    // Padding hides the length of texts from eavesdroppers; a stream without it has the same content.
    const PADDING: &str = "include_obfuscation";
    let unknown = |key: &&String| ![PADDING, "include_usage"].contains(&key.as_str());
    if let Some(key) = fields.keys().find(unknown) {
        return Err(wrong(&format!("`stream_options.{key}` is not supported")));
    }
    let wanted = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(wanted)) => Ok(*wanted),
        Some(_) => Err(wrong(&format!("`{key}` must be true or false"))),
    };
    wanted(PADDING)?;
    wanted("include_usage")
}

fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    checked(
        deserializer,
        "must be a whole number, not below 0",
        |value| whole(value).map(Some),
    )
}

fn n_choices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let must = format!("must be a positive integer up to {MAX_CHOICES}");
    checked(deserializer, must, |value| {
        let number = whole(value).filter(|number| (1..=MAX_CHOICES).contains(number));
        number.map(Some)
    })
}

/// 0 and -1 mean no limit in vLLM.
fn top_k<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    checked(deserializer, "must be a positive integer", |value| {
        let none = (value.as_i64() == Some(-1)).then_some(0);
        none.or_else(|| whole(value)).map(Some)
    })
}

fn whole(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    checked(deserializer, "must be an integer", |value| {
        let negative = || value.as_i64().map(i64::cast_unsigned);
        value.as_u64().or_else(negative).map(Some)
    })
}

fn number<'de, D: Deserializer<'de>>(d: D, low: f64, high: f64) -> Result<Option<f64>, D::Error> {
    let must = format!("must be a number from {low} to {high}");
    checked(d, must, |value| {
        let number = value.as_f64()?;
        (low..=high).contains(&number).then_some(Some(number))
    })
}

fn temperature<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, 0.0, 2.0)
}

fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    number(deserializer, 0.0, 1.0)
}

fn penalty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f32>, D::Error> {
    Ok(number(deserializer, -2.0, 2.0)?.map(single))
}

fn factor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f32>, D::Error> {
    Ok(number(deserializer, 1e-3, 1e3)?.map(single))
}

fn factor_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f32>, D::Error> {
    Ok(number(deserializer, 0.0, 1e3)?.map(single))
}

#[expect(clippy::cast_possible_truncation, reason = "logits are f32 themselves")]
fn single(number: f64) -> f32 {
    number as f32
}

/// The number that is added to the logit of each named token.
fn token_bias<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HashMap<u32, f32>, D::Error> {
    let must = "must be an object of token ids with numbers from -100 to 100";
    checked(deserializer, must, |value| {
        let entry = |(token, bias): (&String, &Value)| {
            let bias = bias.as_f64().filter(|bias| bias.abs() <= 100.0)?;
            Some((token.parse().ok()?, single(bias)))
        };
        value.as_object()?.iter().map(entry).collect()
    })
}

fn token_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    checked(deserializer, "must be a list of token ids", |value| {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        value.as_array()?.iter().map(id).collect()
    })
}

fn breakers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    checked(deserializer, "must be a list of texts", |value| {
        let text = |value: &Value| Some(value.as_str()?.to_owned());
        let texts: Option<Vec<String>> = value.as_array()?.iter().map(text).collect();
        texts.map(Some)
    })
}

/// The texts that end an answer.
fn stop_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let must = "must be a text or a list of texts, none of them empty";
    checked(deserializer, must, |value| {
        let text = |value: &Value| Some(value.as_str().filter(|text| !text.is_empty())?.to_owned());
        match value {
            Value::Array(list) => list.iter().map(text).collect(),
            value => Some(vec![text(value)?]),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::server::fields::{object, take};

    use super::*;
    use crate::quirks_0_8::split_models::refuse_hooks;

    #[test]
    fn stream_options_are_read_or_refused() {
        assert!(usage_wanted(&json!({"include_usage": true}), true).expect("sound"));
        assert!(!usage_wanted(&json!({}), true).expect("sound"));
        assert!(!usage_wanted(&json!({"include_obfuscation": true}), true).expect("sound"));
        for (wrong, stream) in [
            (json!({"include_usage": true}), false),
            (json!(3), true),
            (json!({"include_usage": 1}), true),
            (json!({"include_obfuscation": 1}), true),
            (json!({"continuous_usage_stats": true}), true),
        ] {
            assert!(usage_wanted(&wrong, stream).is_err(), "{wrong}");
        }
    }

    fn read(body: &Value) -> Result<CommonKeys, ApiError> {
        take(&mut object(body.to_string().as_bytes())?)
    }

    #[test]
    fn what_is_given_is_read() {
        let body = json!({"logit_bias": {"3": -100, "7": 0.5}, "seed": -1, "stop": "x", "top_k": -1, "n": 16,
            "presence_penalty": -2, "max_tokens": null});
        let keys = read(&body).expect("sound");
        assert_eq!(keys.logit_bias, HashMap::from([(3, -100.0), (7, 0.5)]));
        assert_eq!((keys.seed, keys.top_k), (Some(u64::MAX), Some(0)));
        assert_eq!((keys.stop, keys.n), (vec!["x".to_owned()], Some(16)));
        assert_eq!((keys.presence_penalty, keys.max_tokens), (Some(-2.0), None));
    }

    #[test]
    fn log_probabilities_are_asked_for_as_in_each_api() {
        let chat = |logprobs: Value, top: Value| {
            let given = |value: Value| Some(value).filter(|value| !value.is_null());
            scores_of_chat(given(logprobs).as_ref(), given(top).as_ref())
        };
        let none = Value::Null;
        assert_eq!(chat(none.clone(), none.clone()).expect("sound"), None);
        assert_eq!(chat(json!(false), json!(0)).expect("sound"), None);
        assert_eq!(chat(json!(true), none.clone()).expect("sound"), Some(0));
        assert_eq!(chat(json!(true), json!(20)).expect("sound"), Some(20));
        for (logprobs, top, key) in [
            (json!(1), none.clone(), "logprobs"),
            (none, json!(3), "top_logprobs"),
            (json!(true), json!(21), "top_logprobs"),
            (json!(true), json!("3"), "top_logprobs"),
        ] {
            let error = chat(logprobs, top).expect_err("refused");
            assert_eq!(error.body()["error"]["param"], key);
        }
        assert_eq!(scores_of_completion(None, None).expect("sound"), None);
        for (given, expected) in [
            (json!(false), None),
            (json!(0), Some(0)),
            (json!(5), Some(5)),
        ] {
            let found = scores_of_completion(Some(&given), None).expect("sound");
            assert_eq!(found, expected);
        }
        assert!(scores_of_completion(Some(&json!(true)), None).is_err());
        assert!(scores_of_completion(Some(&json!(1)), Some(&json!(1))).is_err());
    }

    #[test]
    fn what_cannot_be_done_together_is_refused() {
        let dry = DryKeys {
            dry_multiplier: Some(0.8),
            ..DryKeys::default()
        };
        let dry = dry.params().expect("sound").expect("asked for");
        let keys = read(&json!({"min_tokens": 2, "stop": "x", "ignore_eos": true})).expect("sound");
        let plain = CommonKeys::default();
        plain.check(Some(0), None).expect("nothing else");
        for (error, key) in [
            (plain.check(Some(0), Some(&dry)), "dry_multiplier"),
            (refuse_hooks(true, &plain.hooks(Some(0))), "logprobs"),
            (keys.check(None, None), "min_tokens"),
        ] {
            assert_eq!(error.expect_err("refused").body()["error"]["param"], key);
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_what_it_must_be() {
        for (key, value, must) in [
            ("logit_bias", json!([]), "an object of token ids"),
            ("logit_bias", json!({"x": 1}), "an object of token ids"),
            ("logit_bias", json!({"1": "2"}), "an object of token ids"),
            ("logit_bias", json!({"1": 101}), "an object of token ids"),
            ("seed", json!("x"), "an integer"),
            ("seed", json!(1.5), "an integer"),
            ("n", json!(17), "a positive integer up to 16"),
            ("max_tokens", json!(-1), "a whole number"),
            ("min_tokens", json!("3"), "a whole number"),
            ("stop_token_ids", json!([-1]), "a list of token ids"),
            ("ignore_eos", json!(0), "true or false"),
            ("top_k", json!(-2), "a positive integer"),
            ("top_p", json!(1.5), "a number from 0 to 1"),
            (
                "repetition_penalty",
                json!(0),
                "a number from 0.001 to 1000",
            ),
            ("stop", json!([""]), "a text or a list of texts"),
            ("stream", json!(1), "true or false"),
        ] {
            let error = read(&json!({ key: value })).err().expect("refused").body();
            assert_eq!(error["error"]["param"], key);
            let message = error["error"]["message"].to_string();
            assert!(
                message.contains(&format!("`{key}` must be {must}")),
                "{message}"
            );
        }
    }
}
