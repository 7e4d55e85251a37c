//! The state file: what was loaded and unloaded at run time, so that a server that is killed comes back as it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use monteclora_converters::{Error as FormatError, Problem, files};
use serde::{Deserialize, Serialize};

use crate::config::{ModelConfig, ServeConfig};
use crate::error::{Error, Result, code};

/// Changes made at run time to what `serve.toml` says, by public name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunTimeState {
    pub(crate) adapters: BTreeMap<String, Change>,
}

/// What became of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Change {
    /// Public name of the base model.
    pub(crate) parent: String,
    /// Adapter directory, relative to the adapter root where it lies below; nothing if the name was unloaded.
    pub(crate) path: Option<PathBuf>,
    pub(crate) generation: Option<String>,
    /// What `serve.toml` gave this name to when the change was made. If that is no longer so, the file wins.
    pub(crate) replaces: Option<PathBuf>,
}

impl RunTimeState {
    /// Drops the changes that `serve.toml` has overtaken, and returns their names.
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

/// Base and source that `serve.toml` gives to the adapter `name`.
pub(crate) fn declared<'a>(models: &'a [ModelConfig], name: &str) -> Option<(&'a str, &'a Path)> {
    models.iter().find_map(|model| {
        let (_, source) = model.adapters.iter().find(|(alias, _)| alias == name)?;
        Some((model.name.as_str(), source.as_path()))
    })
}

#[derive(Debug, Clone)]
pub(crate) struct StateFile {
    pub(super) path: PathBuf,
    /// What recorded paths are relative to.
    pub(super) root: PathBuf,
}

impl StateFile {
    pub(crate) fn of(config: &ServeConfig) -> Option<Self> {
        Some(Self {
            path: config.state_file.clone()?,
            root: config.adapter_root.clone()?,
        })
    }

    /// The recorded state; an empty one if there is no file.
    ///
    /// # Errors
    /// [`code::CONFIG`](crate::error::code::CONFIG) for a file that is not one of ours.
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

    /// Replaces the file at once: a reader, or a restart, sees the old state or the new one.
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

    /// The path to record for an adapter.
    pub(crate) fn relative(&self, source: &Path) -> PathBuf {
        source.strip_prefix(&self.root).unwrap_or(source).into()
    }
}
