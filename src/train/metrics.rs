//! `metrics.jsonl`: one JSON object a line, its `type` first.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Error, Result};

/// A line of the file.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Record {
    /// Means over the steps since the last such line.
    Train(TrainRecord),
    /// An evaluation on the validation rows with the posterior mean.
    Eval(EvalRecord),
    /// Something that happened.
    Event(EventRecord),
}

/// What training measures.
#[derive(Debug, Clone, Serialize)]
pub struct TrainRecord {
    /// Optimiser steps made.
    pub step: u64,
    /// Passes over the data, fractional.
    pub epoch: f64,
    /// Task loss plus regulariser, nats.
    pub loss: f64,
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub task_loss: f64,
    /// Weighted divergences, mean over sites.
    pub kl_loss: f64,
    /// Dirichlet divergence, mean over sites, unweighted.
    pub kl_dirichlet: f64,
    /// Wishart divergence.
    pub kl_wishart: f64,
    /// Gaussian divergence.
    pub kl_gaussian: f64,
    /// Sum of squared mixture weights.
    pub entropy_loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens read since the start.
    pub tokens: u64,
    /// Tokens with a loss since the start.
    pub trained_tokens: u64,
    /// Tokens a second since the last such line.
    pub tokens_per_second: f64,
    /// Largest resident memory so far, where the system tells it.
    pub peak_memory_bytes: Option<u64>,
    /// Seconds since the run began.
    pub wall_s: f64,
}

/// What an evaluation measures.
#[derive(Debug, Clone, Serialize)]
pub struct EvalRecord {
    /// Optimiser steps made.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean negative log-likelihood of the trained tokens, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Share of trained tokens that were the most likely one.
    pub token_accuracy: f64,
    /// Rows evaluated.
    pub rows: usize,
    /// Seconds the evaluation took.
    pub seconds: f64,
    /// Seconds since the run began.
    pub wall_s: f64,
}

/// Something that happened in a run.
#[derive(Debug, Clone, Serialize)]
pub struct EventRecord {
    /// `started`, `resumed`, `checkpoint`, `best`, `early_stop`, `interrupted` or `finished`.
    pub event: &'static str,
    /// Optimiser steps made.
    pub step: u64,
    /// Seconds since the run began.
    pub wall_s: f64,
    /// A path or a number that belongs to the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Appends records to a file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `path` for appending.
    pub fn append(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|source| Error::io(path, source))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Writes one line in one call, so that a killed run leaves whole lines.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(|e| Error::io(&self.path, e.into()))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|source| Error::io(&self.path, source))
    }
}

/// Largest resident memory of this process so far, bytes; none where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_comes_first() {
        let record = Record::Event(EventRecord {
            event: "started",
            step: 0,
            wall_s: 0.5,
            detail: None,
        });
        let line = serde_json::to_string(&record).expect("serialises");
        assert_eq!(
            line,
            r#"{"type":"event","event":"started","step":0,"wall_s":0.5}"#
        );
    }
}
