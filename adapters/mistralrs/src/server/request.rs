//! What chat and plain completions have in common: reading the body, checking it, and handing it to an engine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Bytes;
use candle_core::Tensor;
use mistralrs_core::{CustomLogitsProcessor, NormalRequest, Request, Response};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Receiver, channel};

use super::App;
use super::answer::ApiError;
use super::registry::Lease;

/// Most choices a request may ask for.
const MAX_CHOICES: u64 = 16;

/// Responses an engine may be ahead of a slow reader; a full channel holds the engine up.
const CHANNEL_SIZE: usize = 10_000;

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
}

impl Body {
    /// Reads and checks a body; `model` becomes the engine's id.
    pub(crate) fn read(app: &App, bytes: &Bytes) -> Result<Self, ApiError> {
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
        fields.insert("model".to_owned(), json!(lease.engine_id()));

        for key in ["web_search_options", "suffix"] {
            if fields.contains_key(key) {
                return Err(ApiError::invalid(key, format!("`{key}` is not supported")));
            }
        }
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
        let include_usage = match fields.remove("stream_options") {
            Some(options) => options["include_usage"].as_bool().unwrap_or(false),
            None => false,
        };
        let stop = stop_texts(&fields)?;
        Ok(Self {
            fields,
            lease,
            stream,
            include_usage,
            stop,
            max_tokens,
            n_choices,
        })
    }

    /// The rest of the body as mistral.rs's own request type.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_json::from_value(Value::Object(self.fields.clone()))
            .map_err(|error| ApiError::invalid("body", error.to_string()))
    }

    /// Hands `request` to the engine, with as many tokens as fit after a prompt of `prompt_tokens`.
    pub(crate) async fn send(
        &self,
        app: &App,
        build: impl AsyncFnOnce(tokio::sync::mpsc::Sender<Response>) -> Result<NormalRequest, ApiError>,
        prompt_tokens: usize,
    ) -> Result<Exchange, ApiError> {
        let limit = self.lease.max_sequence_length;
        if prompt_tokens == 0 || prompt_tokens >= limit {
            return Err(ApiError::invalid(
                "messages",
                format!(
                    "the prompt has {prompt_tokens} tokens; this model takes 1 to {}",
                    limit - 1
                ),
            ));
        }
        let room = limit - prompt_tokens;
        let max_tokens = self.max_tokens.map_or(room, |max| max.min(room));
        let (sender, receiver) = channel(CHANNEL_SIZE);
        let mut request = build(sender).await?;
        let steps = Arc::new(StepCounter::new(self.n_choices));
        request.model_id = Some(self.lease.engine_id().to_owned());
        request.sampling_params.max_len = Some(max_tokens);
        request.logits_processors = Some(vec![steps.clone()]);
        let engine = app
            .registry
            .host()
            .get_sender(Some(self.lease.engine_id()))
            .map_err(|error| ApiError::internal(error.to_string()))?;
        engine
            .send(Request::Normal(Box::new(request)))
            .await
            .map_err(|_| ApiError::internal("the engine does not take requests"))?;
        Ok(Exchange {
            receiver,
            steps,
            max_tokens,
            prompt_tokens,
        })
    }
}

/// A request that an engine is working on.
pub(crate) struct Exchange {
    pub(crate) receiver: Receiver<Response>,
    steps: Arc<StepCounter>,
    max_tokens: usize,
    pub(crate) prompt_tokens: usize,
}

impl Exchange {
    /// Tokens generated so far, over all choices.
    pub(crate) fn completion_tokens(&self) -> usize {
        self.steps.count()
    }

    /// Why a finished answer ended, where the engine has not said so.
    pub(crate) fn finish_reason(&self) -> &'static str {
        if self.completion_tokens() >= self.max_tokens {
            "length"
        } else {
            "stop"
        }
    }

    /// The final answer of a request that is not streamed.
    pub(crate) async fn answer(&mut self) -> Result<Response, ApiError> {
        match self.receiver.recv().await {
            None => Err(ApiError::internal("the engine stopped without an answer")),
            Some(Response::ValidationError(error)) => {
                Err(ApiError::invalid("messages", error.to_string()))
            }
            Some(Response::InternalError(error)) => Err(ApiError::internal(error.to_string())),
            Some(Response::ModelError(message, _) | Response::CompletionModelError(message, _)) => {
                Err(ApiError::internal(message))
            }
            Some(response) => Ok(response),
        }
    }

    pub(crate) fn usage(&self) -> Value {
        usage(self.prompt_tokens, self.completion_tokens())
    }
}

pub(crate) fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// Counts the tokens that are sampled; mistral.rs 0.8.1 does not tell when the last one adds no text.
///
/// A sample that a grammar forbids is drawn again at the same length, which is why lengths are told apart.
struct StepCounter {
    n_choices: usize,
    draws_by_length: Mutex<HashMap<usize, usize>>,
}

impl StepCounter {
    fn new(n_choices: usize) -> Self {
        Self {
            n_choices,
            draws_by_length: Mutex::default(),
        }
    }

    fn draws(&self) -> MutexGuard<'_, HashMap<usize, usize>> {
        self.draws_by_length
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn count(&self) -> usize {
        self.draws()
            .values()
            .map(|n_draws| *n_draws.min(&self.n_choices))
            .sum()
    }
}

impl CustomLogitsProcessor for StepCounter {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        *self.draws().entry(context.len()).or_default() += 1;
        Ok(logits.clone())
    }
}

/// Cuts text at the first stop text, and holds back what may be the beginning of one.
#[derive(Default)]
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Text that may be shown after `delta`, and whether a stop text was reached.
    pub(crate) fn push(&mut self, delta: &str) -> (String, bool) {
        self.held.push_str(delta);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(position) = first {
            self.held.truncate(position);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .stops
            .iter()
            .flat_map(|stop| {
                let ends = stop.char_indices().skip(1).map(|(end, _)| end);
                ends.filter(|end| self.held.ends_with(&stop[..*end]))
            })
            .max()
            .unwrap_or(0);
        let shown = self.held.len() - keep;
        (self.held.drain(..shown).collect(), false)
    }

    /// What was held back when the text ended.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Cuts a complete text.
    pub(crate) fn cut(stops: &[String], text: &str) -> (String, bool) {
        let mut filter = Self::new(stops.to_vec());
        let (mut shown, stopped) = filter.push(text);
        if !stopped {
            shown.push_str(&filter.finish());
        }
        (shown, stopped)
    }
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

fn flag(fields: &Map<String, Value>, key: &str) -> Result<bool, ApiError> {
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

    #[test]
    fn text_is_shown_in_full_up_to_the_first_stop_however_it_is_cut() {
        let stops = vec!["END".to_owned(), "é.".to_owned()];
        let cases = [
            ("abc", "abc"),
            ("aENbEN", "aENbEN"),
            ("xENDyé.", "x"),
            ("aé.END", "a"),
            ("éé", "éé"),
        ];
        for (text, expected) in cases {
            for size in 1..=text.chars().count() {
                let characters: Vec<char> = text.chars().collect();
                let mut filter = StopFilter::new(stops.clone());
                let mut shown = String::new();
                let mut stopped = false;
                for piece in characters.chunks(size) {
                    let (part, stop) = filter.push(&piece.iter().collect::<String>());
                    shown.push_str(&part);
                    stopped = stop;
                    if stop {
                        break;
                    }
                }
                if !stopped {
                    shown.push_str(&filter.finish());
                }
                assert_eq!(shown, expected, "{text} in pieces of {size}");
            }
            assert_eq!(StopFilter::cut(&stops, text).0, expected);
        }
    }

    #[test]
    fn without_stop_texts_nothing_is_held_back() {
        let mut filter = StopFilter::default();
        assert_eq!(filter.push("abc"), ("abc".to_owned(), false));
    }
}
