//! How the next trial is chosen from those that are known.
//!
//! Every strategy is a function of the seed and of the trials, so that a study goes on after any end as if it had not ended.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::log::Trial;
use super::mads;
use super::space::{Range, Space};

/// How points are chosen.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Tree-structured Parzen estimators: points like the best so far, each parameter by itself.
    #[default]
    Tpe,
    /// Mesh adaptive direct search: points around the best so far, at distances that shrink.
    Mads,
    /// Points at random.
    Random,
}

/// What a strategy knows of a trial: its point and its objective, lower is better; `None` while it is not known.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its point of the unit cube.
    pub point: Vec<f64>,
    /// Its objective.
    pub objective: Option<f64>,
}

/// Trials before which TPE draws at random.
const STARTUP: usize = 8;

impl Strategy {
    /// The point of trial `index` under `seed`, given the trials before it. `start` is the point of run.toml itself, if it is within
    /// the space.
    pub fn propose(
        self,
        space: &Space,
        known: &[Known],
        (seed, index): (u64, usize),
        start: Option<&[f64]>,
    ) -> Vec<f64> {
        let mut rng =
            StdRng::seed_from_u64(seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if let (0, Some(start)) = (index, start) {
            return start.to_vec();
        }
        match self {
            Self::Random => random(space, &mut rng),
            Self::Tpe if known.iter().filter(|k| k.objective.is_some()).count() < STARTUP => {
                random(space, &mut rng)
            }
            Self::Tpe => tpe(space, known, &mut rng).unwrap_or_else(|| random(space, &mut rng)),
            Self::Mads => {
                let next = mads::next(space, known, seed, start);
                next.unwrap_or_else(|| random(space, &mut rng))
            }
        }
    }
}

fn random(space: &Space, rng: &mut StdRng) -> Vec<f64> {
    space
        .parameters
        .iter()
        .map(|_| rng.random::<f64>())
        .collect()
}

/// One parameter after the other, as the crate `tpe` models them; categories by their number.
fn tpe(space: &Space, known: &[Known], rng: &mut StdRng) -> Option<Vec<f64>> {
    let finished: Vec<&Known> = known
        .iter()
        .filter(|known| known.objective.is_some())
        .collect();
    let columns = space.parameters.iter().enumerate();
    columns
        .map(|(column, parameter)| {
            let values = finished
                .iter()
                .filter_map(|known| Some((known.point[column], known.objective?)));
            match &parameter.range {
                Range::Categorical { values: choices } => {
                    let n = choices.len();
                    let range = tpe::categorical_range(n).ok()?;
                    let mut model = tpe::TpeOptimizer::new(tpe::histogram_estimator(), range);
                    for (u, objective) in values {
                        let choice = ((u * n as f64) as usize).min(n - 1);
                        model.tell(choice as f64, objective).ok()?;
                    }
                    Some((model.ask(rng).ok()?.floor() + 0.5) / n as f64)
                }
                _ => {
                    let range = tpe::range(0.0, 1.0 + f64::EPSILON).ok()?;
                    let mut model = tpe::TpeOptimizer::new(tpe::parzen_estimator(), range);
                    for (u, objective) in values {
                        model.tell(u, objective).ok()?;
                    }
                    Some(model.ask(rng).ok()?.clamp(0.0, 1.0))
                }
            }
        })
        .collect()
}

/// What strategies know of `trials`: the objective of those that were trained to their end. A trial that was stopped counts as worse
/// than every finished one, and as worse the higher its last loss.
pub(super) fn known(space: &Space, trials: &[Trial]) -> Vec<Known> {
    use super::log::Outcome;

    let worst = trials
        .iter()
        .filter_map(Trial::objective)
        .fold(f64::NEG_INFINITY, f64::max);
    let point = |trial: &Trial| {
        let values = trial
            .values
            .iter()
            .map(|value| toml::Value::try_from(value).ok());
        space.point(&values.collect::<Option<Vec<_>>>()?)
    };
    trials
        .iter()
        .filter_map(|trial| {
            let last = trial.rungs.values().next_back().copied();
            let objective = match &trial.outcome {
                None => None,
                Some(Outcome::Finished { objective, .. }) => Some(*objective),
                Some(Outcome::Stopped { .. }) if worst.is_finite() => {
                    // A loss is squeezed to below one, so that it orders stopped trials and no more.
                    let last = last.filter(|loss| loss.is_finite()).unwrap_or(f64::MAX);
                    Some(worst + 1e-3 + 1e-3 * (last.abs() / (1.0 + last.abs())))
                }
                Some(Outcome::Stopped { .. }) => None,
                Some(Outcome::Failed { .. }) if worst.is_finite() => Some(worst + 1e-2),
                Some(Outcome::Failed { .. }) => None,
            };
            Some(Known {
                point: point(trial)?,
                objective,
            })
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Minimises `f` of the values with `budget` trials; the best objective.
    pub(crate) fn minimise(
        strategy: Strategy,
        space: &Space,
        budget: usize,
        seed: u64,
        f: &dyn Fn(&[toml::Value]) -> f64,
    ) -> f64 {
        let mut known: Vec<Known> = Vec::new();
        let middle = vec![0.5; space.parameters.len()];
        for index in 0..budget {
            let point = strategy.propose(space, &known, (seed, index), Some(&middle));
            let values = space.values(&point);
            let point = space.point(&values).expect("within the space");
            let objective = Some(f(&values));
            known.push(Known { point, objective });
        }
        known
            .iter()
            .filter_map(|k| k.objective)
            .fold(f64::INFINITY, f64::min)
    }

    fn mixed() -> Space {
        let text = "[parameters]\nx = { type = \"float\", low = 0.0, high = 1.0 }\nk = { type = \"integer\", low = 1, high = 16 }\nc = { type = \"categorical\", values = [0, 1, 2] }\n";
        Space::parse(text, "mixed").expect("valid")
    }

    fn of_mixed(values: &[toml::Value]) -> f64 {
        let (x, k) = (
            values[0].as_float().expect("real"),
            values[1].as_integer().expect("whole"),
        );
        let category = [0.3, 0.0, 0.6][values[2].as_integer().expect("whole") as usize];
        (x - 0.7).powi(2) + (k as f64 - 7.0).powi(2) / 10.0 + category
    }

    #[test]
    fn every_strategy_beats_chance_on_mixed_parameters() {
        let median = |strategy| {
            let run = |seed| minimise(strategy, &mixed(), 60, seed, &of_mixed);
            let mut found: Vec<f64> = (0..9).map(run).collect();
            found.sort_by(f64::total_cmp);
            found[4]
        };
        let [random, tpe, mads] = [Strategy::Random, Strategy::Tpe, Strategy::Mads].map(median);
        assert!(tpe < random, "{tpe} {random}");
        assert!(mads < random, "{mads} {random}");
        assert!(tpe < 0.02 && mads < 0.02, "{tpe} {mads}");
    }

    #[test]
    fn a_proposal_depends_on_seed_and_trials_alone() {
        let space = mixed();
        let known: Vec<Known> = (0..20)
            .map(|at| Known {
                point: vec![f64::from(at) / 20.0, 0.5, 0.5],
                objective: Some(f64::from(at)),
            })
            .collect();
        for strategy in [Strategy::Random, Strategy::Tpe, Strategy::Mads] {
            let propose = |seed| strategy.propose(&space, &known, (seed, 20), None);
            assert_eq!(propose(1), propose(1), "{strategy:?}");
            if strategy != Strategy::Mads {
                assert_ne!(propose(1), propose(2), "{strategy:?}");
            }
        }
    }
}
