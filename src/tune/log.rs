//! `trials.jsonl`: what happened to every trial, a line each, written through at once. A line that a killed process left torn is
//! dropped; everything before it holds.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use monteclora_converters::{Error, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Entry {
    /// A trial was begun with these values, in the order of the space.
    Started {
        /// Its number, from 0.
        trial: usize,
        /// Its values.
        values: Vec<Value>,
    },
    /// A trial reached a rung: a number of steps at which trials are compared.
    Rung {
        /// The trial.
        trial: usize,
        /// Steps made.
        step: u64,
        /// Validation loss there.
        value: f64,
    },
    /// A trial ended.
    Ended {
        /// The trial.
        trial: usize,
        /// How.
        #[serde(flatten)]
        outcome: Outcome,
    },
}

/// How a trial ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It was trained to its end and evaluated.
    Finished {
        /// The objective; lower is better, so that a score that is to be high is negated.
        objective: f64,
        /// What `eval` measured.
        scores: Value,
        /// Seconds of training and evaluation.
        seconds: f64,
    },
    /// It was stopped at a rung, where others were better.
    Stopped {
        /// Steps made.
        step: u64,
    },
    /// It failed.
    Failed {
        /// The last lines that it wrote.
        reason: String,
    },
}

/// What is known of a trial.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trial {
    /// Its values, in the order of the space.
    pub values: Vec<Value>,
    /// Validation losses at rungs, by step.
    pub rungs: BTreeMap<u64, f64>,
    /// How it ended; `None` while it runs, or if the study was killed meanwhile.
    pub outcome: Option<Outcome>,
}

impl Trial {
    /// The objective of a trial that was trained to its end.
    pub fn objective(&self) -> Option<f64> {
        match &self.outcome {
            Some(Outcome::Finished { objective, .. }) => Some(*objective),
            _ => None,
        }
    }
}

/// The best trial that was trained to its end, and its objective.
pub(super) fn best(trials: &[Trial]) -> Option<(usize, f64)> {
    let finished = trials.iter().enumerate();
    let finished = finished.filter_map(|(index, trial)| Some((index, trial.objective()?)));
    finished.min_by(|a, b| a.1.total_cmp(&b.1))
}

/// The log of a study.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    /// The trials, by number.
    pub trials: Vec<Trial>,
}

impl Log {
    /// Opens the log at `path`, which may not exist yet, and reads what happened. A trial has `n_values` values.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if a line but the last is damaged.
    pub fn open(path: &Path, n_values: usize) -> Result<Self> {
        let io = |what| Error::io(what, path);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(io("open"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io("read"))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        // The next line is written over a torn one.
        file.set_len(whole as u64).map_err(io("write"))?;
        file.seek(SeekFrom::End(0)).map_err(io("write"))?;
        let trials = read(&text[..whole], path, n_values)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            trials,
        })
    }

    /// The trials of the log at `path`, without changing it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn trials_in(path: &Path, n_values: usize) -> Result<Vec<Trial>> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        read(&text[..whole], path, n_values)
    }

    /// The best trial that was trained to its end, and its objective.
    pub fn best(&self) -> Option<(usize, f64)> {
        best(&self.trials)
    }

    /// The number of trials that ended.
    pub(super) fn n_ended(&self) -> usize {
        let ended = self.trials.iter().filter(|trial| trial.outcome.is_some());
        ended.count()
    }

    /// Adds a line.
    ///
    /// # Errors
    /// Returns an error if the system refuses.
    pub fn add(&mut self, entry: &Entry) -> Result<()> {
        let mut line = serde_json::to_string(entry).map_err(|e| Error::json(&self.path, &e))?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes());
        written
            .and_then(|()| self.file.sync_data())
            .map_err(Error::io("write", &self.path))?;
        apply(&mut self.trials, entry.clone());
        Ok(())
    }
}

fn read(text: &str, path: &Path, n_values: usize) -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let refuse = |message: String| {
            let at = format!("{}:{}", path.display(), number + 1);
            let fix = "bring back the file as it was, or begin another study in another directory with -o";
            Problem::new("study-log", at, message, fix).exit(2)
        };
        let entry: Entry = serde_json::from_str(line)
            .map_err(|error| refuse(format!("not a line of a study: {error}")))?;
        let n_begun = trials.len();
        let fault = match &entry {
            Entry::Started { trial, .. } if *trial != n_begun => {
                Some(format!("trial {trial} begins, and trial {n_begun} is next"))
            }
            Entry::Started { values, .. } if values.len() != n_values => Some(format!(
                "{} values, and the space has {n_values} parameters",
                values.len()
            )),
            Entry::Rung { trial, .. } | Entry::Ended { trial, .. } if *trial >= n_begun => {
                Some(format!("trial {trial} has not begun"))
            }
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(refuse(fault).into());
        }
        apply(&mut trials, entry);
    }
    Ok(trials)
}

fn apply(trials: &mut Vec<Trial>, entry: Entry) {
    let (Entry::Started { trial, .. } | Entry::Rung { trial, .. } | Entry::Ended { trial, .. }) =
        entry;
    if trials.len() <= trial {
        trials.resize(trial + 1, Trial::default());
    }
    let known = &mut trials[trial];
    match entry {
        Entry::Started { values, .. } => known.values = values,
        Entry::Rung { step, value, .. } => {
            known.rungs.insert(step, value);
        }
        Entry::Ended { outcome, .. } => known.outcome = Some(outcome),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_torn_line_is_dropped_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("trials.jsonl");
        let started = |trial| Entry::Started {
            trial,
            values: vec![json!(1e-4), json!("lora")],
        };
        let ended = Entry::Ended {
            trial: 0,
            outcome: Outcome::Finished {
                objective: 0.25,
                scores: json!({"loss": 0.25}),
                seconds: 1.5,
            },
        };
        let mut log = Log::open(&path, 2).expect("new");
        log.add(&started(0)).expect("written");
        log.add(&ended).expect("written");
        log.add(&started(1)).expect("written");
        drop(log);
        let whole = std::fs::read(&path).expect("readable");
        let all = Log::trials_in(&path, 2).expect("read");
        assert_eq!(all[0].objective(), Some(0.25));
        assert_eq!(all[1].outcome, None);
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).expect("writable");
            let mut log = Log::open(&path, 2).expect("torn lines are no damage");
            let n = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            log.add(&started(log.trials.len())).expect("written");
            let text = std::fs::read_to_string(&path).expect("readable");
            assert_eq!(text.lines().count(), n + 1);
        }
        std::fs::write(&path, "{}\n").expect("writable");
        let error = Log::open(&path, 2).expect_err("damaged");
        assert!(error.to_string().contains("trials.jsonl:1"), "{error}");
    }
}
