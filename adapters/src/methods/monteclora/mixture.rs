//! Mixture weights: a logistic-normal draw that approximates a Dirichlet, and its gradient.

/// Floor of the concentration and of the logits' variance, as in PEFT.
const FLOOR: f64 = 1e-6;

/// One draw of the mixture weights with what its gradient needs.
///
/// With `alpha = max(exp(theta), 1e-6)`, `mu_n = ln alpha_n - mean(ln alpha)`,
/// `d_n = max((1 - 2/N)/alpha_n + (1/N^2) sum_m 1/alpha_m, 1e-6) + 1e-6` the weights are
/// `pi = softmax(mu + sqrt(d) * z)`: the Laplace approximation of a Dirichlet (Srivastava and Sutton 2017, arXiv:1703.01488,
/// eq. 5) with its diagonal covariance, as PEFT 0.21 draws it.
#[derive(Debug, Clone)]
pub(super) struct MixtureWeights {
    alpha: Vec<f64>,
    clipped: Vec<bool>,
    variance: Vec<f64>,
    variance_clipped: Vec<bool>,
    noise: Vec<f64>,
    /// The weights `pi`, `[N]`, positive, summing to one.
    pub(super) weights: Vec<f64>,
}

impl MixtureWeights {
    /// Draws the weights for log-concentrations `theta`, `[N]`, and standard normal `noise`, `[N]`. The caller checks
    /// that both have the same length.
    pub(super) fn draw(theta: &[f64], noise: &[f64]) -> Self {
        let n = theta.len() as f64;
        let alpha: Vec<f64> = theta.iter().map(|t| t.exp().max(FLOOR)).collect();
        let clipped = theta.iter().map(|t| t.exp() < FLOOR).collect();
        let mean_log = alpha.iter().map(|a| a.ln()).sum::<f64>() / n;
        let mean_inverse = alpha.iter().map(|a| 1.0 / a).sum::<f64>() / (n * n);
        let raw: Vec<f64> = alpha
            .iter()
            .map(|a| (1.0 - 2.0 / n) / a + mean_inverse)
            .collect();
        let variance: Vec<f64> = raw.iter().map(|v| v.max(FLOOR) + FLOOR).collect();
        let logits: Vec<f64> = alpha
            .iter()
            .zip(&variance)
            .zip(noise)
            .map(|((a, d), z)| a.ln() - mean_log + d.sqrt() * z)
            .collect();
        Self {
            weights: softmax(&logits),
            variance_clipped: raw.iter().map(|v| *v < FLOOR).collect(),
            alpha,
            clipped,
            variance,
            noise: noise.to_vec(),
        }
    }

    /// The norm `||pi||_2` of the weights.
    pub(super) fn norm(&self) -> f64 {
        self.weights.iter().map(|w| w * w).sum::<f64>().sqrt()
    }

    /// Vector-Jacobian product: gradient with respect to `theta`, `[N]`, for a gradient `upstream` on the weights, `[N]`.
    pub(super) fn backward(&self, upstream: &[f64]) -> Vec<f64> {
        let n = self.weights.len() as f64;
        let inner: f64 = self.weights.iter().zip(upstream).map(|(w, u)| w * u).sum();
        let logits: Vec<f64> = self
            .weights
            .iter()
            .zip(upstream)
            .map(|(w, u)| w * (u - inner))
            .collect();
        let variance: Vec<f64> = (0..logits.len())
            .map(|i| {
                if self.variance_clipped[i] {
                    0.0
                } else {
                    logits[i] * self.noise[i] / (2.0 * self.variance[i].sqrt())
                }
            })
            .collect();
        let mean_logit = logits.iter().sum::<f64>() / n;
        let sum_variance: f64 = variance.iter().sum();
        (0..logits.len())
            .map(|i| {
                if self.clipped[i] {
                    return 0.0;
                }
                // d alpha / d theta = alpha turns every 1/alpha^2 into 1/alpha.
                logits[i]
                    - mean_logit
                    - (variance[i] * (1.0 - 2.0 / n) + sum_variance / (n * n)) / self.alpha[i]
            })
            .collect()
    }
}

/// Softmax of a short vector, shifted by its maximum.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
    let total: f64 = exps.iter().sum();
    exps.iter().map(|e| e / total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Section 2's test vector.
    #[test]
    fn reference_weights() {
        let draw = MixtureWeights::draw(&[0.1, 0.5, 0.9], &[0.3, -0.6, 0.9]);
        for (weight, expected) in draw
            .weights
            .iter()
            .zip([0.20532487, 0.16778906, 0.62688607])
        {
            assert!((weight - expected).abs() < 1e-7, "{:?}", draw.weights);
        }
        let squares = draw.norm().powi(2);
        assert!((squares - 0.46329761).abs() < 1e-7);
        let gradient = draw.backward(&draw.weights.iter().map(|w| 2.0 * w).collect::<Vec<_>>());
        for (value, expected) in gradient.iter().zip([-0.11738616, -0.12065269, 0.17577187]) {
            assert!((value - expected).abs() < 1e-7, "{gradient:?}");
        }
    }

    proptest! {
        #[test]
        fn weights_are_a_distribution_and_the_gradient_is_the_finite_difference(
            theta in prop::collection::vec(-2.0f64..2.0, 1..9),
            seed in 0u64..1000,
        ) {
            let n = theta.len();
            let noise: Vec<f64> = (0..n).map(|i| ((seed as f64 + 1.0) * (i as f64 + 0.7)).sin() * 2.0).collect();
            let upstream: Vec<f64> = (0..n).map(|i| ((seed + 3) as f64 * (i as f64 + 0.3)).cos()).collect();
            let draw = MixtureWeights::draw(&theta, &noise);
            prop_assert!((draw.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            let gradient = draw.backward(&upstream);
            for i in 0..n {
                let at = |delta: f64| {
                    let mut moved = theta.clone();
                    moved[i] += delta;
                    MixtureWeights::draw(&moved, &noise).weights.iter().zip(&upstream).map(|(w, u)| w * u).sum::<f64>()
                };
                let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
                prop_assert!((numeric - gradient[i]).abs() < 1e-6, "{} {}", numeric, gradient[i]);
            }
        }
    }
}
