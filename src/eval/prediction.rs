//! One row's prediction: a distribution over its choices, or the probability that an answer is right.

use crate::model::log_mean_exp;

/// The outcomes of a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Which of several choices is right. The given answer is the most likely one.
    Choice,
    /// Whether the given answer is right (the first outcome) or wrong (the second).
    Answer,
}

/// A distribution over a row's outcomes, and the true outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    kind: Kind,
    log_probabilities: Vec<f64>,
    answer: usize,
}

impl Prediction {
    /// The softmax of one log score per choice. It is computed from differences, so scores far below zero keep their
    /// precision.
    ///
    /// `None` if `answer` is not an index of `scores`, if a score is NaN or positive infinity, or if all are negative
    /// infinity.
    pub fn from_log_scores(scores: &[f64], answer: usize) -> Option<Self> {
        Self::new(Kind::Choice, scores, answer)
    }

    /// The prediction that an answer is right with log probability `log_confidence`. `is_right` is the truth. `None` if
    /// `log_confidence` is NaN.
    pub fn of_answer(log_confidence: f64, is_right: bool) -> Option<Self> {
        /// The largest log confidence: a probability that rounds to 1 is not certain.
        const SUREST: f64 = -1e-12;
        if log_confidence.is_nan() {
            return None;
        }
        let right = log_confidence.min(SUREST);
        let wrong = (-right.exp()).ln_1p();
        Self::new(Kind::Answer, &[right, wrong], usize::from(!is_right))
    }

    fn new(kind: Kind, scores: &[f64], answer: usize) -> Option<Self> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if answer >= scores.len() || !largest.is_finite() || scores.iter().any(|s| s.is_nan()) {
            return None;
        }
        let log_sum = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
        Some(Self {
            kind,
            log_probabilities: scores.iter().map(|s| s - log_sum).collect(),
            answer,
        })
    }

    /// The average of the probabilities of several predictions for one row. All must have the same true outcome. `None`
    /// without predictions.
    pub fn average(predictions: &[Self]) -> Option<Self> {
        let first = predictions.first()?;
        let average = |choice: usize| {
            let all = predictions.iter().map(|p| p.log_probabilities[choice]);
            log_mean_exp(&all.collect::<Vec<_>>())
        };
        Some(Self {
            log_probabilities: (0..first.log_probabilities.len()).map(average).collect(),
            ..*first
        })
    }

    /// The distribution `p^(1/T) / sum p^(1/T)`: the softmax of the scores divided by the `temperature` T, above 0 (Guo
    /// et al. 2017, arXiv:1706.04599, sec. 4.2).
    #[must_use]
    pub fn tempered(&self, temperature: f64) -> Self {
        let log_p = self.log_probabilities.iter();
        let scores: Vec<f64> = log_p.map(|log_p| log_p / temperature).collect();
        // `new` does not fail here, since the largest score of a distribution is finite.
        Self::new(self.kind, &scores, self.answer).unwrap_or_else(|| self.clone())
    }

    /// Logarithms of the probabilities of the outcomes.
    pub fn log_probabilities(&self) -> &[f64] {
        &self.log_probabilities
    }

    /// The distribution over the outcomes.
    pub fn probabilities(&self) -> Vec<f64> {
        self.log_probabilities.iter().map(|p| p.exp()).collect()
    }

    /// The index of the true outcome.
    pub fn answer(&self) -> usize {
        self.answer
    }

    /// `-ln p` of the true outcome, nats.
    pub fn nll(&self) -> f64 {
        // Subtracting from 0 avoids -0.
        0.0 - self.log_probabilities[self.answer]
    }

    /// `sum_c (p_c - y_c)^2`, from 0 to 2.
    pub fn brier(&self) -> f64 {
        let outcomes = self.log_probabilities.iter().enumerate();
        let away = |(idx, log_p): (usize, &f64)| {
            let is_true = f64::from(u8::from(idx == self.answer));
            (log_p.exp() - is_true).powi(2)
        };
        outcomes.map(away).sum()
    }

    /// Entropy of the distribution, nats.
    pub fn entropy(&self) -> f64 {
        let log_p = self.log_probabilities.iter().filter(|p| p.is_finite());
        -log_p.map(|p| p * p.exp()).sum::<f64>()
    }

    /// The index of the given answer: the most likely choice, the first one of ties. For [`Self::of_answer`] it is 0.
    pub fn choice(&self) -> usize {
        if self.kind == Kind::Answer {
            return 0;
        }
        let log_p = &self.log_probabilities;
        (1..log_p.len()).fold(
            0,
            |best, idx| if log_p[idx] > log_p[best] { idx } else { best },
        )
    }

    /// Probability that the given answer is right.
    pub fn confidence(&self) -> f64 {
        self.log_probabilities[self.choice()].exp()
    }

    /// Whether the given answer is right.
    pub fn correct(&self) -> bool {
        self.choice() == self.answer
    }
}

/// [`Prediction::tempered`] of each prediction.
pub fn tempered(predictions: &[Prediction], temperature: f64) -> Vec<Prediction> {
    let each = predictions.iter();
    each.map(|prediction| prediction.tempered(temperature))
        .collect()
}

/// The entropy of the average of several draws for one row, and the average of their entropies, nats. The difference is
/// the mutual information of prediction and weights. `None` without draws.
pub fn entropies(draws: &[Prediction]) -> Option<(f64, f64)> {
    let average = Prediction::average(draws)?;
    let sum: f64 = draws.iter().map(Prediction::entropy).sum();
    Some((average.entropy(), sum / draws.len() as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_far_below_zero_keep_their_ratio() {
        let far = Prediction::from_log_scores(&[-2000.0, -2000.0 - 3f64.ln()], 0).expect("finite");
        assert!((far.confidence() - 0.75).abs() < 1e-12);
        // Ties go to the first choice.
        let tied = Prediction::from_log_scores(&[-1.0, -1.0], 1).expect("finite");
        assert_eq!((tied.choice(), tied.correct()), (0, false));
    }

    #[test]
    fn what_is_no_distribution_is_none() {
        assert_eq!(Prediction::from_log_scores(&[f64::NAN, 0.0], 1), None);
        assert_eq!(
            Prediction::from_log_scores(&[f64::NEG_INFINITY; 2], 1),
            None
        );
        assert_eq!(Prediction::from_log_scores(&[0.0], 1), None);
        assert_eq!(Prediction::of_answer(f64::NAN, true), None);
        assert_eq!(Prediction::average(&[]), None);
    }

    #[test]
    fn an_answer_is_right_or_not_however_unlikely_it_is() {
        let unlikely = Prediction::of_answer(0.2f64.ln(), true).expect("finite");
        assert!(unlikely.correct());
        assert!((unlikely.confidence() - 0.2).abs() < 1e-12);
        assert!((unlikely.brier() - 2.0 * 0.64).abs() < 1e-12);
        let certain = Prediction::of_answer(0.0, false).expect("finite");
        assert!(!certain.correct() && certain.nll().is_finite());
        // A temperature moves the log odds: 1/4 becomes 1/2.
        let tempered = unlikely.tempered(2.0);
        assert!((tempered.confidence() - 1.0 / 3.0).abs() < 1e-12);
    }

    /// Recorded by scipy, see `tests/reference/make_calibration.py`.
    #[test]
    fn averages_equal_recorded_ones() {
        use super::super::recorded::{file, numbers};
        let file = file();
        let rows = file["averages"].as_array().expect("rows");
        assert!(!rows.is_empty());
        for row in rows {
            let draws = row["log_scores"].as_array().expect("draws").iter();
            let draws: Vec<Prediction> = draws
                .map(|scores| Prediction::from_log_scores(&numbers(scores), 0).expect("finite"))
                .collect();
            let (average, expected) = (
                Prediction::average(&draws).expect("draws"),
                &row["expected"],
            );
            let recorded = numbers(&expected["probabilities"]);
            for (ours, recorded) in average.probabilities().iter().zip(recorded) {
                assert!((ours - recorded).abs() < 1e-9);
            }
            let (predictive, of_draws) = entropies(&draws).expect("draws");
            for (ours, key) in [
                (predictive, "predictive_entropy"),
                (of_draws, "expected_entropy"),
                (predictive - of_draws, "mutual_information"),
            ] {
                assert!(
                    (ours - expected[key].as_f64().expect("a number")).abs() < 1e-9,
                    "{key}"
                );
            }
        }
    }

    #[test]
    fn temperature_one_changes_nothing_and_zero_mass_stays() {
        let p = Prediction::from_log_scores(&[0.0, f64::NEG_INFINITY, -1.0], 2).expect("finite");
        for (a, b) in p
            .tempered(1.0)
            .probabilities()
            .iter()
            .zip(p.probabilities())
        {
            assert!((a - b).abs() < 1e-15);
        }
        assert_eq!(p.tempered(5.0).probabilities()[1], 0.0);
        assert!(p.entropy() > 0.0 && p.tempered(5.0).entropy() > p.entropy());
    }
}
