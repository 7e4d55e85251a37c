//! The door for what says how sure answers are.
//!
//! mistral.rs has no posterior: it merges one set of weights. So the server asks a [`Scoring`] for scores, which has weights of its
//! own, and knows nothing of how it computes. `monteclora serve` brings the one of its decoder along.

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

/// How a scorer holds the weights of a base.
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

/// What `[models.uncertainty]` says, where it is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UncertaintyConfig {
    /// The base as it is named in `serve.toml`.
    pub model_id: String,
    /// Its revision on the Hub.
    pub revision: Option<String>,
    /// How its weights are held.
    pub dtype: ScoringDtype,
    /// Posterior draws of each adapter that are held, and most that a request may ask for.
    pub draws: usize,
    /// Scores that are computed at a time.
    pub max_concurrent: NonZeroUsize,
}

/// A base that answers are scored on.
#[derive(Debug, Clone)]
pub struct ScoredBase {
    /// The settings.
    pub config: UncertaintyConfig,
    /// The directory that the engine loads.
    pub dir: PathBuf,
    /// Where it is computed.
    pub device: Device,
    /// File in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
}

/// What scores answers: by weights of its own, one copy per base.
pub trait Scoring: Debug + Send + Sync {
    /// What the files of a base, or of an adapter on it, say before they are loaded; blocking.
    ///
    /// # Errors
    /// What cannot be scored.
    fn survey(
        &self,
        base: &ScoredBase,
        adapter: Option<&ScoredAdapter<'_>>,
    ) -> Result<ScorerSurvey>;

    /// Loads a base, which all its adapters share; blocking.
    ///
    /// # Errors
    /// What cannot be loaded.
    fn load(&self, base: &ScoredBase) -> Result<Arc<dyn BaseScorer>>;
}

/// An adapter on such a base.
#[derive(Debug, Clone, Copy)]
pub struct ScoredAdapter<'a> {
    /// Its directory.
    pub path: &'a Path,
    /// Posterior draws that are held, if it has a posterior.
    pub n_held: usize,
    /// Most of them that a request for a score may ask for.
    pub n_asked: usize,
}

/// What is known of a scorer before it is loaded.
#[derive(Debug, Clone, Default)]
pub struct ScorerSurvey {
    /// Bytes that it takes in memory.
    pub bytes: u64,
    /// Of all that is loaded for it: a base's values; an adapter, its posterior and its calibration, on which base.
    pub fingerprint: String,
    /// Of an adapter, its posterior and its calibration, whatever the base: what a release of it is recognised by.
    pub content: String,
    /// Whether an adapter's scores depend on more than its mean: on a posterior or a calibration.
    pub is_more_than_mean: bool,
    /// Whether it can be drawn from.
    pub has_posterior: bool,
    /// What may be wrong although it can be used.
    pub warnings: Vec<Problem>,
}

/// A base in memory.
pub trait BaseScorer: Debug + Send + Sync {
    /// What scores answers of `adapter` on this base, or of the base alone; blocking.
    ///
    /// # Errors
    /// What cannot be loaded.
    fn scorer(&self, adapter: Option<&ScoredAdapter<'_>>) -> Result<Arc<dyn Scorer>>;
}

/// One model in memory: a base, alone or with an adapter.
pub trait Scorer: Debug + Send + Sync {
    /// As [`ScorerSurvey::fingerprint`], of what was loaded.
    fn fingerprint(&self) -> &str;

    /// What can be asked of it.
    fn about(&self) -> ScorerAbout;

    /// Whether a request can be answered, without computing an answer; blocking.
    ///
    /// # Errors
    /// A request that cannot be answered.
    fn check(&self, request: &ScoreRequest) -> Result<(), ScoreError>;

    /// Answers a question, and says how sure that is; blocking. Ends early, with [`ScoreError::Cancelled`], once `cancelled` is set.
    ///
    /// # Errors
    /// A request that cannot be answered; faults of the computation.
    fn score(&self, request: &ScoreRequest, cancelled: &AtomicBool) -> Result<Score, ScoreError>;

    /// A text that the draw of this index goes on with after `prompt`, which is not empty. Draws from 0 to one less than
    /// [`ScorerAbout::draws`] are held.
    ///
    /// # Errors
    /// For a draw that is not held.
    fn continuation(
        &self,
        draw: usize,
        prompt: &[u32],
    ) -> Result<Box<dyn Continuation + '_>, ScoreError>;

    /// Tells `each` the logits that the draw of this index gives at every token of `prompt`, each for the token after it.
    ///
    /// # Errors
    /// For a draw that is not held; faults of the computation.
    fn prompt_logits(
        &self,
        draw: usize,
        prompt: &[u32],
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ScoreError>;
}

/// A text that grows token by token.
pub trait Continuation {
    /// Logits of the token after the last one; blocking.
    ///
    /// # Errors
    /// Faults of the computation.
    fn logits(&mut self) -> Result<Vec<f32>, ScoreError>;

    /// Appends a token.
    ///
    /// # Errors
    /// Faults of the computation.
    fn push(&mut self, token: u32) -> Result<(), ScoreError>;
}

/// What can be asked of a scorer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScorerAbout {
    /// Type of the weights of the copy that is asked.
    pub dtype: ScoringDtype,
    /// Posterior draws that a request may ask for at most; 0 without a posterior.
    pub draws: usize,
    /// Draws that are asked where a request does not say.
    pub default_draws: usize,
    /// Whether probabilities are calibrated then, for the questions that `calibrated_for` names.
    pub calibrated: bool,
    /// `choices`, or `answers` in the model's own words; asked in conversations where there is a chat template.
    pub calibrated_for: Option<&'static str>,
    /// The share of wrong answers that abstention keeps below, where there is a threshold for it then.
    pub target_error: Option<f64>,
}

/// What is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub enum ScorePrompt {
    /// A conversation, written out by the chat template, with further keys of a row beside `messages`: `tools`,
    /// `chat_template_kwargs`.
    Messages(Map<String, Value>),
    /// A text that the answer continues.
    Text(String),
}

/// A question.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    /// What is to be answered.
    pub prompt: ScorePrompt,
    /// The possible answers; none for an answer in the model's own words.
    pub choices: Vec<String>,
    /// Posterior draws; by default as [`ScorerAbout::default_draws`].
    pub draws: Option<usize>,
    /// Seed of the draws; by default that of the calibration.
    pub seed: Option<u64>,
    /// Share of wrong answers that is allowed; by default that of the calibration.
    pub target_error: Option<f64>,
    /// Most tokens of an answer in the model's own words.
    pub max_tokens: usize,
    /// Most tokens of a prompt.
    pub max_prompt_tokens: Option<usize>,
    /// Whether choices are compared by their likelihood per token.
    pub length_normalised: bool,
}

/// An answer, and how sure it is. Entropies are in nats; what they are of is said at `monteclora predict`, which gives the same numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// The posterior mean's greedy answer, or the most likely choice.
    pub answer: String,
    /// Probability that it is right.
    pub p_correct: f64,
    /// Whether a temperature was applied, so that `p_correct` can be taken at its word for rows like those of the calibration.
    pub calibrated: bool,
    /// Why the calibration that lies beside the adapter was not used; null where it was, or where there is none.
    pub calibration_not_used: Option<String>,
    /// `stop`, or `length` for an answer that was cut; null for choices.
    pub finish_reason: Option<&'static str>,
    /// Whether the answer is too unsure to be given; null where there is no threshold.
    pub abstain: Option<bool>,
    /// The choices in the request's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ScoredChoice>,
    /// What the draws say; null without draws.
    pub uncertainty: Option<ScoredUncertainty>,
    /// What was applied; null where nothing holds for this request.
    pub calibration: Option<ScoredCalibration>,
    /// Tokens of the prompt, once.
    #[serde(skip)]
    pub prompt_tokens: usize,
    /// Tokens of the answer in the model's own words.
    #[serde(skip)]
    pub completion_tokens: usize,
}

/// One of the choices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredChoice {
    /// Its text.
    pub text: String,
    /// Its probability: the mean over the draws, after the temperature.
    pub probability: f64,
    /// Standard deviation of the draws' probabilities, before the temperature; null without draws.
    pub std: Option<f64>,
    /// The 5 % quantile of the draws' probabilities, each after the temperature, interpolated.
    pub q05: Option<f64>,
    /// The 95 % quantile.
    pub q95: Option<f64>,
}

/// What posterior draws say about an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredUncertainty {
    /// How many were asked.
    pub draws: usize,
    /// Their seed.
    pub seed: u64,
    /// Entropy of the draws' average.
    pub predictive_entropy: f64,
    /// Average of the draws' entropies.
    pub expected_entropy: f64,
    /// Their difference: how far the draws disagree.
    pub mutual_information: f64,
    /// Share of the draws that give the same answer.
    pub agreement: f64,
}

/// What of `calibration.json` was applied.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoredCalibration {
    /// Temperature of the probabilities.
    pub temperature: f64,
    /// Confidence below which `abstain` is true.
    pub threshold: Option<f64>,
    /// The share of wrong answers that the threshold was made for.
    pub target_error: Option<f64>,
    /// Rows that it was made on.
    pub rows: usize,
    /// SHA-256 of their file.
    pub data_sha256: String,
}

/// Why there is no score.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// The request is wrong at a key.
    #[error("`{param}` {message}")]
    Invalid {
        /// The key.
        param: String,
        /// What is wrong with it.
        message: String,
    },
    /// Nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
    /// A fault of the computation.
    #[error("{0}")]
    Failed(String),
}

impl ScoreError {
    /// A request that is wrong at `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            param: param.into(),
            message: message.into(),
        }
    }
}
