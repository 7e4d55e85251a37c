//! Temperature scaling   (Guo et al. 2017, arXiv:1706.04599, sec. 4.2): one number that makes confidence match accuracy
//! and changes no answer.

use anyhow::Result;
use argmin::core::{CostFunction, Error, Executor};
use argmin::solver::brent::BrentOpt;

use super::Prediction;

/// Least and largest temperature.
pub(super) const BOUNDS: [f64; 2] = [0.05, 20.0];

/// Whether a temperature is at a bound of the search. Then all answers are right, or confidence carries no information.
pub fn is_at_bound(temperature: f64) -> bool {
    let is_near = |bound: &f64| (temperature / bound).ln().abs() < 1e-3;
    BOUNDS.iter().any(is_near)
}

/// The mean negative log-likelihood of predictions as a function of the logarithm of the temperature.
struct Tempered<'a>(&'a [Prediction]);

impl CostFunction for Tempered<'_> {
    type Param = f64;
    type Output = f64;

    fn cost(&self, log_temperature: &f64) -> std::result::Result<f64, Error> {
        Ok(mean_nll(self.0, log_temperature.exp()))
    }
}

/// The mean negative log-likelihood at `temperature`. A true outcome of probability 0 costs a large constant instead of
/// infinity.
fn mean_nll(predictions: &[Prediction], temperature: f64) -> f64 {
    const MOST: f64 = 1e6;
    let nll = predictions
        .iter()
        .map(|p| p.tempered(temperature).nll().min(MOST));
    nll.sum::<f64>() / predictions.len().max(1) as f64
}

/// The temperature T between 0.05 and 20 with the least mean negative log-likelihood of `predictions`, by Brent's
/// method over `ln T`; 1 without predictions.
///
/// The negative log-likelihood is convex in `1/T`, so it has one minimum. The minimum is at a bound if all answers are
/// right, or if confidence carries no information.
///
/// # Errors
/// Returns an error if the search fails.
pub fn fit_temperature(predictions: &[Prediction]) -> Result<f64> {
    /// Tolerance of `ln T`, so it is relative for T.
    const TOLERANCE: f64 = 1e-6;
    if predictions.is_empty() {
        return Ok(1.0);
    }
    let [low, high] = BOUNDS.map(f64::ln);
    let solver = BrentOpt::new(low, high).set_tolerance(TOLERANCE, TOLERANCE);
    let found = Executor::new(Tempered(predictions), solver)
        .configure(|state| state.max_iters(100))
        .run()?;
    let found = found.state().best_param.unwrap_or(0.0);
    // The method never evaluates the ends. If all answers are right, the negative log-likelihood rounds to 0 long
    // before the end, and the end is the temperature.
    let candidates = [low, high, found];
    let cost = |log: &f64| mean_nll(predictions, log.exp());
    let best = candidates
        .into_iter()
        .min_by(|a, b| cost(a).total_cmp(&cost(b)));
    Ok(best.unwrap_or(0.0).exp())
}

#[cfg(test)]
mod tests {
    use super::super::measures::{brier, expected_calibration_error, outcomes};
    use super::super::recorded;
    use super::*;

    /// scipy's bounded minimum of the same function.
    #[test]
    fn temperatures_equal_recorded_ones() {
        for case in recorded::cases() {
            let temperature = fit_temperature(&case.predictions).expect("finds");
            let expected = case.expected("temperature").expect("recorded");
            let (ours, theirs) = [temperature, expected]
                .map(|t| mean_nll(&case.predictions, t))
                .into();
            assert!(ours <= theirs + 1e-9, "{}: {ours} {theirs}", case.name);
            // Temperatures are only comparable if the likelihood is not flat.
            let away = mean_nll(&case.predictions, 1.05 * expected) - theirs;
            if away > 1e-6 && expected > 1.01 * BOUNDS[0] && expected < 0.99 * BOUNDS[1] {
                let relative = (temperature / expected).ln().abs();
                assert!(relative < 1e-3, "{}: {temperature} {expected}", case.name);
                let after: Vec<_> = case
                    .predictions
                    .iter()
                    .map(|p| p.tempered(expected))
                    .collect();
                case.assert_close(
                    "nll_after",
                    super::super::measures::negative_log_likelihood(&after),
                    1e-7,
                );
                case.assert_close("brier_after", brier(&after), 1e-6);
                case.assert_close(
                    "ece_after",
                    expected_calibration_error(&outcomes(&after), 15),
                    1e-6,
                );
            }
        }
    }

    #[test]
    fn answers_that_are_all_right_end_at_the_bound() {
        let sure = Prediction::from_log_scores(&[0.0, -1.0], 0).expect("finite");
        assert_eq!(
            fit_temperature(std::slice::from_ref(&sure)).expect("finds"),
            BOUNDS[0].ln().exp()
        );
        let wrong = Prediction::from_log_scores(&[0.0, -1.0], 1).expect("finite");
        assert_eq!(
            fit_temperature(&[wrong]).expect("finds"),
            BOUNDS[1].ln().exp()
        );
        assert_eq!(fit_temperature(&[]).expect("finds"), 1.0);
        let impossible = Prediction::from_log_scores(&[0.0, f64::NEG_INFINITY], 1).expect("finite");
        let found = fit_temperature(&[sure, impossible]).expect("finds");
        assert!(found.is_finite());
    }
}
