//! Abstention: the confidence below which no answer is given, so that few of the given answers are wrong.

use anyhow::Result;
use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};
use statrs::distribution::{Beta, ContinuousCDF};

use super::measures::Outcome;
use crate::data::epoch_order;

/// Probability that the bound of the check is wrong. This bound is reported.
const CHECK: f64 = 0.05;

/// Probability that a bound is wrong when the threshold is chosen. It is stricter, because the choice compares many
/// thresholds, and the check should pass in most cases.
const CHOICE: f64 = 0.01;

/// A threshold on confidence, and how it was checked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Abstention {
    /// Share of wrong answers that is allowed.
    pub target_error: f64,
    /// Least confidence of an answer that is given. `None` if no threshold was found that keeps the target.
    pub threshold: Option<f64>,
    /// The least upper bound at 99 % of any threshold, on the rows of the choice. Targets below it cannot be reached.
    pub least_bound: f64,
    /// Rows that the threshold was chosen on.
    pub chosen_on: usize,
    /// Other rows, on which the threshold was checked.
    pub checked_on: usize,
    /// Share of the checked rows that the threshold answers. `None` if no threshold was checked.
    pub answered: Option<f64>,
    /// Share of wrong answers among the answered rows.
    pub error: Option<f64>,
    /// Upper bound of the share of wrong answers, at 95 % confidence   (Clopper and Pearson 1934, Biometrika 26).
    pub error_bound: Option<f64>,
}

/// One-sided Clopper-Pearson upper bound of a share, of which `k` of `n` were seen.
///
/// It is the `1 - alpha` quantile of `Beta(k + 1, n - k)`, and 1 if `k >= n`. It is wrong with probability `alpha`.
///
/// # Errors
/// The signature passes on errors of the distribution, but its parameters are always valid.
pub fn upper_bound(k: usize, n: usize, alpha: f64) -> Result<f64> {
    if k >= n {
        return Ok(1.0);
    }
    let beta = Beta::new(k as f64 + 1.0, (n - k) as f64)?;
    Ok(beta.inverse_cdf(1.0 - alpha))
}

/// The least number of answers whose bound can be at most `target_error`, if all of them are right.
fn answers_needed(target_error: f64, alpha: f64) -> usize {
    // The bound of no error among n is 1 - alpha^(1/n).
    (alpha.ln() / (-target_error).ln_1p()).ceil() as usize
}

/// The least number of rows that [`choose`] needs for `target_error`.
pub fn rows_needed(target_error: f64) -> usize {
    answers_needed(target_error, CHOICE).saturating_mul(2)
}

/// Checks that there are at least [`rows_needed`] rows.
///
/// # Errors
/// Returns an error that names the needed number if there are fewer.
pub fn require_rows(n_rows: usize, target_error: f64) -> Result<(), Problem> {
    let needed = rows_needed(target_error);
    if n_rows >= needed {
        return Ok(());
    }
    let message =
        format!("{n_rows} rows cannot show that at most {target_error} of the answers are wrong");
    let fix = format!("give at least {needed} rows, or a larger --target-error");
    Err(Problem::new("few-rows", "--target-error", message, fix).exit(3))
}

/// Chooses a threshold on one half of `outcomes`, drawn by `seed`, and checks it once on the other.
///
/// The chosen threshold answers as many rows as possible while the upper bound of their error, at 99 %, is at most
/// `target_error`. It is kept if the bound at 95 % on the other half is at most `target_error`, too. Otherwise there is
/// no threshold, and [`Abstention::error_bound`] tells how far it was from the target.
///
/// # Errors
/// Returns an error if there are fewer than [`rows_needed`].
pub fn choose(outcomes: &[Outcome], target_error: f64, seed: u64) -> Result<Abstention> {
    require_rows(outcomes.len(), target_error)?;
    let order = epoch_order(outcomes.len(), seed, 0);
    let (choice, check) = order.split_at(outcomes.len() / 2);
    let of = |rows: &[usize]| -> Vec<Outcome> { rows.iter().map(|row| outcomes[*row]).collect() };
    let (mut choice, check) = (of(choice), of(check));
    choice.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    let (mut threshold, mut least_bound, mut n, mut errors) = (None, 1f64, 0, 0);
    for tied in choice.chunk_by(|a, b| a.confidence == b.confidence) {
        n += tied.len();
        errors += tied.iter().filter(|o| !o.correct).count();
        let bound = upper_bound(errors, n, CHOICE)?;
        least_bound = least_bound.min(bound);
        if bound <= target_error {
            threshold = Some(tied[0].confidence);
        }
    }
    let mut found = Abstention {
        target_error,
        threshold: None,
        least_bound,
        chosen_on: choice.len(),
        checked_on: check.len(),
        answered: None,
        error: None,
        error_bound: None,
    };
    let Some(threshold) = threshold else {
        return Ok(found);
    };
    let answered: Vec<&Outcome> = check.iter().filter(|o| o.confidence >= threshold).collect();
    let (n, errors) = (
        answered.len(),
        answered.iter().filter(|o| !o.correct).count(),
    );
    let bound = upper_bound(errors, n, CHECK)?;
    found.answered = Some(n as f64 / check.len() as f64);
    found.error = (n > 0).then(|| errors as f64 / n as f64);
    found.error_bound = Some(bound);
    found.threshold = (bound <= target_error).then_some(threshold);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::recorded;
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    /// scipy's quantiles of the beta distribution.
    #[test]
    fn bounds_equal_recorded_ones() {
        let file = recorded::file();
        let bounds = file["clopper_pearson"].as_array().expect("bounds");
        assert!(!bounds.is_empty());
        for bound in bounds {
            let count = |key: &str| bound[key].as_u64().expect("a count") as usize;
            let alpha = 1.0 - bound["confidence"].as_f64().expect("a share");
            let found = upper_bound(count("errors"), count("n"), alpha).expect("a bound");
            let expected = bound["upper"].as_f64().expect("a share");
            assert!((found - expected).abs() < 1e-7, "{bound}: {found}");
        }
        for needed in file["rows_needed"].as_array().expect("targets") {
            let target = needed["target"].as_f64().expect("a share");
            let expected = needed["n"].as_u64().expect("a count") as usize;
            assert_eq!(answers_needed(target, CHECK), expected, "{needed}");
        }
    }

    /// `n` rows that are right with a probability equal to their confidence.
    fn calibrated(n: usize, seed: u64) -> Vec<Outcome> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = || super::super::measures::uniform(&mut random);
        (0..n)
            .map(|_| {
                let confidence = 1.0 - 0.5 * uniform().powi(2);
                let correct = uniform() < confidence;
                Outcome {
                    confidence,
                    correct,
                }
            })
            .collect()
    }

    /// Over many data sets, a threshold that is kept has a true error above the target in at most 5 % of them, and it
    /// is kept in most.
    #[test]
    fn thresholds_that_stand_keep_the_target() {
        let (mut standing, mut broken) = (0, 0);
        for seed in 0..200 {
            let found = choose(&calibrated(800, seed), 0.1, seed).expect("enough rows");
            if let Some(threshold) = found.threshold {
                standing += 1;
                assert!(found.error_bound.expect("checked") <= 0.1);
                // With u = 1 - confidence = x^2 / 2, x uniform: the mean of u over u <= 1 - threshold.
                let truth = (1.0 - threshold) / 3.0;
                broken += usize::from(truth > 0.1);
            }
        }
        assert!(standing > 120, "{standing}");
        assert!(broken <= 10, "{broken} of {standing}");
    }

    #[test]
    fn what_cannot_be_kept_stays_off() {
        let mut rows = calibrated(400, 1);
        for (idx, row) in rows.iter_mut().enumerate() {
            row.correct = idx % 2 == 0;
        }
        let found = choose(&rows, 0.05, 7).expect("enough rows");
        assert_eq!(found.threshold, None);
    }

    #[test]
    fn too_few_rows_are_told_how_many_are_needed() {
        let needed = rows_needed(0.05);
        assert_eq!(needed, 2 * 90);
        let error = choose(&calibrated(needed - 1, 1), 0.05, 7).expect_err("too few");
        assert!(error.to_string().contains("at least 180 rows"), "{error}");
        assert!(choose(&calibrated(needed, 1), 0.05, 7).is_ok());
    }
}
