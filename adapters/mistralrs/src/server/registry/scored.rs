//! What scores the answers of a generation, beside its engine.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::memory::Reservation;
use super::slots::blocking_as;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::scoring::{BaseScorer, ScoredBase, Scorer, ScorerSurvey, Scoring};

/// What scores a model's answers, and on which base.
#[derive(Clone)]
pub(super) struct ScoredBy {
    pub(super) scoring: Arc<dyn Scoring>,
    pub(super) base: ScoredBase,
}

impl ScoredBy {
    pub(super) fn of(model: &ModelConfig) -> Result<Option<Self>> {
        let Some(config) = &model.uncertainty else {
            return Ok(None);
        };
        let scoring = model.scoring.clone().ok_or_else(|| {
            let message = "this program has nothing that scores answers; `monteclora serve` has";
            Error::setting("models.uncertainty.enabled", message)
        })?;
        Ok(Some(Self {
            scoring,
            base: ScoredBase {
                config: config.clone(),
                dir: model.base.clone(),
                device: model.device.clone(),
                chat_template: model.chat_template.clone(),
            },
        }))
    }
}

/// The generation of a model whose posterior and calibration change scores: of two adapters with one mean they tell which it is.
pub(super) fn whole_generation(mean: &str, scorer: Option<&ScorerSurvey>) -> String {
    match scorer.filter(|scorer| scorer.is_more_than_mean) {
        None => mean.to_owned(),
        Some(ScorerSurvey { fingerprint, .. }) => {
            let digest = Sha256::digest(format!("{mean}\n{fingerprint}\n"));
            let digest = format!("{digest:x}");
            digest.chars().take(mean.len()).collect()
        }
    }
}

/// What scores the answers of a generation. The scorer goes first: it holds the base, whose memory is free afterwards.
pub(crate) struct Scored {
    pub(crate) scorer: Arc<dyn Scorer>,
    pub(crate) base: Arc<SharedBase>,
}

/// A base's copy for scores, which the base and all its adapters use.
pub(crate) struct SharedBase {
    pub(super) scorer: Arc<dyn BaseScorer>,
    /// One for each score that is computed at a time.
    pub(crate) places: Arc<Semaphore>,
    pub(super) memory: Reservation,
}

impl Scored {
    /// Runs `work` with the scorer on a thread of this name. `held`, the generation and its places among it, is let go when the work
    /// has ended, whoever waits for it: after the scorer, which may be the last to hold what the generation announces.
    ///
    /// # Errors
    /// As [`blocking_as`].
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        held: impl Send + 'static,
        work: impl FnOnce(&dyn Scorer) -> T + Send + 'static,
    ) -> Result<T> {
        let scorer = self.scorer.clone();
        blocking_as(name, move || {
            let outcome = work(&*scorer);
            drop(scorer);
            drop(held);
            Ok(outcome)
        })
        .await
    }
}
