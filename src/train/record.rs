//! run.json: what a run is made of, so that it can be recognised, repeated and resumed.

use std::path::Path;

use serde::Serialize;

use crate::data::Dataset;

/// What `run.json` records.
#[derive(Debug, Clone, Serialize)]
pub struct RunRecord {
    /// The resolved configuration.
    pub config: serde_json::Value,
    /// Root of every random stream.
    pub seed: u64,
    /// Version of this program.
    pub monteclora: &'static str,
    /// Versions of what computes.
    pub versions: Versions,
    /// The base.
    pub base: BaseRecord,
    /// Training rows.
    pub train: DataRecord,
    /// Validation rows.
    pub valid: Option<DataRecord>,
    /// SHA-256 of the chat template's text.
    pub chat_template_sha256: Option<String>,
    /// SHA-256 of tokenizer.json.
    pub tokenizer_sha256: Option<String>,
    /// Adapted modules.
    pub sites: Vec<String>,
    /// Trainable values.
    pub trainable_parameters: usize,
    /// Optimiser steps planned.
    pub total_steps: u64,
    /// The step at which the run ended and its adapter was written; none while it is under way.
    pub finished_step: Option<u64>,
}

/// The version of candle-core that Cargo.toml pins; a test compares the two.
const CANDLE: &str = "0.10.2";

/// Versions of what computes a run's numbers.
#[derive(Debug, Clone, Serialize)]
pub struct Versions {
    /// This program.
    pub monteclora: &'static str,
    /// The tensor library.
    pub candle: &'static str,
    /// Operating system and processor architecture.
    pub platform: String,
    /// Where the tensors are: `cpu`, `cuda` or `metal`.
    pub device: &'static str,
}

impl Versions {
    /// Those of this process with its tensors on `device`.
    pub fn here(device: &candle_core::Device) -> Self {
        Self {
            monteclora: env!("CARGO_PKG_VERSION"),
            candle: CANDLE,
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            device: match device {
                candle_core::Device::Cpu => "cpu",
                candle_core::Device::Cuda(_) => "cuda",
                candle_core::Device::Metal(_) => "metal",
            },
        }
    }
}

/// The `finished_step` of a run.json; none if there is no such file or the run is under way.
pub fn finished_step(path: &Path) -> Option<u64> {
    let text = std::fs::read(path).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
    record["finished_step"].as_u64()
}

/// The base of a run.
#[derive(Debug, Clone, Serialize)]
pub struct BaseRecord {
    /// As given.
    pub model_id: String,
    /// Commit on the Hub.
    pub revision: Option<String>,
    /// See [`fingerprint`](crate::provenance::fingerprint).
    pub fingerprint: String,
}

/// A data file of a run.
#[derive(Debug, Clone, Serialize)]
pub struct DataRecord {
    /// The file, directory or data set on the Hub, as it was named.
    pub path: String,
    /// Its commit on the Hub, where it came from there.
    pub revision: Option<String>,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Sequences in it.
    pub examples: usize,
    /// Tokens in it.
    pub tokens: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
}

impl DataRecord {
    /// The record of `data`.
    pub fn new(data: &Dataset) -> Self {
        Self {
            path: data.path().display().to_string(),
            revision: data.revision().map(str::to_owned),
            sha256: data.sha256(),
            examples: data.len(),
            tokens: data.stats().tokens.total,
            trained_tokens: data.stats().trained_tokens.total,
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn candle_is_the_version_that_is_built() {
        let lock = include_str!("../../Cargo.lock");
        let entry = format!("name = \"candle-core\"\nversion = \"{}\"\n", super::CANDLE);
        assert!(lock.contains(&entry));
    }
}
