//! Divergences from the priors, for each objective.
//!
//! The objective `exact` uses the true divergences, with the Gaussian one in expectation over the Wishart draw. The
//! objective `peft` uses PEFT 0.21's formulas for parity, including a wrong sign and the sampled covariance. They are
//! computed as differences of log-gamma, so that they stay finite for every `num_samples`.

use special::Gamma;
use statrs::function::gamma::{digamma, ln_gamma};

/// A scalar and its gradient with respect to one vector of parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Term {
    /// Value in nats.
    pub(super) value: f64,
    /// Gradient, one entry per parameter.
    pub(super) gradient: Vec<f64>,
}

impl Term {
    /// Returns zero, for a term that is not in the objective.
    pub(super) fn zero(n_parameters: usize) -> Self {
        Self {
            value: 0.0,
            gradient: vec![0.0; n_parameters],
        }
    }
}

/// `KL(Dir(exp theta) || Dir(prior 1))` and its gradient with respect to `theta`, `[N]`.
///
/// `ln G(S) - sum ln G(a_i) - ln G(N a0) + N ln G(a0) + sum (a_i - a0)(psi(a_i) - psi(S))` with `a = exp theta`,
/// `S = sum a`.
pub(super) fn dirichlet_kl(theta: &[f64], prior: f64) -> Term {
    let n = theta.len() as f64;
    let alpha: Vec<f64> = theta.iter().map(|t| t.exp()).collect();
    let total: f64 = alpha.iter().sum();
    let psi_total = digamma(total);
    let excess: f64 = alpha.iter().map(|a| a - prior).sum();
    let mut value = ln_gamma(total) - ln_gamma(n * prior);
    for a in &alpha {
        value += ln_gamma(prior) - ln_gamma(*a) + (a - prior) * (digamma(*a) - psi_total);
    }
    let trigamma_total = total.trigamma();
    let gradient = alpha
        .iter()
        .map(|a| a * ((a - prior) * a.trigamma() - excess * trigamma_total))
        .collect();
    Term { value, gradient }
}

/// PEFT's Dirichlet term: the divergence with the sign of `sum (ln G(a_i) - ln G(a0))` reversed, so
/// `KL + 2 sum (ln G(a_i) - ln G(a0))`. It can be negative.
pub(super) fn dirichlet_peft(theta: &[f64], prior: f64) -> Term {
    let mut term = dirichlet_kl(theta, prior);
    for (t, gradient) in theta.iter().zip(&mut term.gradient) {
        let alpha = t.exp();
        term.value += 2.0 * (ln_gamma(alpha) - ln_gamma(prior));
        *gradient += 2.0 * alpha * digamma(alpha);
    }
    term
}

/// `KL(W_r(diag exp 2s, r) || W_r(I, r)) = r/2 sum_k (exp(2 s_k) - 2 s_k - 1)` and its gradient with respect to `s`, `[r]`.
pub(super) fn wishart_kl(log_std: &[f64]) -> Term {
    let r = log_std.len() as f64;
    Term {
        value: 0.5
            * r
            * log_std
                .iter()
                .map(|s| (2.0 * s).exp() - 2.0 * s - 1.0)
                .sum::<f64>(),
        gradient: log_std
            .iter()
            .map(|s| r * ((2.0 * s).exp() - 1.0))
            .collect(),
    }
}

/// `N E KL(N(0, Sigma) || N(0, I))` over `Sigma_kk = exp(2 s_k) chi2_r`, and its gradient with respect to `s`, `[r]`:
/// `N/2 sum_k (r exp(2 s_k) - 2 s_k - psi(r/2) - ln 2 - 1)`.
///
/// Its minimum is `N r/2 (ln(r/2) - psi(r/2))`, at `exp(2 s) = 1/r`.
pub(super) fn expected_gaussian_kl(log_std: &[f64], num_samples: usize) -> Term {
    let r = log_std.len() as f64;
    let half_n = 0.5 * num_samples as f64;
    let constant = digamma(0.5 * r) + std::f64::consts::LN_2 + 1.0;
    Term {
        value: half_n
            * log_std
                .iter()
                .map(|s| r * (2.0 * s).exp() - 2.0 * s - constant)
                .sum::<f64>(),
        gradient: log_std
            .iter()
            .map(|s| half_n * (2.0 * r * (2.0 * s).exp() - 2.0))
            .collect(),
    }
}

/// PEFT's Gaussian term at the drawn diagonal covariance, `N/2 sum_k (Sigma_kk - ln Sigma_kk - 1)`, and its gradient with
/// respect to `Sigma_kk`, `[r]`.
pub(super) fn sampled_gaussian_kl(covariance: &[f64], num_samples: usize) -> Term {
    let half_n = 0.5 * num_samples as f64;
    Term {
        value: half_n * covariance.iter().map(|c| c - c.ln() - 1.0).sum::<f64>(),
        gradient: covariance
            .iter()
            .map(|c| half_n * (1.0 - 1.0 / c))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assert_gradient(
        f: impl Fn(&[f64]) -> Term,
        at: &[f64],
    ) -> std::result::Result<(), TestCaseError> {
        let gradient = f(at).gradient;
        for i in 0..at.len() {
            let moved = |delta: f64| {
                let mut x = at.to_vec();
                x[i] += delta;
                f(&x).value
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let scale = gradient.iter().fold(1.0f64, |m, g| m.max(g.abs()));
            prop_assert!(
                (numeric - gradient[i]).abs() < 1e-6 * scale,
                "{numeric} {}",
                gradient[i]
            );
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn divergences_are_not_negative(theta in prop::collection::vec(-3.0f64..3.0, 1..40), s in prop::collection::vec(-2.0f64..2.0, 1..20), prior in 0.05f64..6.0) {
            prop_assert!(dirichlet_kl(&theta, prior).value > -1e-9);
            prop_assert!(wishart_kl(&s).value >= 0.0);
            let r = s.len() as f64;
            let floor = 8.0 * r / 2.0 * ((r / 2.0).ln() - digamma(r / 2.0));
            prop_assert!(expected_gaussian_kl(&s, 8).value >= floor - 1e-9);
        }

        #[test]
        fn gradients_are_finite_differences(theta in prop::collection::vec(-2.0f64..2.0, 1..10), s in prop::collection::vec(-1.5f64..1.5, 1..10), prior in 0.05f64..4.0) {
            assert_gradient(|t| dirichlet_kl(t, prior), &theta)?;
            assert_gradient(|t| dirichlet_peft(t, prior), &theta)?;
            assert_gradient(wishart_kl, &s)?;
            assert_gradient(|t| expected_gaussian_kl(t, 4), &s)?;
            let covariance: Vec<f64> = s.iter().map(|x| x.exp()).collect();
            assert_gradient(|c| sampled_gaussian_kl(c, 4), &covariance)?;
        }
    }

    #[test]
    fn dirichlet_and_wishart_vanish_at_the_prior() {
        for n in [1, 4, 64] {
            assert!(dirichlet_kl(&vec![0.3f64.ln(); n], 0.3).value.abs() < 1e-9);
        }
        assert_eq!(wishart_kl(&[0.0; 16]).value, 0.0);
        let r = 16.0f64;
        let at_minimum = expected_gaussian_kl(&[-0.5 * r.ln(); 16], 8);
        assert!(
            (at_minimum.value - 8.0 * r / 2.0 * ((r / 2.0).ln() - digamma(r / 2.0))).abs() < 1e-9
        );
        assert!(at_minimum.gradient.iter().all(|g| g.abs() < 1e-9));
    }

    /// Section 2's test vector.
    #[test]
    fn reference_values() {
        // The vector was computed in single precision.
        let (theta, s) = ([0.1, 0.5, 0.9], [0.25, 0.75]);
        let covariance = [2.47308207, 11.20422363];
        assert!((dirichlet_peft(&theta, 0.1).value + 10.42517662).abs() < 1e-5);
        assert!((dirichlet_kl(&theta, 0.1).value - 2.89271927).abs() < 1e-5);
        assert!((wishart_kl(&s).value - 2.13041019).abs() < 1e-5);
        assert!((sampled_gaussian_kl(&covariance, 3).value - 12.53332329).abs() < 1e-5);
        let theta_gradient = dirichlet_peft(&theta, 0.1).gradient;
        for (value, expected) in theta_gradient
            .iter()
            .zip([-0.48651928, 0.94617671, 3.70841336])
        {
            assert!((value - expected).abs() < 1e-5, "{theta_gradient:?}");
        }
    }

    /// PEFT's own `lgamma(x).exp()` is infinite from 24 samples on.
    #[test]
    fn peft_formula_stays_finite() {
        for n in [1, 8, 24, 64, 1024] {
            let term = dirichlet_peft(&vec![0.5; n], 5.0);
            assert!(term.value.is_finite() && term.gradient.iter().all(|g| g.is_finite()));
        }
    }

    /// The expected Gaussian term against its Monte Carlo mean over chi-square draws, within five standard errors.
    #[test]
    fn expectation_matches_sampling() {
        use crate::noise::{Key, Noise, Purpose};
        let s = [0.3f64, -0.4, 0.1, 0.6];
        let draws = 20_000;
        let normals = Key::new(5, "mc", 0).normals(Purpose::Wishart, draws * 16);
        let values: Vec<f64> = normals
            .chunks_exact(16)
            .map(|z| {
                let covariance: Vec<f64> = (0..4)
                    .map(|k| {
                        (2.0 * s[k]).exp() * z[4 * k..4 * k + 4].iter().map(|x| x * x).sum::<f64>()
                    })
                    .collect();
                sampled_gaussian_kl(&covariance, 8).value
            })
            .collect();
        let mean = values.iter().sum::<f64>() / draws as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / draws as f64;
        let error = (variance / draws as f64).sqrt();
        assert!((mean - expected_gaussian_kl(&s, 8).value).abs() < 5.0 * error);
    }
}
