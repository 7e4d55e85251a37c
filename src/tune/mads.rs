//! Mesh adaptive direct search (Audet and Dennis 2006, SIAM J. Optim. 17(1)), with orthogonal poll directions (Abramson, Audet,
//! Dennis and Le Digabel 2009, OrthoMADS, SIAM J. Optim. 20(2)).
//!
//! The search is over the unit cube. Around the best point so far lie `2n` poll points, the rows of a Householder matrix and their
//! negatives times the poll size, those first that go on in the direction of the last success; before them comes a step of twice the
//! length in that direction (a speculative search). A better point becomes the centre; if none is better, the poll size is halved.
//! Categories have no distance: each poll also tries the other values of one category at the centre. NOMAD's searches by models are left out.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::space::Space;
use super::strategy::Known;

/// Poll size at the start.
const FIRST: f64 = 0.25;
/// Length of the speculative step, in poll sizes.
const SPECULATIVE: f64 = 2.0;
/// Poll size at which the search is at its end; the rest is tried at random.
const SMALLEST: f64 = 1e-4;

/// The next point to try, by what is known; `None` while all points of the poll are being tried.
pub(super) fn next(
    space: &Space,
    known: &[Known],
    seed: u64,
    start: Option<&[f64]>,
) -> Option<Vec<f64>> {
    let n = space.parameters.len();
    let mut centre = snap(space, &start.map_or_else(|| vec![0.5; n], <[f64]>::to_vec));
    let mut best = match find(space, known, &centre) {
        Found::New => return Some(centre),
        Found::Pending => return None,
        Found::Known(objective) => objective,
    };
    let mut poll_size = FIRST;
    let mut last = None;
    for iteration in 0..400u64 {
        let mut is_pending = false;
        let mut better = None;
        let seed = seed.wrapping_add(iteration);
        for point in poll(space, &centre, poll_size, last.as_deref(), seed) {
            match find(space, known, &point) {
                Found::New => return Some(point),
                Found::Pending => is_pending = true,
                Found::Known(objective) if objective < best => {
                    better = Some((point, objective));
                    break;
                }
                Found::Known(_) => {}
            }
        }
        match better {
            Some((point, objective)) => {
                last = Some(moved(&centre, &point));
                (centre, best) = (point, objective);
            }
            // The poll is not over.
            None if is_pending => return None,
            None => (poll_size, last) = (poll_size / 2.0, None),
        }
        if poll_size < SMALLEST {
            return None;
        }
    }
    None
}

enum Found {
    New,
    Pending,
    Known(f64),
}

/// What is known of the point that has the values of `point`.
fn find(space: &Space, known: &[Known], point: &[f64]) -> Found {
    let values = space.values(point);
    let same = known
        .iter()
        .filter(|known| space.values(&known.point) == values);
    let mut found = Found::New;
    for known in same {
        match known.objective {
            Some(objective) => return Found::Known(objective),
            None => found = Found::Pending,
        }
    }
    found
}

/// The point whose values are those of `point`.
fn snap(space: &Space, point: &[f64]) -> Vec<f64> {
    let snapped = space.point(&space.values(point));
    snapped.unwrap_or_else(|| point.to_vec())
}

/// The direction from one point to another, its largest entry one.
fn moved(from: &[f64], to: &[f64]) -> Vec<f64> {
    let step: Vec<f64> = from.iter().zip(to).map(|(from, to)| to - from).collect();
    let largest = step.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    step.iter()
        .map(|x| x / largest.max(f64::MIN_POSITIVE))
        .collect()
}

/// Cosine of the angle between two directions.
fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

/// The poll points around `centre`, different from it and from each other, in the order in which they are tried. `last` is the
/// direction of the last success.
fn poll(
    space: &Space,
    centre: &[f64],
    size: f64,
    last: Option<&[f64]>,
    seed: u64,
) -> Vec<Vec<f64>> {
    let ordered: Vec<usize> = (0..centre.len())
        .filter(|at| !space.parameters[*at].range.is_categorical())
        .collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut points: Vec<Vec<f64>> = Vec::new();
    let mut add = |point: Vec<f64>| {
        let point = snap(space, &point);
        let values = space.values(&point);
        let is_new = values != space.values(centre)
            && points.iter().all(|other| space.values(other) != values);
        if is_new {
            points.push(point);
        }
    };
    // Directions of all parameters; categories stay.
    let widened = |direction: &[f64]| {
        let mut whole = vec![0.0; centre.len()];
        for (at, step) in ordered.iter().zip(direction) {
            whole[*at] = *step;
        }
        whole
    };
    let mut steps: Vec<Vec<f64>> = directions(ordered.len(), &mut rng)
        .iter()
        .flat_map(|direction| [1.0, -1.0].map(|sign| direction.iter().map(|x| sign * x).collect()))
        .map(|direction: Vec<f64>| widened(&direction))
        .collect();
    if let Some(last) = last {
        let on = |direction: &Vec<f64>| cosine(direction, last);
        steps.sort_by(|a, b| on(b).total_cmp(&on(a)));
        let mut ahead: Vec<f64> = last.iter().map(|x| SPECULATIVE * x).collect();
        for at in (0..centre.len()).filter(|at| !ordered.contains(at)) {
            ahead[at] = 0.0;
        }
        steps.insert(0, ahead);
    }
    for direction in steps {
        let mut point = centre.to_vec();
        for at in &ordered {
            let range = &space.parameters[*at].range;
            // A whole number moves by at least one.
            let least = range.n_values().map_or(0.0, |n| 1.0 / n as f64);
            let step = size * direction[*at];
            let step = match step.abs() >= 0.3 * least {
                true => step.signum() * step.abs().max(least),
                false => 0.0,
            };
            point[*at] = (point[*at] + step).clamp(0.0, 1.0);
        }
        add(point);
    }
    let categories = (0..centre.len()).filter(|at| space.parameters[*at].range.is_categorical());
    for at in categories {
        let n = space.parameters[at].range.n_values().unwrap_or(1);
        for choice in 0..n {
            let mut point = centre.to_vec();
            point[at] = (choice as f64 + 0.5) / n as f64;
            add(point);
        }
    }
    points
}

/// `n` orthogonal directions whose largest entry is one: the rows of `I - 2 v v^T` for a random unit vector v.
fn directions(n: usize, rng: &mut StdRng) -> Vec<Vec<f64>> {
    let mut v: Vec<f64> = (0..n).map(|_| 2.0 * rng.random::<f64>() - 1.0).collect();
    let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    if norm > 0.0 {
        v.iter_mut().for_each(|x| *x /= norm);
    }
    (0..n)
        .map(|row| {
            let entry = |column: usize| f64::from(row == column) - 2.0 * v[row] * v[column];
            let direction: Vec<f64> = (0..n).map(entry).collect();
            let largest = direction
                .iter()
                .fold(0f64, |largest, x| largest.max(x.abs()));
            direction
                .iter()
                .map(|x| x / largest.max(f64::MIN_POSITIVE))
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_orthogonal() {
        let mut rng = StdRng::seed_from_u64(3);
        let rows = directions(4, &mut rng);
        for (i, a) in rows.iter().enumerate() {
            let largest = a.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            assert!((largest - 1.0).abs() < 1e-12);
            for b in &rows[..i] {
                let product: f64 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                assert!(product.abs() < 1e-12, "{product}");
            }
        }
    }

    /// Number of parameters, range of each, and the function itself.
    type Function = (usize, f64, f64, fn(&[f64]) -> f64);

    /// The functions of `tests/data/tune/nomad.json`, with the number of their parameters and the ranges of these.
    fn function(name: &str) -> Option<Function> {
        Some(match name {
            "sphere" => (3, -5.0, 5.0, |x| {
                let pairs = x.iter().zip([1.0, -2.0, 0.5]);
                pairs.map(|(x, at)| (x - at).powi(2)).sum()
            }),
            "rosenbrock" => (2, -2.0, 2.0, |x| {
                100.0 * (x[1] - x[0] * x[0]).powi(2) + (1.0 - x[0]).powi(2)
            }),
            "ellipsoid" => (4, -1.0, 1.0, |x| {
                let terms = x.iter().enumerate();
                terms
                    .map(|(at, x)| 10f64.powi(at as i32) * (x - 0.3).powi(2))
                    .sum()
            }),
            _ => return None,
        })
    }

    /// Against NOMAD 4.6 with its polls alone, which is what this file has: after as many evaluations the median of the best values
    /// is no more than six times as far off, on functions whose values span many orders.
    #[test]
    fn finds_what_nomads_polls_find() {
        use super::super::strategy::Strategy;
        use super::super::strategy::tests::minimise;

        let recorded = include_str!("../../tests/data/tune/nomad.json");
        let recorded: serde_json::Value = serde_json::from_str(recorded).expect("recorded");
        let mut n_compared = 0;
        for (name, of) in recorded["functions"].as_object().expect("functions") {
            let Some((n, low, high, f)) = function(name) else {
                continue;
            };
            let text: String = (0..n)
                .map(|at| {
                    format!("x{at} = {{ type = \"float\", low = {low:?}, high = {high:?} }}\n")
                })
                .collect();
            let space = Space::parse(&format!("[parameters]\n{text}"), name).expect("valid");
            for (budget, found) in of["budget"].as_object().expect("budgets") {
                let budget: usize = budget.parse().expect("a number");
                let run = |seed| {
                    minimise(Strategy::Mads, &space, budget, seed, &|values| {
                        let x: Vec<f64> = values.iter().filter_map(toml::Value::as_float).collect();
                        f(&x)
                    })
                };
                let mut ours: Vec<f64> = (1..=10).map(run).collect();
                ours.sort_by(f64::total_cmp);
                let median = f64::midpoint(ours[4], ours[5]);
                let theirs = found["poll"].as_f64().expect("a median");
                // Values have four digits here.
                assert!(
                    median <= 6.0 * theirs + 1e-5,
                    "{name} {budget}: {median} {theirs}"
                );
                n_compared += 1;
            }
        }
        assert_eq!(n_compared, 9);
    }
}
