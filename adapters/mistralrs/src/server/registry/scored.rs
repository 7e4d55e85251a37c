//! The scorer of a generation's answers.

use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::memory::Reservation;
use super::slots::blocking_as;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::scoring::{BaseScorer, ScoredBase, Scorer, ScorerSurvey, Scoring};

/// The implementation that scores a model's answers, and the base that it uses.
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

/// The generation of a model whose posterior and calibration change its scores. It distinguishes two adapters with the
/// same mean.
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

/// The generation of an adapter whose answers are not scored. It is the generation of its posterior mean, unless the
/// adapter was trained with variables of the chat template, because those also affect its answers.
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

/// The scorer of a generation and its base. The scorer is dropped first: it holds the base, whose memory is then freed.
pub(crate) struct Scored {
    pub(crate) scorer: Arc<dyn Scorer>,
    pub(crate) base: Arc<SharedBase>,
}

/// The copy of a base for scores; the base and all its adapters use it.
pub(crate) struct SharedBase {
    pub(super) scorer: Arc<dyn BaseScorer>,
    /// One permit per score that is computed at the same time.
    pub(crate) places: Arc<Semaphore>,
    /// One permit per request that is checked at the same time, before the request waits for a place.
    pub(crate) checks: Arc<Semaphore>,
    pub(super) memory: Reservation,
}

impl Scored {
    /// Runs `work` with the scorer on a thread named `name`.
    ///
    /// `held` includes the generation and its places. It is released when the work has ended, even if nobody waits for
    /// the result. It is dropped after the scorer, because the drop of the generation reports memory as free that the
    /// scorer may still hold.
    ///
    /// # Errors
    /// Returns an error as [`blocking_as`].
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
