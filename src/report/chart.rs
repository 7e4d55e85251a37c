//! Line charts as inline SVG. Colours are classes, so that the page's style sets them for light and dark mode.

use std::fmt::Write;

/// Largest number of points drawn per line. Longer lines are reduced to the extremes of equal intervals.
const MAX_POINTS: usize = 600;
/// Largest number of places along the x axis that show their values.
const MAX_STRIPS: usize = 120;
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// Name of the quantity.
    pub(super) name: &'static str,
    /// Number of its colour class, 1 to 5.
    pub(super) colour: u8,
    /// Whether each point is marked.
    pub(super) marked: bool,
    /// Step and value; a missing value breaks the line.
    pub(super) points: Vec<(u64, Option<f64>)>,
}

/// A chart over optimiser steps.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    /// Title for screen readers.
    pub(super) title: &'static str,
    /// Whether the value axis is logarithmic. Values at or below zero are then left out.
    pub(super) logarithmic: bool,
    /// The lines.
    pub(super) series: Vec<Series>,
}

/// Formats a number with four significant digits, or in scientific notation if it is very small or large.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{value:.2e}");
        return match text.split_once('e') {
            Some((digits, exponent)) if digits.contains('.') => {
                format!(
                    "{}e{exponent}",
                    digits.trim_end_matches('0').trim_end_matches('.')
                )
            }
            _ => text,
        };
    }
    let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

impl Chart {
    /// Whether there is no value to show.
    pub(super) fn is_empty(&self) -> bool {
        self.range().is_none()
    }

    fn shown(&self, value: f64) -> bool {
        value.is_finite() && (!self.logarithmic || value > 0.0)
    }

    fn values(&self) -> impl Iterator<Item = (u64, f64)> {
        self.series
            .iter()
            .flat_map(|series| &series.points)
            .filter_map(|(step, value)| value.map(|value| (*step, value)))
            .filter(|(_, value)| self.shown(*value))
    }

    /// Smallest and largest step, then smallest and largest (transformed) value.
    fn range(&self) -> Option<[f64; 4]> {
        let mut range: Option<[f64; 4]> = None;
        for (step, value) in self.values() {
            let (x, y) = (step as f64, self.transform(value));
            let [x0, x1, y0, y1] = range.unwrap_or([x, x, y, y]);
            range = Some([x0.min(x), x1.max(x), y0.min(y), y1.max(y)]);
        }
        range
    }

    fn transform(&self, value: f64) -> f64 {
        if self.logarithmic {
            value.log10()
        } else {
            value
        }
    }

    /// The chart as SVG; empty if there is no value to show.
    pub(super) fn svg(&self) -> String {
        let Some([x0, x1, y0, y1]) = self.range() else {
            return String::new();
        };
        // Puts a flat line in the middle.
        let pad = if y1 > y0 {
            0.05 * (y1 - y0)
        } else {
            (0.05 * y1.abs()).max(1e-12)
        };
        let (y0, y1) = (y0 - pad, y1 + pad);
        let x_of = |step: f64| {
            let share = if x1 > x0 {
                (step - x0) / (x1 - x0)
            } else {
                0.5
            };
            LEFT + share * (WIDTH - LEFT - RIGHT)
        };
        let y_of = |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            r#"<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#,
            self.title
        );
        self.axes(&mut svg, [x0, x1, y0, y1], &x_of, &y_of);
        for series in &self.series {
            let mut path = String::new();
            let mut pen_down = false;
            for (step, value) in thin(&series.points, MAX_POINTS) {
                let Some(value) = value.filter(|value| self.shown(*value)) else {
                    pen_down = false;
                    continue;
                };
                let (x, y) = (x_of(step as f64), y_of(self.transform(value)));
                let command = if pen_down { 'L' } else { 'M' };
                // Writing to a string cannot fail.
                let _ = write!(path, "{command}{x:.1} {y:.1}");
                pen_down = true;
                if series.marked {
                    let _ = write!(
                        svg,
                        r#"<circle class="s{}" cx="{x:.1}" cy="{y:.1}" r="2.6"/>"#,
                        series.colour
                    );
                }
            }
            if !path.is_empty() {
                let _ = write!(svg, r#"<path class="s{}" d="{path}"/>"#, series.colour);
            }
        }
        self.strips(&mut svg, &x_of);
        svg.push_str("</svg>");
        svg
    }

    fn axes(
        &self,
        svg: &mut String,
        [x0, x1, y0, y1]: [f64; 4],
        x_of: &impl Fn(f64) -> f64,
        y_of: &impl Fn(f64) -> f64,
    ) {
        let ticks = if self.logarithmic {
            log_ticks(y0, y1)
        } else {
            ticks(y0, y1, 5)
        };
        for tick in ticks {
            let y = y_of(self.transform(tick));
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0,
                number(tick)
            );
        }
        let steps = if x1 > x0 {
            ticks_whole(x0, x1)
        } else {
            vec![x0]
        };
        for step in steps {
            let _ = write!(
                svg,
                r#"<text class="tick" x="{:.1}" y="{}" text-anchor="middle">{step}</text>"#,
                x_of(step),
                HEIGHT - 8.0
            );
        }
    }

    /// Adds strips of the plot that show the values at their step while the pointer is over them.
    fn strips(&self, svg: &mut String, x_of: &impl Fn(f64) -> f64) {
        let mut steps: Vec<u64> = self.values().map(|(step, _)| step).collect();
        steps.sort_unstable();
        steps.dedup();
        let every = steps.len().div_ceil(MAX_STRIPS).max(1);
        // Counted from the end, so that the last step is among them.
        let mut chosen: Vec<u64> = steps.iter().rev().step_by(every).copied().collect();
        chosen.reverse();
        for (idx, step) in chosen.iter().enumerate() {
            let x = x_of(*step as f64);
            let middle = |other: Option<&u64>, edge: f64| {
                other.map_or(edge, |other| 0.5 * (x + x_of(*other as f64)))
            };
            let from = middle(idx.checked_sub(1).map(|before| &chosen[before]), LEFT);
            let to = middle(chosen.get(idx + 1), WIDTH - RIGHT);
            let told: Vec<(&Series, f64)> = self
                .series
                .iter()
                .filter_map(|series| {
                    let at = series
                        .points
                        .binary_search_by_key(step, |point| point.0)
                        .ok()?;
                    Some((series, series.points[at].1?))
                })
                .collect();
            let _ = write!(
                svg,
                r#"<g class="strip"><rect x="{from:.1}" y="{TOP}" width="{:.1}" height="{}"/><g class="tip"><line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{}"/>"#,
                (to - from).max(0.1),
                HEIGHT - TOP - BOTTOM,
                HEIGHT - BOTTOM
            );
            let box_width = 150.0;
            let left = if x < LEFT + 0.5 * (WIDTH - LEFT - RIGHT) {
                x + 8.0
            } else {
                x - 8.0 - box_width
            };
            let _ = write!(
                svg,
                r#"<rect class="box" x="{left:.1}" y="{}" width="{box_width}" height="{}" rx="4"/><text x="{:.1}" y="{}">step {step}</text>"#,
                TOP + 2.0,
                22.0 + 15.0 * told.len() as f64,
                left + 8.0,
                TOP + 17.0
            );
            for (line, (series, value)) in told.iter().enumerate() {
                let _ = write!(
                    svg,
                    r#"<text class="t{}" x="{:.1}" y="{:.1}">{} {}</text>"#,
                    series.colour,
                    left + 8.0,
                    TOP + 32.0 + 15.0 * line as f64,
                    series.name,
                    number(*value)
                );
            }
            svg.push_str("</g></g>");
        }
    }
}

/// About `limit` points: per interval the smallest and the largest value, and the first break if there is one.
fn thin(points: &[(u64, Option<f64>)], limit: usize) -> Vec<(u64, Option<f64>)> {
    if points.len() <= limit {
        return points.to_vec();
    }
    let interval = points.len().div_ceil(limit / 2);
    let mut kept = Vec::with_capacity(limit);
    for chunk in points.chunks(interval) {
        let finite = |idx: &usize| chunk[*idx].1.is_some();
        let value = |idx: &usize| chunk[*idx].1.unwrap_or_default();
        let by_value = |a: &usize, b: &usize| value(a).total_cmp(&value(b));
        let mut wanted: Vec<usize> = [
            (0..chunk.len()).filter(finite).min_by(by_value),
            (0..chunk.len()).filter(finite).max_by(by_value),
            (0..chunk.len()).find(|idx| !finite(idx)),
        ]
        .into_iter()
        .flatten()
        .collect();
        wanted.sort_unstable();
        wanted.dedup();
        kept.extend(wanted.into_iter().map(|idx| chunk[idx]));
    }
    kept
}

/// About `n` round numbers from `low` to `high`.
pub(super) fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let raw = (high - low) / n as f64;
    let unit = 10f64.powf(raw.log10().floor());
    let step = unit
        * [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|m| m * unit >= raw)
            .unwrap_or(10.0);
    if step.is_nan() || step <= 0.0 {
        return vec![low];
    }
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    // Removes the rounding error of a multiple of a power of ten.
    let round = |value: f64| format!("{value:.12e}").parse().unwrap_or(value);
    (first..=last).map(|k| round(k as f64 * step)).collect()
}

fn ticks_whole(low: f64, high: f64) -> Vec<f64> {
    ticks(low, high, 5)
        .into_iter()
        .filter(|tick| tick.fract() == 0.0)
        .collect()
}

/// Powers of ten between two logarithms, also times 2 and 5 if there are few; for a short range, round numbers.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = high - low;
    if decades < 0.7 {
        return ticks(10f64.powf(low), 10f64.powf(high), 4);
    }
    let multiples: &[f64] = if decades < 3.0 {
        &[1.0, 2.0, 5.0]
    } else {
        &[1.0]
    };
    let every = (decades / 6.0).ceil().max(1.0) as i32;
    (low.floor() as i32..=high.ceil() as i32)
        .filter(|power| power.rem_euclid(every) == 0)
        .flat_map(|power| multiples.iter().map(move |m| m * 10f64.powi(power)))
        .filter(|tick| (low..=high).contains(&tick.log10()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(logarithmic: bool, points: Vec<(u64, Option<f64>)>) -> Chart {
        Chart {
            title: "a chart",
            logarithmic,
            series: vec![Series {
                name: "value",
                colour: 1,
                marked: false,
                points,
            }],
        }
    }

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.123456, "0.1235"),
            (12345.6, "12346"),
            (5e-4, "5e-4"),
            (1.25e-5, "1.25e-5"),
            (-2.5, "-2.5"),
            (100.0, "100"),
            (3.2e7, "3.2e7"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_line_is_where_its_numbers_say() {
        let svg = chart(
            false,
            vec![
                (0, Some(1.0)),
                (10, Some(2.0)),
                (20, None),
                (30, Some(1.5)),
                (40, Some(1.5)),
            ],
        )
        .svg();
        // x from 58 to 468. The range has 5 % added above and below, so 1 is at 1/22 of the height 194 above the bottom
        // at 204.
        let path = svg
            .split("d=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .expect("a path");
        assert_eq!(path, "M58.0 195.2L160.5 18.8M365.5 107.0L468.0 107.0");
        assert!(svg.contains("value 1.5</text>") && svg.contains(">step 40</text>"));
    }

    #[test]
    fn long_lines_keep_their_extremes() {
        let mut points: Vec<(u64, Option<f64>)> = (0..100_000)
            .map(|step| (step, Some((step as f64).sin())))
            .collect();
        points[54_321].1 = Some(99.0);
        points[77_777].1 = Some(-99.0);
        points[33_333].1 = None;
        let kept = thin(&points, MAX_POINTS);
        assert!(kept.len() <= MAX_POINTS + 1, "{}", kept.len());
        for point in [(54_321, Some(99.0)), (77_777, Some(-99.0)), (33_333, None)] {
            assert!(kept.contains(&point), "{point:?}");
        }
        assert!(kept.is_sorted_by_key(|point| point.0));
        assert!(chart(false, points).svg().len() < 200_000);
    }

    #[test]
    fn odd_data_are_drawn() {
        assert!(chart(false, vec![]).is_empty());
        assert!(chart(false, vec![(1, None)]).is_empty());
        assert!(chart(true, vec![(1, Some(0.0)), (2, Some(-1.0))]).is_empty());
        for points in [
            vec![(5, Some(2.0))],
            vec![(5, Some(0.0)), (6, Some(0.0))],
            vec![(1, Some(1e-300)), (2, Some(1e300))],
        ] {
            let svg = chart(false, points).svg();
            assert!(
                svg.starts_with("<svg") && !svg.contains("NaN") && !svg.contains("inf"),
                "{svg}"
            );
        }
        let svg = chart(true, vec![(1, Some(1e-6)), (2, Some(1e6))]).svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert_eq!(ticks(0.93, 3.1, 5), [1.0, 1.5, 2.0, 2.5, 3.0]);
        assert_eq!(
            log_ticks(-5.0, 1.0),
            [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
        );
    }
}
