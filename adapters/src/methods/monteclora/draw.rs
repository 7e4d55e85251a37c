//! One posterior draw of A, in the fast collapsed form and in PEFT's literal form, with its regulariser and the exact
//! gradient of both.

use candle_core::{DType, Tensor};

use super::mixture::MixtureWeights;
use super::{Form, MonteCloraConfig, Objective, divergence};
use crate::device::{to_device, to_host};
use crate::error::{Result, expect_shape};
use crate::linalg;
use crate::methods::Weighting;
use crate::noise::{Noise, Purpose};
use crate::numbers::Numbers;

/// Floor of the covariance's diagonal, as in PEFT.
const COVARIANCE_FLOOR: f64 = 1e-3;

/// The Gaussian part of a draw's noise.
#[derive(Debug, Clone)]
pub(super) enum Gaussian {
    /// One standard normal value per entry of A, `[r, in]`.
    Collapsed(Tensor),
    /// `N` standard normal values per entry of A, `[N, in, r]` row-major.
    Literal(Vec<f32>),
}

/// Standard noise of one draw at one module.
#[derive(Debug, Clone)]
pub(super) struct StandardNoise {
    pub(super) gaussian: Gaussian,
    /// The diagonal of a draw from `W_r(I, r)`, `[r]`. By Bartlett's decomposition, its entries are independent
    /// chi-squares with `r` degrees of freedom, each the sum of a row's squared normals.
    pub(super) chi_square: Vec<f64>,
    /// Standard normal, `[N]`.
    pub(super) mixture: Vec<f64>,
}

impl StandardNoise {
    /// Draws the noise for a mean A with the shape and the device of `a`.
    pub(super) fn new(
        form: Form,
        noise: &dyn Noise,
        num_samples: usize,
        a: &Tensor,
    ) -> Result<Self> {
        let (rank, in_features) = a.dims2()?;
        let gaussian = match form {
            Form::Collapsed => {
                let values = noise.normals_f32(Purpose::Gaussian, rank * in_features);
                Gaussian::Collapsed(to_device(values, (rank, in_features), a.device())?)
            }
            Form::Literal => {
                let n_values = num_samples * in_features * rank;
                Gaussian::Literal(noise.normals_f32(Purpose::Gaussian, n_values))
            }
        };
        let chi_square = noise
            .normals(Purpose::Wishart, rank * rank)
            .chunks_exact(rank)
            .map(|row| row.iter().map(|z| z * z).sum())
            .collect();
        Ok(Self {
            gaussian,
            chi_square,
            mixture: noise.normals(Purpose::Mixture, num_samples),
        })
    }
}

/// A draw of A at one module, with the unweighted parts of its regulariser.
///
/// Collapsed: `E = c ||pi|| diag(sqrt Sigma) Z` with one standard normal `Z` `[r, in]`; literal:
/// `E^T = c sum_n pi_n Z_n diag(sqrt Sigma)` with `N` of them. Both have the same law (arXiv:2411.04358; a sum of
/// independent Gaussians is one Gaussian), and `Sigma_kk = max(exp(2 s_k) chi2_k, 1e-3)`.
#[derive(Debug)]
pub(super) struct Draw {
    /// `A + E`, `[r, in]`.
    pub(super) effective_a: Tensor,
    /// Diagonal covariance `Sigma_kk`, `[r]`.
    pub(super) covariance: Vec<f64>,
    /// The mixture weights.
    pub(super) mixture: MixtureWeights,
    /// Dirichlet divergence (or PEFT's formula), nats.
    pub(super) dirichlet: f64,
    /// Wishart divergence, nats.
    pub(super) wishart: f64,
    /// Gaussian divergence, nats.
    pub(super) gaussian: f64,
    /// Collision probability `sum pi^2`, zero when `use_entropy` is off.
    pub(super) sum_of_squares: f64,
    /// The weighted divergences, as added to the loss: `dirichlet + wishart + gaussian` times `kl_loss_weight` and the
    /// warm-up factor, or times the weight of the evidence bound.
    pub(super) weighted_kl: f64,
    /// Variance of the noise on each row of A given the mixture weights, `v_k = c^2 ||pi||^2 r exp(2 s_k)`, `[r]`.
    pub(super) variance: Vec<f64>,
    /// Factor on A in the gradient of the regulariser.
    pub(super) decay: f64,
    clipped: Vec<bool>,
    sample_scaler: f64,
    noise: Gaussian,
    log_std_gradient: Vec<f64>,
    log_concentration_gradient: Vec<f64>,
    covariance_gradient: Vec<f64>,
    weights_gradient: Vec<f64>,
}

impl Draw {
    /// Draws A around the mean `a`, `[r, in]`, f32, with variational parameters `s` and `theta` and the given `noise`.
    ///
    /// # Errors
    /// Returns [`crate::Error::Shape`] if the shapes of noise, parameters and mean disagree, or an error of candle.
    pub(super) fn new(
        settings: &MonteCloraConfig,
        weighting: &Weighting,
        a: &Tensor,
        (log_std, log_concentration): (&[f64], &[f64]),
        noise: StandardNoise,
    ) -> Result<Self> {
        let (rank, in_features) = a.dims2()?;
        let num_samples = log_concentration.len();
        expect_shape("log_std", &[rank], &[log_std.len()])?;
        expect_shape("wishart noise", &[rank], &[noise.chi_square.len()])?;
        expect_shape("mixture noise", &[num_samples], &[noise.mixture.len()])?;
        let raw: Vec<f64> = log_std
            .iter()
            .zip(&noise.chi_square)
            .map(|(s, c)| (2.0 * s).exp() * c)
            .collect();
        let covariance: Vec<f64> = raw.iter().map(|v| v.max(COVARIANCE_FLOOR)).collect();
        let mixture = MixtureWeights::draw(log_concentration, &noise.mixture);
        let sample_scaler = settings.sample_scaler;
        let effective_a = match &noise.gaussian {
            Gaussian::Collapsed(gaussian) => {
                expect_shape("gaussian noise", &[rank, in_features], gaussian.dims())?;
                let norm = mixture.norm();
                let scales: Vec<f32> = covariance
                    .iter()
                    .map(|c| (sample_scaler * norm * c.sqrt()) as f32)
                    .collect();
                linalg::add_scaled_rows(a, gaussian, &scales)?
            }
            Gaussian::Literal(gaussian) => {
                let n_values = num_samples * in_features * rank;
                expect_shape("gaussian noise", &[n_values], &[gaussian.len()])?;
                let mut perturbation = vec![0f64; rank * in_features];
                let samples = gaussian.chunks_exact(in_features * rank);
                for (sample, weight) in samples.zip(&mixture.weights) {
                    for (i, row) in sample.chunks_exact(rank).enumerate() {
                        for (k, z) in row.iter().enumerate() {
                            perturbation[k * in_features + i] +=
                                weight * sample_scaler * covariance[k].sqrt() * f64::from(*z);
                        }
                    }
                }
                let perturbation: Vec<f32> = perturbation.iter().map(|v| *v as f32).collect();
                (a + to_device(perturbation, (rank, in_features), a.device())?)?
            }
        };
        let prior = settings.dirichlet_prior;
        let evidence = settings.evidence();
        let (kl_weight, decay) = match &evidence {
            Some(evidence) => {
                let weight = evidence.weight(weighting);
                (weight, weight / evidence.prior_std.powi(2))
            }
            None => (settings.kl_loss_weight * weighting.factor, 0.0),
        };
        // With an evidence bound, no gradient moves the variational parameters.
        let wishart = match evidence {
            Some(_) => divergence::Term::zero(rank),
            None => divergence::wishart_kl(log_std),
        };
        let mut log_std_gradient = wishart.gradient;
        let mut covariance_gradient = vec![0.0; rank];
        let (dirichlet, gaussian) = match (evidence, settings.objective) {
            (Some(evidence), _) => {
                let squares = Numbers::squares(a)?.read()?.iter().sum();
                let gaussian = evidence.divergence(log_std, squares, in_features);
                (divergence::Term::zero(num_samples), gaussian)
            }
            (None, Objective::Peft) => {
                let gaussian = divergence::sampled_gaussian_kl(&covariance, num_samples);
                covariance_gradient = gaussian.gradient;
                let dirichlet = divergence::dirichlet_peft(log_concentration, prior);
                (dirichlet, gaussian.value)
            }
            (None, _) => {
                let gaussian = divergence::expected_gaussian_kl(log_std, num_samples);
                for (total, part) in log_std_gradient.iter_mut().zip(&gaussian.gradient) {
                    *total += part;
                }
                let dirichlet = divergence::dirichlet_kl(log_concentration, prior);
                (dirichlet, gaussian.value)
            }
        };
        let row_scale = (sample_scaler * mixture.norm()).powi(2) * rank as f64;
        let scale = |values: Vec<f64>| values.iter().map(|v| kl_weight * v).collect::<Vec<f64>>();
        let (sum_of_squares, weights_gradient) = match settings.use_entropy {
            true => (
                mixture.weights.iter().map(|w| w * w).sum(),
                mixture.weights.iter().map(|w| 2.0 * w).collect(),
            ),
            false => (0.0, vec![0.0; num_samples]),
        };
        Ok(Self {
            effective_a,
            clipped: raw.iter().map(|v| *v < COVARIANCE_FLOOR).collect(),
            covariance,
            mixture,
            dirichlet: dirichlet.value,
            wishart: wishart.value,
            gaussian,
            sum_of_squares,
            weighted_kl: kl_weight * (dirichlet.value + wishart.value + gaussian),
            variance: log_std
                .iter()
                .map(|s| row_scale * (2.0 * s).exp())
                .collect(),
            decay,
            sample_scaler,
            noise: noise.gaussian,
            log_std_gradient: scale(log_std_gradient),
            log_concentration_gradient: scale(dirichlet.gradient),
            covariance_gradient: scale(covariance_gradient),
            weights_gradient,
        })
    }

    /// The numbers that [`Draw::backward`] takes of `upstream` `[r, in]`: for the collapsed draw the inner product of
    /// each row with that of the noise, `[r]`.
    pub(super) fn numbers(&self, upstream: &Tensor) -> Result<Option<Numbers>> {
        match &self.noise {
            Gaussian::Collapsed(gaussian) => Ok(Some(Numbers::row_dots(upstream, gaussian)?)),
            Gaussian::Literal(_) => Ok(None),
        }
    }

    /// Returns the gradient with respect to `s` `[r]` and `theta` `[N]`: that of the loss with gradient `upstream`
    /// `[r, in]` on [`Draw::effective_a`] and its [numbers](Draw::numbers) (`None` for the regulariser alone), plus
    /// `weight` times that of the regulariser.
    pub(super) fn backward(
        &self,
        upstream: Option<(&Tensor, &[f64])>,
        weight: f64,
    ) -> Result<(Vec<f64>, Vec<f64>)> {
        let rank = self.covariance.len();
        let mut weights: Vec<f64> = self.weights_gradient.iter().map(|g| weight * g).collect();
        let mut log_std: Vec<f64> = (0..rank)
            .map(|k| {
                let through_covariance = if self.clipped[k] {
                    0.0
                } else {
                    2.0 * self.covariance[k] * self.covariance_gradient[k]
                };
                weight * (self.log_std_gradient[k] + through_covariance)
            })
            .collect();
        match (upstream, &self.noise) {
            (None, _) => {}
            (Some((_, rows)), Gaussian::Collapsed(_)) => {
                expect_shape("inner products with the noise", &[rank], &[rows.len()])?;
                let norm = self.mixture.norm();
                let mut norm_gradient = 0.0;
                for k in 0..rank {
                    let deviation = self.sample_scaler * self.covariance[k].sqrt();
                    norm_gradient += rows[k] * deviation;
                    if !self.clipped[k] {
                        log_std[k] += rows[k] * norm * deviation;
                    }
                }
                for (gradient, w) in weights.iter_mut().zip(&self.mixture.weights) {
                    *gradient += norm_gradient * w / norm;
                }
            }
            (Some((upstream, _)), Gaussian::Literal(gaussian)) => {
                let (rank, in_features) = upstream.dims2()?;
                let upstream = to_host::<f32>(&upstream.to_dtype(DType::F32)?)?;
                for (n, sample) in gaussian.chunks_exact(in_features * rank).enumerate() {
                    for (i, row) in sample.chunks_exact(rank).enumerate() {
                        for (k, z) in row.iter().enumerate() {
                            let entry = f64::from(upstream[k * in_features + i])
                                * self.sample_scaler
                                * self.covariance[k].sqrt()
                                * f64::from(*z);
                            weights[n] += entry;
                            if !self.clipped[k] {
                                log_std[k] += self.mixture.weights[n] * entry;
                            }
                        }
                    }
                }
            }
        }
        let mut log_concentration = self.mixture.backward(&weights);
        let direct = &self.log_concentration_gradient;
        for (gradient, direct) in log_concentration.iter_mut().zip(direct) {
            *gradient += weight * direct;
        }
        Ok((log_std, log_concentration))
    }
}
