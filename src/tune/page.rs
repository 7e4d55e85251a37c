//! One self-contained HTML page about a study.

use std::path::Path;

use minijinja::context;
use monteclora_converters::{Error, Result};
use serde_json::Value;

use super::importance::importance;
use super::log::{Log, Outcome, Trial, best};
use super::space::Space;
use super::strategy::known;
use super::study::Options;
use super::trial::name_of;
use super::{BEST, LOG, RECORD};
use crate::report::lay_out;

/// Name of the copy of space.toml in a study.
pub const SPACE: &str = "space.toml";

/// What a page about a study shows.
#[derive(Debug)]
pub struct StudyPage {
    name: String,
    options: Options,
    space: Space,
    trials: Vec<Trial>,
    best: String,
}

impl StudyPage {
    /// Whether `dir` is the directory of a study.
    pub fn is_study(dir: &Path) -> bool {
        dir.join(RECORD).is_file() && dir.join(LOG).is_file()
    }

    /// Reads the study in `dir`.
    ///
    /// # Errors
    /// Returns an error if a file is missing or damaged.
    pub fn read(dir: &Path) -> Result<Self> {
        let record = dir.join(RECORD);
        let space = Space::read(&dir.join(SPACE))?;
        let text = std::fs::read_to_string(&record).map_err(Error::io("read", &record))?;
        Ok(Self {
            name: crate::output::name_of(&dir.canonicalize().unwrap_or_else(|_| dir.to_owned())),
            options: serde_json::from_str(&text).map_err(|e| Error::json(&record, &e))?,
            trials: Log::trials_in(&dir.join(LOG), space.parameters.len())?,
            space,
            best: std::fs::read_to_string(dir.join(BEST)).unwrap_or_default(),
        })
    }

    /// Renders the page.
    ///
    /// # Errors
    /// Returns an error if the template cannot be rendered.
    pub fn html(&self) -> Result<String> {
        let objective = &self.options.objective;
        let winner = best(&self.trials);
        let of = importance(&self.space, &known(&self.space, &self.trials));
        let keys: Vec<&str> = self
            .space
            .parameters
            .iter()
            .map(|p| p.key.as_str())
            .collect();
        let plain = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let mut order: Vec<usize> = (0..self.trials.len()).collect();
        // The best first; those without an objective last, in their order.
        order.sort_by(|a, b| {
            let value = |at: &usize| self.trials[*at].objective().unwrap_or(f64::INFINITY);
            value(a).total_cmp(&value(b)).then(a.cmp(b))
        });
        let trials: Vec<_> = order
            .into_iter()
            .map(|index| {
                let trial = &self.trials[index];
                let (state, score, seconds) = match &trial.outcome {
                    None => ("running".to_owned(), None, None),
                    Some(Outcome::Finished {
                        objective: value,
                        seconds,
                        ..
                    }) => (
                        "finished".to_owned(),
                        Some(objective.shown(*value)),
                        Some(*seconds),
                    ),
                    Some(Outcome::Stopped { step }) => {
                        (format!("stopped at step {step}"), None, None)
                    }
                    Some(Outcome::Failed { reason }) => (format!("failed: {reason}"), None, None),
                };
                context! {
                    name => name_of(index),
                    values => trial.values.iter().map(plain).collect::<Vec<_>>(),
                    state => state,
                    score => score.map(|score| format!("{score:.4}")),
                    seconds => seconds.map(|seconds| format!("{seconds:.0}")),
                    best => winner.is_some_and(|(best, _)| best == index),
                }
            })
            .collect();
        let count = |is: fn(&Outcome) -> bool| {
            self.trials
                .iter()
                .filter(|trial| trial.outcome.as_ref().is_some_and(is))
                .count()
        };
        let importance: Option<Vec<_>> = of.map(|of| {
            let pairs = keys.iter().zip(of);
            pairs
                .map(|(key, value)| context! { key => key, value => format!("{value:.2}"), width => (100.0 * value).round() })
                .collect()
        });
        let values = context! {
            title => format!("Study {}", self.name),
            metric => objective.metric,
            direction => if objective.maximise { "higher is better" } else { "lower is better" },
            strategy => format!("{:?}", self.options.strategy).to_lowercase(),
            keys => keys,
            trials => trials,
            importance => importance,
            n_finished => count(|o| matches!(o, Outcome::Finished { .. })),
            n_stopped => count(|o| matches!(o, Outcome::Stopped { .. })),
            n_failed => count(|o| matches!(o, Outcome::Failed { .. })),
            best => winner.map(|(index, value)| context! { name => name_of(index), score => format!("{:.4}", objective.shown(value)) }),
            best_toml => self.best,
        };
        lay_out(include_str!("page.html"), values)
    }
}
