//! Common steps of every request for generated text: reading it, checking it, and sending it to an engine.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mistralrs_core::llguidance::Matcher;
use mistralrs_core::{Constraint, NormalRequest, SamplingParams, TokenizationRequest};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::Sender;

use super::App;
use super::admission::Admission;
use super::api_error::ApiError;
use super::common_keys::{AskedScores, CommonKeys, DryKeys, usage_wanted};
use super::context::RequestContext;
use super::fields::{object, only, refuse_unknown, take, wrong};
use super::job::{Job, Plan, PromptScores, RunningJob};
use super::metrics::Counted;
use super::registry::Lease;
use super::sampling::Sampling;
use super::seeded::SeededDraw;
use super::steps::{Penalties, Rules, Scores, Steps};
use super::stop::StopWatch;
use super::structured::{Form, FormKeys};
use super::vocabulary::Held;
use crate::field_names::field_names;
use crate::quirks_0_8::abandoned_requests::tokenize;
use crate::quirks_0_8::narrow_sampling;
use crate::quirks_0_8::split_models::{refuse_hooks, samples_in_step};
use crate::quirks_0_8::stop_texts;

/// Keys of vLLM that are accepted only with the value that describes the fixed behaviour.
const AS_DONE: &[(&str, bool)] = &[
    ("skip_special_tokens", true),
    ("spaces_between_special_tokens", true),
    ("include_stop_str_in_output", false),
    ("use_beam_search", false),
];

/// Accepted keys in addition to those of the structures.
const OTHER_KEYS: &[&str] = &["model"];

/// A request that has passed the common checks.
pub(crate) struct Asked {
    /// The generation that answers.
    pub(crate) lease: Lease,
    /// The posterior draw that answers instead of the posterior mean.
    pub(crate) posterior_draw: Option<usize>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Texts that end an answer.
    pub(crate) stop: Vec<String>,
    /// The constraint on the form of the answer.
    pub(crate) form: Option<Form>,
    /// Number of alternatives per token, if log-probabilities are wanted.
    pub(crate) n_top: Option<usize>,
    pub(crate) n_choices: usize,
    /// Whether the request may ask for the prompt alone.
    pub(crate) may_be_empty: bool,
    /// Sampling settings, except those that depend on the prompt and the constraint.
    sampling: SamplingParams,
    max_tokens: Option<usize>,
    rules: Arc<Rules>,
    draw: Option<SeededDraw>,
}

/// A prompt for an engine.
pub(crate) struct Prompt {
    pub(crate) request: NormalRequest,
    pub(crate) tokens: Vec<u32>,
    /// Whether the tokens of the prompt are scored.
    pub(crate) is_scored: bool,
}

impl Asked {
    /// Reads and checks a body. Its keys are the common keys and those of `Own`.
    pub(crate) fn read<Own: DeserializeOwned>(
        app: &App,
        bytes: &[u8],
        scores: AskedScores,
    ) -> Result<(Self, Own), ApiError> {
        let mut fields = object(bytes)?;
        let (lease, posterior_draw) = leased(app, &fields)?;
        let as_done: Vec<&str> = AS_DONE.iter().map(|(key, _)| *key).collect();
        let known = [
            field_names::<CommonKeys>(),
            field_names::<DryKeys>(),
            field_names::<FormKeys>(),
            OTHER_KEYS,
            &as_done,
            field_names::<Own>(),
        ];
        refuse_unknown(&fields, &known)?;
        for (key, value) in AS_DONE {
            only(key, fields.remove(*key).as_ref(), &json!(value))?;
        }
        let common: CommonKeys = take(&mut fields)?;
        let dry = take::<DryKeys>(&mut fields)?.params()?;
        if posterior_draw.is_some() && dry.is_some() {
            let must = "is not applied to the tokens of posterior draws; ask the adapter itself";
            return Err(wrong("dry_multiplier", must));
        }
        let form = take::<FormKeys>(&mut fields)?.form()?;
        let n_top = scores(common.logprobs.as_ref(), common.top_logprobs.as_ref())?;
        let n_choices = common.n.unwrap_or(1);
        if common.best_of.is_some_and(|best| best != n_choices) {
            let message = "only the value of `n` is supported";
            return Err(ApiError::invalid("best_of", message));
        }
        let include_usage = match &common.stream_options {
            Some(options) => usage_wanted(options, common.stream)?,
            None => false,
        };
        let in_step = samples_in_step();
        // If a token may be a stop token or is scored, it must be known when it is drawn.
        let known =
            n_top.is_some() || !common.stop_token_ids.is_empty() || posterior_draw.is_some();
        common.check_tokens(&lease.tokens.tokenizer)?;
        common.check(n_top, dry.as_ref())?;
        refuse_hooks(in_step, &common.hooks(n_top))?;
        let asked = Sampling {
            temperature: common.temperature,
            top_k: common.top_k,
            top_p: common.top_p,
            min_p: common.min_p,
            repetition_penalty: common.repetition_penalty,
        };
        let mut sampling = asked.or(&lease.sampling);
        let draw = sampling.seeded(common.seed, known);
        refuse_hooks(in_step, &[("seed", draw.is_some())])?;
        narrow_sampling::say_otherwise(&mut sampling);
        // If several processes sample, each must apply the penalties itself, as mistral.rs does.
        let theirs = |penalty: Option<f32>| penalty.filter(|_| in_step);
        let ours = |penalty: Option<f32>| penalty.filter(|_| !in_step).unwrap_or_default();
        let asked = Self {
            lease,
            posterior_draw,
            stream: common.stream,
            include_usage,
            stop: common.stop,
            form,
            n_top,
            n_choices,
            may_be_empty: false,
            sampling: SamplingParams {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                top_n_logprobs: 1,
                frequency_penalty: theirs(common.frequency_penalty),
                presence_penalty: theirs(common.presence_penalty),
                repetition_penalty: theirs(sampling.repetition_penalty),
                dry_params: dry,
                ..SamplingParams::neutral()
            },
            max_tokens: common.max_completion_tokens.or(common.max_tokens),
            rules: Arc::new(Rules {
                bias: common.logit_bias,
                penalties: Penalties {
                    frequency: ours(common.frequency_penalty),
                    presence: ours(common.presence_penalty),
                    repetition: ours(sampling.repetition_penalty),
                },
                min_tokens: common.min_tokens.unwrap_or(0),
                ignore_eos: common.ignore_eos,
                stop_tokens: common.stop_token_ids,
            }),
            draw,
        };
        Ok((asked, take(&mut fields)?))
    }

    /// The name of the model that answers.
    pub(crate) fn model_name(&self) -> String {
        match self.posterior_draw {
            Some(draw) => draw_name(&self.lease.name, draw),
            None => self.lease.name.clone(),
        }
    }

    /// Asks the engine for the tokens of `request`. Errors name the key `prompt`, which has the text.
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
        let tokens = admission.within(tokens).await?;
        self.require_vectors(prompt, &tokens)?;
        Ok(tokens)
    }

    /// Refuses tokens without a vector in the model's embedding. A tokenizer may have more tokens, and mistral.rs adds
    /// some for images.
    pub(crate) fn require_vectors(&self, prompt: &str, tokens: &[u32]) -> Result<(), ApiError> {
        let vocab_size = self.lease.vocab_size;
        let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) else {
            return Ok(());
        };
        let text = self.lease.tokens.tokenizer.id_to_token(*token);
        let message = format!(
            "the prompt has the token {token} (`{}`), of which the model has no vector: its vocabulary has {vocab_size}",
            text.unwrap_or_default()
        );
        Err(ApiError::invalid(prompt, message))
    }

    /// Sends `prompts`, given under `key`, to the engine, once per choice. The choices of the first prompt come first.
    pub(crate) async fn start(
        &self,
        app: &App,
        mut admission: Admission,
        key: &str,
        prompts: Vec<Prompt>,
    ) -> Result<RunningJob, ApiError> {
        let matcher = admission.within(self.matcher()).await?;
        admission.widen(app, self.n_choices, prompts.len())?;
        let mut plans = Vec::new();
        let mut n_prompt_tokens = 0;
        for mut prompt in prompts {
            let n_tokens = prompt.tokens.len();
            let max_tokens = self.max_tokens(app, key, n_tokens)?;
            n_prompt_tokens += n_tokens;
            prompt.request.is_streaming = self.stream;
            prompt.request.constraint = match (&self.form, samples_in_step()) {
                (Some(form), true) => form.constraint.clone(),
                _ => Constraint::None,
            };
            prompt.request.sampling_params = SamplingParams {
                stop_toks: stop_texts::told(&self.stop),
                max_len: Some(max_tokens),
                ..self.sampling.clone()
            };
            let n_top = self.n_top.unwrap_or_default();
            let scores = prompt
                .is_scored
                .then(|| PromptScores::new(prompt.tokens.clone(), n_top));
            let scores = scores.map(Arc::new);
            let tokens: Arc<[u32]> = prompt.tokens.into();
            for _ in 0..self.n_choices {
                plans.push(Plan {
                    tokens: tokens.clone(),
                    steps: Arc::new(self.steps(app, plans.len(), max_tokens, matcher.as_ref())),
                    request: prompt.request.clone(),
                    max_tokens,
                    scores: scores.clone(),
                });
            }
        }
        let job = Job {
            lease: self.lease.clone(),
            draw: self.posterior_draw,
            plans,
            prompt_tokens: n_prompt_tokens,
            complete: AtomicBool::default(),
        };
        job.start(app, admission, self.stream)
    }

    /// The steps of the choice `idx`, counted over all prompts; the choice may have `limit` tokens.
    fn steps(&self, app: &App, idx: usize, limit: usize, matcher: Option<&Matcher>) -> Steps {
        let scores = |n_top| Scores {
            n_top,
            ..Scores::default()
        };
        Steps {
            end_tokens: self.lease.tokens.end_tokens.clone(),
            rules: self.rules.clone(),
            draw: self.draw.as_ref().map(|draw| draw.for_choice(idx)),
            grammar: matcher.map(Held::new),
            stop: StopWatch::new(&self.stop, &self.lease.tokens.tokenizer),
            scores: self.n_top.map(scores),
            limit: Some(limit),
            // A request counts as waiting until its first choice has a token.
            waiting: Mutex::new((idx == 0).then(|| Counted::new(&app.metrics.requests_waiting))),
            ..Steps::default()
        }
    }

    /// Compiles the form, unless mistral.rs must compile it in every process.
    async fn matcher(&self) -> Result<Option<Matcher>, ApiError> {
        let Some(form) = self.form.clone().filter(|_| !samples_in_step()) else {
            return Ok(None);
        };
        let vocabulary = self.lease.tokens.vocabulary.clone();
        let Form { key, constraint } = form;
        let compiled = tokio::task::spawn_blocking(move || vocabulary.compile(&constraint));
        // The library panics on a form that is far too large.
        let compiled = compiled.await;
        let compiled = compiled.unwrap_or_else(|_| Err("it is too large".to_owned()));
        compiled.map_err(|cause| {
            // The following lines are the state of a parser.
            let cause: String = cause
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(300)
                .collect();
            ApiError::invalid(
                &key,
                format!("`{key}` cannot be used as a grammar: {cause}"),
            )
        })
    }

    /// The maximum number of tokens: the minimum of the requested number, the server's limit, and the room after the
    /// prompt.
    fn max_tokens(&self, app: &App, prompt: &str, n_prompt: usize) -> Result<usize, ApiError> {
        let limits = &app.config.limits;
        let context = self.lease.max_sequence_length;
        let longest = limits.max_prompt_tokens.unwrap_or(context);
        let only_prompt = self.max_tokens == Some(0);
        let longest = longest.min(context - usize::from(!only_prompt));
        if n_prompt == 0 || n_prompt > longest {
            return Err(ApiError::invalid(
                prompt,
                format!("the prompt has {n_prompt} tokens; this model takes 1 to {longest}"),
            ));
        }
        if only_prompt && !self.may_be_empty {
            let message =
                "`max_tokens` must be a positive integer; 0 goes with `echo`: true in a completion";
            return Err(ApiError::invalid("max_tokens", message));
        }
        let room = context - n_prompt;
        let given = match (self.max_tokens, limits.max_completion_tokens) {
            (Some(asked), Some(limit)) if asked > limit => {
                return Err(ApiError::invalid(
                    "max_tokens",
                    format!("`max_tokens` is {asked}; this server gives at most {limit}"),
                ));
            }
            (asked, limit) => asked.or(limit).unwrap_or(room).min(room),
        };
        let least = self.rules.min_tokens;
        if least > given {
            let message = format!("`min_tokens` is {least}, but this answer may have {given}");
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(given)
    }
}

/// Separator of an adapter's name and the index of a posterior draw.
const DRAW: &str = "@draw-";

/// The name of a posterior draw.
pub(crate) fn draw_name(adapter: &str, draw: usize) -> String {
    format!("{adapter}{DRAW}{draw}")
}

/// Finds the generation that answers for `name`, and the index if the name is that of a posterior draw.
pub(crate) fn named(app: &App, name: Option<&str>) -> Option<(Lease, Option<usize>)> {
    if let Some((adapter, draw)) = name.and_then(|name| name.rsplit_once(DRAW)) {
        let lease = app.registry.lease(Some(adapter))?;
        let draw: usize = draw.parse().ok()?;
        let is_served = draw < lease.n_draws() && Some(draw_name(adapter, draw).as_str()) == name;
        return is_served.then_some((lease, Some(draw)));
    }
    Some((app.registry.lease(name)?, None))
}

/// Finds the generation that answers for the key `model`, and the index if the name is that of a posterior draw.
pub(crate) fn leased(
    app: &App,
    fields: &Map<String, Value>,
) -> Result<(Lease, Option<usize>), ApiError> {
    let name = match fields.get("model") {
        None => None,
        Some(Value::String(name)) => Some(name.as_str()),
        Some(_) => return Err(ApiError::invalid("model", "expected the name of a model")),
    };
    let found = named(app, name);
    let (lease, draw) = found.ok_or_else(|| ApiError::unknown_model(name.unwrap_or("default")))?;
    RequestContext::set_model(&lease.name);
    Ok((lease, draw))
}
