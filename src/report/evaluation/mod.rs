//! One self-contained HTML page about an evaluation: scores, reliability, and errors against coverage for each
//! predictor.

mod figures;
mod risk;

use minijinja::{Value as Text, context};
use monteclora_converters::Result;

use self::risk::RiskCurve;
use super::chart::number;
use super::page::grouped;
use crate::eval::measures::{Bin, Outcome, accuracy, reliability};

/// Largest number of bins in a diagram; more would be too narrow to see.
const MAX_BINS: usize = 50;
/// Coverages in the table of errors, in percent.
const COVERAGES: [usize; 4] = [50, figures::MARKED, 90, 100];

/// Label, value and interval of a score.
pub type Score = (&'static str, Option<f64>, Option<[f64; 2]>);

/// One predictor of an evaluation, as the page shows it.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Name, such as `posterior mean`.
    pub name: String,
    /// Number of its colour class, 1 to 5.
    pub colour: u8,
    /// Confidence and whether the answer was right, per row. Rows whose confidence is not finite are left out.
    pub outcomes: Vec<(f64, bool)>,
    /// Label, value and interval of each score, in the order of the table. A missing value shows as a dash. The
    /// interval is shown if it is known.
    pub scores: Vec<Score>,
}

/// The contents of the page.
#[derive(Debug, Clone)]
pub struct EvaluationPage {
    /// Heading, such as the names of the model and of the data.
    pub title: String,
    /// Names and values that say how the evaluation was made.
    pub facts: Vec<(String, String)>,
    /// Number of bins of the calibration error, and of the diagrams up to 50. At least 1.
    pub n_bins: usize,
    /// The predictors, in the order of the table.
    pub shown: Vec<Shown>,
    /// Sentences below the table of scores.
    pub notes: Vec<String>,
}

/// The outcomes of a predictor, and its reliability bins.
struct Outcomes<'a> {
    name: &'a str,
    colour: u8,
    rows: Vec<Outcome>,
    bins: Vec<Bin>,
}

impl<'a> Outcomes<'a> {
    fn new(name: &'a str, colour: u8, rows: &[(f64, bool)], n_bins: usize) -> Self {
        let sound = rows.iter().filter(|(confidence, _)| confidence.is_finite());
        let rows: Vec<_> = sound
            .map(|(confidence, correct)| Outcome {
                confidence: confidence.clamp(0.0, 1.0),
                correct: *correct,
            })
            .collect();
        Self {
            name,
            colour,
            bins: reliability(&rows, n_bins),
            rows,
        }
    }

    /// Mean confidence.
    fn confidence(&self) -> f64 {
        self.rows.iter().map(|row| row.confidence).sum::<f64>() / self.rows.len() as f64
    }

    /// Share of right answers.
    fn accuracy(&self) -> f64 {
        accuracy(&self.rows).unwrap_or_default()
    }

    /// The reliability diagram, with its text and its numbers.
    fn figure(&self) -> Text {
        let filled = self.bins.iter().filter(|bin| bin.n > 0);
        context! {
            name => self.name,
            colour => self.colour,
            rows => grouped(self.rows.len() as u64),
            confidence => format!("{:.3}", self.confidence()),
            accuracy => format!("{:.3}", self.accuracy()),
            svg => Text::from_safe_string(figures::reliability(self)),
            bins => filled.map(|bin| {
                let [low, high] = interval(bin);
                context! {
                    from => format!("{:.3}", bin.above),
                    to => format!("{:.3}", bin.to),
                    n => grouped(bin.n as u64),
                    confidence => format!("{:.3}", bin.confidence),
                    accuracy => format!("{:.3}", bin.accuracy),
                    interval => format!("{low:.3} to {high:.3}"),
                }
            }).collect::<Vec<_>>(),
        }
    }
}

impl EvaluationPage {
    /// Renders the page.
    ///
    /// # Errors
    /// Returns an error if the page's template cannot be rendered with its values.
    pub fn html(&self) -> Result<String> {
        let n_bins = self.n_bins.clamp(1, MAX_BINS);
        let outcomes: Vec<Outcomes<'_>> = (self.shown.iter())
            .map(|shown| Outcomes::new(&shown.name, colour(shown), &shown.outcomes, n_bins))
            .filter(|outcomes| !outcomes.rows.is_empty())
            .collect();
        let curves: Vec<_> = outcomes
            .iter()
            .map(|outcomes| (outcomes, RiskCurve::new(&outcomes.rows)))
            .collect();
        let (risk, is_cut) = figures::risk(&curves);
        let values = context! {
            title => self.title,
            predictors => self.shown.iter().map(|shown| context! { name => shown.name, colour => colour(shown) }).collect::<Vec<_>>(),
            scores => self.scores(),
            notes => self.notes,
            reliability => outcomes.iter().map(Outcomes::figure).collect::<Vec<_>>(),
            n_bins,
            n_bins_of_score => self.n_bins,
            risk => Text::from_safe_string(risk),
            is_cut,
            marked => figures::MARKED,
            coverages => COVERAGES,
            risks => curves.iter().map(|(outcomes, curve)| {
                let at = |percentage| curve.at(percentage).map(|[_, risk]| percent(risk));
                context! { name => outcomes.name, colour => outcomes.colour, values => COVERAGES.map(at), marked => at(figures::MARKED) }
            }).collect::<Vec<_>>(),
            facts => self.facts,
        };
        super::lay_out(include_str!("../evaluation.html"), values)
    }

    /// Every score once, in the order in which the predictors name them, with the value of each predictor.
    fn scores(&self) -> Vec<Text> {
        let mut labels: Vec<&str> = Vec::new();
        for (label, ..) in self.shown.iter().flat_map(|shown| &shown.scores) {
            if !labels.contains(label) {
                labels.push(label);
            }
        }
        let row = |label: &str| {
            let cells = self.shown.iter().map(|shown| {
                let of_label = shown.scores.iter().find(|(name, ..)| *name == label);
                let value = of_label.and_then(|(_, value, _)| *value);
                let value = value.filter(|value| value.is_finite());
                let ends = of_label.and_then(|(.., ends)| *ends);
                let ends = ends.filter(|ends| value.is_some() && ends.iter().all(|e| e.is_finite()));
                context! {
                    value => value.map(number),
                    interval => ends.map(|[low, high]| format!("{} to {}", number(low), number(high))),
                }
            });
            context! { label, cells => cells.collect::<Vec<_>>() }
        };
        labels.into_iter().map(row).collect()
    }
}

fn colour(shown: &Shown) -> u8 {
    shown.colour.clamp(1, 5)
}

/// Formats a share in percent, with one decimal.
fn percent(share: f64) -> String {
    format!("{:.1}\u{202f}%", 100.0 * share)
}

/// The 95 % interval of the share of right answers in a non-empty bin, by Wilson's score (Wilson 1927, J. Am. Stat.
/// Assoc. 22, p. 209). It lies within 0 and 1, and has a width even if all or none are right.
fn interval(bin: &Bin) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    let (n, p) = (bin.n as f64, bin.accuracy);
    let scale = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / scale;
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
    // Rounding can put an end slightly on the wrong side of the share itself.
    [(middle - half).clamp(0.0, p), (middle + half).clamp(p, 1.0)]
}

#[cfg(test)]
mod tests;
