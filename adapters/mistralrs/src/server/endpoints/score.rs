//! `POST /v1/monteclora/score`: returns an answer and how certain it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use crate::field_names::field_names;
use crate::scoring::{Score, ScoreError, ScorePrompt, ScoreRequest};
use crate::server::App;
use crate::server::admission::Admission;
use crate::server::api_error::ApiError;
use crate::server::chat::{set_thinking, template, variables};
use crate::server::context::RequestContext;
use crate::server::effort::Effort;
use crate::server::fields::{flag, object, refuse_unknown, take, wrong};
use crate::server::guard::Payload;
use crate::server::job::Usage;
use crate::server::messages::Messages;
use crate::server::metrics::count_outcome;
use crate::server::registry::{Lease, Scored};
use crate::server::request::leased;
use crate::server::tools;

/// Maximum number of tokens of an answer in the model's own words, if neither the request nor the server sets one.
const MAX_TOKENS: usize = 128;

/// Maximum number of choices per request; each one is computed.
const MAX_CHOICES: usize = 64;

/// Keys of the body besides `model`.
#[derive(Deserialize)]
struct ScoreKeys {
    messages: Option<Value>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Value>,
    enable_thinking: Option<bool>,
    reasoning_effort: Option<Effort>,
    prompt: Option<String>,
    choices: Option<Vec<String>>,
    draws: Option<usize>,
    seed: Option<u64>,
    target_error: Option<f64>,
    max_tokens: Option<usize>,
    #[serde(default, deserialize_with = "flag")]
    length_normalised: bool,
    #[serde(default, deserialize_with = "flag")]
    stream: bool,
    temperature: Option<f64>,
}

/// A score, with its model and usage.
#[derive(Serialize)]
struct Answer {
    object: &'static str,
    model: String,
    /// Generation of the files that answered, even if others have been loaded since.
    generation: String,
    #[serde(flatten)]
    score: Score,
    usage: Usage,
}

pub(super) async fn handle(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<Json<Value>, ApiError> {
    let admission = Admission::new(&app)?;
    let mut fields = object(&bytes)?;
    let (lease, draw) = leased(&app, &fields)?;
    if let Some(draw) = draw {
        let message = format!(
            "a draw by itself has no score; ask `{}`, with `draws` of at least {}",
            lease.name,
            draw + 1
        );
        return Err(ApiError::invalid("model", message));
    }
    refuse_unknown(&fields, &[field_names::<ScoreKeys>(), &["model"]])?;
    let keys: ScoreKeys = take(&mut fields)?;
    let scored = lease.scored.as_ref().ok_or_else(|| not_scored(&lease))?;
    let mut end = CountedEnd {
        app: &app,
        outcome: "canceled",
    };
    let outcome = match keys.request(&app, &lease) {
        Ok(request) => score(&admission, &lease, scored, request).await,
        Err(error) => Err(error),
    };
    end.outcome = match &outcome {
        Ok(_) => "finished",
        Err(error) if error.is_timeout() => "timeout",
        Err(error) if error.is_server_error() => "failed",
        Err(_) => "refused",
    };
    let score = outcome?;
    let duration = admission.started.elapsed();
    app.metrics.score(&lease.name, duration);
    tracing::info!(
        request_id = RequestContext::current()
            .as_ref()
            .map(|context| &context.id),
        model = lease.name,
        generation = lease.hash,
        prompt_tokens = score.prompt_tokens,
        draws = score.uncertainty.as_ref().map(|found| found.draws),
        duration_ms = duration.as_millis(),
        "scored"
    );
    let usage = Usage::new(score.prompt_tokens, score.completion_tokens);
    let answer = Answer {
        object: "monteclora.score",
        model: lease.name.clone(),
        generation: lease.hash.clone(),
        score,
        usage,
    };
    let value = serde_json::to_value(answer);
    Ok(Json(
        value.map_err(|error| ApiError::internal(error.to_string()))?,
    ))
}

/// Counts how a score ended, even if the client left.
struct CountedEnd<'a> {
    app: &'a App,
    outcome: &'static str,
}

impl Drop for CountedEnd<'_> {
    fn drop(&mut self) {
        count_outcome(&self.app.metrics.scores, self.outcome);
    }
}

fn not_scored(lease: &Lease) -> ApiError {
    let base = lease.parent.as_ref().unwrap_or(&lease.name);
    let message = format!(
        "the answers of `{}` are not scored; [models.uncertainty] of `{base}` in serve.toml needs `enabled = true`",
        lease.name
    );
    ApiError::invalid("model", message)
}

impl ScoreKeys {
    fn request(self, app: &App, lease: &Lease) -> Result<ScoreRequest, ApiError> {
        let invalid =
            |key: &str, message: &str| Err(ApiError::invalid(key, format!("`{key}` {message}")));
        if self.stream {
            return invalid("stream", "must be false: a score comes as a whole");
        }
        if self
            .temperature
            .is_some_and(|temperature| temperature != 0.0)
        {
            return invalid(
                "temperature",
                "must be 0: what is scored is the most likely answer",
            );
        }
        let of_template = [
            ("tools", self.tools.is_some()),
            ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
            ("enable_thinking", self.enable_thinking.is_some()),
            ("reasoning_effort", self.reasoning_effort.is_some()),
        ];
        let prompt = match (self.messages, self.prompt) {
            (Some(messages), None) => {
                let turns = Turns {
                    messages,
                    tools: self.tools,
                    kwargs: self.chat_template_kwargs,
                    thinking: (self.enable_thinking, self.reasoning_effort),
                };
                turns.read(lease)?
            }
            (None, Some(text)) => match of_template.iter().find(|(_, is_given)| *is_given) {
                None => ScorePrompt::Text(text),
                Some((key, _)) => {
                    return invalid(
                        key,
                        "goes with `messages`: a `prompt` is taken as it is, without the chat template",
                    );
                }
            },
            (Some(_), Some(_)) => {
                return invalid("prompt", "excludes `messages`: give one of them");
            }
            (None, None) => return invalid("messages", "or `prompt` is needed"),
        };
        if self.choices.as_ref().is_some_and(Vec::is_empty) {
            return invalid(
                "choices",
                "is empty: give two or more, or leave it out for an answer in the model's own words",
            );
        }
        let choices = self.choices.unwrap_or_default();
        if choices.len() == 1 {
            return invalid("choices", "has one entry: give two or more");
        }
        if let Some(at) = choices.iter().position(String::is_empty) {
            return invalid(&format!("choices[{at}]"), "is empty");
        }
        if choices.len() > MAX_CHOICES {
            let message = format!(
                "has {} entries; this server scores at most {MAX_CHOICES}",
                choices.len()
            );
            return invalid("choices", &message);
        }
        if !choices.is_empty() && self.max_tokens.is_some() {
            return invalid(
                "max_tokens",
                "is for answers in the model's own words, and there are `choices`",
            );
        }
        if choices.is_empty() && self.length_normalised {
            return invalid(
                "length_normalised",
                "is about `choices`, and there are none",
            );
        }
        if self
            .target_error
            .is_some_and(|share| !(share > 0.0 && share < 1.0))
        {
            return invalid(
                "target_error",
                "must be a share of wrong answers, above 0 and below 1",
            );
        }
        let limits = &app.config.limits;
        let max_tokens = match (self.max_tokens, limits.max_completion_tokens) {
            (Some(0), _) => return invalid("max_tokens", "must be a positive integer"),
            (Some(asked), Some(limit)) if asked > limit => {
                let message = format!("is {asked}; this server gives at most {limit}");
                return invalid("max_tokens", &message);
            }
            (asked, limit) => asked.unwrap_or(MAX_TOKENS.min(limit.unwrap_or(MAX_TOKENS))),
        };
        Ok(ScoreRequest {
            prompt,
            choices,
            draws: self.draws,
            seed: self.seed,
            target_error: self.target_error,
            max_tokens,
            max_prompt_tokens: limits.max_prompt_tokens,
            length_normalised: self.length_normalised,
        })
    }
}

/// A conversation to score, as the request gives it.
struct Turns {
    messages: Value,
    tools: Option<Value>,
    kwargs: Option<Value>,
    thinking: (Option<bool>, Option<Effort>),
}

impl Turns {
    /// Converts it to a row as `predict` reads it.
    fn read(self, lease: &Lease) -> Result<ScorePrompt, ApiError> {
        let template = template(lease, "messages")?;
        let tools = tools::read(self.tools)?;
        tools::refuse_unseen(&tools, template)?;
        let has_tools = !tools.is_empty();
        let mut kwargs = variables("chat_template_kwargs", self.kwargs, template, has_tools)?;
        let (enable, effort) = self.thinking;
        set_thinking(&mut kwargs, enable, effort)?;
        // Variables that the template does not read change nothing, and must not change which calibration applies.
        kwargs.retain(|name, _| template.reads(name, has_tools));
        let messages = Messages::read("messages", Some(self.messages), template, has_tools)?;
        if messages
            .list
            .last()
            .is_some_and(|last| last["role"] == "assistant")
        {
            let must = "must not end with the assistant's turn: that is what is scored; an answer that is given goes into `choices`";
            return Err(wrong("messages", must));
        }
        let mut row = Map::from_iter([("messages".to_owned(), json!(messages.list))]);
        if has_tools {
            row.insert("tools".to_owned(), Value::Array(tools));
        }
        if !kwargs.is_empty() {
            row.insert("chat_template_kwargs".to_owned(), Value::Object(kwargs));
        }
        Ok(ScorePrompt::Messages(row))
    }
}

/// Sets its flag when it is dropped, because then nobody waits any more.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Checks the request, waits for a place, and computes the score on its own thread. The thread holds the generation
/// until it ends. A request that cannot be answered is refused before it waits for a place.
async fn score(
    admission: &Admission,
    lease: &Lease,
    scored: &Scored,
    request: ScoreRequest,
) -> Result<Score, ApiError> {
    let request = Arc::new(request);
    let asked = request.clone();
    let one = async {
        let check = Semaphore::acquire_owned(scored.base.checks.clone()).await;
        check.map_err(|error| ApiError::internal(error.to_string()))
    };
    let held = (
        lease.clone(),
        admission.within(one).await?,
        admission.places(),
    );
    let check = scored.run("check-score", held, move |scorer| scorer.check(&asked));
    admission
        .within(async { Ok(check.await?) })
        .await?
        .map_err(refused)?;
    let turn = async {
        let places = scored.base.places.clone();
        let turn = Semaphore::acquire_owned(places).await;
        turn.map_err(|error| ApiError::internal(error.to_string()))
    };
    let turn = admission.within(turn).await?;
    let cancelled = CancelOnDrop(Arc::default());
    let flag = cancelled.0.clone();
    let held = (lease.clone(), turn, admission.places());
    let begun = Instant::now();
    let work = scored.run("scoring", held, move |scorer| scorer.score(&request, &flag));
    let outcome = admission.within(async { Ok(work.await?) }).await?;
    tracing::debug!(
        model = lease.name,
        elapsed_ms = begun.elapsed().as_millis(),
        "score computed"
    );
    outcome.map_err(refused)
}

fn refused(error: ScoreError) -> ApiError {
    match error {
        ScoreError::Invalid { ref param, .. } => ApiError::invalid(param, error.to_string()),
        ScoreError::Cancelled => ApiError::timed_out(),
        ScoreError::Failed(cause) => ApiError::internal(cause),
    }
}
