//! Reads metrics.jsonl as one history, even if the run was interrupted and resumed.

use std::io::BufRead;

use serde::Deserialize;
use serde_json::{Map, Value};

/// The values of a `train` or an `eval` line.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Point {
    /// Number of optimiser steps made.
    pub step: u64,
    /// Values by key. Numbers that were not finite are null.
    #[serde(flatten)]
    pub values: Map<String, Value>,
}

impl Point {
    /// The number at `key`, if there is one.
    pub fn get(&self, key: &str) -> Option<f64> {
        self.values.get(key)?.as_f64()
    }
}

/// An `event` line.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EventPoint {
    /// What happened.
    pub event: String,
    /// Number of optimiser steps made.
    pub step: u64,
    /// Seconds since the run began.
    pub wall_s: Option<f64>,
}

/// The metrics and events of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Training metrics, by step.
    pub train: Vec<Point>,
    /// Evaluations, by step.
    pub eval: Vec<Point>,
    /// Events, in the order they happened.
    pub events: Vec<EventPoint>,
    /// Number of lines that are not valid. A killed run may leave one.
    pub n_unreadable: usize,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    Train(Point),
    Eval(Point),
    Event(EventPoint),
    #[serde(other)]
    Unknown,
}

impl History {
    /// Reads every line. If a run resumed from a checkpoint, earlier lines about later steps are dropped.
    ///
    /// # Errors
    /// Returns the reader's errors.
    pub fn read(reader: impl BufRead) -> std::io::Result<Self> {
        let mut history = Self::default();
        for line in reader.split(b'\n') {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice(&line) {
                Ok(Line::Train(point)) => {
                    back_to(&mut history.train, point.step);
                    history.train.push(point);
                }
                Ok(Line::Eval(point)) => {
                    back_to(&mut history.eval, point.step);
                    history.eval.push(point);
                }
                Ok(Line::Event(point)) => {
                    if matches!(point.event.as_str(), "started" | "resumed") {
                        back_to(&mut history.train, point.step + 1);
                        back_to(&mut history.eval, point.step + 1);
                    }
                    history.events.push(point);
                }
                Ok(Line::Unknown) => {}
                Err(_) => history.n_unreadable += 1,
            }
        }
        Ok(history)
    }

    /// The evaluation with the lowest loss; the first one if several have it.
    pub fn best(&self) -> Option<&Point> {
        let with_loss = self.eval.iter().filter_map(|p| Some((p.get("loss")?, p)));
        let best = with_loss.min_by(|(a, _), (b, _)| a.total_cmp(b));
        best.map(|(_, point)| point)
    }

    /// Says how the run ended, or that no event reports its end.
    pub fn status(&self) -> String {
        let last = |name: &str| self.events.iter().rposition(|event| event.event == name);
        let begun = last("started").max(last("resumed"));
        let since = |name: &str| {
            last(name)
                .filter(|at| Some(*at) > begun)
                .map(|at| &self.events[at])
        };
        if let Some(event) = since("finished") {
            return match since("early_stop") {
                Some(_) => format!("stopped early at step {}", event.step),
                None => format!("finished at step {}", event.step),
            };
        }
        if let Some(event) = since("interrupted") {
            return format!("interrupted at step {}", event.step);
        }
        match self
            .train
            .last()
            .map(|p| p.step)
            .max(begun.map(|at| self.events[at].step))
        {
            Some(step) => format!("running or killed after step {step}"),
            None => "nothing reported yet".to_owned(),
        }
    }
}

fn back_to(points: &mut Vec<Point>, step: u64) {
    while points.last().is_some_and(|point| point.step >= step) {
        points.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> History {
        History::read(lines.join("\n").as_bytes()).expect("reads")
    }

    fn train(step: u64, loss: &str) -> String {
        format!(r#"{{"type":"train","step":{step},"task_loss":{loss}}}"#)
    }

    fn event(name: &str, step: u64) -> String {
        format!(r#"{{"type":"event","event":"{name}","step":{step},"wall_s":1}}"#)
    }

    #[test]
    fn a_resumed_run_is_one_curve() {
        let lines = [
            event("started", 0),
            train(10, "3"),
            train(20, "2"),
            train(30, "9"),
            "{\"type\":\"tra".to_owned(),
            event("resumed", 20),
            train(30, "1"),
            event("finished", 30),
        ];
        let history = read(&lines.each_ref().map(String::as_str));
        let curve: Vec<_> = history
            .train
            .iter()
            .map(|p| (p.step, p.get("task_loss")))
            .collect();
        assert_eq!(curve, [(10, Some(3.0)), (20, Some(2.0)), (30, Some(1.0))]);
        assert_eq!(history.n_unreadable, 1);
        assert_eq!(history.status(), "finished at step 30");
    }

    #[test]
    fn the_end_is_told_from_what_was_said_last() {
        assert_eq!(read(&[]).status(), "nothing reported yet");
        let lines = [
            event("started", 0),
            train(10, "3"),
            event("interrupted", 12),
        ];
        let mut lines: Vec<String> = lines.into();
        let status =
            |lines: &[String]| read(&lines.iter().map(String::as_str).collect::<Vec<_>>()).status();
        assert_eq!(status(&lines), "interrupted at step 12");
        lines.push(event("resumed", 12));
        assert_eq!(status(&lines), "running or killed after step 12");
        lines.extend([event("early_stop", 40), event("finished", 40)]);
        assert_eq!(status(&lines), "stopped early at step 40");
    }

    #[test]
    fn what_was_not_finite_is_absent() {
        let history = read(&[&train(1, "null")]);
        assert_eq!(history.train[0].get("task_loss"), None);
        assert_eq!(history.best(), None);
    }
}
