//! The base model of a command line: the one given with `-m`, otherwise the one that the adapter's configuration names.

use std::path::{Path, PathBuf};

use anyhow::Result;
use monteclora_converters::json::read_object;
use monteclora_converters::{Adapter, GgufFile, Problem, base_named_in, is_gguf};

use crate::cli::ModelArgs;

const KEY: &str = "base_model_name_or_path";
/// mlx-lm's key for the same.
const OF_MLX: &str = "model";

impl ModelArgs {
    /// Sets the base model to the one that `adapter` names, if the command line gives none.
    ///
    /// # Errors
    /// Returns an error if `adapter` names no base model.
    pub(super) fn settle(&mut self, adapter: Option<&PathBuf>) -> Result<()> {
        if let (None, Some(adapter)) = (&self.model_id, adapter) {
            self.model_id = Some(named_by(adapter)?);
        }
        Ok(())
    }

    /// The name of the base model for messages, or `BASE`.
    pub(super) fn named(&self) -> &str {
        self.model_id.as_deref().unwrap_or("BASE")
    }

    /// The base model. Call [`Self::settle`] first.
    ///
    /// # Errors
    /// Returns an error if neither the command line nor the adapter names a base model.
    pub(super) fn id(&self) -> Result<&str> {
        let message = "which base model? Give it with -m: a directory, a Hub id or a .gguf file";
        let id = self.model_id.as_deref();
        id.ok_or_else(|| Problem::usage(message).into())
    }
}

/// The base model that the adapter's configuration names, or the metadata of a GGUF LoRA.
pub(super) fn named_by(adapter: &Path) -> Result<String> {
    if is_gguf(adapter) && adapter.is_file() {
        let file = GgufFile::open(adapter)?;
        return known(base_named_in(&file).map(str::to_owned), adapter, adapter);
    }
    if !adapter.exists() {
        let message = format!(
            "`{}`: no such adapter; give the directory of an adapter, or a GGUF LoRA",
            adapter.display()
        );
        return Err(Problem::usage(message).into());
    }
    let dir = match adapter.is_file() {
        true => adapter.parent().unwrap_or(adapter),
        false => adapter,
    };
    let path = dir.join("adapter_config.json");
    let named = match path.is_file() {
        true => read_object(&path)?
            .iter()
            .find(|(key, _)| [KEY, OF_MLX].contains(&key.as_str()))
            .and_then(|(_, value)| value.as_str())
            .map(str::to_owned),
        false => {
            if dir.join("config.json").is_file() {
                let message = format!(
                    "`{}` is a model, not an adapter; give it with -m",
                    adapter.display()
                );
                return Err(Problem::usage(message).into());
            }
            // What is wrong with it is said by whoever reads it, such as a run that has only checkpoints so far.
            Adapter::read(adapter)?;
            None
        }
    };
    known(named, adapter, &path)
}

/// The base that `adapter` names in the file at `path`.
fn known(named: Option<String>, adapter: &Path, path: &Path) -> Result<String> {
    let Some(named) = named.filter(|named| !named.is_empty()) else {
        let message = format!(
            "`{}` names no base model; give it with -m",
            adapter.display()
        );
        return Err(Problem::usage(message).into());
    };
    tracing::info!("base model: {named}, which `{}` names", path.display());
    Ok(named)
}
