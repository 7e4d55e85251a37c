//! What scores the answers of a generation, beside its engine.

use std::sync::Arc;

use serde_json::{Map, Value};
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
pub(super) fn whole_generation(
    mean: &str,
    variables: &Map<String, Value>,
    scorer: Option<&ScorerSurvey>,
) -> String {
    match scorer.filter(|scorer| scorer.is_more_than_mean) {
        None => generation_of(mean, variables),
        Some(ScorerSurvey { fingerprint, .. }) => digest(mean, fingerprint),
    }
}

/// The generation of an adapter whose answers are not scored: that of its posterior mean, unless it was trained with variables of the
/// chat template, which decide its answers, too.
pub fn generation_of(mean: &str, variables: &Map<String, Value>) -> String {
    match variables.is_empty() {
        true => mean.to_owned(),
        false => digest(mean, &Value::Object(variables.clone()).to_string()),
    }
}

fn digest(mean: &str, more: &str) -> String {
    let digest = format!("{:x}", Sha256::digest(format!("{mean}\n{more}\n")));
    digest.chars().take(mean.len()).collect()
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
    /// One for each request that is looked at at a time, before it waits for such a place.
    pub(crate) checks: Arc<Semaphore>,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whatever_changes_answers_or_scores_is_another_generation() {
        let none = Map::new();
        let variables = Map::from_iter([("enable_thinking".to_owned(), json!(false))]);
        let scorer = |is_more_than_mean, fingerprint: &str| ScorerSurvey {
            is_more_than_mean,
            fingerprint: fingerprint.to_owned(),
            ..ScorerSurvey::default()
        };
        let mean = "0123456789ab";
        assert_eq!(whole_generation(mean, &none, None), mean);
        assert_eq!(
            whole_generation(mean, &none, Some(&scorer(false, "a"))),
            mean
        );
        let found = [
            whole_generation(mean, &none, None),
            whole_generation(mean, &variables, None),
            whole_generation(mean, &none, Some(&scorer(true, "a"))),
            whole_generation(mean, &none, Some(&scorer(true, "b"))),
        ];
        for (at, one) in found.iter().enumerate() {
            assert_eq!(one.len(), mean.len());
            assert!(!found[..at].contains(one), "{found:?}");
        }
    }
}
