//! What there is to say about an adapter: norms of its factors and updates, and the health of its posterior.

use std::path::Path;

use serde::Serialize;

use crate::adapter::{Adapter, Site, SitePosterior};
use crate::beside::Beside;
use crate::beyond::Beyond;
use crate::config::MonteCloraSettings;
use crate::error::Result;
use crate::formats::format_of;
use crate::problem::Problem;
use crate::tensors::dtype::DType;

/// PEFT keeps every variance of the noise at or above this, before the factor `sample_scaler`.
const MIN_VARIANCE: f64 = 1e-3;

/// Figures of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteSummary {
    /// Path of the module.
    pub name: String,
    /// Rank.
    pub r: usize,
    /// Alpha.
    pub alpha: f64,
    /// Factor on B A.
    pub scaling: f64,
    /// Length of the input.
    pub in_features: usize,
    /// Length of the output.
    pub out_features: usize,
    /// Element type of A.
    pub dtype: String,
    /// Frobenius norm of A.
    pub norm_a: f64,
    /// Frobenius norm of B.
    pub norm_b: f64,
    /// Frobenius norm of `scaling * B A`.
    pub norm_delta: f64,
    /// Standard deviation of the perturbation of A over the root mean square of A, for MonteCLoRA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_to_signal: Option<f64>,
    /// Effective number of mixture components, `1 / E||w||^2`, for MonteCLoRA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective_components: Option<f64>,
}

/// Figures of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterSummary {
    /// What it was read from.
    pub format: &'static str,
    /// Rank where no pattern applies.
    pub r: usize,
    /// Alpha where no pattern applies.
    pub lora_alpha: f64,
    /// Number of sites.
    pub n_sites: usize,
    /// Number of trained values: A, B and the posterior's.
    pub n_parameters: usize,
    /// The base model it names.
    pub base_model: Option<String>,
    /// Figures of every site.
    pub sites: Vec<SiteSummary>,
    /// What deserves attention.
    pub problems: Vec<Problem>,
    /// What lies beside the files it was read from, if it was read from files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<Beside>,
}

impl Adapter {
    /// Figures of the adapter and of every site; B A is never formed.
    ///
    /// # Errors
    /// If a factor is not of a float type.
    pub fn summary(&self) -> Result<AdapterSummary> {
        let settings = self.config.monteclora.as_ref();
        let sites = self
            .sites
            .iter()
            .map(|site| figures(site, settings))
            .collect::<Result<Vec<_>>>()?;
        let n_parameters = self.sites.iter().map(n_parameters).sum();
        Ok(AdapterSummary {
            format: self.format,
            r: self.config.r,
            lora_alpha: self.config.lora_alpha,
            n_sites: self.sites.len(),
            n_parameters,
            base_model: self.config.base_model_name_or_path.clone(),
            problems: self.health(&sites)?,
            beside: None,
            sites,
        })
    }

    fn health(&self, sites: &[SiteSummary]) -> Result<Vec<Problem>> {
        let notes = self.notes.iter();
        let mut problems: Vec<Problem> =
            notes.map(|note| Problem::sentence("note", note)).collect();
        let has_norm = sites.iter().any(|site| site.norm_delta > 0.0);
        if !has_norm && !self.has_effect()? {
            problems.push(no_effect());
        }
        if let Some(beyond) = self.sites.iter().find_map(|site| site.beyond.as_ref()) {
            let message = format!(
                "{}: {}",
                beyond.name(),
                match beyond {
                    Beyond::Magnitude(_) =>
                        "the figures of each module are those of B A, without the magnitude",
                    Beyond::Scale { .. } | Beyond::Sparse { .. } =>
                        "the modules have no A and B, so their figures are zero",
                }
            );
            problems.push(Problem::sentence("note", message));
        }
        if self.is_authors_dialect() {
            let message = "written by the authors' own code, which saves A and B and no sampler: this is a plain LoRA, and there is nothing to draw from";
            let fix = "use it as it is; for posterior draws train with PEFT 0.20 or later, or with monteclora train";
            let at = "adapter_config.json";
            problems.push(Problem::new("posterior-not-stored", at, message, fix));
        }
        for dtype in [DType::BF16, DType::F16] {
            // Half the distance from 1 to the next number of the type.
            let unit = 2f64.powi(if dtype == DType::BF16 { -8 } else { -11 });
            let below: Vec<(&str, f64)> = sites
                .iter()
                .filter_map(|site| Some((site.name.as_str(), site.noise_to_signal?)))
                .filter(|(_, ratio)| *ratio < unit)
                .collect();
            let Some((name, smallest)) = below
                .iter()
                .min_by(|left, right| left.1.total_cmp(&right.1))
            else {
                continue;
            };
            let message = format!(
                "at {} of {} sites the posterior's spread is below the rounding of {dtype}: noise to signal is {smallest:.1e} here, {unit:.1e} is needed",
                below.len(),
                sites.len()
            );
            let fix = format!(
                "draw and serve posterior samples in F32; in {dtype} they would round to the mean"
            );
            problems.push(Problem::new("spread-below-rounding", *name, message, fix));
        }
        Ok(problems)
    }
}

/// Figures of the adapter at `path`, of any format, with what lies beside it; weights there that were trained with it are among the
/// problems. A GGUF LoRA needs no base here, since no norm depends on the order of
/// rows.
///
/// # Errors
/// As [`Adapter::read`] and [`Adapter::summary`].
///
/// ```
/// # use monteclora_converters::{Tensor, write_safetensors};
/// # let dir = tempfile::tempdir().expect("a temporary directory");
/// # std::fs::write(
/// #     dir.path().join("adapter_config.json"),
/// #     r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}"#,
/// # ).expect("writable");
/// # let site = "base_model.model.model.layers.0.self_attn.q_proj";
/// # write_safetensors(dir.path().join("adapter_model.safetensors"), [
/// #     (format!("{site}.lora_A.weight"), Tensor::from_f32(&[1, 2], vec![3.0, 4.0])?),
/// #     (format!("{site}.lora_B.weight"), Tensor::from_f32(&[2, 1], vec![1.0, 0.0])?),
/// # ], &Default::default())?;
/// let summary = monteclora_converters::summarise(dir.path())?;
/// assert_eq!((summary.format, summary.n_sites, summary.n_parameters), ("peft-lora", 1, 4));
/// assert_eq!((summary.sites[0].norm_a, summary.sites[0].norm_delta), (5.0, 10.0));
/// # Ok::<(), monteclora_converters::Error>(())
/// ```
pub fn summarise(path: &Path) -> Result<AdapterSummary> {
    let format = format_of(path);
    let mut summary = format.read_without_base(path)?.summary()?;
    let mut beside = Beside::of_format(path, format)?;
    summary.problems.append(&mut beside.problems);
    summary.beside = Some(beside);
    Ok(summary)
}

/// The problem of an adapter whose B A is zero everywhere.
pub(crate) fn no_effect() -> Problem {
    let message = "B A is zero at every site, so the adapter changes nothing";
    Problem::new("no-effect", "adapter", message, "train it first")
}

fn n_parameters(site: &Site) -> usize {
    let posterior = site.posterior.as_ref().map_or(0, |posterior| {
        posterior.log_std.n_elements() + posterior.log_concentration.n_elements()
    });
    let beyond = site.beyond.iter().flat_map(Beyond::tensors);
    let beyond: usize = beyond
        .filter(|(_, tensor)| tensor.dtype().is_float())
        .map(|(_, tensor)| tensor.n_elements())
        .sum();
    let triplets = site.triplets.as_ref();
    let values = triplets.map_or(0, |triplets| triplets.lora_e.n_elements());
    site.lora_a.n_elements() + site.lora_b.n_elements() + posterior + beyond + values
}

fn figures(site: &Site, settings: Option<&MonteCloraSettings>) -> Result<SiteSummary> {
    let (norm_a, norm_b) = site.factor_norms()?;
    let mut noise_to_signal = None;
    let mut effective_components = None;
    if let (Some(posterior), Some(settings)) = (&site.posterior, settings) {
        let weight = mean_squared_weight(posterior)?;
        effective_components = Some(1.0 / weight);
        let rms_a = norm_a / (site.lora_a.n_elements() as f64).sqrt();
        let sd = settings.sample_scaler * (mean_variance(posterior, site.rank)? * weight).sqrt();
        noise_to_signal = (rms_a > 0.0).then_some(sd / rms_a);
    }
    Ok(SiteSummary {
        name: site.name.clone(),
        r: site.rank,
        alpha: site.alpha,
        scaling: site.scaling,
        in_features: site.in_features(),
        out_features: site.out_features(),
        dtype: site.lora_a.dtype().name().to_owned(),
        norm_a,
        norm_b,
        norm_delta: site.delta_norm()?,
        noise_to_signal,
        effective_components,
    })
}

/// `E||w||^2 = sum_n alpha_n (alpha_n + 1) / (alpha_0 (alpha_0 + 1))` of the Dirichlet with `alpha_n = e^theta_n`. The
/// sampler draws from a logistic-normal approximation of it, whose value is up to a tenth smaller at small alpha.
fn mean_squared_weight(posterior: &SitePosterior) -> Result<f64> {
    let theta = posterior.log_concentration.to_f32()?;
    let concentrations: Vec<f64> = theta
        .iter()
        .map(|theta| f64::from(*theta).exp().max(1e-6))
        .collect();
    let total: f64 = concentrations.iter().sum();
    let sum: f64 = concentrations
        .iter()
        .map(|alpha| alpha * (alpha + 1.0))
        .sum();
    Ok(sum / (total * (total + 1.0)))
}

/// Mean over the ranks of the expected variance `max(e^{2 s_k} r, 1e-3)`: the Wishart's diagonal has mean r.
fn mean_variance(posterior: &SitePosterior, rank: usize) -> Result<f64> {
    let log_std = posterior.log_std.to_f32()?;
    let variances = log_std
        .iter()
        .map(|s| ((2.0 * f64::from(*s)).exp() * rank as f64).max(MIN_VARIANCE));
    Ok(variances.sum::<f64>() / rank.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
    use crate::formats::Format;
    use crate::formats::gguf_lora::GgufLora;
    use crate::formats::lora::LoraOptions;
    use crate::tensors::tensor::Tensor;

    #[test]
    fn norms_agree_with_the_update_formed_in_full() {
        let adapter = fixtures::small_adapter(11, true);
        let summary = adapter.summary().expect("float");
        for (site, figures) in adapter.sites.iter().zip(&summary.sites) {
            let delta = site.delta_f32().expect("float");
            let norm = delta
                .iter()
                .map(|value| f64::from(*value).powi(2))
                .sum::<f64>()
                .sqrt();
            assert!((norm - figures.norm_delta).abs() <= 1e-5 * norm.max(1.0));
            assert!(figures.noise_to_signal.is_some_and(|ratio| ratio > 0.0));
        }
        assert!(
            adapter.collapse().summary().expect("float").sites[0]
                .noise_to_signal
                .is_none()
        );
    }

    #[test]
    fn noise_is_as_the_method_states() {
        // r = 1, s = 0, N = 1: the draw is sample_scaler times a normal of variance 1, and there is one component.
        let mut adapter = fixtures::small_adapter(12, true);
        adapter.sites.truncate(1);
        let site = &mut adapter.sites[0];
        site.rank = 1;
        site.lora_a = Tensor::from_f32(&[1, 2], vec![2.0, -2.0]).expect("sized");
        site.lora_b = Tensor::from_f32(&[1, 1], vec![1.0]).expect("sized");
        site.posterior = Some(SitePosterior {
            log_std: Tensor::from_f32(&[1], vec![0.0]).expect("sized"),
            log_concentration: Tensor::from_f32(&[1], vec![0.3]).expect("sized"),
        });
        let scaler = adapter
            .config
            .monteclora
            .as_ref()
            .expect("settings")
            .sample_scaler;
        let summary = adapter.summary().expect("float");
        let ratio = summary.sites[0].noise_to_signal.expect("a posterior");
        assert!((ratio - scaler / 2.0).abs() <= 1e-12);
        assert_eq!(summary.sites[0].effective_components, Some(1.0));
        assert_eq!(summary.n_parameters, 5);
        assert!(
            summary
                .problems
                .iter()
                .any(|problem| problem.code == "spread-below-rounding")
        );
    }

    #[test]
    fn the_spread_is_judged_once_for_each_narrow_type() {
        let summary = fixtures::small_adapter(13, true).summary().expect("float");
        let spread: Vec<&Problem> = summary
            .problems
            .iter()
            .filter(|problem| problem.code == "spread-below-rounding")
            .collect();
        // PEFT's default noise, 1e-4, is below both.
        assert_eq!(spread.len(), 2);
        assert!(spread[0].message.contains("4 of 4 sites") && spread[0].message.contains("BF16"));
        assert!(spread[1].message.contains("F16"));
    }

    #[test]
    fn a_gguf_lora_is_summarised_without_its_base() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let adapter = fixtures::small_adapter(14, false);
        let config = serde_json::json!({"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1});
        let mut adapter = adapter;
        // Heads of two rows for q, and no k, whose three rows fit no head.
        adapter.sites.retain(|site| site.name.ends_with("q_proj"));
        let path = dir.path().join("adapter.gguf");
        GgufLora
            .write(
                &adapter,
                &path,
                &LoraOptions::default(),
                Some(config.as_object().expect("an object")),
            )
            .expect("written");
        let here = summarise(&path).expect("readable");
        let (plain, _) = adapter.to_lora(None).expect("float");
        let there = plain.summary().expect("float");
        assert_eq!(here.format, "gguf-lora");
        for (here, there) in here.sites.iter().zip(&there.sites) {
            assert_eq!(here.name, there.name);
            assert!((here.norm_delta - there.norm_delta).abs() <= 1e-6 * there.norm_delta);
        }
    }

    #[test]
    fn equal_concentrations_have_about_all_components() {
        let posterior = SitePosterior {
            log_std: Tensor::from_f32(&[1], vec![0.0]).expect("sized"),
            log_concentration: Tensor::from_f32(&[4], vec![14.0; 4]).expect("sized"),
        };
        let weight = mean_squared_weight(&posterior).expect("float");
        assert!((1.0 / weight - 4.0).abs() < 1e-4);
    }
}
