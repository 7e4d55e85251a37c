//! An adapter with its calibration and template variables, as a scorer needs them.

use mistralrs_monteclora::{ScoredAdapter, ScoredBase};
use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{Adapter, Beyond, ModelFiles};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::eval::calibration::{Applicable, Calibration, Circumstances, Draws};
use crate::eval::{DEFAULT_SEED, LengthNormalisation};
use crate::provenance::content_hash;

/// Posterior draws in memory: the first `n` under `seed`. Requests may ask for at most `n_asked`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Held {
    pub(super) n: usize,
    pub(super) n_asked: usize,
    pub(super) seed: u64,
}

/// An adapter's calibration, and the circumstances in which the adapter is used.
#[derive(Debug)]
pub(super) struct Calibrated {
    pub(super) calibration: Calibration,
    /// All circumstances except chat template and length normalisation, which each request decides.
    circumstances: Circumstances,
}

impl Calibrated {
    /// The part of the calibration that applies to prompts rendered with this chat template.
    pub(super) fn applicable(
        &self,
        chat_template_sha256: Option<String>,
        length_normalised: bool,
        draws: Option<Draws>,
    ) -> Applicable {
        let now = Circumstances {
            chat_template_sha256,
            length_normalised,
            ..self.circumstances.clone()
        };
        self.calibration.applicable(&now, draws)
    }

    /// The draws that the calibration was made with, up to the number that requests may ask for. If the calibration
    /// does not apply, as many draws as requests may ask for.
    pub(super) fn default_draws(
        &self,
        chat_template_sha256: Option<String>,
        length_normalised: bool,
        held: Held,
    ) -> Option<Draws> {
        let holds = self
            .applicable(chat_template_sha256, length_normalised, None)
            .mean
            .is_some();
        let n = match holds {
            true => self.calibration.draws.map_or(0, |draws| draws.n),
            false => held.n_asked,
        };
        held.first(n.min(held.n_asked))
    }
}

impl Held {
    pub(super) fn first(self, n: usize) -> Option<Draws> {
        (n > 0).then_some(Draws { n, seed: self.seed })
    }
}

/// An adapter with its calibration and the settings of its draws.
pub(super) struct ReadAdapter {
    pub(super) adapter: Adapter,
    pub(super) calibration: Option<Calibrated>,
    pub(super) held: Held,
    /// As [`ScorerSurvey::fingerprint`](mistralrs_monteclora::ScorerSurvey::fingerprint).
    pub(super) fingerprint: String,
    /// As [`ScorerSurvey::content`](mistralrs_monteclora::ScorerSurvey::content).
    pub(super) content: String,
    pub(super) is_more_than_mean: bool,
}

impl ReadAdapter {
    pub(super) fn new(
        asked: &ScoredAdapter<'_>,
        base: &ModelFiles,
        base_fingerprint: String,
    ) -> anyhow::Result<Self> {
        let adapter = Adapter::read_on(asked.path, base)?;
        adapter.require_fit(base)?;
        let calibration = Calibration::beside(asked.path)?;
        let variables = recorded_variables(asked.path)?;
        let whole = json!([
            base_fingerprint,
            adapter.fingerprint(),
            calibration,
            variables
        ]);
        let content = content_hash(&adapter, calibration.as_ref(), &variables);
        let of_calibration = calibration.as_ref().and_then(|c| c.draws);
        let mut found = Self {
            fingerprint: format!("{:x}", Sha256::digest(whole.to_string())),
            content,
            is_more_than_mean: calibration.is_some() || !variables.is_empty(),
            calibration: calibration.map(|calibration| Calibrated {
                calibration,
                circumstances: Circumstances::new(
                    base_fingerprint,
                    &adapter,
                    None,
                    LengthNormalisation::None,
                ),
            }),
            held: Held::default(),
            adapter,
        };
        if found.has_posterior() {
            found.is_more_than_mean = true;
            found.held = Held {
                n: asked.n_held,
                n_asked: asked.n_asked,
                seed: of_calibration.map_or(DEFAULT_SEED, |draws| draws.seed),
            };
        }
        Ok(found)
    }

    pub(super) fn has_posterior(&self) -> bool {
        let sites = &self.adapter.sites;
        self.adapter.config.monteclora.is_some() && sites.iter().all(|s| s.posterior.is_some())
    }

    /// Bytes of the mean and the held draws. With a posterior, also of its parameters and of draws of other seeds for
    /// every score that is computed at the same time.
    pub(super) fn bytes(&self, base: &ScoredBase, asked: &ScoredAdapter<'_>) -> u64 {
        let sites = self.adapter.sites.iter();
        let (a, b) = sites.fold((0, 0), |(a, b), site| {
            (a + site.lora_a.n_elements(), b + site.lora_b.n_elements())
        });
        let mut mean = 4 * (a + b) as u64;
        for site in &self.adapter.sites {
            // Single entries are held as a whole matrix.
            mean += match &site.beyond {
                Some(Beyond::Sparse { .. }) => {
                    4 * site.in_features() as u64 * site.out_features() as u64
                }
                Some(_) => 8 * site.out_features() as u64,
                None => 0,
            };
        }
        if !self.has_posterior() {
            return mean;
        }
        let of_other_seeds = base.config.max_concurrent.get() * asked.n_asked;
        2 * mean + 4 * ((asked.n_held + of_other_seeds) * a) as u64
    }
}
