//! The figures as inline SVG: reliability diagrams, and the chart of risk against coverage.

use std::fmt::Write;

use minijinja::HtmlEscape;

use super::risk::RiskCurve;
use super::{Outcomes, interval, percent};
use crate::report::chart::{number, ticks};

/// Largest number of points per risk line.
const MAX_POINTS: usize = 600;
/// Number of places along the coverage axis that show their values.
const N_STRIPS: usize = 50;
/// The marked coverage, in percent.
pub(super) const MARKED: usize = 80;
/// Smallest coverage whose risk can widen the scale. Below it the risk rests on too few rows.
const LEAST_COVERAGE: f64 = 0.1;
/// Number of characters of a name that a tip shows.
const MAX_NAME: usize = 24;

const WIDTH: f64 = 380.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 24.0;
const PLOT: f64 = 250.0;
/// Height of the histogram, and of the space above it.
const HISTOGRAM: f64 = 46.0;
const GAP: f64 = 12.0;
/// Height for the tick labels and the name of the x axis.
const BOTTOM: f64 = 38.0;

/// The reliability diagram: confidence of a predictor against the share of right answers, above a histogram of the
/// confidences.
pub(super) fn reliability(outcomes: &Outcomes<'_>) -> String {
    let base = TOP + PLOT + GAP + HISTOGRAM;
    let most = outcomes.bins.iter().map(|bin| bin.n).max().unwrap_or(0);
    let most = most.max(1) as f64;
    let label = format!(
        "Reliability of {}: of {} rows with a mean confidence of {} the share {} was right",
        outcomes.name,
        outcomes.rows.len(),
        number(outcomes.confidence()),
        number(outcomes.accuracy())
    );
    let mut svg = opened(&label, base + BOTTOM);
    let fifths: Vec<f64> = (0..=5).map(|k| f64::from(k) / 5.0).collect();
    let y_of = |share: f64| TOP + (1.0 - share) * PLOT;
    horizontal(&mut svg, &fifths, &y_of, number);
    vertical(&mut svg, &fifths, [TOP, TOP + PLOT], base, number);
    named(&mut svg, "share right", "confidence", base);
    // Writing to a string cannot fail.
    let _ = write!(
        svg,
        r#"<line class="dashed" x1="{LEFT}" y1="{}" x2="{}" y2="{TOP}"/><line class="grid" x1="{LEFT}" x2="{}" y1="{base}" y2="{base}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>"#,
        TOP + PLOT,
        x_of(1.0),
        x_of(1.0),
        LEFT - 6.0,
        base - HISTOGRAM + 9.0,
        format_args!("{:.0}\u{202f}%", 100.0 * most / outcomes.rows.len() as f64)
    );
    let filled = || outcomes.bins.iter().filter(|bin| bin.n > 0);
    let colour = outcomes.colour;
    for bin in filled() {
        let (from, to) = (x_of(bin.above), x_of(bin.to));
        let height = HISTOGRAM * bin.n as f64 / most;
        let _ = write!(
            svg,
            r#"<rect class="s{colour}" x="{from:.1}" y="{:.1}" width="{:.1}" height="{height:.1}"/>"#,
            base - height,
            (to - from - 1.0).max(0.5)
        );
        let x = x_of(bin.confidence);
        let [low, high] = interval(bin);
        let _ = write!(
            svg,
            r#"<line class="s{colour}" x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{:.1}"/><circle class="s{colour}" cx="{x:.1}" cy="{:.1}" r="{:.1}"/>"#,
            y_of(low),
            y_of(high),
            y_of(bin.accuracy),
            2.5 + 4.5 * (bin.n as f64 / most).sqrt()
        );
    }
    for bin in filled() {
        let [low, high] = interval(bin);
        let lines = [
            (
                None,
                format!("confidence {:.3} to {:.3}", bin.above, bin.to),
            ),
            (Some(colour), format!("right {}", number(bin.accuracy))),
            (None, format!("95 % {low:.3} to {high:.3}")),
            (None, format!("rows {}", bin.n)),
        ];
        let sides = [x_of(bin.above), x_of(bin.to)];
        strip(&mut svg, sides, x_of(bin.confidence), base, &lines);
    }
    svg.push_str("</svg>");
    svg
}

/// The chart of the share of errors against coverage. Also returns whether part of a line lies above the scale.
pub(super) fn risk(predictors: &[(&Outcomes<'_>, RiskCurve)]) -> (String, bool) {
    let base = TOP + PLOT;
    let lines: Vec<Vec<[f64; 2]>> = predictors
        .iter()
        .map(|(_, curve)| curve.points(MAX_POINTS))
        .collect();
    let highest = lines
        .iter()
        .flatten()
        .filter(|[coverage, _]| *coverage >= LEAST_COVERAGE)
        .map(|[_, risk]| *risk)
        .fold(0.01, f64::max);
    let highest = (1.08 * highest).min(1.0);
    let y_of = |risk: f64| base - risk / highest * PLOT;
    let mut told = String::new();
    for (outcomes, curve) in predictors {
        if let Some([_, risk]) = curve.at(MARKED) {
            let _ = write!(told, "; {}: {}", outcomes.name, percent(risk));
        }
    }
    let label = format!("Share of errors over coverage; at a coverage of {MARKED} %{told}");
    let mut svg = opened(&label, base + BOTTOM);
    let share = |value: f64| format!("{}\u{202f}%", number(100.0 * value));
    horizontal(&mut svg, &ticks(0.0, highest, 6), &y_of, share);
    let fifths: Vec<f64> = (0..=5).map(|k| f64::from(k) / 5.0).collect();
    vertical(&mut svg, &fifths, [TOP, base], base, share);
    named(&mut svg, "errors", "coverage", base);
    let _ = write!(
        svg,
        r#"<line class="dashed" x1="{0:.1}" x2="{0:.1}" y1="{TOP}" y2="{base}"/>"#,
        x_of(MARKED as f64 / 100.0)
    );
    let mut is_cut = false;
    // The first line is drawn last, above the others.
    for ((outcomes, curve), points) in predictors.iter().zip(&lines).rev() {
        let (mut path, mut pen_down) = (String::new(), false);
        for [coverage, risk] in points {
            if *risk > highest {
                (pen_down, is_cut) = (false, true);
                continue;
            }
            let command = if pen_down { 'L' } else { 'M' };
            let _ = write!(path, "{command}{:.1} {:.1}", x_of(*coverage), y_of(*risk));
            pen_down = true;
        }
        let colour = outcomes.colour;
        let _ = write!(svg, r#"<path class="s{colour}" d="{path}"/>"#);
        if let Some([coverage, risk]) = curve.at(MARKED) {
            let _ = write!(
                svg,
                r#"<circle class="s{colour}" cx="{:.1}" cy="{:.1}" r="3.6"/>"#,
                x_of(coverage),
                y_of(risk.min(highest))
            );
        }
    }
    for idx in 1..=N_STRIPS {
        let part = 100 * idx / N_STRIPS;
        let mut lines = vec![(None, format!("coverage {part} %"))];
        for (outcomes, curve) in predictors {
            let risk = curve.at(part).map_or(String::new(), |[_, r]| percent(r));
            let name: String = outcomes.name.chars().take(MAX_NAME).collect();
            lines.push((Some(outcomes.colour), format!("{name} {risk}")));
        }
        let at = |idx: f64| x_of((idx / N_STRIPS as f64).min(1.0));
        let sides = [at(idx as f64 - 0.5), at(idx as f64 + 0.5)];
        strip(&mut svg, sides, at(idx as f64), base, &lines);
    }
    svg.push_str("</svg>");
    (svg, is_cut)
}

/// The x coordinate of a value from 0 to 1.
fn x_of(share: f64) -> f64 {
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

fn opened(label: &str, height: f64) -> String {
    format!(
        r#"<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#,
        HtmlEscape(label)
    )
}

/// Draws lines across the plot, with their values at the left.
fn horizontal(
    svg: &mut String,
    at: &[f64],
    y_of: &impl Fn(f64) -> f64,
    text: impl Fn(f64) -> String,
) {
    for value in at {
        let y = y_of(*value);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            x_of(1.0),
            LEFT - 6.0,
            y + 4.0,
            text(*value)
        );
    }
}

/// Draws lines down the plot, with their values below `base`.
fn vertical(
    svg: &mut String,
    at: &[f64],
    [top, bottom]: [f64; 2],
    base: f64,
    text: impl Fn(f64) -> String,
) {
    for share in at {
        let x = x_of(*share);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="{top}" y2="{bottom}"/><text class="tick" x="{x:.1}" y="{}" text-anchor="middle">{}</text>"#,
            base + 17.0,
            text(*share)
        );
    }
}

/// Draws the names of the axes.
fn named(svg: &mut String, y: &str, x: &str, base: f64) {
    let _ = write!(
        svg,
        r#"<text x="{LEFT}" y="13">{y}</text><text x="{}" y="{}" text-anchor="end">{x}</text>"#,
        x_of(1.0),
        base + 33.0
    );
}

/// Adds a part of the plot that shows lines of text while the pointer is over it. Each line has the class of its
/// colour.
fn strip(
    svg: &mut String,
    [from, to]: [f64; 2],
    x: f64,
    base: f64,
    lines: &[(Option<u8>, String)],
) {
    let longest = lines.iter().map(|(_, text)| text.chars().count()).max();
    let width = 16.0 + 6.6 * longest.unwrap_or(0) as f64;
    let left = if x < 0.5 * (LEFT + x_of(1.0)) {
        x + 8.0
    } else {
        (x - 8.0 - width).max(2.0)
    };
    let _ = write!(
        svg,
        r#"<g class="strip"><rect x="{from:.1}" y="{TOP}" width="{:.1}" height="{}"/><g class="tip"><line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{base}"/><rect class="box" x="{left:.1}" y="{}" width="{width:.1}" height="{}" rx="4"/>"#,
        (to - from).max(0.1),
        base - TOP,
        TOP + 2.0,
        8.0 + 15.0 * lines.len() as f64
    );
    for (line, (colour, text)) in lines.iter().enumerate() {
        let class = colour.map_or(String::new(), |colour| format!(r#" class="t{colour}""#));
        let _ = write!(
            svg,
            r#"<text{class} x="{:.1}" y="{}">{}</text>"#,
            left + 8.0,
            TOP + 17.0 + 15.0 * line as f64,
            HtmlEscape(text)
        );
    }
    svg.push_str("</g></g>");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(rows: Vec<(f64, bool)>) -> Outcomes<'static> {
        Outcomes::new("a predictor", 2, &rows, 10)
    }

    #[test]
    fn a_point_is_where_its_bin_says() {
        let svg = reliability(&outcomes(vec![(0.75, true), (0.75, false), (1.0, true)]));
        // x from 44 to 360, y from 274 up to 24: a confidence of 0.75 is at 281, a share of one half at 149.
        assert!(svg.contains(r#"cx="281.0" cy="149.0" r="7.0""#), "{svg}");
        assert!(svg.contains(r#"cx="360.0" cy="24.0""#), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains(">right 0.5</text>") && svg.contains(">rows 2</text>"));
    }

    #[test]
    fn a_line_of_risk_ends_at_all_rows() {
        let rows = outcomes(vec![
            (0.9, true),
            (0.8, true),
            (0.7, true),
            (0.6, true),
            (0.5, false),
        ]);
        let curve = RiskCurve::new(&rows.rows);
        let (svg, is_cut) = risk(&[(&rows, curve)]);
        assert!(!is_cut);
        // The scale ends 8 % above the risk of one fifth. At a coverage of four fifths there is no error.
        assert!(svg.contains("L296.8 274.0L360.0 42.5\""), "{svg}");
        assert!(svg.contains(r#"cx="296.8" cy="274.0""#), "{svg}");
        assert!(svg.contains("at a coverage of 80 %; a predictor: 0.0"));
    }

    #[test]
    fn a_first_error_does_not_widen_the_scale() {
        let rows: Vec<_> = (0..100)
            .map(|row| (1.0 - f64::from(row) * 1e-3, row % 50 != 0))
            .collect();
        let rows = outcomes(rows);
        let (svg, is_cut) = risk(&[(&rows, RiskCurve::new(&rows.rows))]);
        assert!(is_cut);
        assert!(!svg.contains("y=\"-") && !svg.contains(" -"), "{svg}");
    }
}
