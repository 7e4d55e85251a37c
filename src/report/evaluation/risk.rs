//! Risk and coverage: the share of errors among the rows with the highest confidence.

use crate::eval::measures::{Outcome, risk_coverage};

/// The curve of [`risk_coverage`], which can be read at any share of the rows.
#[derive(Debug, Clone)]
pub(super) struct RiskCurve {
    risks: Vec<f64>,
}

impl RiskCurve {
    /// The curve of outcomes with finite confidence.
    pub(super) fn new(outcomes: &[Outcome]) -> Self {
        Self {
            risks: risk_coverage(outcomes),
        }
    }

    /// Coverage and risk of the smallest number of rows that is at least `percent` of all; `None` if there are no rows.
    pub(super) fn at(&self, percent: usize) -> Option<[f64; 2]> {
        self.place(percent, 100)
    }

    /// Coverage and risk at up to `limit` points, evenly spaced along the coverage. The last point is that of all rows.
    pub(super) fn points(&self, limit: usize) -> Vec<[f64; 2]> {
        let n_points = self.risks.len().min(limit);
        (1..=n_points)
            .filter_map(|idx| self.place(idx, n_points))
            .collect()
    }

    fn place(&self, part: usize, parts: usize) -> Option<[f64; 2]> {
        let n_rows = self.risks.len();
        let n = (n_rows * part).div_ceil(parts);
        let risk = self.risks.get(n.checked_sub(1)?)?;
        Some([n as f64 / n_rows as f64, *risk])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(rows: &[(f64, bool)]) -> RiskCurve {
        let outcome = |&(confidence, correct): &(f64, bool)| Outcome {
            confidence,
            correct,
        };
        RiskCurve::new(&rows.iter().map(outcome).collect::<Vec<_>>())
    }

    #[test]
    fn rows_come_by_confidence() {
        let curve = curve(&[(0.6, false), (0.9, true), (0.7, true), (0.8, false)]);
        let expected = [[0.25, 0.0], [0.5, 0.5], [0.75, 1.0 / 3.0], [1.0, 0.5]];
        assert_eq!(curve.points(600), expected);
        assert_eq!(curve.at(50), Some([0.5, 0.5]));
        // Three of four rows are less than 80 %, so all four are needed.
        assert_eq!(curve.at(80), Some([1.0, 0.5]));
    }

    #[test]
    fn ties_count_as_their_mean_over_orders() {
        let tied = [(0.9, true), (0.5, false), (0.5, true), (0.5, true)];
        let risks = |outcomes: &[(f64, bool)]| -> Vec<f64> {
            let points = curve(outcomes).points(600);
            points.into_iter().map(|[_, risk]| risk).collect()
        };
        let expected = [0.0, 1.0 / 6.0, 2.0 / 9.0, 0.25];
        for (found, expected) in risks(&tied).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
        let mut turned = tied;
        turned.reverse();
        assert_eq!(risks(&tied), risks(&turned));
        // Equal confidences: the mean of the curves for the three places that the error may have.
        let at = |error: usize| -> Vec<f64> {
            let rows = (0..3).map(|idx| (0.5 - idx as f64 * 1e-3, idx != error));
            risks(&[(0.9, true)].into_iter().chain(rows).collect::<Vec<_>>())
        };
        let orders = [at(0), at(1), at(2)];
        for (n, found) in risks(&tied).into_iter().enumerate() {
            let mean = orders.iter().map(|order| order[n]).sum::<f64>() / 3.0;
            assert!((found - mean).abs() < 1e-12, "{found} {mean}");
        }
    }

    #[test]
    fn few_and_many_rows() {
        let none = curve(&[]);
        assert!(none.points(600).is_empty() && none.at(80).is_none());
        let one = curve(&[(0.4, false)]);
        assert_eq!(one.points(600), [[1.0, 1.0]]);
        assert_eq!(one.at(80), Some([1.0, 1.0]));
        let rows: Vec<_> = (0..100_001)
            .map(|row| (f64::from(row % 997) / 997.0, row % 3 == 0))
            .collect();
        let curve = curve(&rows);
        let points = curve.points(600);
        assert_eq!(points.len(), 600);
        assert!(points.is_sorted_by(|a, b| a[0] < b[0]));
        assert_eq!(points.last().copied(), curve.at(100));
    }
}
