//! What of an adapter goes into a release: what decides its answers, and how sure they are.

use std::fs;
use std::path::Path;

use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{Adapter, Error, LoraOptions, Result, files, training_record};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::eval::calibration::{self, Calibration};

/// Name of what training recorded.
const RECORD: &str = "run.json";

/// An adapter as it is released.
#[derive(Debug)]
pub struct Release {
    /// The posterior mean as a plain LoRA, unless something beside it is of the adapter as it was.
    adapter: Adapter,
    calibration: Option<Calibration>,
    /// Of the chat template, as `data.template_variables` has them.
    variables: Map<String, Value>,
    record: Option<Value>,
}

impl Release {
    /// The posterior mean of `adapter`, which was read from `path`: what every server takes.
    ///
    /// # Errors
    /// Factors that a plain LoRA cannot hold.
    pub fn mean(adapter: &Adapter, path: &Path) -> Result<Self> {
        let (adapter, _) = adapter.to_lora(None)?;
        Ok(Self {
            adapter,
            calibration: None,
            variables: recorded_variables(path),
            record: training_record(path),
        })
    }

    /// `adapter` with its posterior and its calibration, for a server that scores answers; without both [`Self::mean`].
    ///
    /// # Errors
    /// As [`Self::mean`], or a calibration that cannot be read.
    pub fn whole(adapter: &Adapter, path: &Path) -> Result<Self> {
        let calibration = Calibration::beside(path)?;
        if adapter.config.monteclora.is_none() && calibration.is_none() {
            return Self::mean(adapter, path);
        }
        Ok(Self {
            adapter: adapter.clone(),
            calibration,
            variables: recorded_variables(path),
            record: training_record(path),
        })
    }

    /// Whether the posterior is in it.
    pub fn has_posterior(&self) -> bool {
        self.adapter.config.monteclora.is_some()
    }

    /// Whether a calibration is in it.
    pub fn has_calibration(&self) -> bool {
        self.calibration.is_some()
    }

    /// The posterior mean's fingerprint.
    pub(super) fn mean_fingerprint(&self) -> String {
        self.adapter.collapse().fingerprint()
    }

    /// A hash of its content: the adapter's where there is nothing else.
    pub(super) fn fingerprint(&self) -> String {
        let adapter = self.adapter.fingerprint();
        if self.calibration.is_none() && self.variables.is_empty() {
            return adapter;
        }
        let whole = json!([adapter, self.calibration, self.variables]);
        format!("{:x}", Sha256::digest(whole.to_string()))
    }

    /// Writes it as a directory that appears at once, of read-only files.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        files::write_new_dir(path, |dir| {
            if let Some(calibration) = &self.calibration {
                calibration.write(&dir.join(calibration::FILE))?;
            }
            if let Some(record) = &self.record {
                files::write_json(&dir.join(RECORD), record)?;
            }
            if self.has_posterior() || self.has_calibration() {
                self.adapter.write_peft(dir, true)?;
            } else {
                let options = LoraOptions {
                    overwrite: true,
                    ..LoraOptions::default()
                };
                self.adapter.write_lora(dir, &options)?;
            }
            for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
                let file = entry.map_err(Error::io("read", dir))?.path();
                let metadata = fs::metadata(&file).map_err(Error::io("read", &file))?;
                let mut permissions = metadata.permissions();
                permissions.set_readonly(true);
                fs::set_permissions(&file, permissions).map_err(Error::io("protect", &file))?;
            }
            Ok(())
        })
    }
}
