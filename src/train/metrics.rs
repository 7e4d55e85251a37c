//! The metrics of a run and their sinks: `metrics.jsonl` (one JSON object per line, its `type` first), TensorBoard and
//! commands.

mod command;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use monteclora_adapters::Result;
use monteclora_adapters::methods::{Metric, in_loss};
use monteclora_converters::files;
use serde::{Serialize, Serializer};

use self::command::CommandSink;
use super::io_error;
use super::progress::Progress;
use super::tensorboard::EventFile;
use crate::config::Report;
use crate::system::status_bytes;

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Record {
    /// Means over the steps since the last such line.
    Train(TrainRecord),
    /// An evaluation on the validation rows with the posterior mean.
    Eval(EvalRecord),
    /// An event of the run.
    Event {
        /// `started`, `resumed`, `checkpoint`, `best`, `early_stop`, `interrupted` or `finished`.
        event: &'static str,
        /// Number of optimiser steps so far.
        step: u64,
        /// Seconds since the run began.
        wall_s: f64,
    },
}

/// The metrics of training.
#[derive(Debug, Clone, Serialize)]
pub struct TrainRecord {
    /// Number of optimiser steps so far.
    pub step: u64,
    /// Passes over the data, fractional.
    pub epoch: f64,
    /// Task loss plus regulariser, nats.
    pub loss: f64,
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub task_loss: f64,
    /// The method's metrics, as means over the modules.
    #[serde(flatten, serialize_with = "by_key")]
    pub metrics: Vec<(&'static Metric, f64)>,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens read since the start.
    pub tokens: u64,
    /// Tokens with a loss since the start.
    pub trained_tokens: u64,
    /// Tokens per second since the last such line.
    pub tokens_per_second: f64,
    /// Largest resident memory so far, if the system reports it. `None` for a run on another device than the CPU: the
    /// system does not count that device's memory.
    pub peak_memory_bytes: Option<u64>,
    /// With several ranks, mean seconds per step that rank 0 waited for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<f64>,
    /// With several ranks, mean seconds per step of the exchange of gradients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exchange_s: Option<f64>,
    /// Seconds since the run began.
    pub wall_s: f64,
}

/// The metrics of an evaluation.
#[derive(Debug, Clone, Serialize)]
pub struct EvalRecord {
    /// Number of optimiser steps so far.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Share of trained tokens that were the most likely one.
    pub token_accuracy: f64,
    /// Number of evaluated rows.
    pub rows: usize,
    /// Seconds of the evaluation.
    pub seconds: f64,
    /// Seconds since the run began.
    pub wall_s: f64,
}

/// Writes records to the sinks of a run.
#[derive(Debug)]
pub struct Metrics {
    lines: Option<(File, PathBuf)>,
    events: Option<EventFile>,
    commands: Vec<CommandSink>,
}

impl Metrics {
    /// Opens the sinks in `output_dir`. A new run starts new files. A run that continues from `resumed` keeps earlier
    /// records, and drops the records of steps that it repeats.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written or a command cannot be started.
    pub fn open(output_dir: &Path, sinks: &[Report], resumed: Option<&Progress>) -> Result<Self> {
        let lines = match sinks.contains(&Report::Jsonl) {
            true => {
                let path = output_dir.join("metrics.jsonl");
                if let Some(progress) = resumed {
                    forget_after(&path, progress)?;
                } else {
                    File::create(&path).map_err(io_error(&path))?;
                }
                let file = File::options().create(true).append(true).open(&path);
                Some((file.map_err(io_error(&path))?, path))
            }
            false => None,
        };
        let step = resumed.map_or(0, |progress| progress.step);
        let events = match sinks.contains(&Report::Tensorboard) {
            true => Some(EventFile::create(&output_dir.join("tb"), step)?),
            false => None,
        };
        let commands = sinks.iter().filter_map(|sink| match sink {
            Report::Command(command) => Some(CommandSink::start(command, output_dir, step)),
            _ => None,
        });
        Ok(Self {
            commands: commands.collect::<Result<_>>()?,
            lines,
            events,
        })
    }

    /// Writes a record to all sinks. A line is written in one call, so that a killed run leaves whole lines.
    ///
    /// # Errors
    /// Returns an error if a file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| io_error(Path::new("metrics"))(error.into()))?;
        line.push(b'\n');
        if let Some((file, path)) = &mut self.lines {
            file.write_all(&line).map_err(io_error(path))?;
        }
        for command in &mut self.commands {
            command.write(&line);
        }
        let Some(events) = &mut self.events else {
            return Ok(());
        };
        match record {
            Record::Train(record) => events.write(record.step, &record.scalars()),
            Record::Eval(record) => events.write(record.step, &record.scalars()),
            Record::Event { .. } => Ok(()),
        }
    }
}

fn by_key<S: Serializer>(
    metrics: &[(&'static Metric, f64)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(metrics.iter().map(|(metric, value)| (metric.key, value)))
}

impl TrainRecord {
    /// The record for the steps since the last line.
    pub(super) fn new(
        progress: &Progress,
        metrics: &'static [Metric],
        (epoch, wall_s): (f64, f64),
        learning_rate: f64,
        n_ranks: usize,
        peak_memory_bytes: Option<u64>,
    ) -> Self {
        let window = &progress.window;
        let mean = |sum: f64| sum / window.steps.max(1) as f64;
        let sums = window.sums(metrics);
        Self {
            step: progress.step,
            epoch,
            loss: mean(window.task_loss + in_loss(metrics, &sums)),
            task_loss: mean(window.task_loss),
            metrics: metrics.iter().zip(sums.into_iter().map(mean)).collect(),
            grad_norm: mean(window.grad_norm),
            learning_rate,
            tokens: progress.tokens,
            trained_tokens: progress.trained_tokens,
            tokens_per_second: window.tokens as f64 / window.elapsed().max(1e-9),
            peak_memory_bytes,
            wait_s: (n_ranks > 1).then(|| mean(window.between_ranks[0])),
            exchange_s: (n_ranks > 1).then(|| mean(window.between_ranks[1])),
            wall_s,
        }
    }

    fn scalars(&self) -> Vec<(&'static str, f64)> {
        let mut scalars = vec![
            ("train/loss", self.loss),
            ("train/task_loss", self.task_loss),
        ];
        let metrics = self.metrics.iter();
        scalars.extend(metrics.map(|(metric, value)| (metric.tag, *value)));
        scalars.extend([
            ("train/grad_norm", self.grad_norm),
            ("train/learning_rate", self.learning_rate),
            ("train/epoch", self.epoch),
            ("speed/tokens_per_second", self.tokens_per_second),
        ]);
        let bytes = self.peak_memory_bytes.map(|bytes| bytes as f64);
        scalars.extend(bytes.map(|bytes| ("speed/peak_memory_bytes", bytes)));
        scalars
    }
}

impl EvalRecord {
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("eval/loss", self.loss),
            ("eval/perplexity", self.perplexity),
            ("eval/token_accuracy", self.token_accuracy),
        ]
    }
}

/// Rewrites `path` without the records of steps and of an evaluation that the run will repeat, and without a line that
/// a killed run left incomplete.
fn forget_after(path: &Path, progress: &Progress) -> Result<()> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io_error(path)(e)),
    };
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| {
            let Ok(line) = serde_json::from_str::<serde_json::Value>(line) else {
                return false;
            };
            let to_be_made = progress.evaluation_due && line["type"] == "eval";
            line["step"]
                .as_u64()
                .is_some_and(|at| at < progress.step || (at == progress.step && !to_be_made))
        })
        .collect();
    files::write_file(path, |writer| {
        for line in kept {
            writeln!(writer, "{line}").map_err(io_error(path))?;
        }
        Ok(())
    })
}

/// Largest memory so far of a process that computes on `device`, bytes. `None` if the system does not report it, as it does
/// not for the memory of another device than the CPU.
pub fn peak_memory_bytes(device: &Device) -> Option<u64> {
    device.is_cpu().then(|| status_bytes("VmHWM:")).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_comes_first() {
        let record = Record::Event {
            event: "started",
            step: 0,
            wall_s: 0.5,
        };
        let line = serde_json::to_string(&record).expect("serialises");
        assert_eq!(
            line,
            r#"{"type":"event","event":"started","step":0,"wall_s":0.5}"#
        );
    }
    fn eval(step: u64) -> Record {
        Record::Eval(EvalRecord {
            step,
            epoch: 0.5,
            loss: 1.5,
            perplexity: 1.5f64.exp(),
            token_accuracy: 0.25,
            rows: 2,
            seconds: 0.1,
            wall_s: 2.0,
        })
    }

    const BOTH: &[Report] = &[Report::Jsonl, Report::Tensorboard];

    /// A run is killed at step 8 in the middle of a line and resumed from step 4: the file has every step once.
    #[test]
    fn a_resumed_run_continues_the_curve() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("metrics.jsonl");
        let steps = || -> Vec<u64> {
            std::fs::read_to_string(&path)
                .expect("reads")
                .lines()
                .map(|line| {
                    let line: serde_json::Value = serde_json::from_str(line).expect("whole lines");
                    line["step"].as_u64().expect("a step")
                })
                .collect()
        };
        let mut metrics = Metrics::open(dir.path(), BOTH, None).expect("opens");
        for step in [2, 4, 6, 8] {
            metrics.write(&eval(step)).expect("writes");
        }
        let mut text = std::fs::read_to_string(&path).expect("reads");
        text.push_str("{\"type\":\"eval\",\"ste");
        std::fs::write(&path, text).expect("writes");
        let at_four = Progress {
            step: 4,
            ..Progress::default()
        };
        let mut metrics = Metrics::open(dir.path(), BOTH, Some(&at_four)).expect("opens");
        for step in [6, 8, 10] {
            metrics.write(&eval(step)).expect("writes");
        }
        assert_eq!(steps(), [2, 4, 6, 8, 10]);
        // A new run in the same directory keeps no records of the old one.
        let mut metrics = Metrics::open(dir.path(), BOTH, None).expect("opens");
        metrics.write(&eval(2)).expect("writes");
        assert_eq!(steps(), [2]);
        assert_eq!(
            std::fs::read_dir(dir.path().join("tb"))
                .expect("lists")
                .count(),
            3
        );
    }

    #[test]
    fn sinks_are_opened_only_where_asked_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut metrics = Metrics::open(dir.path(), &[], None).expect("opens");
        metrics.write(&eval(1)).expect("writes");
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 0);
    }
}
