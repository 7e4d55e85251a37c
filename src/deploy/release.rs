//! The parts of an adapter that go into a release: what decides its answers, and their uncertainty.

use std::fs;
use std::path::Path;

use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{Adapter, Error, LoraOptions, Result, files, training_record};
use serde_json::{Map, Value, json};

use crate::eval::calibration::{self, Calibration};
use crate::provenance::content_hash;

/// File name of the training record.
pub const RECORD: &str = "run.json";

/// An adapter as it is released.
#[derive(Debug)]
pub struct Release {
    adapter: Adapter,
    /// Whether the adapter is written unchanged, not as the plain LoRA that every runtime takes.
    as_it_is: bool,
    calibration: Option<Calibration>,
    /// Variables of the chat template, as in `data.template_variables`.
    variables: Map<String, Value>,
    record: Option<Value>,
}

impl Release {
    fn new(adapter: Adapter, as_it_is: bool, path: &Path) -> Result<Self> {
        Ok(Self {
            adapter: adapter.exportable()?,
            as_it_is,
            calibration: None,
            variables: recorded_variables(path)?,
            record: training_record(path)?,
        })
    }

    /// The posterior mean of `adapter`, which was read from `path`. Every server takes this form.
    ///
    /// # Errors
    /// Returns an error if a plain LoRA cannot hold the adapter's factors.
    pub fn mean(adapter: &Adapter, path: &Path) -> Result<Self> {
        Self::new(adapter.to_lora(None)?.0, false, path)
    }

    /// `adapter` with its posterior and its calibration, for a server that scores answers. If it has neither, as
    /// [`Self::mean`].
    ///
    /// # Errors
    /// As [`Self::mean`], or if the calibration cannot be read.
    pub fn whole(adapter: &Adapter, path: &Path) -> Result<Self> {
        let calibration = Calibration::beside(path)?;
        if adapter.config.monteclora.is_none() && calibration.is_none() {
            return Self::mean(adapter, path);
        }
        Ok(Self {
            calibration,
            ..Self::new(adapter.clone(), true, path)?
        })
    }

    /// What a server that serves `adapter` from `path` uses: all of it if the server scores answers, otherwise the
    /// mean.
    ///
    /// # Errors
    /// Returns an error if the adapter cannot be exported, or if its calibration or training record cannot be read.
    pub(super) fn served(adapter: &Adapter, path: &Path, is_scored: bool) -> Result<Self> {
        match is_scored {
            false => Self::new(adapter.collapse(), true, path),
            true => Ok(Self {
                calibration: Calibration::beside(path)?,
                ..Self::new(adapter.clone(), true, path)?
            }),
        }
    }

    /// Reads a release directory.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be read.
    pub(super) fn read(path: &Path) -> Result<Self> {
        Self::served(&Adapter::read(path)?, path, true)
    }

    /// Whether the release contains the posterior.
    pub fn has_posterior(&self) -> bool {
        self.adapter.config.monteclora.is_some()
    }

    /// Whether the release contains a calibration.
    pub fn has_calibration(&self) -> bool {
        self.calibration.is_some()
    }

    /// The adapter.
    pub(super) fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Variables of the chat template.
    pub(super) fn variables(&self) -> &Map<String, Value> {
        &self.variables
    }

    /// Hash of the release's content.
    pub(super) fn content(&self) -> String {
        content_hash(&self.adapter, self.calibration.as_ref(), &self.variables)
    }

    /// Writes the release as a directory of read-only files. The directory appears whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        files::write_new_dir(path, |dir| {
            if let Some(calibration) = &self.calibration {
                calibration.write(&dir.join(calibration::FILE))?;
            }
            // An empty record says that nothing is known. Without a record, readers would take one from the directory
            // above.
            let nothing = json!({});
            files::write_json(&dir.join(RECORD), self.record.as_ref().unwrap_or(&nothing))?;
            let is_low_rank = self.adapter.sites.iter().all(|site| site.beyond.is_none());
            if self.as_it_is || !is_low_rank {
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
