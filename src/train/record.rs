//! run.json: the record of a run, to recognise, repeat and resume it.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use candle_core::Device;
use serde_json::{Value, json};

use super::Prepared;
use crate::data::Dataset;
use crate::distributed::Communicator;

/// The version of candle-core that Cargo.toml pins; a test compares the two.
const CANDLE: &str = "0.10.2";

impl Prepared {
    /// The content of `run.json` for a run that trains `parameters` values on `device`. `finished` is the step at which
    /// its adapter was written, or `None` while it runs.
    pub(super) fn record(
        &self,
        parameters: usize,
        device: &Device,
        ranks: &dyn Communicator,
        finished: Option<u64>,
    ) -> serde_json::Result<Value> {
        Ok(json!({
            "config": serde_json::to_value(&self.run)?,
            "seed": self.run.seed,
            "monteclora": env!("CARGO_PKG_VERSION"),
            "versions": {
                "monteclora": env!("CARGO_PKG_VERSION"),
                "candle": CANDLE,
                "platform": format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
                "device": device_name(device),
            },
            "base": {
                "model_id": self.base.name,
                "revision": self.base.revision,
                "fingerprint": self.fingerprint,
                "sample": self.sample,
            },
            "train": data(&self.train),
            "valid": self.valid.as_ref().map(data),
            "chat_template_sha256": self.chat_template_sha256,
            "template_time": self.template_time,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sites": self.sites,
            "trainable_parameters": parameters,
            "total_steps": self.total_steps,
            "ranks": ranks.size(),
            "micro_batches_per_step": self.settings.micro_batches,
            "finished_step": finished,
        }))
    }
}

/// The record of a data file: its path, its commit if it came from the Hub, and its content.
fn data(data: &Dataset) -> Value {
    json!({
        "path": data.path().display().to_string(),
        "format": data.format().name(),
        "revision": data.revision(),
        "sha256": data.sha256(),
        "examples": data.len(),
        "tokens": data.stats().tokens.total,
        "trained_tokens": data.stats().trained_tokens.total,
    })
}

/// The record at `path`. `None` if there is none that can be read.
pub(super) fn read(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// The `finished_step` of a run.json. `None` if the file does not exist or the run is not finished.
pub(super) fn finished_step(path: &Path) -> Option<u64> {
    read(path)?["finished_step"].as_u64()
}

/// The batches per step in the run of a run.json, whose `gradient_accumulation_steps` must be `accumulation`.
pub(super) fn micro_batches(path: &Path, accumulation: usize) -> Option<usize> {
    let record = read(path)?;
    let before = &record["config"]["train"]["gradient_accumulation_steps"];
    let is_same = before.as_u64() == u64::try_from(accumulation).ok();
    let count = record["micro_batches_per_step"]
        .as_u64()
        .filter(|_| is_same)?;
    usize::try_from(count).ok()
}

/// The time that the chat template got in the run of a run.json; `None` if its text does not depend on the date.
pub(super) fn template_time(path: &Path) -> Option<SystemTime> {
    let seconds = read(path)?["template_time"].as_u64()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// The kind of a device.
pub(crate) fn device_name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
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
