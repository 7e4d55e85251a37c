//! A posterior of any width around the mean of any LoRA adapter; one number sets how wide the noise on A is.
//!
//! Training-free Bayesianisation (Shi et al. 2024, arXiv:2412.05723) fits this number after training. The posterior has
//! the form of PEFT's MonteCLoRA.

use monteclora_converters::{Adapter, MonteCloraSettings, Problem, Site, SitePosterior, Tensor};
use nalgebra::{DMatrix, SVD};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// How the noise's standard deviation depends on the row of A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Geometry {
    /// The same for all rows, in the trained basis.
    Rows,
    /// `sigma / d_k` for row k in the basis of B's singular vectors, where `d_k` is the singular value that scales the
    /// row. The noise is then the same in every direction of the output that B reaches.
    Svd,
}

/// Smallest divisor, as a share of the largest singular value of the module.
const LEAST_SHARE: f64 = 1e-3;

/// An adapter in the basis of a geometry, with the width of each row's noise at `sigma = 1`.
#[derive(Debug, Clone)]
pub struct ScaledPosterior {
    mean: Adapter,
    /// `sigma_k / sigma` for each row of each module; empty for a module whose B is zero.
    widths: Vec<Vec<f64>>,
    /// Largest relative difference between the updates of a module before and after the change of basis, in Frobenius
    /// norms. Zero for [`Geometry::Rows`].
    pub rounding: f64,
}

impl ScaledPosterior {
    /// Builds the posterior around the mean of `adapter`, LoRA or MonteCLoRA.
    ///
    /// With a thin singular value decomposition `B = U diag(d) V^T` of each module, the basis of [`Geometry::Svd`] has
    /// `B' = U diag(d)` and `A' = V^T A`, both rounded to float32 once, so that `B' A' = B A` up to [`Self::rounding`],
    /// and `sigma_k = sigma / max(d_k, 1e-3 d_1)`.
    ///
    /// # Errors
    /// Returns an error if a factor has no float type, or if the singular value decomposition of a B does not converge.
    pub fn new(adapter: &Adapter, geometry: Geometry) -> Result<Self> {
        for site in &adapter.sites {
            site.require_low_rank()?;
        }
        let mut mean = adapter.collapse();
        let changed = mean
            .sites
            .par_iter()
            .map(|site| match geometry {
                Geometry::Rows => {
                    let n = if is_zero(site)? { 0 } else { site.rank };
                    Ok((site.clone(), vec![1.0; n], 0.0))
                }
                Geometry::Svd => in_singular_basis(site),
            })
            .collect::<Result<Vec<_>>>()?;
        let (mut widths, mut rounding) = (Vec::with_capacity(changed.len()), 0f64);
        for (slot, (site, of_site, error)) in mean.sites.iter_mut().zip(changed) {
            *slot = site;
            widths.push(of_site);
            rounding = rounding.max(error);
        }
        Ok(Self {
            mean,
            widths,
            rounding,
        })
    }

    /// Names of the modules whose B is zero: noise on their A has no effect.
    pub fn zero_modules(&self) -> Vec<&str> {
        let sites = self.mean.sites.iter().zip(&self.widths);
        let zero = sites.filter(|(_, widths)| widths.is_empty());
        zero.map(|(site, _)| site.name.as_str()).collect()
    }

    /// Returns the posterior at `sigma`, above 0: row k of A keeps the adapter's mean and has standard deviation
    /// `sigma_k`.
    ///
    /// In PEFT's terms `N = 1`, the noise scale `c` is the smallest `sigma_k / sqrt r` of all modules, and
    /// `s_k = ln(sigma_k / (c sqrt r)) >= 0`, so the variance `c^2 e^{2 s_k} r` is `sigma_k^2`.
    ///
    /// # Errors
    /// Returns an error if B is zero in every module, or if `sigma` is not finite and above 0.
    pub fn at(&self, sigma: f64) -> Result<Adapter> {
        let sites = || self.mean.sites.iter().zip(&self.widths);
        let per_root = |site: &Site, width: f64| sigma * width / (site.rank as f64).sqrt();
        let all = sites().flat_map(|(site, widths)| widths.iter().map(|w| per_root(site, *w)));
        let least = all.fold(f64::INFINITY, f64::min);
        if !(least > 0.0 && least.is_finite()) {
            let message = format!("no module has noise of scale {sigma}: B is zero in all of them");
            let fix = "was the adapter saved before training?";
            return Err(Problem::new("no-effect", "the adapter", message, fix).into());
        }
        let mut posterior = self.mean.clone();
        for (slot, (site, widths)) in posterior.sites.iter_mut().zip(sites()) {
            let log_std = match widths.as_slice() {
                [] => vec![0.0; site.rank],
                widths => widths
                    .iter()
                    .map(|w| (per_root(site, *w) / least).ln() as f32)
                    .collect(),
            };
            slot.posterior = Some(SitePosterior {
                log_std: Tensor::from_f32(&[site.rank], log_std)?,
                log_concentration: Tensor::from_f32(&[1], vec![0.0])?,
            });
        }
        posterior.config.monteclora = Some(MonteCloraSettings {
            num_samples: 1,
            sample_scaler: least,
            kl_loss_weight: 0.0,
            dirichlet_prior: 1.0,
            use_entropy: false,
            buffer_size: MonteCloraSettings::EXPORT_BUFFER_SIZE,
        });
        posterior.format = posterior.config.peft_format();
        Ok(posterior)
    }
}

fn is_zero(site: &Site) -> Result<bool> {
    Ok(site.lora_b.to_f32()?.iter().all(|v| *v == 0.0))
}

/// Converts a row-major `[rows, columns]` tensor to double precision.
fn matrix(tensor: &Tensor, rows: usize, columns: usize) -> Result<DMatrix<f64>> {
    let values = tensor.to_f32()?;
    Ok(DMatrix::from_row_iterator(
        rows,
        columns,
        values.into_iter().map(f64::from),
    ))
}

/// Converts to a row-major float32 tensor.
fn tensor(matrix: &DMatrix<f64>) -> Result<Tensor> {
    let (rows, columns) = matrix.shape();
    // Column-major storage of the transpose is row-major.
    let values = matrix.transpose().iter().map(|v| *v as f32).collect();
    Ok(Tensor::from_f32(&[rows, columns], values)?)
}

/// Returns the module in the basis of B's singular vectors, the noise width of each row, and the relative rounding
/// error of the update.
fn in_singular_basis(site: &Site) -> Result<(Site, Vec<f64>, f64)> {
    let (rank, n_in, n_out) = (site.rank, site.in_features(), site.out_features());
    if is_zero(site)? {
        return Ok((site.clone(), Vec::new(), 0.0));
    }
    let a = matrix(&site.lora_a, rank, n_in)?;
    let b = matrix(&site.lora_b, n_out, rank)?;
    // With fewer outputs than the rank, some rows of A have no singular value. B is padded with zero rows, so these
    // values are zero.
    let tall = b.clone().resize_vertically(n_out.max(rank), 0.0);
    let decomposed = SVD::try_new(tall, false, true, f64::EPSILON, 0);
    let right = decomposed.and_then(|svd| Some((svd.v_t?, svd.singular_values)));
    let Some((v_t, d)) = right else {
        let message = "the singular value decomposition of lora_B does not converge; is it finite?";
        return Err(Problem::new("not-finite", &site.name, message, "")
            .exit(5)
            .into());
    };
    let mut order: Vec<usize> = (0..rank).collect();
    order.sort_by(|i, j| d[*j].total_cmp(&d[*i]));
    let v_t = DMatrix::from_fn(rank, rank, |k, column| v_t[(order[k], column)]);
    let largest = d[order[0]];
    let widths = order.iter().map(|k| 1.0 / d[*k].max(LEAST_SHARE * largest));
    let changed = Site {
        // U diag(d) is B V.
        lora_b: tensor(&(&b * v_t.transpose()))?,
        lora_a: tensor(&(&v_t * &a))?,
        ..site.clone()
    };
    let was = &b * &a;
    let is = matrix(&changed.lora_b, n_out, rank)? * matrix(&changed.lora_a, rank, n_in)?;
    let size = was.norm();
    let rounding = if size > 0.0 {
        (is - was).norm() / size
    } else {
        0.0
    };
    Ok((changed, widths.collect(), rounding))
}

#[cfg(test)]
mod tests {
    use super::*;
    use monteclora_converters::AdapterConfig;

    fn site(name: &str, rank: usize, a: &[f32], b: &[f32]) -> Site {
        Site {
            name: name.to_owned(),
            rank,
            alpha: 2.0,
            scaling: 2.0 / rank as f64,
            lora_a: Tensor::from_f32(&[rank, a.len() / rank], a.to_vec()).expect("sized"),
            lora_b: Tensor::from_f32(&[b.len() / rank, rank], b.to_vec()).expect("sized"),
            posterior: None,
            beyond: None,
            triplets: None,
        }
    }

    fn adapter(sites: Vec<Site>) -> Adapter {
        let config = AdapterConfig {
            r: 2,
            lora_alpha: 2.0,
            ..AdapterConfig::default()
        };
        Adapter {
            format: config.peft_format(),
            config,
            sites,
            metadata: std::collections::BTreeMap::new(),
            notes: Vec::new(),
        }
    }

    fn varied(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
    }

    /// A tall, a wide and a zero module, of several ranks.
    fn mixed() -> Adapter {
        adapter(vec![
            site("a", 2, &varied(2 * 3, 0.3), &varied(5 * 2, 0.9)),
            site("b", 4, &varied(4 * 9, 0.1), &varied(7 * 4, 0.2)),
            site("c", 3, &varied(3 * 5, 0.7), &varied(2 * 3, 0.4)),
            site("d", 2, &varied(2 * 3, 0.5), &[0.0; 8]),
        ])
    }

    fn numbers(list: &serde_json::Value) -> Vec<f64> {
        let list = list.as_array().expect("a list").iter();
        let flat = list.flat_map(|v| match v.as_f64() {
            Some(number) => vec![number],
            None => numbers(v),
        });
        flat.collect()
    }

    /// Against numpy's decomposition, see `tests/reference/make_svd.py`.
    #[test]
    fn the_singular_basis_is_the_recorded_one() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/data/calibration/svd.json");
        let text = std::fs::read_to_string(path).expect("readable");
        let file: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let modules = file["modules"].as_array().expect("modules");
        assert!(!modules.is_empty());
        for module in modules {
            let rank = module["rank"].as_u64().expect("a rank") as usize;
            let recorded = &module["expected"];
            let single = |key: &str| -> Vec<f32> {
                numbers(&module[key])
                    .into_iter()
                    .map(|v| v as f32)
                    .collect()
            };
            let site = site("m", rank, &single("A"), &single("B"));
            let (changed, widths, rounding) = in_singular_basis(&site).expect("converges");
            assert!(rounding < 1e-6, "{rounding}");
            let update = changed.delta_f32().expect("float");
            let expected = numbers(&recorded["product"]);
            let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
            for (ours, expected) in update.iter().zip(&expected) {
                let expected = expected * site.scaling;
                assert!((f64::from(*ours) - expected).abs() < 2e-6 * largest.max(1.0));
            }
            for (width, sigma) in widths.iter().zip(numbers(&recorded["sigma"])) {
                assert!((0.02 * width / sigma - 1.0).abs() < 1e-5, "{widths:?}");
            }
        }
    }

    #[test]
    fn rows_of_a_have_the_width_that_was_asked_for() {
        for geometry in [Geometry::Rows, Geometry::Svd] {
            let family = ScaledPosterior::new(&mixed(), geometry).expect("sound");
            assert_eq!(family.zero_modules(), ["d"]);
            let posterior = family.at(0.03).expect("sound");
            let settings = posterior.config.monteclora.as_ref().expect("a posterior");
            let mut least = f64::INFINITY;
            for (site, widths) in posterior.sites.iter().zip(&family.widths) {
                let of_site = site.posterior.as_ref().expect("a posterior");
                let log_std = of_site.log_std.to_f32().expect("float");
                assert_eq!(log_std.len(), site.rank);
                for (s, width) in log_std.iter().zip(widths) {
                    assert!(*s >= 0.0);
                    let variance = settings.sample_scaler.powi(2)
                        * (2.0 * f64::from(*s)).exp()
                        * site.rank as f64;
                    assert!((variance.sqrt() / (0.03 * width) - 1.0).abs() < 1e-5);
                    least = least.min(f64::from(*s));
                }
            }
            assert_eq!(least, 0.0);
            // Draws have that width: their root mean square over all entries of a row, over many draws.
            let mut squares = 0.0;
            let n_draws = 400;
            for index in 0..n_draws {
                let draw = super::super::sample(&posterior, 5, index).expect("draws");
                let (mean, drawn) = [&posterior, &draw]
                    .map(|a| a.sites[0].lora_a.to_f32().expect("float"))
                    .into();
                squares += (0..3)
                    .map(|i| f64::from(drawn[i] - mean[i]).powi(2))
                    .sum::<f64>();
            }
            let found = (squares / (3.0 * n_draws as f64)).sqrt();
            let expected = 0.03 * family.widths[0][0];
            assert!((found / expected - 1.0).abs() < 0.1, "{found} {expected}");
        }
    }

    #[test]
    fn the_mean_is_the_adapters() {
        let adapter = mixed();
        let rows = ScaledPosterior::new(&adapter, Geometry::Rows).expect("sound");
        assert_eq!(rows.rounding, 0.0);
        assert_eq!(rows.at(0.1).expect("sound").collapse(), adapter.collapse());
        let svd = ScaledPosterior::new(&adapter, Geometry::Svd).expect("sound");
        assert!(svd.rounding > 0.0 && svd.rounding < 1e-6);
        let zero = self::adapter(vec![site("d", 2, &varied(6, 0.5), &[0.0; 8])]);
        let family = ScaledPosterior::new(&zero, Geometry::Svd).expect("sound");
        let error = family.at(0.1).expect_err("nothing to see").to_string();
        assert!(error.contains("B is zero"), "{error}");
    }
}
