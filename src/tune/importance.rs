//! How much each parameter decides: a number from 0 to 1 per parameter, from the finished trials.
//!
//! For ordered parameters it is the square of Spearman's rank correlation with the objective; for categories the share of the
//! variance of the ranks that lies between them (eta squared). Both are of one parameter by itself: what two decide together is not seen.

use super::space::Space;
use super::strategy::Known;

/// Ranks from 0, the mean rank for equal values.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    while first < order.len() {
        let mut last = first;
        while last + 1 < order.len() && values[order[last + 1]] == values[order[first]] {
            last += 1;
        }
        for at in &order[first..=last] {
            ranks[*at] = (first + last) as f64 / 2.0;
        }
        first = last + 1;
    }
    ranks
}

/// The importance of every parameter, in the order of the space; `None` below 5 finished trials.
pub(super) fn importance(space: &Space, known: &[Known]) -> Option<Vec<f64>> {
    let finished: Vec<(&[f64], f64)> = known
        .iter()
        .filter_map(|known| Some((known.point.as_slice(), known.objective?)))
        .collect();
    if finished.len() < 5 {
        return None;
    }
    let objectives: Vec<f64> = finished.iter().map(|(_, objective)| *objective).collect();
    let y = ranks(&objectives);
    let mean = y.iter().sum::<f64>() / y.len() as f64;
    let total: f64 = y.iter().map(|y| (y - mean).powi(2)).sum();
    let of = |column: usize| {
        let x: Vec<f64> = finished.iter().map(|(point, _)| point[column]).collect();
        if total == 0.0 {
            return 0.0;
        }
        if space.parameters[column].range.is_categorical() {
            let mut between = 0.0;
            let mut seen: Vec<f64> = x.clone();
            seen.sort_by(f64::total_cmp);
            seen.dedup();
            for choice in seen {
                let group: Vec<f64> = x
                    .iter()
                    .zip(&y)
                    .filter(|(x, _)| **x == choice)
                    .map(|(_, y)| *y)
                    .collect();
                let own = group.iter().sum::<f64>() / group.len() as f64;
                between += group.len() as f64 * (own - mean).powi(2);
            }
            return between / total;
        }
        let x = ranks(&x);
        let spread: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
        let product: f64 = x.iter().zip(&y).map(|(x, y)| (x - mean) * (y - mean)).sum();
        match spread > 0.0 {
            true => product * product / (spread * total),
            false => 0.0,
        }
    };
    Some((0..space.parameters.len()).map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decides_is_important() {
        let text = "[parameters]\na = { type = \"float\", low = 0.0, high = 1.0 }\nb = { type = \"float\", low = 0.0, high = 1.0 }\nc = { type = \"categorical\", values = [0, 1] }\n";
        let space = Space::parse(text, "x").expect("valid");
        let known = |f: &dyn Fn(&[f64]) -> f64| -> Vec<Known> {
            (0..40)
                .map(|at| {
                    let point = vec![
                        f64::from(at) / 40.0,
                        f64::from(at * 17 % 40) / 40.0,
                        if at % 2 == 0 { 0.25 } else { 0.75 },
                    ];
                    let objective = Some(f(&point));
                    Known { point, objective }
                })
                .collect()
        };
        let found = importance(&space, &known(&|p| p[0].powi(3))).expect("enough");
        assert!(
            found[0] > 0.99 && found[1] < 0.2 && found[2] < 0.1,
            "{found:?}"
        );
        let found = importance(&space, &known(&|p| p[2])).expect("enough");
        assert!(found[2] > 0.99 && found[0] < 0.1, "{found:?}");
        let same = importance(&space, &known(&|_| 1.0)).expect("enough");
        assert_eq!(same, [0.0; 3]);
        assert_eq!(importance(&space, &known(&|_| 1.0)[..4]), None);
    }
}
