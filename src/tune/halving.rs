//! Stopping poor trials early: asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) in its stopping form.
//!
//! Rungs are at `total / eta^k` steps. A trial that reaches a rung goes on if its validation loss there is among the best
//! `1/eta` of all that have reached it so far. The first `eta` trials at a rung go on, since there is nothing to compare them with.

use std::collections::BTreeMap;

use super::log::Trial;

/// The share of trials that goes on at a rung is `1/ETA`.
pub(super) const ETA: usize = 3;
/// Steps below which no rung lies: a loss that early says little.
const LEAST: u64 = 10;

/// The steps at which a run of `total` steps is compared, in order; only those at which it is evaluated, every `eval_steps`.
pub fn rungs(total: u64, eval_steps: u64) -> Vec<u64> {
    if eval_steps == 0 {
        return Vec::new();
    }
    let mut rungs = Vec::new();
    let mut step = total;
    loop {
        step /= ETA as u64;
        if step < LEAST {
            break;
        }
        // The next evaluation.
        let evaluated = step.div_ceil(eval_steps) * eval_steps;
        if evaluated < total && rungs.last() != Some(&evaluated) {
            rungs.push(evaluated);
        }
    }
    rungs.sort_unstable();
    rungs.dedup();
    rungs
}

/// Whether a trial with `value` at the rung `step` goes on, given all `trials`, itself among them or not.
pub(super) fn goes_on(trials: &[Trial], step: u64, value: f64) -> bool {
    let at_rung = |rungs: &BTreeMap<u64, f64>| rungs.get(&step).copied();
    let mut values: Vec<f64> = trials
        .iter()
        .filter_map(|trial| at_rung(&trial.rungs))
        .collect();
    if !values.contains(&value) {
        values.push(value);
    }
    if values.len() <= ETA || !value.is_finite() {
        return value.is_finite();
    }
    values.sort_by(f64::total_cmp);
    let n_best = values.len().div_ceil(ETA);
    value <= values[n_best - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rungs_are_where_a_run_is_evaluated() {
        assert_eq!(rungs(270, 10), [10, 30, 90]);
        assert_eq!(rungs(100, 25), [25, 50]);
        assert!(rungs(100, 0).is_empty());
        assert!(rungs(20, 5).is_empty());
        assert!(rungs(40, 40).is_empty());
    }

    #[test]
    fn the_best_third_goes_on() {
        let trial = |value: f64| Trial {
            rungs: [(10, value)].into(),
            ..Trial::default()
        };
        let trials: Vec<Trial> = [0.9, 0.8, 0.7, 0.6, 0.5].map(trial).into();
        assert!(goes_on(&trials[..1], 10, 0.9));
        assert!(
            goes_on(&trials[..2], 10, 2.0),
            "nothing to compare with yet"
        );
        assert!(goes_on(&trials, 10, 0.4));
        assert!(goes_on(&trials, 10, 0.55));
        assert!(!goes_on(&trials, 10, 0.75));
        assert!(goes_on(&trials, 30, 9.0), "another rung");
        assert!(!goes_on(&trials, 10, f64::NAN));
    }
}
