//! `fit.json`: how a posterior was fitted.

use monteclora_adapters::methods::monteclora::Geometry;
use serde::Serialize;
use serde_json::Value;

use super::search::{Criterion, Evaluation, Fitted, Search};

/// The file's name.
pub const FILE: &str = "fit.json";

/// The content of the file.
#[derive(Debug, Serialize)]
pub struct FitRecord {
    /// Version of the program.
    pub monteclora: &'static str,
    /// How noise depends on the row of A.
    pub geometry: Geometry,
    /// By what scales were judged.
    pub criterion: &'static str,
    /// For the criterion `tolerance`, the share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// The scale that was kept: the standard deviation of A's entries, or that times the singular value of the row.
    pub sigma: f64,
    /// Every scale that was tried.
    pub evaluations: Vec<Evaluation>,
    /// The posterior mean.
    pub before: Evaluation,
    /// The average over the draws at the scale that was kept.
    pub after: Evaluation,
    /// Draws of the average.
    pub draws: usize,
    /// Seed of the draws and of the choice of rows.
    pub seed: u64,
    /// Rows that were used.
    pub rows: usize,
    /// SHA-256 of their file.
    pub data_sha256: String,
    /// Fingerprint of the base.
    pub base_fingerprint: String,
    /// Fingerprint of the adapter that was fitted.
    pub adapter_fingerprint: String,
    /// What rounding in the change of basis made of an update at most, as a share of it.
    pub rounding: f64,
    /// Modules whose B is zero, which have no noise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zero_modules: Vec<String>,
    /// Seconds of the search.
    pub seconds: f64,
    /// What the adapter's run.json records, without its list of modules: by it `eval` and `predict` know the conversation that the
    /// adapter was trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Value>,
}

impl FitRecord {
    /// That of what `search` found on the base of this fingerprint; `training` is what the adapter was trained with.
    pub fn new(
        search: &Search<'_>,
        fitted: &Fitted,
        base_fingerprint: String,
        training: Option<Value>,
    ) -> Self {
        let (criterion, tolerance) = match search.criterion {
            Criterion::Nll => ("nll", None),
            Criterion::Tolerance(share) => ("tolerance", Some(share)),
        };
        Self {
            monteclora: env!("CARGO_PKG_VERSION"),
            geometry: fitted.geometry,
            criterion,
            tolerance,
            sigma: fitted.sigma,
            evaluations: fitted.evaluations.clone(),
            before: fitted.before,
            after: fitted.after,
            draws: search.n_draws,
            seed: search.seed,
            rows: search.rows.len(),
            data_sha256: search.data.sha256(),
            base_fingerprint,
            adapter_fingerprint: search.adapter.fingerprint(),
            rounding: fitted.rounding,
            zero_modules: fitted.zero_modules.clone(),
            seconds: fitted.seconds,
            training,
        }
    }

    /// What came of it, in words.
    pub fn verdict(&self) -> String {
        let (before, after) = (self.before.nll, self.after.nll);
        let what = match (self.before.accuracy, self.tolerance) {
            (_, Some(_)) => "NLL of the average",
            (Some(_), None) => "NLL after a temperature",
            (None, None) => "loss",
        };
        let mut text = format!(
            "{what} on {} rows: {before:.4} without noise, {after:.4} with",
            self.rows
        );
        if after >= before {
            text.push_str("; the noise gains nothing on these rows");
        }
        text
    }
}
