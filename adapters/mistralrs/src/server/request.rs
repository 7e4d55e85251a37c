//! What every request for generated text has in common: reading it, checking it, and giving it to an engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mistralrs_core::{
    Constraint, DrySamplingParams, NormalRequest, SamplingParams, TokenizationRequest,
};
use mistralrs_server_core::openai::Grammar;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use tokio::sync::mpsc::Sender;

use super::App;
use super::admission::Admission;
use super::api_error::ApiError;
use super::context::RequestContext;
use super::fields::{checked, flag, object, refuse_unknown, take, take_theirs};
use super::job::{Job, RunningJob};
use super::metrics::Counted;
use super::registry::Lease;
use super::sampling::Sampling;
use super::seeded::SeededDraw;
use super::steps::Steps;
use super::stop::StopWatch;
use crate::field_names::field_names;
use crate::quirks_0_8::abandoned_requests::tokenize;
use crate::quirks_0_8::split_models::{refuse_hooks, samples_in_step};
use crate::quirks_0_8::{log_probabilities, narrow_sampling, stop_texts};

/// Most choices a request may ask for.
const MAX_CHOICES: usize = 16;

/// Keys that every endpoint for generated text understands.
#[derive(Default, Deserialize)]
#[serde(default)]
struct CommonKeys {
    #[serde(deserialize_with = "flag")]
    stream: bool,
    stream_options: Option<Value>,
    #[serde(deserialize_with = "positive")]
    max_tokens: Option<usize>,
    #[serde(deserialize_with = "n_choices")]
    n: Option<usize>,
    #[serde(deserialize_with = "n_choices")]
    best_of: Option<usize>,
    #[serde(deserialize_with = "stop_list")]
    stop: Vec<String>,
    #[serde(deserialize_with = "seed")]
    seed: Option<u64>,
    #[serde(deserialize_with = "temperature")]
    temperature: Option<f64>,
    #[serde(deserialize_with = "share")]
    top_p: Option<f64>,
    #[serde(deserialize_with = "top_k")]
    top_k: Option<usize>,
    #[serde(deserialize_with = "share")]
    min_p: Option<f64>,
    #[serde(deserialize_with = "penalty")]
    presence_penalty: Option<f32>,
    #[serde(deserialize_with = "penalty")]
    frequency_penalty: Option<f32>,
    #[serde(deserialize_with = "factor")]
    repetition_penalty: Option<f32>,
    #[serde(deserialize_with = "token_bias")]
    logit_bias: HashMap<u32, f32>,
    logprobs: Option<Value>,
    top_logprobs: Option<Value>,
}

/// Those of them that have the types of mistral.rs.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TheirKeys {
    dry_multiplier: Option<f32>,
    dry_base: Option<f32>,
    dry_allowed_length: Option<usize>,
    dry_sequence_breakers: Option<Vec<String>>,
    grammar: Option<Grammar>,
}

/// Keys that are understood besides those of [`CommonKeys`] and [`TheirKeys`].
const OTHER_KEYS: &[&str] = &["model", "max_completion_tokens"];

/// A request that has passed the common checks.
pub(crate) struct Asked {
    /// The generation that answers.
    pub(crate) lease: Lease,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Texts that end an answer.
    pub(crate) stop: Vec<String>,
    /// What holds the answer to a form.
    pub(crate) constraint: Constraint,
    /// How tokens are sampled, but for what depends on the prompt and the constraint.
    sampling: SamplingParams,
    max_tokens: Option<usize>,
    n_choices: usize,
    bias: Arc<HashMap<u32, f32>>,
    seeded: Option<SeededDraw>,
}

impl Asked {
    /// Reads and checks a body, whose keys are the common ones and those of `Own`.
    pub(crate) fn read<Own: DeserializeOwned>(
        app: &App,
        bytes: &[u8],
    ) -> Result<(Self, Own), ApiError> {
        let mut fields = object(bytes)?;
        let lease = leased(app, &fields)?;
        let (common, theirs) = (field_names::<CommonKeys>(), field_names::<TheirKeys>());
        let known = [common, theirs, OTHER_KEYS, field_names::<Own>()];
        refuse_unknown(&fields, &known)?;
        if let Some(max) = fields.remove("max_completion_tokens") {
            fields.insert("max_tokens".to_owned(), max);
        }
        let common: CommonKeys = take(&mut fields)?;
        let their: TheirKeys = take_theirs(&mut fields)?;
        log_probabilities::refuse(common.logprobs.as_ref(), common.top_logprobs.as_ref())?;
        let n_choices = common.n.unwrap_or(1);
        if common.best_of.is_some_and(|best| best != n_choices) {
            let message = "only the value of `n` is supported";
            return Err(ApiError::invalid("best_of", message));
        }
        let include_usage = match &common.stream_options {
            Some(options) => usage_wanted(options, common.stream)?,
            None => false,
        };
        let asked = Sampling {
            temperature: common.temperature,
            top_k: common.top_k,
            top_p: common.top_p,
            min_p: common.min_p,
            repetition_penalty: common.repetition_penalty,
        };
        let mut sampling = asked.or(&lease.sampling);
        let seeded = sampling.seeded(common.seed);
        refuse_hooks(samples_in_step(), &common.logit_bias, seeded.as_ref())?;
        narrow_sampling::say_otherwise(&mut sampling);
        let asked = Self {
            lease,
            stream: common.stream,
            include_usage,
            stop: common.stop,
            sampling: SamplingParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                top_n_logprobs: 1,
                frequency_penalty: common.frequency_penalty,
                presence_penalty: common.presence_penalty,
                repetition_penalty: sampling.repetition_penalty,
                dry_params: their.dry()?,
                ..SamplingParams::neutral()
            },
            constraint: their.constraint(),
            max_tokens: common.max_tokens,
            n_choices,
            bias: Arc::new(common.logit_bias),
            seeded,
        };
        Ok((asked, take(&mut fields)?))
    }

    /// The tokens that the engine makes of `request`, whose text came under the key `prompt`.
    pub(crate) async fn tokens(
        &self,
        admission: &Admission,
        prompt: &str,
        request: impl FnOnce(Sender<anyhow::Result<Vec<u32>>>) -> TokenizationRequest,
    ) -> Result<Vec<u32>, ApiError> {
        let engine = self.lease.input()?;
        let held = (self.lease.clone(), admission.places());
        let tokens = async {
            tokenize(engine, request, held)
                .await
                .map_err(|error| ApiError::invalid(prompt, error.to_string()))
        };
        admission.within(tokens).await
    }

    /// Gives `request`, whose prompt has `n_prompt` tokens and came under the key `prompt`, to the engine, once for each choice.
    pub(crate) fn start(
        &self,
        app: &App,
        mut admission: Admission,
        prompt: &str,
        n_prompt: usize,
        mut request: NormalRequest,
    ) -> Result<RunningJob, ApiError> {
        admission.widen(app, self.n_choices)?;
        let max_tokens = self.max_tokens(app, prompt, n_prompt)?;
        request.is_streaming = self.stream;
        request.constraint = self.constraint.clone();
        request.sampling_params = SamplingParams {
            stop_toks: stop_texts::told(&self.stop, &self.constraint),
            max_len: Some(max_tokens),
            ..self.sampling.clone()
        };
        let steps = (0..self.n_choices).map(|idx| {
            Arc::new(Steps {
                end_tokens: self.lease.end_tokens.clone(),
                bias: self.bias.clone(),
                seeded: self.seeded.as_ref().map(|draw| draw.for_choice(idx)),
                stop: StopWatch::new(&self.stop, &self.lease.tokenizer),
                // The request waits for its first token, whichever choice has it.
                waiting: Mutex::new(
                    (idx == 0).then(|| Counted::new(&app.metrics.requests_waiting)),
                ),
                ..Steps::default()
            })
        });
        let job = Job {
            lease: self.lease.clone(),
            steps: steps.collect(),
            max_tokens,
            prompt_tokens: n_prompt,
            complete: AtomicBool::default(),
        };
        job.start(app, admission, &request)
    }

    /// As many tokens as are wanted, may be asked for, and fit after the prompt.
    fn max_tokens(&self, app: &App, prompt: &str, n_prompt: usize) -> Result<usize, ApiError> {
        let limits = &app.config.limits;
        let context = self.lease.max_sequence_length;
        let longest = limits.max_prompt_tokens.unwrap_or(context);
        let longest = longest.min(context - 1);
        if n_prompt == 0 || n_prompt > longest {
            return Err(ApiError::invalid(
                prompt,
                format!("the prompt has {n_prompt} tokens; this model takes 1 to {longest}"),
            ));
        }
        let room = context - n_prompt;
        match (self.max_tokens, limits.max_completion_tokens) {
            (Some(asked), Some(limit)) if asked > limit => Err(ApiError::invalid(
                "max_tokens",
                format!("`max_tokens` is {asked}; this server gives at most {limit}"),
            )),
            (asked, limit) => Ok(asked.or(limit).unwrap_or(room).min(room)),
        }
    }
}

impl TheirKeys {
    fn dry(&self) -> Result<Option<DrySamplingParams>, ApiError> {
        let Some(multiplier) = self.dry_multiplier else {
            return Ok(None);
        };
        let breakers = self.dry_sequence_breakers.clone();
        let (base, length) = (self.dry_base, self.dry_allowed_length);
        DrySamplingParams::new_with_defaults(multiplier, breakers, base, length)
            .map(Some)
            .map_err(|error| ApiError::invalid("body", error.root_cause().to_string()))
    }

    fn constraint(self) -> Constraint {
        match self.grammar {
            None => Constraint::None,
            Some(Grammar::Regex(regex)) => Constraint::Regex(regex),
            Some(Grammar::Lark(lark)) => Constraint::Lark(lark),
            Some(Grammar::JsonSchema(schema)) => Constraint::JsonSchema(schema),
            Some(Grammar::Llguidance(grammar)) => Constraint::Llguidance(grammar),
        }
    }
}

/// The generation that answers for the `model` that is named.
fn leased(app: &App, fields: &Map<String, Value>) -> Result<Lease, ApiError> {
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
    Ok(lease)
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

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    checked(deserializer, "must be a positive integer", |value| {
        whole(value).filter(|number| *number > 0).map(Some)
    })
}

fn n_choices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    let must = format!("must be a positive integer up to {MAX_CHOICES}");
    checked(deserializer, must, |value| {
        let number = whole(value).filter(|number| (1..=MAX_CHOICES).contains(number));
        number.map(Some)
    })
}

/// 0 and -1 are vLLM's ways of asking for none.
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

#[expect(clippy::cast_possible_truncation, reason = "logits are f32 themselves")]
fn single(number: f64) -> f32 {
    number as f32
}

/// What is added to the logit of each token named.
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

    use super::*;

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
    fn what_is_wrong_is_named_with_what_it_must_be() {
        for (key, value, must) in [
            ("logit_bias", json!([]), "an object of token ids"),
            ("logit_bias", json!({"x": 1}), "an object of token ids"),
            ("logit_bias", json!({"1": "2"}), "an object of token ids"),
            ("logit_bias", json!({"1": 101}), "an object of token ids"),
            ("seed", json!("x"), "an integer"),
            ("seed", json!(1.5), "an integer"),
            ("n", json!(17), "a positive integer up to 16"),
            ("max_tokens", json!(0), "a positive integer"),
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
