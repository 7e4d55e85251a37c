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
    /// How the noise depends on the row of A.
    pub geometry: Geometry,
    /// The criterion that scales were judged by: `nll` or `tolerance`.
    pub criterion: &'static str,
    /// The tolerated share, for the criterion `tolerance`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// The scale that was kept: the standard deviation of A's entries, or, for [`Geometry::Svd`], the product of a
    /// row's standard deviation and its singular value.
    pub sigma: f64,
    /// The evaluation of every scale that was tried.
    pub evaluations: Vec<Evaluation>,
    /// The evaluation of the posterior mean.
    pub before: Evaluation,
    /// The evaluation of the average over the draws at the scale that was kept.
    pub after: Evaluation,
    /// Number of draws in the average.
    pub draws: usize,
    /// Seed of the draws and of the choice of rows.
    pub seed: u64,
    /// Number of rows that were used.
    pub rows: usize,
    /// SHA-256 of their file.
    pub data_sha256: String,
    /// Fingerprint of the base.
    pub base_fingerprint: String,
    /// Fingerprint of the adapter that was fitted.
    pub adapter_fingerprint: String,
    /// The largest relative change of an update by rounding in the change of basis.
    pub rounding: f64,
    /// Modules whose B is zero. They have no noise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zero_modules: Vec<String>,
    /// Seconds of the search.
    pub seconds: f64,
    /// The adapter's run.json without its list of modules. `eval` and `predict` read from it how prompts were rendered
    /// in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Value>,
}

impl FitRecord {
    /// The record of `fitted`, the result of `search` on the base model with this fingerprint. `training` is the
    /// adapter's run.json.
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

    /// The result of the search as a sentence.
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
