//! A study: trials that are chosen, run, compared and kept.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use monteclora_converters::files::{sha256, write_json, write_text};
use monteclora_converters::{Error, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::halving;
use super::log::{Entry, Log, Outcome, Trial};
use super::space::Space;
use super::strategy::{Strategy, known};
use super::trial::{BUSY, Commands, Objective, Running, Seen, dir_of, name_of};
use super::{BEST, LOG, RECORD};
use crate::config::set;
use crate::train::RunLock;

/// What a study is made of, `study.json`. It goes on only as what it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// SHA-256 of run.toml with the `--set`s of the command line.
    pub run_sha256: String,
    /// SHA-256 of space.toml.
    pub space_sha256: String,
    /// How points are chosen.
    pub strategy: Strategy,
    /// Seed of the choice.
    pub seed: u64,
    /// What is optimised.
    pub objective: Objective,
    /// Steps at which trials are compared; none without early stopping.
    pub rungs: Vec<u64>,
    /// SHA-256 of the training rows.
    pub train: String,
    /// SHA-256 of the rows of the objective.
    pub data: String,
    /// The number of these rows that are used.
    pub limit: Option<usize>,
}

/// What a caller may show.
#[derive(Debug)]
pub enum Event<'a> {
    /// A trial begins, or goes on.
    Started(usize, &'a [String], bool),
    /// A trial ended; with it the number of trials that ended, and the best objective.
    Ended(usize, &'a Outcome, usize, Option<f64>),
    /// A trial of an earlier process is still running.
    Waiting(usize),
}

/// A study under way.
pub struct Study<'a> {
    /// Its directory.
    pub dir: PathBuf,
    /// What is searched.
    pub space: &'a Space,
    /// What it is made of.
    pub options: Options,
    /// How trials are run.
    pub commands: Commands,
    /// The point of run.toml itself, which is tried first.
    pub start: Option<Vec<f64>>,
    /// Set to end.
    pub interrupt: &'a AtomicBool,
}

/// How often trials are looked at.
const PAUSE: Duration = Duration::from_millis(200);

impl Options {
    /// Hash of a file's text and of what changes it.
    pub fn hash(text: &str, overrides: &[String]) -> String {
        sha256(format!("{text}\n{}", overrides.join("\n")).as_bytes())
    }
}

impl Study<'_> {
    /// Opens the study in its directory, which may be new.
    ///
    /// # Errors
    /// Returns an error if another study was begun there, with what differs.
    pub fn open(&self) -> Result<(Log, RunLock)> {
        std::fs::create_dir_all(&self.dir).map_err(Error::io("create", &self.dir))?;
        let lock = RunLock::take(&self.dir, "give another directory with -o");
        let lock = lock.map_err(|error| match error {
            monteclora_adapters::Error::Format(error) => error,
            other => Problem::usage(other.to_string()).into(),
        })?;
        let path = self.dir.join(RECORD);
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let found: Options =
                    serde_json::from_str(&text).map_err(|e| Error::json(&path, &e))?;
                self.require_same(&found)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                write_json(&path, &self.options)?;
            }
            Err(error) => return Err(Error::io("read", &path)(error)),
        }
        let n_values = self.space.parameters.len();
        Ok((Log::open(&self.dir.join(LOG), n_values)?, lock))
    }

    fn require_same(&self, found: &Options) -> Result<()> {
        let ours = &self.options;
        let differs = [
            ("run.toml or --set", found.run_sha256 != ours.run_sha256),
            ("space.toml", found.space_sha256 != ours.space_sha256),
            ("--strategy", found.strategy != ours.strategy),
            ("--seed", found.seed != ours.seed),
            ("--objective", found.objective != ours.objective),
            ("early stopping", found.rungs != ours.rungs),
            ("the training rows", found.train != ours.train),
            ("the rows of the objective", found.data != ours.data),
            ("--limit", found.limit != ours.limit),
        ];
        let differs: Vec<&str> = differs
            .iter()
            .filter(|(_, differs)| *differs)
            .map(|(what, _)| *what)
            .collect();
        if differs.is_empty() {
            return Ok(());
        }
        let message = format!(
            "`{}` holds another study: {} differ; undo the change, or begin a new study in another directory with -o",
            self.dir.display(),
            differs.join(", ")
        );
        Err(Problem::usage(message).into())
    }

    /// Runs trials until `n_trials` have ended, `jobs` at a time; false if it was interrupted before.
    ///
    /// # Errors
    /// Returns an error if the system refuses, or if the first trials all fail.
    pub fn run(
        &self,
        log: &mut Log,
        n_trials: usize,
        jobs: usize,
        mut watch: impl FnMut(&Event<'_>),
    ) -> Result<bool> {
        let mut running = Vec::new();
        let ended = self.run_trials(log, n_trials, jobs, &mut running, &mut watch);
        // Nothing goes on without the study.
        for trial in &mut running {
            trial.stop(None);
            trial.wait();
        }
        ended
    }

    fn run_trials(
        &self,
        log: &mut Log,
        n_trials: usize,
        jobs: usize,
        running: &mut Vec<Running>,
        watch: &mut impl FnMut(&Event<'_>),
    ) -> Result<bool> {
        let mut waiting = None;
        loop {
            let stops = self.interrupt.load(Ordering::Relaxed);
            if stops {
                running.iter_mut().for_each(|trial| trial.stop(None));
            }
            while !stops && running.len() < jobs {
                let Some(next) = self.next(log, n_trials, running)? else {
                    break;
                };
                let dir = dir_of(&self.dir, next);
                if is_busy(&dir)? {
                    if waiting != Some(next) {
                        watch(&Event::Waiting(next));
                        waiting = Some(next);
                    }
                    break;
                }
                let settings = self.settings(&log.trials[next])?;
                watch(&Event::Started(next, &settings, dir.is_dir()));
                running.push(Running::start(&self.commands, &self.dir, next, &settings)?);
            }
            if running.is_empty()
                && (stops || waiting.is_none() || self.next(log, n_trials, running)?.is_none())
            {
                break;
            }
            std::thread::sleep(PAUSE);
            let mut at = 0;
            while at < running.len() {
                self.compare(log, &mut running[at])?;
                let seen = running[at].look(&self.commands, &self.options.objective)?;
                if matches!(seen, Seen::Running) {
                    at += 1;
                    continue;
                }
                let trial = running.remove(at);
                match seen {
                    // It is waited for.
                    Seen::Running | Seen::Busy => {}
                    Seen::Ended(None) => self.interrupt.store(true, Ordering::Relaxed),
                    Seen::Ended(Some(outcome)) => {
                        let index = trial.index;
                        log.add(&Entry::Ended {
                            trial: index,
                            outcome: outcome.clone(),
                        })?;
                        let best = log.best().map(|(_, objective)| objective);
                        watch(&Event::Ended(index, &outcome, log.n_ended(), best));
                        require_some_success(&log.trials)?;
                    }
                }
            }
        }
        Ok(log.n_ended() >= n_trials)
    }

    /// The trial that is to run next: one that was begun and did not end, or a new one, which is written to the log.
    fn next(&self, log: &mut Log, n_trials: usize, running: &[Running]) -> Result<Option<usize>> {
        let runs = |index: usize| running.iter().any(|trial| trial.index == index);
        let open = (0..log.trials.len())
            .find(|index| log.trials[*index].outcome.is_none() && !runs(*index));
        if let Some(open) = open.filter(|open| *open < n_trials) {
            return Ok(Some(open));
        }
        let index = log.trials.len();
        if index >= n_trials {
            return Ok(None);
        }
        let known = known(self.space, &log.trials);
        let mut values = None;
        // A point that was tried already says nothing new, unless there is no other.
        for attempt in 0..64u64 {
            let seed = (self.options.seed.wrapping_add(attempt << 32), index);
            let point =
                self.options
                    .strategy
                    .propose(self.space, &known, seed, self.start.as_deref());
            let found = self.space.values(&point);
            let is_new = log
                .trials
                .iter()
                .all(|trial| trial.values != json_of(&found));
            values = Some(found);
            if is_new {
                break;
            }
        }
        let values = json_of(&values.unwrap_or_default());
        log.add(&Entry::Started {
            trial: index,
            values,
        })?;
        Ok(Some(index))
    }

    /// Settings of a trial as `--set` takes them.
    ///
    /// # Errors
    /// Returns an error if the log holds a value that TOML has not.
    pub fn settings(&self, trial: &Trial) -> Result<Vec<String>> {
        let values = trial.values.iter().map(toml::Value::try_from);
        let values: std::result::Result<Vec<_>, _> = values.collect();
        let wrong = |error| Problem::usage(format!("{LOG}: a value of a trial: {error}"));
        Ok(self.space.settings(&values.map_err(wrong)?))
    }

    /// Compares a trial at the rungs that it has reached, and stops it where others are better.
    fn compare(&self, log: &mut Log, trial: &mut Running) -> Result<()> {
        if self.options.rungs.is_empty() || trial.is_stopping() {
            return Ok(());
        }
        for (step, value) in trial.evaluations() {
            let is_known = log.trials[trial.index].rungs.contains_key(&step);
            if !self.options.rungs.contains(&step) || is_known && trial.is_compared {
                continue;
            }
            if !is_known {
                log.add(&Entry::Rung {
                    trial: trial.index,
                    step,
                    value,
                })?;
            }
            if !halving::goes_on(&log.trials, step, value) {
                trial.stop(Some(step));
                return Ok(());
            }
        }
        // A trial that an earlier process was stopping is compared once more; after that each rung once.
        trial.is_compared = true;
        Ok(())
    }

    /// Writes run.toml with the best trial's settings, `best.toml`; its path.
    ///
    /// # Errors
    /// Returns an error if run.toml is none, or the file cannot be written.
    pub fn write_best(
        &self,
        log: &Log,
        run_toml: &str,
        overrides: &[String],
    ) -> Result<Option<PathBuf>> {
        let Some((index, _)) = log.best() else {
            return Ok(None);
        };
        let wrong = |error: toml::de::Error| Problem::usage(format!("run.toml: {error}"));
        let mut table: toml::Table = run_toml.parse().map_err(wrong)?;
        for entry in overrides
            .iter()
            .cloned()
            .chain(self.settings(&log.trials[index])?)
        {
            set(&mut table, &entry)
                .map_err(|message| Problem::usage(format!("{BEST}: {message}")))?;
        }
        let path = self.dir.join(BEST);
        let text = format!(
            "# The settings of {}, the best of the study.\n{table}",
            name_of(index)
        );
        write_text(&path, &text)?;
        Ok(Some(path))
    }
}

fn json_of(values: &[toml::Value]) -> Vec<Value> {
    values
        .iter()
        .map(|value| serde_json::to_value(value).unwrap_or_default())
        .collect()
}

/// Ends a study whose trials all fail: it is not the settings then.
fn require_some_success(trials: &[Trial]) -> Result<()> {
    const ENOUGH: usize = 3;
    let ended: Vec<&Outcome> = trials
        .iter()
        .filter_map(|trial| trial.outcome.as_ref())
        .collect();
    let failed = |outcome: &&&Outcome| matches!(outcome, Outcome::Failed { .. });
    match ended.as_slice() {
        [.., Outcome::Failed { reason }]
            if ended.len() >= ENOUGH && ended.iter().filter(failed).count() == ended.len() =>
        {
            let message = format!("all {} trials failed, the last with: {reason}", ended.len());
            Err(Problem::sentence("tune", message).exit(1).into())
        }
        _ => Ok(()),
    }
}

/// Whether a run of an earlier process still writes to `dir`.
fn is_busy(dir: &Path) -> Result<bool> {
    match dir.is_dir() {
        // Every other fault is told by the trial itself.
        true => Ok(RunLock::take(dir, "").is_err_and(|error| error.to_string().contains(BUSY))),
        false => Ok(false),
    }
}
