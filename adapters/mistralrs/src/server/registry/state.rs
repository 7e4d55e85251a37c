//! The state file records which adapters were loaded and unloaded at run time, so that a restarted server serves the
//! same models.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use monteclora_converters::{Error as FormatError, Problem, files};
use serde::{Deserialize, Serialize};

use crate::config::{ModelConfig, ServeConfig};
use crate::error::{Error, Result, code};

/// Changes made at run time to the models of `serve.toml`, by public name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunTimeState {
    pub(crate) adapters: BTreeMap<String, Change>,
}

/// The change of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Change {
    /// Public name of the base model.
    pub(crate) parent: String,
    /// Adapter directory; relative to the adapter root if it is below that root. None if the name was unloaded.
    pub(crate) path: Option<PathBuf>,
    pub(crate) generation: Option<String>,
    /// The source that `serve.toml` gave to this name when the change was made. If the source has changed, the file
    /// wins.
    pub(crate) replaces: Option<PathBuf>,
}

impl RunTimeState {
    /// Drops the changes that `serve.toml` supersedes, and returns their names.
    pub(crate) fn prune(&mut self, models: &[ModelConfig]) -> Vec<String> {
        let (kept, dropped) =
            std::mem::take(&mut self.adapters)
                .into_iter()
                .partition(|(name, change)| {
                    let declared = declared(models, name);
                    let is_base = models.iter().any(|model| model.name == *name);
                    let has_parent = models.iter().any(|model| model.name == change.parent);
                    let same = declared.map(|(_, source)| source) == change.replaces.as_deref();
                    let moved = declared.is_some_and(|(parent, _)| parent != change.parent);
                    !is_base && has_parent && same && !moved
                });
        self.adapters = kept;
        let dropped: BTreeMap<String, Change> = dropped;
        dropped.into_keys().collect()
    }
}

/// The base and the source that `serve.toml` gives to the adapter `name`.
pub(crate) fn declared<'a>(models: &'a [ModelConfig], name: &str) -> Option<(&'a str, &'a Path)> {
    models.iter().find_map(|model| {
        let (_, source) = model.adapters.iter().find(|(alias, _)| alias == name)?;
        Some((model.name.as_str(), source.as_path()))
    })
}

#[derive(Debug, Clone)]
pub(crate) struct StateFile {
    pub(super) path: PathBuf,
    /// The directory to which recorded paths are relative.
    pub(super) root: PathBuf,
}

impl StateFile {
    pub(crate) fn of(config: &ServeConfig) -> Option<Self> {
        Some(Self {
            path: config.state_file.clone()?,
            root: config.adapter_root.clone()?,
        })
    }

    /// Reads the recorded state; an empty state if there is no file.
    ///
    /// # Errors
    /// Returns [`code::CONFIG`](crate::error::code::CONFIG) for a file that is not a state file, and [`Error::Io`] for
    /// a file that cannot be read.
    pub(crate) fn read(&self) -> Result<RunTimeState> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(RunTimeState::default());
            }
            Err(error) => return Err(Error::io("read", &self.path)(error)),
        };
        serde_json::from_str(&text).map_err(|error| {
            let message = format!(
                "not a record of adapters loaded at run time ({error}); remove it to serve what serve.toml says"
            );
            Error::config(&self.path, message)
        })
    }

    /// Replaces the file atomically: a reader, or a restart, sees the old state or the new one.
    pub(crate) fn write(&self, state: &RunTimeState) -> Result<()> {
        let mut text = serde_json::to_string_pretty(state)
            .map_err(|error| Error::io("write", &self.path)(error.into()))?;
        text.push('\n');
        files::write_text(&self.path, &text).map_err(|error| {
            tracing::error!("the state file cannot be written: {error}");
            let why = match error {
                FormatError::Io { source, .. } => source.to_string(),
                error => error.to_string(),
            };
            let message = format!("the state file cannot be written ({why}); nothing was changed");
            Problem::sentence(code::STATE_FILE, message).into()
        })
    }

    /// The path that is recorded for an adapter.
    pub(crate) fn relative(&self, source: &Path) -> PathBuf {
        source.strip_prefix(&self.root).unwrap_or(source).into()
    }
}
