//! The interface between the server and the code that computes how certain an answer is.
//!
//! mistral.rs has no posterior: it merges one set of weights. The server therefore asks a [`Scoring`] for scores. A
//! [`Scoring`] has weights of its own, and the server does not know how it computes. `monteclora serve` passes the one
//! that is built on its decoder.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Result;

/// The form in which a scorer holds the weights of a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoringDtype {
    /// bfloat16.
    #[default]
    Bf16,
    /// float32.
    F32,
    /// The quantised blocks of a `.gguf` file, as they are.
    Blocks,
}

/// The settings of an enabled `[models.uncertainty]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UncertaintyConfig {
    /// The base model, as `serve.toml` names it.
    pub model_id: String,
    /// Revision of the base model on the Hub.
    pub revision: Option<String>,
    /// The form in which the scorer holds the weights.
    pub dtype: ScoringDtype,
    /// Number of posterior draws held per adapter; a request may ask for at most this many.
    pub draws: usize,
    /// Number of scores that are computed at the same time.
    pub max_concurrent: NonZeroUsize,
}

/// A base model on which answers are scored.
#[derive(Debug, Clone)]
pub struct ScoredBase {
    /// The settings.
    pub config: UncertaintyConfig,
    /// The directory from which the engine loads the model.
    pub dir: PathBuf,
    /// The device that computes the scores.
    pub device: Device,
    /// Chat template file that replaces the model's own.
    pub chat_template: Option<PathBuf>,
}

/// Scores answers with weights of its own, one copy per base model.
pub trait Scoring: Debug + Send + Sync {
    /// Reads what the files of a base model, or of an adapter on it, say before they are loaded. It blocks.
    ///
    /// # Errors
    /// Returns an error if the base or the adapter cannot be scored.
    fn survey(
        &self,
        base: &ScoredBase,
        adapter: Option<&ScoredAdapter<'_>>,
    ) -> Result<ScorerSurvey>;

    /// Loads a base model, which all its adapters share. It blocks.
    ///
    /// # Errors
    /// Returns an error if the base model cannot be loaded.
    fn load(&self, base: &ScoredBase) -> Result<Arc<dyn BaseScorer>>;
}

/// An adapter on a [`ScoredBase`].
#[derive(Debug, Clone, Copy)]
pub struct ScoredAdapter<'a> {
    /// Directory of the adapter.
    pub path: &'a Path,
    /// Number of posterior draws to hold, if the adapter has a posterior.
    pub n_held: usize,
    /// Number of these draws that a request for a score may ask for at most.
    pub n_asked: usize,
}

/// What the files say about a scorer before it is loaded.
#[derive(Debug, Clone, Default)]
pub struct ScorerSurvey {
    /// Memory that the scorer takes, in bytes.
    pub bytes: u64,
    /// Fingerprint of everything that is loaded: for a base, its values; for an adapter, its posterior, its calibration
    /// and the base.
    pub fingerprint: String,
    /// Fingerprint of an adapter's posterior and calibration, independent of the base. It identifies a release of the
    /// adapter.
    pub content: String,
    /// Whether an adapter's scores depend on more than its mean, that is on a posterior or a calibration.
    pub is_more_than_mean: bool,
    /// Whether the adapter has a posterior to draw from.
    pub has_posterior: bool,
    /// Possible faults that do not prevent scoring.
    pub warnings: Vec<Problem>,
}

/// A base model in memory.
pub trait BaseScorer: Debug + Send + Sync {
    /// Returns the scorer of `adapter` on this base, or of the base alone. It blocks.
    ///
    /// # Errors
    /// Returns an error if the adapter cannot be loaded.
    fn scorer(&self, adapter: Option<&ScoredAdapter<'_>>) -> Result<Arc<dyn Scorer>>;
}

/// One model in memory: a base, alone or with an adapter.
pub trait Scorer: Debug + Send + Sync {
    /// The fingerprint of what was loaded; see [`ScorerSurvey::fingerprint`].
    fn fingerprint(&self) -> &str;

    /// What a request can ask of this scorer.
    fn about(&self) -> ScorerAbout;

    /// Checks whether a request can be answered, without computing an answer. It blocks.
    ///
    /// # Errors
    /// Returns an error if the request cannot be answered.
    fn check(&self, request: &ScoreRequest) -> Result<(), ScoreError>;

    /// Answers a question and says how certain the answer is. It blocks. Once `cancelled` is set, it returns early with
    /// [`ScoreError::Cancelled`].
    ///
    /// # Errors
    /// Returns an error if the request cannot be answered, if `cancelled` is set or if the computation fails.
    fn score(&self, request: &ScoreRequest, cancelled: &AtomicBool) -> Result<Score, ScoreError>;

    /// Starts a text that posterior draw number `draw` continues after `prompt`. `prompt` must not be empty. The draws
    /// are numbered from 0; at least [`ScorerAbout::draws`] of them are held.
    ///
    /// # Errors
    /// Returns an error if the draw is not held.
    fn continuation(
        &self,
        draw: usize,
        prompt: &[u32],
    ) -> Result<Box<dyn Continuation + '_>, ScoreError>;

    /// Calls `each` with the logits that posterior draw number `draw` gives at every token of `prompt`. The logits at a
    /// token predict the token after it.
    ///
    /// # Errors
    /// Returns an error if the draw is not held or the computation fails.
    fn prompt_logits(
        &self,
        draw: usize,
        prompt: &[u32],
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ScoreError>;
}

/// A text that grows token by token.
pub trait Continuation {
    /// Returns the logits of the next token. It blocks.
    ///
    /// # Errors
    /// Returns an error if the computation fails.
    fn logits(&mut self) -> Result<Vec<f32>, ScoreError>;

    /// Appends a token.
    ///
    /// # Errors
    /// Returns an error if the computation fails.
    fn push(&mut self, token: u32) -> Result<(), ScoreError>;
}

/// What a request can ask of a scorer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScorerAbout {
    /// The form in which the scorer holds its weights.
    pub dtype: ScoringDtype,
    /// Number of posterior draws that a request may ask for at most; 0 without a posterior.
    pub draws: usize,
    /// Number of posterior draws if a request does not name one.
    pub default_draws: usize,
    /// Whether the probabilities are calibrated with `default_draws` draws, for the questions that `calibrated_for`
    /// names.
    pub calibrated: bool,
    /// `choices`, or `answers` for answers in the model's own words. This assumes that questions are conversations if
    /// the model has a chat template.
    pub calibrated_for: Option<&'static str>,
    /// Error rate that abstention stays below with `default_draws` draws, if the calibration has a threshold for it.
    pub target_error: Option<f64>,
}

/// The prompt of a score request.
#[derive(Debug, Clone, PartialEq)]
pub enum ScorePrompt {
    /// A conversation, rendered by the chat template. Besides `messages` it may hold the other keys of a data row:
    /// `tools`, `chat_template_kwargs`.
    Messages(Map<String, Value>),
    /// A text that the answer continues.
    Text(String),
}

/// A request for an answer and its score.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    /// The prompt to answer.
    pub prompt: ScorePrompt,
    /// The possible answers; empty for an answer in the model's own words.
    pub choices: Vec<String>,
    /// Number of posterior draws; [`ScorerAbout::default_draws`] by default.
    pub draws: Option<usize>,
    /// Seed of the draws; by default the seed of the calibration.
    pub seed: Option<u64>,
    /// Allowed share of wrong answers; by default that of the calibration.
    pub target_error: Option<f64>,
    /// Maximum number of tokens of an answer in the model's own words.
    pub max_tokens: usize,
    /// Maximum number of tokens of a prompt.
    pub max_prompt_tokens: Option<usize>,
    /// Whether choices are compared by their likelihood per token.
    pub length_normalised: bool,
}

/// An answer and how certain it is. Entropies are in nats. `monteclora predict` gives the same numbers, and its
/// documentation defines each entropy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// The posterior mean's greedy answer, or the most likely choice.
    pub answer: String,
    /// Probability that the answer is right.
    pub p_correct: f64,
    /// Whether a temperature was applied. If so, `p_correct` is reliable for rows like those of the calibration.
    pub calibrated: bool,
    /// Why the adapter's calibration was not used; null if it was used or if the adapter has none.
    pub calibration_not_used: Option<String>,
    /// `stop`, or `length` for an answer that was cut off; null for choices.
    pub finish_reason: Option<&'static str>,
    /// Whether the answer is too uncertain to be given; null without a threshold.
    pub abstain: Option<bool>,
    /// The choices in the request's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ScoredChoice>,
    /// Statistics over the posterior draws; null without draws.
    pub uncertainty: Option<ScoredUncertainty>,
    /// The calibration that was applied; null if none holds for this request.
    pub calibration: Option<ScoredCalibration>,
    /// Number of tokens of the prompt, counted once.
    #[serde(skip)]
    pub prompt_tokens: usize,
    /// Number of tokens of the answer in the model's own words.
    #[serde(skip)]
    pub completion_tokens: usize,
}

/// One of the choices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredChoice {
    /// Text of the choice.
    pub text: String,
    /// Probability of the choice: the mean over the draws, after the temperature.
    pub probability: f64,
    /// Standard deviation of the draws' probabilities, before the temperature; null without draws.
    pub std: Option<f64>,
    /// The 5 % quantile of the draws' probabilities, each after the temperature, interpolated.
    pub q05: Option<f64>,
    /// The 95 % quantile, computed as `q05`.
    pub q95: Option<f64>,
}

/// Statistics of an answer over the posterior draws.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredUncertainty {
    /// Number of draws.
    pub draws: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// Entropy of the draws' average distribution.
    pub predictive_entropy: f64,
    /// Average of the entropies of the draws' distributions.
    pub expected_entropy: f64,
    /// Difference of the two entropies: how far the draws disagree.
    pub mutual_information: f64,
    /// Share of the draws that give the same answer.
    pub agreement: f64,
}

/// The part of `calibration.json` that was applied.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredCalibration {
    /// Temperature of the probabilities.
    pub temperature: f64,
    /// Confidence below which `abstain` is true.
    pub threshold: Option<f64>,
    /// Share of wrong answers that the threshold allows.
    pub target_error: Option<f64>,
    /// Number of rows that the calibration was made on.
    pub rows: usize,
    /// SHA-256 of the file with these rows.
    pub data_sha256: String,
}

/// Why there is no score.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// A key of the request has an invalid value.
    #[error("`{param}` {message}")]
    Invalid {
        /// The key.
        param: String,
        /// What is wrong with the value.
        message: String,
    },
    /// The caller no longer waits for the score.
    #[error("cancelled")]
    Cancelled,
    /// The computation failed.
    #[error("{0}")]
    Failed(String),
}

impl ScoreError {
    /// Makes the error for an invalid value of the key `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            param: param.into(),
            message: message.into(),
        }
    }
}
