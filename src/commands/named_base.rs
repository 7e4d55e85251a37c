//! The base model of a command line: the one given with `-m`, otherwise the one that the adapter's configuration names.

use std::path::{Path, PathBuf};

use anyhow::Result;
use monteclora_converters::json::read_object;
use monteclora_converters::{GgufFile, Problem, base_named_in, is_gguf};

use crate::cli::ModelArgs;

const KEY: &str = "base_model_name_or_path";

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
    let dir = match adapter.is_file() {
        true => adapter.parent().unwrap_or(adapter),
        false => adapter,
    };
    let path = dir.join("adapter_config.json");
    let named = match path.is_file() {
        true => read_object(&path)?
            .get(KEY)
            .and_then(|v| v.as_str())
            .map(str::to_owned),
        false => None,
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
