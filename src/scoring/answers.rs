//! The answers of an adapter, or of a base model alone, with their uncertainty.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mistralrs_monteclora::{
    Continuation, Score, ScoreError, ScorePrompt, ScoreRequest, ScoredCalibration, ScoredChoice,
    ScoredUncertainty, Scorer, ScorerAbout,
};
use monteclora_converters::{Adapter, Problem};
use serde_json::{Map, Value, json};

use super::adapter::{Calibrated, Held};
use super::{Base, Result};
use crate::data::{Encoder, fault_of_row, parse_question};
use crate::eval::calibration::{Draws, Judged, Scaling};
use crate::eval::{Answer, Answerer, Cancelled, LengthNormalisation, Question, posterior_draw};
use crate::model::{self, ActiveAdapter, GenerationSettings, Sequences};

/// Largest number of tokens computed for one question with its choices. Memory use grows with this number.
const MOST_TOKENS: usize = 16_384;

/// A base model in memory, alone or with an adapter.
#[derive(Debug)]
pub(super) struct AdapterScorer {
    pub(super) base: Arc<Base>,
    /// Encoder of conversations; `None` if the model has no chat template.
    pub(super) chat: Option<Arc<Encoder>>,
    pub(super) mean: ActiveAdapter,
    /// The whole adapter, if it has a posterior.
    pub(super) posterior: Option<Adapter>,
    pub(super) held: Held,
    pub(super) draws: Vec<ActiveAdapter>,
    pub(super) calibration: Option<Calibrated>,
    pub(super) fingerprint: String,
}

impl AdapterScorer {
    /// The draws used if a request names no number: those of an applicable calibration, otherwise as many as requests
    /// may ask for.
    fn default_draws(&self, encoder: &Encoder, length_normalised: bool) -> Option<Draws> {
        match &self.calibration {
            Some(found) => {
                found.default_draws(encoder.chat_template_sha256(), length_normalised, self.held)
            }
            None => self.held.first(self.held.n_asked),
        }
    }

    /// The draws that a request asks for.
    fn asked_draws(
        &self,
        request: &ScoreRequest,
        encoder: &Encoder,
    ) -> Result<Option<Draws>, ScoreError> {
        let most = self.held.n_asked;
        let n = match request.draws {
            None => self
                .default_draws(encoder, request.length_normalised)
                .map_or(0, |draws| draws.n),
            Some(0) => 0,
            Some(n) if most == 0 => {
                let message = format!(
                    "asks for {n} draws, and this model has no posterior; `monteclora fit` makes one around any LoRA"
                );
                return Err(ScoreError::invalid("draws", message));
            }
            Some(n) if n > most => {
                let message = format!("is {n}; this server draws at most {most}");
                return Err(ScoreError::invalid("draws", message));
            }
            Some(n) => n,
        };
        if n == 0 && request.seed.is_some() {
            let message = "is one of posterior draws, and none are asked for";
            return Err(ScoreError::invalid("seed", message));
        }
        let seed = request.seed.unwrap_or(self.held.seed);
        Ok((n > 0).then_some(Draws { n, seed }))
    }

    /// Encodes the question of a request.
    fn question(&self, request: &ScoreRequest) -> Result<Encoded<'_>, ScoreError> {
        let (encoder, mut row) = match &request.prompt {
            ScorePrompt::Messages(row) => {
                let encoder = self.chat.as_ref().ok_or_else(|| {
                    let message = "needs a chat template, which this model has not; give `prompt`";
                    ScoreError::invalid("messages", message)
                })?;
                (encoder, row.clone())
            }
            ScorePrompt::Text(text) => {
                let row = Map::from_iter([("prompt".to_owned(), json!(text))]);
                (&self.base.plain, row)
            }
        };
        if !request.choices.is_empty() {
            row.insert("choices".to_owned(), json!(request.choices));
        }
        let invalid =
            |problem: &Problem| ScoreError::invalid(problem.at.clone(), problem.message.clone());
        let bytes = Value::Object(row).to_string();
        let row = parse_question(bytes.as_bytes());
        let row = row.map_err(|problems| match problems.first() {
            Some(problem) => invalid(problem),
            None => ScoreError::invalid("body", "cannot be read"),
        })?;
        let question =
            Question::of_row(&row, encoder).map_err(|error| match fault_of_row(error) {
                Ok(problem) => invalid(&problem),
                Err(error) => ScoreError::Failed(error.to_string()),
            })?;
        let template = encoder.chat_template_sha256_with(&row.variables);
        Ok(Encoded {
            question,
            encoder,
            template,
            system: row.system().map(str::to_owned),
        })
    }

    /// Checks a request, and finds the draws, calibration and threshold for its answer.
    fn asked(&self, request: &ScoreRequest) -> Result<Asked<'_>, ScoreError> {
        let Encoded {
            question,
            encoder,
            template,
            system,
        } = self.question(request)?;
        let n_prompt = question.n_prompt();
        let context = self.base.decoder.config().max_position_embeddings;
        let longest = request
            .max_prompt_tokens
            .unwrap_or(context)
            .min(context - 1);
        if !(1..=longest).contains(&n_prompt) {
            let message = format!("has {n_prompt} tokens; this model takes 1 to {longest}");
            return Err(ScoreError::invalid(prompt_key(request), message));
        }
        let n_tokens = question.n_tokens();
        if n_tokens > MOST_TOKENS && request.choices.is_empty() {
            let message = format!(
                "has {n_tokens} tokens; this server scores answers to at most {MOST_TOKENS}"
            );
            return Err(ScoreError::invalid(prompt_key(request), message));
        }
        if n_tokens > MOST_TOKENS {
            let message = format!(
                "make {n_tokens} tokens with their prompts; this server computes at most {MOST_TOKENS} for a score: give fewer or shorter ones"
            );
            return Err(ScoreError::invalid("choices", message));
        }
        let draws = self.asked_draws(request, encoder)?;
        let judged = question.judged();
        let normalised = request.length_normalised;
        let found = self.calibration.as_ref();
        let found = found.map(|found| found.applicable(template, normalised, draws));
        let (calibration, why_not) = match found {
            None => (None, None),
            Some(found) if !found.knows_system(system.as_deref()) => {
                let why = "was made on rows with another system message";
                (None, Some(why.to_owned()))
            }
            Some(found) if found.judged.is_some_and(|own| own != judged) => {
                let why = match judged {
                    Judged::Choices => {
                        "is of answers in the model's own words, and this has choices"
                    }
                    Judged::Answers => "is of rows with choices, and this has none",
                };
                (None, Some(why.to_owned()))
            }
            Some(found) => {
                let why = found.why_not.clone();
                (found.asked(draws), why)
            }
        };
        let scaling = calibration.as_ref().map(|(_, scaling)| scaling);
        Ok(Asked {
            threshold: threshold(scaling, request.target_error)?,
            max_new_tokens: request.max_tokens.min(context - n_prompt),
            length_normalised: request.length_normalised,
            encoder,
            question,
            draws,
            why_not: why_not.filter(|_| calibration.is_none()),
            calibration,
        })
    }

    fn answer(&self, asked: Asked<'_>, cancelled: &AtomicBool) -> Result<Score, ScoreError> {
        let other;
        let draws = match (asked.draws, &self.posterior) {
            (None, _) => &[],
            (Some(Draws { n, seed }), _) if seed == self.held.seed => &self.draws[..n],
            (Some(Draws { n, seed }), Some(adapter)) => {
                other = self.draws_of(adapter, seed, n, cancelled)?;
                other.as_slice()
            }
            (Some(_), None) => return Err(ScoreError::Failed("no posterior".to_owned())),
        };
        let answerer = Answerer {
            decoder: &self.base.decoder,
            mean: &self.mean,
            draws,
            calibration: asked.calibration.as_ref(),
            threshold: asked.threshold.map(|(threshold, _)| threshold),
            tokenizer: asked.encoder.tokenizer(),
            generation: GenerationSettings {
                max_new_tokens: asked.max_new_tokens,
                stop_tokens: asked.encoder.stop_ids(),
                batch_size: 1,
            },
            normalisation: LengthNormalisation::per_token(asked.length_normalised),
            cancelled: Some(cancelled),
        };
        let n_prompt = asked.question.n_prompt();
        let answers = answerer.answer(&[asked.question]).map_err(failed)?;
        let [answer] = <[Answer; 1]>::try_from(answers)
            .map_err(|_| ScoreError::Failed("no answer to one question".to_owned()))?;
        let rows = self.calibration.as_ref();
        let rows = rows.map(|found| &found.calibration.data);
        let applied = rows
            .zip(asked.calibration)
            .map(|(rows, (_, scaling))| ScoredCalibration {
                temperature: scaling.temperature,
                threshold: asked.threshold.map(|(threshold, _)| threshold),
                target_error: asked.threshold.map(|(_, target)| target),
                rows: rows.rows,
                data_sha256: rows.sha256.clone(),
            });
        Ok(scored(
            answer,
            asked.draws,
            (applied, asked.why_not),
            n_prompt,
        ))
    }

    /// Computes draws that are not held in memory.
    fn draws_of(
        &self,
        adapter: &Adapter,
        seed: u64,
        n: usize,
        cancelled: &AtomicBool,
    ) -> Result<Vec<ActiveAdapter>, ScoreError> {
        let draw = |index| {
            if cancelled.load(Ordering::Relaxed) {
                return Err(ScoreError::Cancelled);
            }
            posterior_draw(adapter, &self.mean, &self.base.decoder, seed, index).map_err(failed)
        };
        (0..n).map(draw).collect()
    }
}

/// A question as tokens.
struct Encoded<'a> {
    question: Question,
    /// The encoder that made the tokens.
    encoder: &'a Encoder,
    /// Hash of the chat template that rendered the question.
    template: Option<String>,
    system: Option<String>,
}

/// The key of the request that holds the prompt.
fn prompt_key(request: &ScoreRequest) -> &'static str {
    match request.prompt {
        ScorePrompt::Messages(_) => "messages",
        ScorePrompt::Text(_) => "prompt",
    }
}

/// A checked request.
struct Asked<'a> {
    encoder: &'a Encoder,
    question: Question,
    max_new_tokens: usize,
    length_normalised: bool,
    draws: Option<Draws>,
    calibration: Option<(Judged, Scaling)>,
    /// Why the adapter's calibration does not apply to this question.
    why_not: Option<String>,
    /// The smallest confidence at which answers are given, and the error rate that this threshold targets.
    threshold: Option<(f64, f64)>,
}

/// The smallest confidence at which answers are given, and the error rate that this threshold targets.
fn threshold(
    scaling: Option<&Scaling>,
    asked: Option<f64>,
) -> Result<Option<(f64, f64)>, ScoreError> {
    let abstention = scaling.and_then(|scaling| scaling.abstention);
    let found = abstention.and_then(|found| Some((found.threshold?, found.target_error)));
    let Some(asked) = asked else {
        return Ok(found);
    };
    let message = match (found, abstention) {
        (Some((_, target)), _) if asked >= target => return Ok(found),
        (Some((_, target)), _) => {
            format!("is {asked}, and the calibration's threshold is for {target}")
        }
        (None, Some(off)) => format!(
            "asks for abstention, and no threshold was found that keeps the error below {}",
            off.target_error
        ),
        (None, None) => {
            "asks for abstention, and no calibration with a threshold holds for this request"
                .to_owned()
        }
    };
    let message = format!("{message}; `monteclora calibrate --target-error {asked}` looks for one");
    Err(ScoreError::invalid("target_error", message))
}

fn failed(error: anyhow::Error) -> ScoreError {
    match error.downcast_ref::<Cancelled>() {
        Some(_) => ScoreError::Cancelled,
        None => ScoreError::Failed(format!("{error:#}")),
    }
}

fn scored(
    answer: Answer,
    draws: Option<Draws>,
    (calibration, why_not): (Option<ScoredCalibration>, Option<String>),
    prompt_tokens: usize,
) -> Score {
    let choices = answer.choices.into_iter().map(|choice| ScoredChoice {
        text: choice.text,
        probability: choice.probability,
        std: choice.std,
        q05: choice.quantiles.map(|[low, _]| low),
        q95: choice.quantiles.map(|[_, high]| high),
    });
    let uncertainty = answer.uncertainty.zip(draws);
    let is_open = choices.len() == 0;
    let (calibration, why_not) = match (answer.truncated, calibration) {
        (true, Some(_)) => {
            let why = "says nothing of an answer that was cut";
            (None, Some(why.to_owned()))
        }
        (_, calibration) => (calibration, why_not),
    };
    Score {
        answer: answer.text,
        p_correct: answer.p_correct,
        calibrated: answer.calibrated,
        calibration_not_used: why_not,
        finish_reason: match (is_open, answer.truncated) {
            (false, _) => None,
            (true, true) => Some("length"),
            (true, false) => Some("stop"),
        },
        abstain: answer.abstain,
        choices: choices.collect(),
        uncertainty: uncertainty.map(|(found, draws)| ScoredUncertainty {
            draws: found.draws,
            seed: draws.seed,
            predictive_entropy: found.predictive_entropy,
            expected_entropy: found.expected_entropy,
            mutual_information: found.mutual_information,
            agreement: found.agreement,
        }),
        calibration,
        prompt_tokens,
        completion_tokens: answer.n_tokens,
    }
}

impl Scorer for AdapterScorer {
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn about(&self) -> ScorerAbout {
        let encoder = self.chat.as_ref().unwrap_or(&self.base.plain);
        let draws = self.default_draws(encoder, false);
        let template = encoder.chat_template_sha256();
        let found = self.calibration.as_ref();
        let found = found.and_then(|found| found.applicable(template, false, draws).asked(draws));
        let abstention = found.as_ref().and_then(|(_, scaling)| scaling.abstention);
        ScorerAbout {
            dtype: self.base.dtype,
            draws: self.held.n_asked,
            default_draws: draws.map_or(0, |draws| draws.n),
            calibrated: found.is_some(),
            calibrated_for: found.map(|(judged, _)| judged.name()),
            target_error: abstention
                .filter(|found| found.threshold.is_some())
                .map(|found| found.target_error),
        }
    }

    fn check(&self, request: &ScoreRequest) -> Result<(), ScoreError> {
        self.asked(request).map(drop)
    }

    fn score(&self, request: &ScoreRequest, cancelled: &AtomicBool) -> Result<Score, ScoreError> {
        self.answer(self.asked(request)?, cancelled)
    }

    fn continuation(
        &self,
        draw: usize,
        prompt: &[u32],
    ) -> Result<Box<dyn Continuation + '_>, ScoreError> {
        let text = self.base.decoder.continuation(prompt, self.draw(draw)?);
        Ok(Box::new(Text(text)))
    }

    fn prompt_logits(
        &self,
        draw: usize,
        prompt: &[u32],
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ScoreError> {
        let sequences = Sequences::new(&[prompt]);
        let told = self
            .base
            .decoder
            .each_logits(&sequences, self.draw(draw)?, each);
        told.map_err(|error| failed(error.into()))
    }
}

impl AdapterScorer {
    fn draw(&self, index: usize) -> Result<&ActiveAdapter, ScoreError> {
        let draw = self.draws.get(index);
        draw.ok_or_else(|| ScoreError::Failed(format!("draw {index} is not held")))
    }
}

/// A text that one draw continues.
struct Text<'a>(model::Continuation<'a>);

impl Continuation for Text<'_> {
    fn logits(&mut self) -> Result<Vec<f32>, ScoreError> {
        let logits = self.0.logits().map_err(|error| failed(error.into()))?;
        let row = logits.flatten_all().and_then(|row| row.to_vec1());
        row.map_err(|error| failed(error.into()))
    }

    fn push(&mut self, token: u32) -> Result<(), ScoreError> {
        self.0.push(token).map_err(|error| failed(error.into()))
    }
}
