//! One trial: `train` and `eval` as processes of their own, in a directory of their own. The same commands run it by hand, in a Slurm
//! array or as a Ray task.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use monteclora_converters::{Error, Problem, Result};
use serde_json::Value;

use super::log::Outcome;
use crate::report::METRICS;

/// What all trials of a study share.
#[derive(Debug, Clone)]
pub struct Commands {
    /// The program that trains and evaluates: this one.
    pub program: PathBuf,
    /// Arguments of `train` besides the trial's own settings.
    pub train: Vec<OsString>,
    /// Arguments of `eval` besides the adapter.
    pub eval: Vec<OsString>,
    /// Threads per trial.
    pub threads: usize,
}

/// The part of a trial that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Training,
    Evaluating,
}

/// A trial under way.
#[derive(Debug)]
pub(super) struct Running {
    /// Its number.
    pub(super) index: usize,
    /// Its output directory.
    pub(super) dir: PathBuf,
    part: Part,
    child: Child,
    began: Instant,
    /// Whether the rungs of an earlier process were compared again.
    pub(super) is_compared: bool,
    /// Set when the trial was told to stop: the step of the rung, or `None` for the end of the study.
    stopping: Option<Option<u64>>,
    scores: PathBuf,
    /// What it writes.
    log: PathBuf,
    /// Length of the trial's log when this process began to write it.
    log_from: usize,
}

/// What became of a trial when it was looked at.
#[derive(Debug)]
pub(super) enum Seen {
    /// It runs.
    Running,
    /// It could not begin, since a process of an earlier study still runs it.
    Busy,
    /// It ended. Without an outcome the study was told to stop, and the trial goes on another time.
    Ended(Option<Outcome>),
}

/// The name of trial `index`, such as `trial-0007`.
pub fn name_of(index: usize) -> String {
    format!("trial-{index:04}")
}

/// The output directory of trial `index`. What the trial writes and its scores lie beside it, as `.log` and `.json`.
pub fn dir_of(study: &Path, index: usize) -> PathBuf {
    study.join(name_of(index))
}

/// Arguments of `train` for a trial with `settings`.
fn train_arguments(commands: &Commands, settings: &[String], dir: &Path) -> Vec<OsString> {
    let mut arguments = vec![OsString::from("train")];
    arguments.extend(commands.train.iter().cloned());
    for setting in settings {
        arguments.extend(["--set".into(), setting.into()]);
    }
    let output = format!(
        "train.output_dir={}",
        toml::Value::from(dir.display().to_string())
    );
    arguments.extend(["--set".into(), output.into()]);
    // A directory that does not exist yet is begun.
    arguments.extend(["--resume".into(), "auto".into()]);
    arguments
}

impl Running {
    /// Begins trial `index` in its directory below `study`, or goes on with it.
    ///
    /// # Errors
    /// Returns an error if the program cannot be started.
    pub(super) fn start(
        commands: &Commands,
        study: &Path,
        index: usize,
        settings: &[String],
    ) -> Result<Self> {
        let dir = dir_of(study, index);
        let arguments = train_arguments(commands, settings, &dir);
        let log = dir.with_extension("log");
        let log_from = std::fs::metadata(&log).map_or(0, |found| found.len() as usize);
        let child = spawn(commands, &arguments, &log, None)?;
        Ok(Self {
            log_from,
            index,
            scores: dir.with_extension("json"),
            log,
            dir,
            part: Part::Training,
            child,
            began: Instant::now(),
            is_compared: false,
            stopping: None,
        })
    }

    /// Whether the run was refused because another process writes to its directory; that one may have written to the log since.
    fn met_another(&self) -> bool {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let since = text.get(self.log_from..).unwrap_or_default();
        String::from_utf8_lossy(since).contains(BUSY)
    }

    /// Where `eval` writes until it has ended.
    fn partial(&self) -> PathBuf {
        self.scores
            .with_extension(format!("{}.partial", std::process::id()))
    }

    /// Validation losses of the run so far, by step.
    pub(super) fn evaluations(&self) -> Vec<(u64, f64)> {
        let Ok(file) = File::open(self.dir.join(METRICS)) else {
            return Vec::new();
        };
        let lines = BufReader::new(file)
            .lines()
            .map_while(std::result::Result::ok);
        lines
            .filter_map(|line| {
                // A line that is being written is read another time.
                let record: Value = serde_json::from_str(&line).ok()?;
                (record["type"] == "eval")
                    .then_some((record["step"].as_u64()?, record["loss"].as_f64()?))
            })
            .collect()
    }

    /// Tells the trial to stop: at the rung `step`, or `None` because the study ends. It writes a checkpoint first.
    pub(super) fn stop(&mut self, step: Option<u64>) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(step);
        let id = self.child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &id]).status();
        if !told.is_ok_and(|status| status.success()) {
            // What has no signals is ended; the last checkpoint stays.
            let _ = self.child.kill();
        }
    }

    /// Whether the trial was told to stop.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// Waits for the end of a trial that was told to stop.
    pub(super) fn wait(&mut self) {
        let _ = self.child.wait();
    }

    /// Looks whether the trial has ended, and begins its evaluation after its training.
    ///
    /// # Errors
    /// Returns an error if the system refuses.
    pub(super) fn look(&mut self, commands: &Commands, objective: &Objective) -> Result<Seen> {
        let waited = self
            .child
            .try_wait()
            .map_err(Error::io("wait for", &self.dir))?;
        let Some(status) = waited else {
            return Ok(Seen::Running);
        };
        if let Some(step) = self.stopping {
            let stopped = step.map(|step| Outcome::Stopped { step });
            return Ok(Seen::Ended(stopped));
        }
        let failed = |what: &str| {
            let reason = format!("{what}: {}", last_lines(&self.log));
            Ok(Seen::Ended(Some(Outcome::Failed { reason })))
        };
        if !status.success() {
            if self.part == Part::Training && self.met_another() {
                return Ok(Seen::Busy);
            }
            // Somebody stopped the trial by itself; a crash or a lack of memory is a failure.
            return match status.code() {
                Some(130) => Ok(Seen::Ended(None)),
                _ => {
                    let part = match self.part {
                        Part::Training => "train",
                        Part::Evaluating => "eval",
                    };
                    failed(&format!("{part} {}", how_it_ended(status)))
                }
            };
        }
        if self.part == Part::Training {
            let mut arguments = vec![OsString::from("eval"), "-a".into(), self.dir.clone().into()];
            arguments.extend(commands.eval.iter().cloned());
            self.child = spawn(commands, &arguments, &self.log, Some(&self.partial()))?;
            self.part = Part::Evaluating;
            return Ok(Seen::Running);
        }
        let partial = self.partial();
        std::fs::rename(&partial, &self.scores).map_err(Error::io("rename", &partial))?;
        let text =
            std::fs::read_to_string(&self.scores).map_err(Error::io("read", &self.scores))?;
        let Ok(scores) = serde_json::from_str::<Value>(&text) else {
            return failed("eval wrote no scores");
        };
        match objective.of(&scores["mean"]) {
            Some(value) => Ok(Seen::Ended(Some(Outcome::Finished {
                objective: value,
                scores: scores["mean"].clone(),
                seconds: self.began.elapsed().as_secs_f64(),
            }))),
            None => failed(&format!("eval measured no `{}`", objective.metric)),
        }
    }
}

/// What is optimised: a score of `eval`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Objective {
    /// Its name in the JSON of `eval`.
    pub metric: String,
    /// Whether it is to be high.
    pub maximise: bool,
}

/// Scores that are to be high.
const HIGH: [&str; 3] = ["accuracy", "token_accuracy", "auroc"];
/// Scores that are to be low.
const LOW: [&str; 6] = ["loss", "perplexity", "nll", "ece", "brier", "aurc"];

/// Scores that rows without choices have, too.
const OF_ALL_ROWS: [&str; 3] = ["loss", "perplexity", "token_accuracy"];

impl Objective {
    /// The score called `metric`.
    ///
    /// # Errors
    /// Returns an error that lists the scores.
    pub fn named(metric: &str) -> std::result::Result<Self, Problem> {
        let is = |known: &[&str]| known.contains(&metric);
        if !is(&HIGH) && !is(&LOW) {
            let known: Vec<&str> = LOW.iter().chain(&HIGH).copied().collect();
            let message = format!("--objective {metric}: expected one of {}", known.join(", "));
            return Err(Problem::usage(message));
        }
        Ok(Self {
            metric: metric.to_owned(),
            maximise: is(&HIGH),
        })
    }

    /// Whether only rows with choices have it.
    pub fn is_of_choices(&self) -> bool {
        !OF_ALL_ROWS.contains(&self.metric.as_str())
    }

    /// Its value in `scores`, negated if it is to be high.
    pub fn of(&self, scores: &Value) -> Option<f64> {
        let value = scores[&self.metric]
            .as_f64()
            .filter(|value| value.is_finite())?;
        Some(if self.maximise { -value } else { value })
    }

    /// The score itself.
    pub fn shown(&self, objective: f64) -> f64 {
        if self.maximise { -objective } else { objective }
    }
}

fn spawn(
    commands: &Commands,
    arguments: &[OsString],
    log: &Path,
    output: Option<&Path>,
) -> Result<Child> {
    let open = |path: &Path| {
        let mut options = File::options();
        let file = options.create(true).append(true).open(path);
        file.map_err(Error::io("write", path))
    };
    let stdout = match output {
        Some(path) => Stdio::from(File::create(path).map_err(Error::io("write", path))?),
        None => Stdio::from(open(log)?),
    };
    let mut command = Command::new(&commands.program);
    command
        .args(arguments)
        .env("RAYON_NUM_THREADS", commands.threads.to_string())
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(open(log)?);
    // Ctrl-C at a terminal is for the study, which tells its trials.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
        .spawn()
        .map_err(Error::io("start", &commands.program))
}

/// The end of a process in words.
fn how_it_ended(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("was killed by signal {signal}");
    }
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => "was killed".to_owned(),
    }
}

/// What [`crate::train::RunLock`] says of a directory that another process writes to.
pub(super) const BUSY: &str = "another run";

/// The end of what a trial wrote.
fn last_lines(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.len().saturating_sub(3);
    let text: Vec<&str> = lines[last..].iter().map(|line| line.trim()).collect();
    text.join(" | ").chars().take(600).collect()
}
