//! Weights that lie beside those of a base, or beside those of its language model, and are not read.

use super::ModelFiles;
use crate::problem::{Problem, listed};

/// Beginnings of names of weights that are the same ones in Mistral's own layout.
const COPIES: &str = "consolidated";

impl ModelFiles {
    /// A warning for weights in the directory that no one reads with the model: shards of another save, an adapter.
    pub(super) fn beside(&self) -> Option<Problem> {
        let entries = std::fs::read_dir(self.dir()).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let is_read = |name: &str| {
            let mut files = self.files().iter();
            files.any(|file| file.file_name().is_some_and(|file| file == name))
        };
        let is_unread = |name: &String| {
            let is_weights = name.ends_with(".safetensors") && !name.starts_with(COPIES);
            is_weights && !is_read(name) || name == "adapter_config.json"
        };
        let mut unread: Vec<String> = names.filter(is_unread).collect();
        unread.sort();
        let has_adapter = unread.iter().any(|name| name == "adapter_config.json");
        let (message, fix) = match (unread.is_empty(), has_adapter) {
            (true, _) => return None,
            (_, true) => (
                "not read with the base, though transformers loads an adapter that lies there with the model",
                "give the adapter by itself, or move it elsewhere",
            ),
            _ => (
                "weights that are not read with the base",
                "remove them if they are left from another save",
            ),
        };
        Some(Problem::new("beside", listed(&unread), message, fix))
    }
    /// A note that a model for several media has parts that text does not go through.
    pub(super) fn other_media(&self) -> Option<Problem> {
        let wrapper = self.wrapper()?;
        let is_there = |part: &&&str| self.names().any(|name| name.starts_with(**part));
        let parts = wrapper.beside.iter().filter(is_there);
        let parts: Vec<&str> = parts.map(|part| part.trim_end_matches('.')).collect();
        let message = format!(
            "parts of the {} for other media than text: kept as they are, and not used in training",
            wrapper.class_name
        );
        (!parts.is_empty()).then(|| Problem::new("other-media", parts.join(", "), message, ""))
    }
}
