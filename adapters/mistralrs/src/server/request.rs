//! What chat and plain completions have in common: reading the body and checking it.

use std::sync::Arc;

use axum::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::App;
use super::answer::ApiError;
use super::context::RequestContext;
use super::exchange::{Admission, Handover};
use super::registry::Lease;
use super::steps::{SeededDraw, Steps};

/// Most choices a request may ask for.
const MAX_CHOICES: u64 = 16;

/// Sampling below this temperature is greedy, as in mistral.rs.
const GREEDY: f64 = 1e-7;

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
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
    "grammar",
    "tools",
    "tool_choice",
];

/// Keys that change nothing about an answer: what a client keeps for itself, or where a provider runs it.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
];

/// A body that has passed the common checks.
pub(crate) struct Body {
    pub(crate) fields: Map<String, Value>,
    /// The generation that answers.
    pub(crate) lease: Lease,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) n_choices: usize,
    seeded: Option<SeededDraw>,
}

impl Body {
    /// Reads and checks a body, whose keys are the common ones and `own`; `model` becomes the engine's id.
    pub(crate) fn read(app: &App, bytes: &Bytes, own: &[&str]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| ApiError::invalid("body", format!("not valid JSON: {error}")))?;
        let Value::Object(mut fields) = value else {
            return Err(ApiError::invalid("body", "expected a JSON object"));
        };
        // Clients write null for "not given", which mistral.rs's types take only in places.
        fields.retain(|_, value| !value.is_null());
        let name = match fields.get("model") {
            None => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(_) => return Err(ApiError::invalid("model", "expected the name of a model")),
        };
        let lease = app
            .registry
            .lease(name)
            .ok_or_else(|| ApiError::unknown_model(name.unwrap_or("default")))?;
        RequestContext::set_model(&lease.name);
        fields.insert("model".to_owned(), json!(lease.engine_id()));

        refuse_unknown(&fields, own)?;
        fields.retain(|key, _| !WITHOUT_EFFECT.contains(&key.as_str()));
        // mistral.rs 0.8.1 reports base-10 logarithms of filtered probabilities, which is not what clients expect.
        let wants_logprobs = |key| {
            fields
                .get(key)
                .is_some_and(|value: &Value| value != &json!(false))
        };
        if wants_logprobs("logprobs") || wants_logprobs("top_logprobs") {
            return Err(ApiError::invalid(
                "logprobs",
                "log-probabilities are not supported",
            ));
        }
        check_range(&fields, "temperature", 0.0, 2.0)?;
        check_range(&fields, "top_p", 0.0, 1.0)?;
        check_range(&fields, "min_p", 0.0, 1.0)?;
        check_range(&fields, "presence_penalty", -2.0, 2.0)?;
        check_range(&fields, "frequency_penalty", -2.0, 2.0)?;
        check_range(&fields, "repetition_penalty", 1e-3, 1e3)?;

        if let Some(max) = fields.remove("max_completion_tokens") {
            fields.insert("max_tokens".to_owned(), max);
        }
        let max_tokens = positive(&fields, "max_tokens", u64::MAX)?;
        let n_choices = positive(&fields, "n", MAX_CHOICES)?.unwrap_or(1);
        if positive(&fields, "best_of", MAX_CHOICES)?.is_some_and(|best| best != n_choices) {
            return Err(ApiError::invalid(
                "best_of",
                "only the value of `n` is supported",
            ));
        }
        fields.remove("best_of");
        let stream = flag(&fields, "stream")?;
        if stream && n_choices > 1 {
            return Err(ApiError::invalid("n", "a stream has one choice"));
        }
        if n_choices > 1 && lease.turns().is_some() {
            return Err(ApiError::invalid(
                "n",
                "on a CPU an answer has one choice (mistral.rs 0.8.1 mixes up the sequences of a batch there); send the request several times",
            ));
        }
        let include_usage = match fields.remove("stream_options") {
            Some(options) => usage_wanted(&options, stream)?,
            None => false,
        };
        let stop = stop_texts(&fields)?;
        let seeded = seeded(&mut fields, n_choices)?;
        Ok(Self {
            fields,
            lease,
            stream,
            include_usage,
            stop,
            max_tokens,
            n_choices,
            seeded,
        })
    }

    /// The rest of the body as mistral.rs's own request type.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_json::from_value(Value::Object(self.fields.clone()))
            .map_err(|error| ApiError::invalid("body", error.to_string()))
    }

    /// What the engine needs besides the request itself, with as many tokens as fit after a prompt of `prompt_tokens`.
    pub(crate) fn hand_over(
        &self,
        app: &App,
        admission: Admission,
        prompt_param: &str,
        prompt_tokens: usize,
    ) -> Result<Handover, ApiError> {
        let context = self.lease.max_sequence_length;
        let longest = app
            .limits
            .max_prompt_tokens
            .map_or(context - 1, |limit| limit.min(context - 1));
        if prompt_tokens == 0 || prompt_tokens > longest {
            return Err(ApiError::invalid(
                prompt_param,
                format!("the prompt has {prompt_tokens} tokens; this model takes 1 to {longest}"),
            ));
        }
        let room = context - prompt_tokens;
        let max_tokens = match (self.max_tokens, app.limits.max_completion_tokens) {
            (Some(asked), Some(limit)) if asked > limit => {
                return Err(ApiError::invalid(
                    "max_tokens",
                    format!("`max_tokens` is {asked}; this server gives at most {limit}"),
                ));
            }
            (Some(asked), _) => asked.min(room),
            (None, Some(limit)) => limit.min(room),
            (None, None) => room,
        };
        let steps = Steps::new(
            self.n_choices,
            self.lease.end_tokens.clone(),
            self.seeded.clone(),
            Some(app.metrics.waiting()),
        );
        Ok(Handover {
            admission,
            lease: self.lease.clone(),
            steps: Arc::new(steps),
            max_tokens,
            prompt_tokens,
        })
    }
}

pub(crate) fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// Refuses keys that neither the endpoint nor mistral.rs understands, rather than drop them.
fn refuse_unknown(fields: &Map<String, Value>, own: &[&str]) -> Result<(), ApiError> {
    let known = || COMMON.iter().chain(own).copied();
    let unknown = fields.keys().find(|key| {
        !known()
            .chain(WITHOUT_EFFECT.iter().copied())
            .any(|name| name == *key)
    });
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

fn usage_wanted(options: &Value, stream: bool) -> Result<bool, ApiError> {
    let wrong = |message: &str| ApiError::invalid("stream_options", message);
    if !stream {
        return Err(wrong("`stream_options` needs `stream`: true"));
    }
    let fields = options
        .as_object()
        .ok_or_else(|| wrong("`stream_options` must be an object"))?;
    if let Some(key) = fields.keys().find(|key| *key != "include_usage") {
        return Err(wrong(&format!("`stream_options.{key}` is not supported")));
    }
    match fields.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(wanted)) => Ok(*wanted),
        Some(_) => Err(wrong("`include_usage` must be true or false")),
    }
}

/// The draw that `seed` asks for; greedy answers need none. It takes over temperature, top-k, top-p and min-p.
fn seeded(
    fields: &mut Map<String, Value>,
    n_choices: usize,
) -> Result<Option<SeededDraw>, ApiError> {
    let seed = match fields.remove("seed") {
        None => return Ok(None),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .ok_or_else(|| ApiError::invalid("seed", "`seed` must be an integer"))?,
    };
    let number = |key: &str| fields.get(key).and_then(Value::as_f64);
    let temperature = number("temperature").unwrap_or(0.0);
    if temperature < GREEDY {
        return Ok(None);
    }
    if n_choices > 1 {
        return Err(ApiError::invalid(
            "seed",
            "`seed` fixes one choice; with `n` above 1 it is not supported",
        ));
    }
    let draw = SeededDraw {
        seed,
        temperature,
        top_k: positive(fields, "top_k", u64::MAX)?,
        top_p: number("top_p"),
        min_p: number("min_p"),
    };
    for key in ["top_k", "top_p", "min_p"] {
        fields.remove(key);
    }
    fields.insert("temperature".to_owned(), json!(0.0));
    Ok(Some(draw))
}

fn check_range(
    fields: &Map<String, Value>,
    key: &str,
    low: f64,
    high: f64,
) -> Result<(), ApiError> {
    match fields.get(key).map(Value::as_f64) {
        None => Ok(()),
        Some(Some(number)) if (low..=high).contains(&number) => Ok(()),
        Some(_) => Err(ApiError::invalid(
            key,
            format!("`{key}` must be a number from {low} to {high}"),
        )),
    }
}

fn positive(fields: &Map<String, Value>, key: &str, most: u64) -> Result<Option<usize>, ApiError> {
    match fields.get(key) {
        None => Ok(None),
        Some(value) => value
            .as_u64()
            .filter(|number| (1..=most).contains(number))
            .and_then(|number| usize::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| {
                let upper = if most == u64::MAX {
                    String::new()
                } else {
                    format!(" up to {most}")
                };
                ApiError::invalid(key, format!("`{key}` must be a positive integer{upper}"))
            }),
    }
}

pub(crate) fn flag(fields: &Map<String, Value>, key: &str) -> Result<bool, ApiError> {
    match fields.get(key) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(ApiError::invalid(
            key,
            format!("`{key}` must be true or false"),
        )),
    }
}

fn stop_texts(fields: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "stop",
            "`stop` must be a text or a list of texts, none of them empty",
        )
    };
    let texts = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .map(|text| text.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    if texts.iter().any(String::is_empty) {
        return Err(wrong());
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_the_nearest_name() {
        refuse_unknown(&fields(json!({"user": "u", "top_k": 3})), &[]).expect("known");
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
    fn a_seed_takes_over_sampling_and_is_not_needed_for_greedy_answers() {
        let mut greedy = fields(json!({"seed": 1, "temperature": 0, "top_p": 0.5}));
        assert_eq!(seeded(&mut greedy, 1).expect("sound"), None);
        assert!(!greedy.contains_key("seed") && greedy.contains_key("top_p"));

        let mut body = fields(json!({"seed": -1, "temperature": 0.5, "top_p": 0.5, "top_k": 3}));
        let draw = seeded(&mut body, 1).expect("sound").expect("a draw");
        assert_eq!((draw.seed, draw.temperature), (u64::MAX, 0.5));
        assert_eq!((draw.top_k, draw.top_p), (Some(3), Some(0.5)));
        assert_eq!(Value::Object(body), json!({"temperature": 0.0}));

        for wrong in [json!({"seed": "x"}), json!({"seed": 1.5})] {
            assert!(seeded(&mut fields(wrong), 1).is_err());
        }
        assert!(seeded(&mut fields(json!({"seed": 1, "temperature": 1})), 2).is_err());
    }

    #[test]
    fn stream_options_are_read_or_refused() {
        assert!(usage_wanted(&json!({"include_usage": true}), true).expect("sound"));
        assert!(!usage_wanted(&json!({}), true).expect("sound"));
        for (wrong, stream) in [
            (json!({"include_usage": true}), false),
            (json!(3), true),
            (json!({"include_usage": 1}), true),
            (json!({"include_obfuscation": true}), true),
        ] {
            assert!(usage_wanted(&wrong, stream).is_err(), "{wrong}");
        }
    }
}
