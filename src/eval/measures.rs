//! Scores of many predictions: accuracy, negative log-likelihood, calibration error, Brier score, and how well
//! confidence ranks errors.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::Prediction;

/// The confidence of one answer, and whether it is right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Predicted probability that the answer is right.
    pub confidence: f64,
    /// Whether the answer is right.
    pub correct: bool,
}

impl From<&Prediction> for Outcome {
    fn from(prediction: &Prediction) -> Self {
        Self {
            confidence: prediction.confidence(),
            correct: prediction.correct(),
        }
    }
}

/// The outcomes of `predictions`.
pub fn outcomes(predictions: &[Prediction]) -> Vec<Outcome> {
    predictions.iter().map(Outcome::from).collect()
}

/// Share of outcomes that are right. Like all scores of this module, `None` without outcomes.
pub fn accuracy(outcomes: &[Outcome]) -> Option<f64> {
    mean(outcomes, |o| f64::from(u8::from(o.correct)))
}

/// Mean of `-ln p(true outcome)`, nats.
pub fn negative_log_likelihood(predictions: &[Prediction]) -> Option<f64> {
    mean(predictions, Prediction::nll)
}

/// Brier's score over all choices: mean of `sum_c (p_c - y_c)^2`, from 0 to 2   (Brier 1950, Mon. Weather Rev. 78, eq.
/// 2).
pub fn brier(predictions: &[Prediction]) -> Option<f64> {
    mean(predictions, Prediction::brier)
}

/// The predictions in one bin of confidence.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Bin {
    /// Lower end, not included (the first bin includes 0).
    pub above: f64,
    /// Upper end, included.
    pub to: f64,
    /// Predictions in it.
    pub n: usize,
    /// Their mean confidence; 0 in an empty bin.
    pub confidence: f64,
    /// Share of them that was right; 0 in an empty bin.
    pub accuracy: f64,
}

/// Outcomes by confidence in `n_bins` bins of equal width: bin `m` of `M` is `((m-1)/M, m/M]`   (Guo et al. 2017,
/// arXiv:1706.04599, sec. 2).
pub fn reliability(outcomes: &[Outcome], n_bins: usize) -> Vec<Bin> {
    let n_bins = n_bins.max(1);
    let edge = |idx: usize| idx as f64 / n_bins as f64;
    let mut bins: Vec<Bin> = (0..n_bins)
        .map(|idx| Bin {
            above: edge(idx),
            to: edge(idx + 1),
            n: 0,
            confidence: 0.0,
            accuracy: 0.0,
        })
        .collect();
    for outcome in outcomes {
        let bin = &mut bins[bin_of(outcome.confidence, n_bins)];
        bin.n += 1;
        bin.confidence += outcome.confidence;
        bin.accuracy += f64::from(u8::from(outcome.correct));
    }
    for bin in bins.iter_mut().filter(|bin| bin.n > 0) {
        bin.confidence /= bin.n as f64;
        bin.accuracy /= bin.n as f64;
    }
    bins
}

fn bin_of(confidence: f64, n_bins: usize) -> usize {
    let edge = |idx: usize| idx as f64 / n_bins as f64;
    let idx = ((confidence * n_bins as f64).ceil() as usize).clamp(1, n_bins) - 1;
    // Rounding may move the product across an edge that the confidence itself does not cross.
    if idx > 0 && confidence <= edge(idx) {
        idx - 1
    } else if idx + 1 < n_bins && confidence > edge(idx + 1) {
        idx + 1
    } else {
        idx
    }
}

/// Expected calibration error: `sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)|` over the bins of [`reliability`]
/// (Guo et al. 2017, arXiv:1706.04599, eq. 3).
pub fn expected_calibration_error(outcomes: &[Outcome], n_bins: usize) -> Option<f64> {
    if outcomes.is_empty() {
        return None;
    }
    let total = outcomes.len() as f64;
    let bins = reliability(outcomes, n_bins);
    let gap = |bin: &Bin| bin.n as f64 / total * (bin.accuracy - bin.confidence).abs();
    Some(bins.iter().map(gap).sum())
}

/// The calibration error of a perfectly calibrated model with the same confidences on as many rows.
///
/// It is the mean of [`expected_calibration_error`] over 500 simulations with fixed seeds, in which each answer is
/// right with its predicted probability. A model whose error is near this floor may well be calibrated.
pub fn calibration_error_floor(outcomes: &[Outcome], n_bins: usize) -> Option<f64> {
    /// With this many, the standard error of the mean is about one percent of it.
    const SIMULATIONS: u64 = 500;
    if outcomes.is_empty() {
        return None;
    }
    let n_bins = n_bins.max(1);
    let binned: Vec<(usize, f64)> = outcomes
        .iter()
        .map(|o| (bin_of(o.confidence, n_bins), o.confidence))
        .collect();
    let mut total = 0.0;
    for simulation in 0..SIMULATIONS {
        let mut random = ChaCha8Rng::seed_from_u64(simulation);
        let mut excess = vec![0.0; n_bins];
        for (bin, confidence) in &binned {
            let is_right = uniform(&mut random) < *confidence;
            excess[*bin] += f64::from(u8::from(is_right)) - confidence;
        }
        total += excess.iter().map(|e: &f64| e.abs()).sum::<f64>();
    }
    Some(total / (SIMULATIONS as f64 * outcomes.len() as f64))
}

/// A number in `[0, 1)`.
pub(super) fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 * (0.5f64).powi(53)
}

/// Area under the ROC curve of error detection: the probability that a right answer is more confident than a wrong one.
/// Ties count half. `None` if all or none are right.
pub fn error_detection_auroc(outcomes: &[Outcome]) -> Option<f64> {
    auroc(outcomes.iter().map(|o| (o.confidence, o.correct)))
}

/// Area under the ROC curve: the probability that the value of a positive is above the value of a negative. Ties count
/// half. `None` without positives or without negatives.
pub fn auroc(values: impl IntoIterator<Item = (f64, bool)>) -> Option<f64> {
    let mut ranked: Vec<(f64, bool)> = values.into_iter().collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n_positive = ranked.iter().filter(|(_, positive)| *positive).count() as f64;
    let n_negative = ranked.len() as f64 - n_positive;
    if n_positive == 0.0 || n_negative == 0.0 {
        return None;
    }
    let (mut negative_below, mut area) = (0.0, 0.0);
    for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
        let positive = tied.iter().filter(|(_, positive)| *positive).count() as f64;
        let negative = tied.len() as f64 - positive;
        area += positive * (negative_below + 0.5 * negative);
        negative_below += negative;
    }
    Some(area / (n_positive * n_negative))
}

/// Share of errors among the `i` most confident answers, for `i` from 1 to n: the risk at coverage `i/n`   (Geifman and
/// El-Yaniv 2017, arXiv:1705.08500). For answers of equal confidence it is the expectation over their orders.
pub fn risk_coverage(outcomes: &[Outcome]) -> Vec<f64> {
    let mut ranked: Vec<&Outcome> = outcomes.iter().collect();
    ranked.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    let (mut risks, mut errors) = (Vec::with_capacity(ranked.len()), 0.0);
    for tied in ranked.chunk_by(|a, b| a.confidence == b.confidence) {
        let of_tied = tied.iter().filter(|o| !o.correct).count() as f64;
        let share = of_tied / tied.len() as f64;
        for among in 1..=tied.len() {
            let expected = errors + share * among as f64;
            risks.push(expected / (risks.len() + 1) as f64);
        }
        errors += of_tied;
    }
    risks
}

/// Area under the risk-coverage curve: the mean of [`risk_coverage`]. The better confidence ranks errors, the further
/// it is below the error rate.
pub fn risk_coverage_area(outcomes: &[Outcome]) -> Option<f64> {
    mean(&risk_coverage(outcomes), |risk| *risk)
}

/// Accuracy of the most confident `share` of all answers, rounded up to whole answers.
pub fn accuracy_of_surest(outcomes: &[Outcome], share: f64) -> Option<f64> {
    let risks = risk_coverage(outcomes);
    // The product may round to slightly above a whole number, which must not be rounded up.
    let n = (share * risks.len() as f64 - 1e-9).ceil() as usize;
    Some(1.0 - risks.get(n.checked_sub(1)?)?)
}

fn mean<T>(items: &[T], value: impl Fn(&T) -> f64) -> Option<f64> {
    (!items.is_empty()).then(|| items.iter().map(value).sum::<f64>() / items.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prediction(probabilities: &[f64], answer: usize) -> Prediction {
        let scores: Vec<f64> = probabilities.iter().map(|p| p.ln()).collect();
        Prediction::from_log_scores(&scores, answer).expect("finite")
    }

    fn close(found: Option<f64>, expected: f64) {
        let found = found.expect("a score");
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }

    /// Confidences 0.9 (right), 0.8 (wrong), 0.6 (right), 0.55 (wrong); the expected scores are computed by hand.
    fn four() -> Vec<Prediction> {
        vec![
            prediction(&[0.9, 0.1], 0),
            prediction(&[0.2, 0.8], 0),
            prediction(&[0.6, 0.4], 0),
            prediction(&[0.45, 0.55], 0),
        ]
    }

    fn outcome(confidence: f64, correct: bool) -> Outcome {
        Outcome {
            confidence,
            correct,
        }
    }

    #[test]
    fn scores_of_four_predictions() {
        let found = outcomes(&four());
        close(accuracy(&found), 0.5);
        // -(ln 0.9 + ln 0.2 + ln 0.6 + ln 0.45) / 4
        close(
            negative_log_likelihood(&four()),
            -(0.9f64 * 0.2 * 0.6 * 0.45).ln() / 4.0,
        );
        // (2 * 0.01 + 2 * 0.64 + 2 * 0.16 + 2 * 0.3025) / 4
        close(brier(&four()), 0.55625);
        // Right 0.9 beats 0.8 and 0.55, right 0.6 beats 0.55: 3 of 4 pairs.
        close(error_detection_auroc(&found), 0.75);
        // From the surest: right, wrong, right, wrong.
        let risks = risk_coverage(&found);
        for (risk, expected) in risks.iter().zip([0.0, 0.5, 1.0 / 3.0, 0.5]) {
            assert!((risk - expected).abs() < 1e-12, "{risks:?}");
        }
        close(risk_coverage_area(&found), (0.5 + 1.0 / 3.0 + 0.5) / 4.0);
        close(accuracy_of_surest(&found, 0.25), 1.0);
        close(accuracy_of_surest(&found, 0.8), 0.5);
        assert_eq!(accuracy_of_surest(&found, 0.0), None);
    }

    #[test]
    fn calibration_error_of_four_predictions() {
        let found = outcomes(&four());
        // Ten bins: 0.9 in (0.8, 0.9], 0.8 in (0.7, 0.8], 0.6 and 0.55 share (0.5, 0.6]:
        // (|1 - 0.9| + |0 - 0.8| + 2 |0.5 - 0.575|) / 4
        close(expected_calibration_error(&found, 10), 0.2625);
        // One bin: |0.5 - 0.7125|
        close(expected_calibration_error(&found, 1), 0.2125);
        let bins = reliability(&found, 10);
        assert_eq!(
            bins.iter().map(|bin| bin.n).collect::<Vec<_>>(),
            [0, 0, 0, 0, 0, 2, 0, 1, 1, 0]
        );
    }

    #[test]
    fn certain_predictions_fall_into_the_last_bin() {
        let sure = outcome(1.0, true);
        assert_eq!(reliability(&[sure], 15)[14].n, 1);
        close(expected_calibration_error(&[sure], 15), 0.0);
        close(calibration_error_floor(&[sure], 15), 0.0);
        // A certain and wrong prediction has the worst value of every score.
        let wrong = Prediction::from_log_scores(&[0.0, f64::NEG_INFINITY], 1).expect("finite");
        close(
            expected_calibration_error(&[Outcome::from(&wrong)], 15),
            1.0,
        );
        close(brier(std::slice::from_ref(&wrong)), 2.0);
        assert_eq!(negative_log_likelihood(&[wrong]), Some(f64::INFINITY));
    }

    #[test]
    fn edges_belong_to_the_bin_below() {
        for n_bins in 1..60 {
            for idx in 1..=n_bins {
                let confidence = idx as f64 / n_bins as f64;
                assert_eq!(
                    reliability(&[outcome(confidence, true)], n_bins)[idx - 1].n,
                    1
                );
            }
        }
    }

    #[test]
    fn nothing_scores_nothing() {
        assert_eq!(accuracy(&[]), None);
        assert_eq!(expected_calibration_error(&[], 15), None);
        assert_eq!(calibration_error_floor(&[], 15), None);
        assert_eq!(error_detection_auroc(&[]), None);
        assert_eq!(risk_coverage_area(&[]), None);
        assert_eq!(accuracy_of_surest(&[], 0.8), None);
        assert_eq!(
            error_detection_auroc(&[outcome(0.9, true)]),
            None,
            "all right"
        );
    }

    /// One bin of n rows of confidence p: the floor is `E |K - n p| / n` for a binomial K, about
    /// `sqrt(2 p (1 - p) / (pi n))`.
    #[test]
    fn the_floor_is_what_chance_makes_of_a_calibrated_model() {
        let rows = vec![outcome(0.7, true); 400];
        let floor = calibration_error_floor(&rows, 15).expect("rows");
        let expected = (2.0 * 0.7 * 0.3 / (std::f64::consts::PI * 400.0)).sqrt();
        assert!((floor / expected - 1.0).abs() < 0.15, "{floor} {expected}");
    }

    /// Recorded by scikit-learn and scipy, see `tests/reference/make_calibration.py`.
    #[test]
    fn scores_equal_recorded_ones() {
        for case in super::super::recorded::cases() {
            let predictions = &case.predictions;
            let found = outcomes(predictions);
            let scores = [
                ("accuracy", accuracy(&found)),
                ("nll", negative_log_likelihood(predictions)),
                ("brier", brier(predictions)),
                ("ece", expected_calibration_error(&found, 15)),
                ("auroc", error_detection_auroc(&found)),
                ("aurc", risk_coverage_area(&found)),
            ];
            for (key, found) in scores {
                case.assert_close(key, found, 1e-9);
            }
        }
    }

    proptest! {
        #[test]
        fn scores_stay_in_range(rows in prop::collection::vec((prop::collection::vec(-50.0f64..0.0, 2..6), 0usize..6), 1..40), n_bins in 1usize..40) {
            let predictions: Vec<_> = rows.iter().map(|(scores, answer)| {
                Prediction::from_log_scores(scores, answer % scores.len()).expect("finite")
            }).collect();
            let found = outcomes(&predictions);
            let ece = expected_calibration_error(&found, n_bins).expect("rows");
            prop_assert!((0.0..=1.0).contains(&ece));
            prop_assert!((0.0..=2.0).contains(&brier(&predictions).expect("rows")));
            prop_assert!(negative_log_likelihood(&predictions).expect("rows") >= 0.0);
            prop_assert_eq!(reliability(&found, n_bins).iter().map(|bin| bin.n).sum::<usize>(), predictions.len());
            let risks = risk_coverage(&found);
            let errors = 1.0 - accuracy(&found).expect("rows");
            prop_assert!((risks[risks.len() - 1] - errors).abs() < 1e-9);
            // Against the definition: every pair of a right and a wrong prediction.
            let (right, wrong): (Vec<&Outcome>, Vec<&Outcome>) = found.iter().partition(|o| o.correct);
            let pairs: f64 = right.iter().flat_map(|r| wrong.iter().map(move |w| match r.confidence.total_cmp(&w.confidence) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })).sum();
            match error_detection_auroc(&found) {
                Some(area) => prop_assert!((area - pairs / (right.len() * wrong.len()) as f64).abs() < 1e-9),
                None => prop_assert!(right.is_empty() || wrong.is_empty()),
            }
        }
    }
}
