//! Scores of categorical predictions: accuracy, negative log-likelihood, calibration error, Brier score, error detection.

use crate::model::log_mean_exp;

/// One prediction: a distribution over the choices of a row, and which of them was right.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    probabilities: Vec<f64>,
    log_probability: f64,
    answer: usize,
}

impl Prediction {
    /// The softmax of one log score a choice; computed from differences, so that scores far below zero lose nothing.
    ///
    /// `None` if there is no such choice as `answer`, or a score is NaN or positive infinity, or all are negative infinity.
    pub fn from_log_scores(scores: &[f64], answer: usize) -> Option<Self> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if answer >= scores.len() || !largest.is_finite() || scores.iter().any(|s| s.is_nan()) {
            return None;
        }
        let log_sum = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
        Some(Self {
            probabilities: scores.iter().map(|s| (s - log_sum).exp()).collect(),
            log_probability: scores[answer] - log_sum,
            answer,
        })
    }

    /// The average of the probabilities of several predictions about one row, which say the same about its answer; `None` of none.
    pub fn average(predictions: &[Self]) -> Option<Self> {
        let first = predictions.first()?;
        let n = predictions.len() as f64;
        let probability = |choice: usize| {
            predictions
                .iter()
                .map(|p| p.probabilities[choice])
                .sum::<f64>()
                / n
        };
        let of_answer: Vec<f64> = predictions.iter().map(|p| p.log_probability).collect();
        Some(Self {
            probabilities: (0..first.probabilities.len()).map(probability).collect(),
            log_probability: log_mean_exp(&of_answer),
            answer: first.answer,
        })
    }

    /// The distribution over the choices.
    pub fn probabilities(&self) -> &[f64] {
        &self.probabilities
    }

    /// Entropy of the distribution, nats.
    pub fn entropy(&self) -> f64 {
        let positive = self.probabilities.iter().filter(|p| **p > 0.0);
        -positive.map(|p| p * p.ln()).sum::<f64>()
    }

    /// The most likely choice; the first of several.
    pub fn choice(&self) -> usize {
        (1..self.probabilities.len()).fold(0, |best, idx| {
            if self.probabilities[idx] > self.probabilities[best] {
                idx
            } else {
                best
            }
        })
    }

    /// Probability of the most likely choice.
    pub fn confidence(&self) -> f64 {
        self.probabilities[self.choice()]
    }

    /// Whether the most likely choice is the answer.
    pub fn correct(&self) -> bool {
        self.choice() == self.answer
    }
}

/// Share of predictions whose most likely choice is right; `None` without predictions, as for every score here.
pub fn accuracy(predictions: &[Prediction]) -> Option<f64> {
    mean(predictions, |p| f64::from(u8::from(p.correct())))
}

/// Mean of `-ln p(answer)`, nats.
pub fn negative_log_likelihood(predictions: &[Prediction]) -> Option<f64> {
    mean(predictions, |p| -p.log_probability)
}

/// Brier's score over all choices: mean of `sum_c (p_c - y_c)^2`, from 0 to 2   (Brier 1950, Mon. Weather Rev. 78, eq. 2).
pub fn brier(predictions: &[Prediction]) -> Option<f64> {
    mean(predictions, |p| {
        p.probabilities
            .iter()
            .enumerate()
            .map(|(idx, q)| (q - f64::from(u8::from(idx == p.answer))).powi(2))
            .sum()
    })
}

/// What fell into one bin of confidence.
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

/// Predictions by confidence in `n_bins` bins of equal width: bin `m` of `M` is `((m-1)/M, m/M]`   (Guo et al. 2017,
/// arXiv:1706.04599, sec. 2).
pub fn reliability(predictions: &[Prediction], n_bins: usize) -> Vec<Bin> {
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
    for prediction in predictions {
        let confidence = prediction.confidence();
        let mut idx = ((confidence * n_bins as f64).ceil() as usize).clamp(1, n_bins) - 1;
        // The product may round across an edge that the confidence itself does not cross.
        if idx > 0 && confidence <= edge(idx) {
            idx -= 1;
        } else if idx + 1 < n_bins && confidence > edge(idx + 1) {
            idx += 1;
        }
        bins[idx].n += 1;
        bins[idx].confidence += confidence;
        bins[idx].accuracy += f64::from(u8::from(prediction.correct()));
    }
    for bin in bins.iter_mut().filter(|bin| bin.n > 0) {
        bin.confidence /= bin.n as f64;
        bin.accuracy /= bin.n as f64;
    }
    bins
}

/// Expected calibration error: `sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)|` over the bins of [`reliability`]   (Guo et
/// al. 2017, arXiv:1706.04599, eq. 3).
pub fn expected_calibration_error(predictions: &[Prediction], n_bins: usize) -> Option<f64> {
    if predictions.is_empty() {
        return None;
    }
    let total = predictions.len() as f64;
    Some(
        reliability(predictions, n_bins)
            .iter()
            .map(|bin| bin.n as f64 / total * (bin.accuracy - bin.confidence).abs())
            .sum(),
    )
}

/// How well low confidence detects errors: the probability that a right prediction is more confident than a wrong one,
/// ties counting half (the area under the ROC curve). `None` where all or none are right.
pub fn error_detection_auroc(predictions: &[Prediction]) -> Option<f64> {
    let mut ranked: Vec<(f64, bool)> = predictions
        .iter()
        .map(|p| (p.confidence(), p.correct()))
        .collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n_right = ranked.iter().filter(|(_, right)| *right).count() as f64;
    let n_wrong = ranked.len() as f64 - n_right;
    if n_right == 0.0 || n_wrong == 0.0 {
        return None;
    }
    let (mut wrong_below, mut area) = (0.0, 0.0);
    for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
        let right = tied.iter().filter(|(_, right)| *right).count() as f64;
        let wrong = tied.len() as f64 - right;
        area += right * (wrong_below + 0.5 * wrong);
        wrong_below += wrong;
    }
    Some(area / (n_right * n_wrong))
}

fn mean(predictions: &[Prediction], value: impl Fn(&Prediction) -> f64) -> Option<f64> {
    (!predictions.is_empty())
        .then(|| predictions.iter().map(value).sum::<f64>() / predictions.len() as f64)
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

    /// By hand: confidences 0.9 (right), 0.8 (wrong), 0.6 (right), 0.55 (wrong).
    fn four() -> Vec<Prediction> {
        vec![
            prediction(&[0.9, 0.1], 0),
            prediction(&[0.2, 0.8], 0),
            prediction(&[0.6, 0.4], 0),
            prediction(&[0.45, 0.55], 0),
        ]
    }

    #[test]
    fn scores_of_four_predictions() {
        close(accuracy(&four()), 0.5);
        // -(ln 0.9 + ln 0.2 + ln 0.6 + ln 0.45) / 4
        close(
            negative_log_likelihood(&four()),
            -(0.9f64 * 0.2 * 0.6 * 0.45).ln() / 4.0,
        );
        // (2 * 0.01 + 2 * 0.64 + 2 * 0.16 + 2 * 0.3025) / 4
        close(brier(&four()), 0.55625);
        // Right 0.9 beats 0.8 and 0.55, right 0.6 beats 0.55: 3 of 4 pairs.
        close(error_detection_auroc(&four()), 0.75);
    }

    #[test]
    fn calibration_error_of_four_predictions() {
        // Ten bins: 0.9 in (0.8, 0.9], 0.8 in (0.7, 0.8], 0.6 and 0.55 share (0.5, 0.6]:
        // (|1 - 0.9| + |0 - 0.8| + 2 |0.5 - 0.575|) / 4
        close(expected_calibration_error(&four(), 10), 0.2625);
        // One bin: |0.5 - 0.7125|
        close(expected_calibration_error(&four(), 1), 0.2125);
        let bins = reliability(&four(), 10);
        assert_eq!(
            bins.iter().map(|bin| bin.n).collect::<Vec<_>>(),
            [0, 0, 0, 0, 0, 2, 0, 1, 1, 0]
        );
    }

    #[test]
    fn certain_predictions_fall_into_the_last_bin() {
        let sure = Prediction::from_log_scores(&[0.0, f64::NEG_INFINITY], 0).expect("finite");
        assert_eq!(sure.confidence(), 1.0);
        assert_eq!(reliability(std::slice::from_ref(&sure), 15)[14].n, 1);
        close(
            expected_calibration_error(std::slice::from_ref(&sure), 15),
            0.0,
        );
        close(brier(&[sure]), 0.0);
        // Certain and wrong: the worst of every score.
        let wrong = Prediction::from_log_scores(&[0.0, f64::NEG_INFINITY], 1).expect("finite");
        close(
            expected_calibration_error(std::slice::from_ref(&wrong), 15),
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
                // Three choices, so that the most likely one may be below one half.
                let rest = (1.0 - confidence) / 2.0;
                if confidence > rest {
                    let prediction = Prediction {
                        probabilities: vec![confidence, rest, rest],
                        log_probability: confidence.ln(),
                        answer: 0,
                    };
                    assert_eq!(reliability(&[prediction], n_bins)[idx - 1].n, 1);
                }
            }
        }
    }

    #[test]
    fn nothing_scores_nothing() {
        assert_eq!(accuracy(&[]), None);
        assert_eq!(expected_calibration_error(&[], 15), None);
        assert_eq!(error_detection_auroc(&[]), None);
        assert_eq!(
            error_detection_auroc(&[prediction(&[0.9, 0.1], 0)]),
            None,
            "all right"
        );
        assert_eq!(Prediction::from_log_scores(&[f64::NAN, 0.0], 1), None);
        assert_eq!(
            Prediction::from_log_scores(&[f64::NEG_INFINITY; 2], 1),
            None
        );
        assert_eq!(Prediction::from_log_scores(&[0.0], 1), None);
    }

    #[test]
    fn scores_far_below_zero_keep_their_ratio() {
        let far = Prediction::from_log_scores(&[-2000.0, -2000.0 - 3f64.ln()], 0).expect("finite");
        assert!((far.confidence() - 0.75).abs() < 1e-12);
        // Ties go to the first choice.
        assert_eq!(prediction(&[0.5, 0.5], 1).choice(), 0);
    }

    proptest! {
        #[test]
        fn scores_stay_in_range(rows in prop::collection::vec((prop::collection::vec(-50.0f64..0.0, 2..6), 0usize..6), 1..40), n_bins in 1usize..40) {
            let predictions: Vec<_> = rows.iter().map(|(scores, answer)| {
                Prediction::from_log_scores(scores, answer % scores.len()).expect("finite")
            }).collect();
            let ece = expected_calibration_error(&predictions, n_bins).expect("rows");
            prop_assert!((0.0..=1.0).contains(&ece));
            prop_assert!((0.0..=2.0).contains(&brier(&predictions).expect("rows")));
            prop_assert!(negative_log_likelihood(&predictions).expect("rows") >= 0.0);
            prop_assert_eq!(reliability(&predictions, n_bins).iter().map(|bin| bin.n).sum::<usize>(), predictions.len());
            // Against the definition: every pair of a right and a wrong prediction.
            let (right, wrong): (Vec<_>, Vec<_>) = predictions.iter().partition(|p| p.correct());
            let pairs: f64 = right.iter().flat_map(|r| wrong.iter().map(move |w| match r.confidence().total_cmp(&w.confidence()) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })).sum();
            match error_detection_auroc(&predictions) {
                Some(area) => prop_assert!((area - pairs / (right.len() * wrong.len()) as f64).abs() < 1e-9),
                None => prop_assert!(right.is_empty() || wrong.is_empty()),
            }
        }
    }
}
