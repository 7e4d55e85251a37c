//! Training with an evidence lower bound: the divergence from a Gaussian prior on A, weighted relative to the data, and
//! a closed-form step that moves the posterior variance towards the optimum of the bound.
//!
//! The idea is that of BLoB (Wang et al. 2024, arXiv:2406.11675), with the posterior of this method: one variance per
//! row of A.

use statrs::function::gamma::digamma;

use crate::methods::{Step, Weighting};

/// Share of the distance to its target that a precision moves per step.
const RATE: f64 = 0.03;

/// The prior on the entries of A, `N(0, tau^2)`, and the temperature T of the bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Evidence {
    /// Standard deviation `tau`.
    pub(super) prior_std: f64,
    /// Temperature T: 1 is the bound itself; below 1 the posterior is colder.
    pub(super) temperature: f64,
    /// Scale c of the noise.
    pub(super) sample_scaler: f64,
}

impl Evidence {
    /// Returns `ln(c^2 r / tau^2)`, so that `ln u_k` is `2 s_k` plus this, where `u_k` is the ratio of the posterior
    /// variance to the prior's. It is zero for `c = tau / sqrt r`; then `s = 0` is the prior.
    fn offset(&self, rank: usize) -> f64 {
        2.0 * (self.sample_scaler / self.prior_std).ln() + (rank as f64).ln()
    }

    /// Returns the `s_k` at which the posterior variance equals the prior's.
    pub(super) fn log_std_of_prior(&self, rank: usize) -> f64 {
        -0.5 * self.offset(rank)
    }

    /// Returns the divergence of a module's posterior from the prior, in nats. With `u_k = c^2 e^{2 s_k} r / tau^2`:
    ///
    /// `KL = in/2 sum_k [u_k - 1 - ln u_k + ln r - psi(r/2) - ln 2] + |A|^2 / (2 tau^2)`,
    ///
    /// This is the expectation over the chi-square factor that the entries of a row share. By convexity it is an upper
    /// bound of the divergence of the mixture. `a_squares` is `|A|^2`.
    pub(super) fn divergence(&self, log_std: &[f64], a_squares: f64, in_features: usize) -> f64 {
        let rank = log_std.len();
        let r = rank as f64;
        let constant = r.ln() - digamma(0.5 * r) - std::f64::consts::LN_2 - 1.0;
        let offset = self.offset(rank);
        let rows: f64 = log_std
            .iter()
            .map(|s| 2.0 * s + offset)
            .map(|ln_u| ln_u.exp() - ln_u + constant)
            .sum();
        0.5 * in_features as f64 * rows + 0.5 * a_squares / self.prior_std.powi(2)
    }

    /// Returns the weight of a module's divergence in the loss: `T / N` times the number of modules. The task loss is a
    /// mean over trained tokens, of which one pass over the training rows has N, and the trainer averages the
    /// divergence over the modules.
    pub(super) fn weight(&self, weighting: &Weighting) -> f64 {
        let per_token = self.temperature / weighting.epoch_tokens.max(1) as f64;
        per_token * weighting.n_modules as f64
    }

    /// Makes a natural-gradient step on the precision of every row:
    ///
    /// `1/u_k <- (1 - rho) / u_k + rho (1 + N tau^2 h_k / T)`, `h_k = batch * |g_k|^2 / in`,
    ///
    /// Here rho is 0.03, `mean_squares` holds `|g_k|^2 / in` of the task loss's gradient at the drawn A before
    /// clipping, and `batch` is the number of the step's trained tokens. The fixed point is that of the bound, whose
    /// slope is `u_k N tau^2 h_k / T + u_k - 1`.
    pub(super) fn step(&self, log_std: &mut [f64], mean_squares: &[f64], step: &Step) {
        let offset = self.offset(log_std.len());
        let data = step.epoch_tokens as f64 * self.prior_std.powi(2) / self.temperature;
        for (s, squares) in log_std.iter_mut().zip(mean_squares) {
            let precision = (-2.0 * *s - offset).exp();
            let target = 1.0 + data * step.trained_tokens as f64 * squares;
            let moved = (1.0 - RATE) * precision + RATE * target;
            // Rounded to the precision of a file.
            *s = f64::from((-0.5 * (moved.ln() + offset)) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Key, Noise, Purpose};

    const TAU: f64 = 0.2;

    fn evidence(rank: usize) -> Evidence {
        Evidence {
            prior_std: TAU,
            temperature: 1.0,
            sample_scaler: TAU / (rank as f64).sqrt(),
        }
    }

    /// At the prior the divergence is not zero, because the family is not Gaussian: it is
    /// `in r/2 (ln(r/2) - psi(r/2))`, plus the term of A's own square.
    #[test]
    fn the_divergence_is_least_at_the_prior() {
        let (rank, in_features) = (8usize, 12usize);
        let evidence = evidence(rank);
        assert!(evidence.log_std_of_prior(rank).abs() < 1e-12);
        let half = 0.5 * rank as f64;
        let least = in_features as f64 * half * (half.ln() - digamma(half));
        let at = |s: f64, squares: f64| evidence.divergence(&vec![s; rank], squares, in_features);
        assert!((at(0.0, 0.0) - least).abs() < 1e-9);
        assert!((at(0.0, 3.0) - least - 3.0 / (2.0 * TAU * TAU)).abs() < 1e-9);
        assert!(at(0.1, 0.0) > least && at(-0.1, 0.0) > least);
        // Another scale of the noise, the same variance.
        let wider = Evidence {
            sample_scaler: 3.0 * evidence.sample_scaler,
            ..evidence
        };
        let moved = wider.divergence(&vec![-(3f64.ln()); rank], 1.5, in_features);
        assert!((moved - at(0.0, 1.5)).abs() < 1e-9);
        assert!((wider.log_std_of_prior(rank) + 3f64.ln()).abs() < 1e-12);
    }

    /// Compares the divergence with its definition, `E_c KL(N(A, v c/r I) || N(0, tau^2 I))`, by sampling the
    /// chi-square, within five standard errors.
    #[test]
    fn the_divergence_is_an_expectation_over_the_shared_factor() {
        let (rank, in_features, draws) = (4usize, 3usize, 20_000usize);
        let evidence = evidence(rank);
        let s = [0.2f64, -0.5, 0.0, -1.0];
        let normals = Key::new(11, "mc", 0).normals(Purpose::Wishart, draws * rank * rank);
        let values: Vec<f64> = normals
            .chunks_exact(rank * rank)
            .map(|z| {
                (0..rank)
                    .map(|k| {
                        let c: f64 = z[k * rank..][..rank].iter().map(|x| x * x).sum();
                        let u = (2.0 * s[k]).exp() * c / rank as f64;
                        0.5 * in_features as f64 * (u - 1.0 - u.ln())
                    })
                    .sum()
            })
            .collect();
        let mean = values.iter().sum::<f64>() / draws as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / draws as f64;
        let error = (variance / draws as f64).sqrt();
        let ours = evidence.divergence(&s, 0.0, in_features);
        assert!((ours - mean).abs() < 5.0 * error, "{ours} {mean} {error}");
    }

    /// Steps with a constant gradient end where the slope of `1/2 sum v_k in h_k + T/N KL` vanishes.
    #[test]
    fn steps_end_at_the_stationary_point_of_the_bound() {
        let (rank, in_features) = (4usize, 10usize);
        let evidence = Evidence {
            temperature: 0.5,
            ..evidence(rank)
        };
        let step = Step {
            index: 0,
            total: 1,
            trained_tokens: 32,
            epoch_tokens: 1280,
        };
        let squares = [1e-4, 3e-5, 0.0, 1e-6];
        let mut s = vec![0.0; rank];
        for _ in 0..1000 {
            evidence.step(&mut s, &squares, &step);
        }
        let bound = |s: &[f64]| {
            let rows = s.iter().zip(&squares).map(|(s, squares)| {
                let variance = TAU * TAU * (2.0 * s).exp();
                0.5 * variance * in_features as f64 * 32.0 * squares
            });
            let kl = evidence.divergence(s, 0.0, in_features);
            rows.sum::<f64>() + evidence.temperature / 1280.0 * kl
        };
        for k in 0..rank {
            let at = |delta: f64| {
                let mut moved = s.clone();
                moved[k] += delta;
                bound(&moved)
            };
            let (slope, curvature) = (
                (at(1e-3) - at(-1e-3)) / 2e-3,
                (at(1e-3) - 2.0 * at(0.0) + at(-1e-3)) / 1e-6,
            );
            assert!(slope.abs() < 1e-5 * curvature, "{k}: {slope} {curvature}");
        }
        // Data make the posterior narrower; without data it stays at the prior.
        assert!(s[0] < s[1] && s[1] < s[3] && s[3] < 0.0 && s[2] == 0.0);
    }
}
