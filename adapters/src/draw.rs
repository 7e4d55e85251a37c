//! One posterior draw of A, in the fast collapsed form and in PEFT's literal form, with the exact gradient of either.

use candle_core::{DType, Tensor};

use crate::divergence::{self, Objective};
use crate::error::{Result, expect_shape};
use crate::linalg;
use crate::mixture::MixtureWeights;
use crate::noise::{Key, Purpose};
use monteclora_converters::MonteCloraSettings;

/// Floor of the covariance's diagonal, as in PEFT.
const COVARIANCE_FLOOR: f64 = 1e-3;

/// Variational parameters of one site.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// `s`, `[r]`: log of the Wishart scale's standard deviation (PEFT's `std_prior`).
    pub log_std: Vec<f64>,
    /// `theta`, `[N]`: log of the Dirichlet concentration (PEFT's `expert_weights_prior`).
    pub log_concentration: Vec<f64>,
}

/// Standard noise for one draw at one site.
#[derive(Debug, Clone)]
pub enum Noise {
    /// One Gaussian a module: `in * r + r * r + N` numbers.
    Collapsed {
        /// Standard normal, `[r, in]`.
        gaussian: Tensor,
        /// Chi-square with `r` degrees of freedom, `[r]`.
        chi_square: Vec<f64>,
        /// Standard normal, `[N]`.
        mixture: Vec<f64>,
    },
    /// PEFT's literal draw: `N` Gaussians a module and a Wishart matrix.
    Literal {
        /// Standard normal, `[N, in, r]` row-major.
        gaussian: Vec<f32>,
        /// Diagonal of a draw from `W_r(I, r)`, `[r]`.
        wishart_diagonal: Vec<f64>,
        /// Standard normal, `[N]`.
        mixture: Vec<f64>,
    },
}

impl Noise {
    /// Noise of the collapsed draw for a site of rank `r` and `in_features` inputs, on the device of `like`.
    pub fn collapsed(
        key: Key,
        rank: usize,
        in_features: usize,
        num_samples: usize,
        like: &Tensor,
    ) -> Result<Self> {
        let gaussian = key.normals_f32(Purpose::Gaussian, rank * in_features);
        let gaussian = Tensor::from_vec(gaussian, (rank, in_features), &candle_core::Device::Cpu)?
            .to_device(like.device())?;
        let chi_square = key
            .normals(Purpose::Wishart, rank * rank)
            .chunks_exact(rank)
            .map(|row| row.iter().map(|z| z * z).sum())
            .collect();
        Ok(Self::Collapsed {
            gaussian,
            chi_square,
            mixture: key.normals(Purpose::Mixture, num_samples),
        })
    }

    /// Noise of the literal draw: the Wishart matrix by Bartlett's decomposition `L L^T`, `L_ii^2 ~ chi2_{r-i+1}`,
    /// `L_ij ~ N(0, 1)` below the diagonal, of which only the diagonal of the product is used.
    pub fn literal(key: Key, rank: usize, in_features: usize, num_samples: usize) -> Self {
        let normals = key.normals(Purpose::Wishart, rank * rank);
        // Row i needs i squared normals below the diagonal and r - i for the chi-square on it.
        let wishart_diagonal = normals
            .chunks_exact(rank)
            .enumerate()
            .map(|(row, z)| {
                let below: f64 = z[..row].iter().map(|v| v * v).sum();
                let diagonal: f64 = z[row..].iter().map(|v| v * v).sum::<f64>().sqrt();
                below + diagonal * diagonal
            })
            .collect();
        Self::Literal {
            gaussian: key.normals_f32(Purpose::Gaussian, num_samples * in_features * rank),
            wishart_diagonal,
            mixture: key.normals(Purpose::Mixture, num_samples),
        }
    }

    fn mixture(&self) -> &[f64] {
        match self {
            Self::Collapsed { mixture, .. } | Self::Literal { mixture, .. } => mixture,
        }
    }

    fn degrees(&self) -> &[f64] {
        match self {
            Self::Collapsed { chi_square, .. } => chi_square,
            Self::Literal {
                wishart_diagonal, ..
            } => wishart_diagonal,
        }
    }
}

/// Gradient with respect to the variational parameters of one site.
#[derive(Debug, Clone, PartialEq)]
pub struct SpreadGradient {
    /// With respect to `s`, `[r]`.
    pub log_std: Vec<f64>,
    /// With respect to `theta`, `[N]`.
    pub log_concentration: Vec<f64>,
}

/// A drawn perturbation of A at one site.
///
/// Collapsed: `E = c ||pi|| diag(sqrt Sigma) Z` with one standard normal `Z` `[r, in]`; literal:
/// `E^T = c sum_n pi_n Z_n diag(sqrt Sigma)` with `N` of them. Both have the same law (arXiv:2411.04358; a sum of independent
/// Gaussians is one Gaussian), and `Sigma_kk = max(exp(2 s_k) chi2_k, 1e-3)`.
#[derive(Debug, Clone)]
pub struct Draw {
    /// `A + E`, `[r, in]`.
    pub effective_a: Tensor,
    /// Diagonal covariance `Sigma_kk`, `[r]`.
    pub covariance: Vec<f64>,
    /// The mixture weights.
    pub mixture: MixtureWeights,
    clipped: Vec<bool>,
    sample_scaler: f64,
    noise: Noise,
}

impl Draw {
    /// Draws at mean `a`, `[r, in]`, f32, with `spread` and given `noise`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when noise, spread and mean disagree; candle's errors.
    pub fn new(a: &Tensor, spread: &Spread, sample_scaler: f64, noise: Noise) -> Result<Self> {
        let (rank, in_features) = a.dims2()?;
        let num_samples = spread.log_concentration.len();
        expect_shape("log_std", &[rank], &[spread.log_std.len()])?;
        expect_shape("wishart noise", &[rank], &[noise.degrees().len()])?;
        expect_shape("mixture noise", &[num_samples], &[noise.mixture().len()])?;
        let raw: Vec<f64> = spread
            .log_std
            .iter()
            .zip(noise.degrees())
            .map(|(s, c)| (2.0 * s).exp() * c)
            .collect();
        let covariance: Vec<f64> = raw.iter().map(|v| v.max(COVARIANCE_FLOOR)).collect();
        let mixture = MixtureWeights::draw(&spread.log_concentration, noise.mixture());
        let effective_a = match &noise {
            Noise::Collapsed { gaussian, .. } => {
                expect_shape("gaussian noise", &[rank, in_features], gaussian.dims())?;
                let norm = mixture.norm();
                let scales: Vec<f32> = covariance
                    .iter()
                    .map(|c| (sample_scaler * norm * c.sqrt()) as f32)
                    .collect();
                linalg::add_scaled_rows(a, gaussian, &scales)?
            }
            Noise::Literal { gaussian, .. } => {
                expect_shape(
                    "gaussian noise",
                    &[num_samples * in_features * rank],
                    &[gaussian.len()],
                )?;
                let mut perturbation = vec![0f64; rank * in_features];
                for (sample, weight) in gaussian
                    .chunks_exact(in_features * rank)
                    .zip(&mixture.weights)
                {
                    for (i, row) in sample.chunks_exact(rank).enumerate() {
                        for (k, z) in row.iter().enumerate() {
                            perturbation[k * in_features + i] +=
                                weight * sample_scaler * covariance[k].sqrt() * f64::from(*z);
                        }
                    }
                }
                let perturbation: Vec<f32> = perturbation.iter().map(|v| *v as f32).collect();
                (a + Tensor::from_vec(perturbation, (rank, in_features), a.device())?)?
            }
        };
        Ok(Self {
            effective_a,
            clipped: raw.iter().map(|v| *v < COVARIANCE_FLOOR).collect(),
            covariance,
            mixture,
            sample_scaler,
            noise,
        })
    }

    /// Gradient with respect to the variational parameters, for a gradient `upstream` `[r, in]` on [`Draw::effective_a`]
    /// (none for the loss's regulariser alone) plus `weight` times the gradient of `regulariser`.
    ///
    /// The gradient with respect to A is `upstream` itself: A enters with weight one, the mixture weights summing to one.
    pub fn backward(
        &self,
        upstream: Option<&Tensor>,
        regulariser: &Regulariser,
        weight: f64,
    ) -> Result<SpreadGradient> {
        let rank = self.covariance.len();
        let mut weights: Vec<f64> = regulariser
            .weights_gradient
            .iter()
            .map(|g| weight * g)
            .collect();
        let mut log_std: Vec<f64> = (0..rank)
            .map(|k| {
                let through_covariance = if self.clipped[k] {
                    0.0
                } else {
                    2.0 * self.covariance[k] * regulariser.covariance_gradient[k]
                };
                weight * (regulariser.log_std_gradient[k] + through_covariance)
            })
            .collect();
        if let Some(upstream) = upstream {
            match &self.noise {
                Noise::Collapsed { gaussian, .. } => {
                    let norm = self.mixture.norm();
                    let rows = linalg::row_dots(upstream, gaussian)?;
                    let mut norm_gradient = 0.0;
                    for k in 0..rank {
                        let spread = self.sample_scaler * self.covariance[k].sqrt();
                        norm_gradient += rows[k] * spread;
                        if !self.clipped[k] {
                            log_std[k] += rows[k] * norm * spread;
                        }
                    }
                    for (gradient, w) in weights.iter_mut().zip(&self.mixture.weights) {
                        *gradient += norm_gradient * w / norm;
                    }
                }
                Noise::Literal { gaussian, .. } => {
                    self.literal_backward(upstream, gaussian, &mut weights, &mut log_std)?;
                }
            }
        }
        let mut log_concentration = self.mixture.backward(&weights);
        for (gradient, direct) in log_concentration
            .iter_mut()
            .zip(&regulariser.log_concentration_gradient)
        {
            *gradient += weight * direct;
        }
        Ok(SpreadGradient {
            log_std,
            log_concentration,
        })
    }

    fn literal_backward(
        &self,
        upstream: &Tensor,
        gaussian: &[f32],
        weights: &mut [f64],
        log_std: &mut [f64],
    ) -> Result<()> {
        let (rank, in_features) = upstream.dims2()?;
        let upstream = upstream
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
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
        Ok(())
    }
}

/// The regulariser of one site, its parts unweighted, and its gradient.
#[derive(Debug, Clone)]
pub struct Regulariser {
    /// Dirichlet divergence (or PEFT's formula), nats.
    pub dirichlet: f64,
    /// Wishart divergence, nats.
    pub wishart: f64,
    /// Gaussian divergence, nats.
    pub gaussian: f64,
    /// Collision probability `sum pi^2`, zero when `use_entropy` is off.
    pub sum_of_squares: f64,
    /// `kl_loss_weight * (dirichlet + wishart + gaussian)`.
    pub weighted_kl: f64,
    log_std_gradient: Vec<f64>,
    log_concentration_gradient: Vec<f64>,
    covariance_gradient: Vec<f64>,
    weights_gradient: Vec<f64>,
}

impl Regulariser {
    /// Evaluates the regulariser at `draw` under the formulas of `objective`.
    pub fn new(
        draw: &Draw,
        spread: &Spread,
        settings: &MonteCloraSettings,
        objective: Objective,
    ) -> Self {
        let num_samples = spread.log_concentration.len();
        let kl_weight = settings.kl_loss_weight;
        let wishart = divergence::wishart_kl(&spread.log_std);
        let mut log_std_gradient = wishart.gradient;
        let mut covariance_gradient = vec![0.0; spread.log_std.len()];
        let (dirichlet, gaussian) = match objective {
            Objective::Exact => {
                let gaussian = divergence::expected_gaussian_kl(&spread.log_std, num_samples);
                for (total, part) in log_std_gradient.iter_mut().zip(&gaussian.gradient) {
                    *total += part;
                }
                (
                    divergence::dirichlet_kl(&spread.log_concentration, settings.dirichlet_prior),
                    gaussian.value,
                )
            }
            Objective::Peft => {
                let gaussian = divergence::sampled_gaussian_kl(&draw.covariance, num_samples);
                covariance_gradient = gaussian.gradient;
                (
                    divergence::dirichlet_peft(&spread.log_concentration, settings.dirichlet_prior),
                    gaussian.value,
                )
            }
        };
        let scale = |values: Vec<f64>| values.iter().map(|v| kl_weight * v).collect::<Vec<f64>>();
        let (sum_of_squares, weights_gradient) = if settings.use_entropy {
            let weights = &draw.mixture.weights;
            (
                weights.iter().map(|w| w * w).sum(),
                weights.iter().map(|w| 2.0 * w).collect(),
            )
        } else {
            (0.0, vec![0.0; num_samples])
        };
        Self {
            dirichlet: dirichlet.value,
            wishart: wishart.value,
            gaussian,
            sum_of_squares,
            weighted_kl: kl_weight * (dirichlet.value + wishart.value + gaussian),
            log_std_gradient: scale(log_std_gradient),
            log_concentration_gradient: scale(dirichlet.gradient),
            covariance_gradient: scale(covariance_gradient),
            weights_gradient,
        }
    }

    /// What the site adds to the loss before the mean over sites: weighted divergences plus the sum of squares.
    pub fn total(&self) -> f64 {
        self.weighted_kl + self.sum_of_squares
    }
}
