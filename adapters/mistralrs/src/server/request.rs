//! What chat and plain completions have in common: reading the body and checking it.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::App;
use super::answer::ApiError;
use super::context::RequestContext;
use super::exchange::{Admission, Handover};
use super::fields::keep_understood;
use super::registry::Lease;
use super::sampling::{keep_to_mistralrs, seeded};
use super::steps::{SeededDraw, Steps, StopWatch};
use super::tools::hold_to_call;
use crate::distributed::samples_in_step;

/// Most choices a request may ask for.
const MAX_CHOICES: u64 = 16;

/// A body that has passed the common checks.
pub(crate) struct Body {
    pub(crate) fields: Map<String, Value>,
    /// The generation that answers.
    pub(crate) lease: Lease,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) max_tokens: Option<usize>,
    n_choices: usize,
    bias: Arc<HashMap<u32, f32>>,
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

        keep_understood(&mut fields, own)?;
        // mistral.rs 0.8.1 reports base-10 logarithms of filtered probabilities, which is not what clients expect.
        let wants_logprobs = |key| {
            fields
                .get(key)
                .is_some_and(|value: &Value| value != &json!(false))
        };
        let wants_top = fields
            .get("top_logprobs")
            .is_some_and(|value| value != &json!(0));
        if wants_logprobs("logprobs") || wants_top {
            return Err(ApiError::invalid(
                "logprobs",
                "log-probabilities are not supported",
            ));
        }
        fields.remove("logprobs");
        fields.remove("top_logprobs");
        check_range(&fields, "temperature", 0.0, 2.0)?;
        check_range(&fields, "top_p", 0.0, 1.0)?;
        check_range(&fields, "min_p", 0.0, 1.0)?;
        check_range(&fields, "presence_penalty", -2.0, 2.0)?;
        check_range(&fields, "frequency_penalty", -2.0, 2.0)?;
        check_range(&fields, "repetition_penalty", 1e-3, 1e3)?;
        lease.sampling.fill(&mut fields);

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
        fields.remove("n");
        if fields.get("tools") == Some(&json!([])) {
            fields.remove("tools");
        }
        hold_to_call(&mut fields)?;
        let stream = flag(&fields, "stream")?;
        let include_usage = match fields.remove("stream_options") {
            Some(options) => usage_wanted(&options, stream)?,
            None => false,
        };
        let stop = stop_texts(&fields)?;
        // mistral.rs 0.8.1 cuts an answer at a place in its bytes as they were before what is no UTF-8 was replaced, and panics
        // where that is within a character. It need not know of stop texts, but where nothing here can end an answer.
        let is_held = fields.contains_key("grammar")
            || fields
                .get("response_format")
                .is_some_and(|format| format["type"] != "text");
        if !is_held && !samples_in_step() {
            fields.remove("stop");
        }
        let bias = token_bias(&mut fields)?;
        let seeded = seeded(&mut fields)?;
        if samples_in_step() {
            refuse_hooks(&bias, seeded.as_ref())?;
        }
        keep_to_mistralrs(&mut fields);
        Ok(Self {
            fields,
            lease,
            stream,
            include_usage,
            stop,
            max_tokens,
            n_choices,
            bias: Arc::new(bias),
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
        mut admission: Admission,
        prompt_param: &str,
        prompt_tokens: usize,
    ) -> Result<Handover, ApiError> {
        admission.widen(app, self.n_choices)?;
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
        let steps = (0..self.n_choices).map(|idx| {
            Arc::new(Steps::new(
                self.lease.end_tokens.clone(),
                self.bias.clone(),
                self.seeded.as_ref().map(|draw| draw.for_choice(idx)),
                StopWatch::new(&self.stop, &self.lease.tokenizer),
                // The request waits for its first token, whichever choice has it.
                (idx == 0).then(|| app.metrics.waiting()),
            ))
        });
        Ok(Handover {
            admission,
            lease: self.lease.clone(),
            steps: steps.collect(),
            max_tokens,
            prompt_tokens,
        })
    }
}

/// Refuses what is done in a hook of the sampling steps.
fn refuse_hooks(bias: &HashMap<u32, f32>, seeded: Option<&SeededDraw>) -> Result<(), ApiError> {
    let key = match (bias.is_empty(), seeded) {
        (true, None) => return Ok(()),
        (false, _) => "logit_bias",
        (true, Some(_)) => "seed",
    };
    Err(ApiError::invalid(
        key,
        format!("`{key}` is not supported where a model is split over several processes"),
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
    // Padding against eavesdroppers on the length of texts; a stream without it says the same.
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

/// The bias of every token named in `logit_bias`, which mistral.rs 0.8.1 reads and does not apply.
fn token_bias(fields: &mut Map<String, Value>) -> Result<HashMap<u32, f32>, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "logit_bias",
            "`logit_bias` must be an object of token ids with numbers from -100 to 100",
        )
    };
    let Some(value) = fields.remove("logit_bias") else {
        return Ok(HashMap::new());
    };
    let table = value.as_object().ok_or_else(wrong)?;
    let entry = |(token, bias): (&String, &Value)| {
        let bias = bias
            .as_f64()
            .filter(|bias| (-100.0..=100.0).contains(bias))?;
        #[expect(clippy::cast_possible_truncation, reason = "logits are f32 themselves")]
        let bias = bias as f32;
        Some((token.parse().ok()?, bias))
    };
    table
        .iter()
        .map(|pair| entry(pair).ok_or_else(wrong))
        .collect()
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

/// A whole number from 1 to `most`, if there is one.
pub(super) fn positive(
    fields: &Map<String, Value>,
    key: &str,
    most: u64,
) -> Result<Option<usize>, ApiError> {
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

/// The texts that end an answer.
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
    use super::super::fields::tests::fields;
    use super::*;

    #[test]
    fn what_other_processes_would_not_do_is_refused() {
        let none = HashMap::new();
        refuse_hooks(&none, None).expect("nothing to refuse");
        let mut sampled = fields(json!({"seed": 1, "temperature": 1}));
        let draw = seeded(&mut sampled).expect("sound");
        let error = refuse_hooks(&none, draw.as_ref()).expect_err("refused");
        assert_eq!(error.body()["error"]["param"], "seed");
        let error = refuse_hooks(&HashMap::from([(1, 1.0)]), None).expect_err("refused");
        assert_eq!(error.body()["error"]["param"], "logit_bias");
    }

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

    #[test]
    fn a_bias_is_a_number_for_a_token() {
        let mut body = fields(json!({"logit_bias": {"3": -100, "7": 0.5}}));
        let bias = token_bias(&mut body).expect("sound");
        assert_eq!(bias, HashMap::from([(3, -100.0), (7, 0.5)]));
        assert!(body.is_empty());
        for wrong in [
            json!([]),
            json!({"x": 1}),
            json!({"1": "2"}),
            json!({"1": 101}),
        ] {
            assert!(token_bias(&mut fields(json!({"logit_bias": wrong}))).is_err());
        }
    }
}
