//! Reads adapters that have an effect and fit their base model, and warns about how they were made.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{
    Adapter, ConversationSettings, ModelFiles, Problem, base_warnings, other_conversation,
    training_record,
};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::eval::calibration::Calibration;

/// SHA-256, in hexadecimal, of everything in an adapter that decides its answers and their uncertainty, whatever the
/// base model: its factors and posterior, its calibration, and the chat template variables that it was trained with.
/// Without calibration and variables it is the adapter's own fingerprint.
pub fn content_hash(
    adapter: &Adapter,
    calibration: Option<&Calibration>,
    variables: &Map<String, Value>,
) -> String {
    let adapter = adapter.fingerprint();
    if calibration.is_none() && variables.is_empty() {
        return adapter;
    }
    let whole = json!([adapter, calibration, variables]);
    format!("{:x}", Sha256::digest(whole.to_string()))
}

/// Reads an adapter and refuses one that changes nothing, unless `force`.
pub fn read_effective(path: &Path, force: bool) -> Result<Adapter> {
    let adapter = Adapter::read(path)?;
    tell(&adapter, path);
    require_effect(&adapter, path, force)?;
    Ok(adapter)
}

/// Reads an adapter for `base`, and refuses one that does not fit. Warns about what is left out, about a base model
/// that the adapter was not trained on, and about one that it is already merged into.
pub fn read_fitting(path: &Path, base: &ModelFiles) -> Result<Adapter> {
    let adapter = Adapter::read_on(path, base)?;
    tell(&adapter, path);
    adapter.require_fit(base)?;
    warn_of_other_media(&adapter, base);
    for warning in base_warnings(path, &adapter, base)? {
        tracing::warn!("{warning}");
    }
    Ok(adapter)
}

/// Warns about adapted modules that text does not pass through.
fn warn_of_other_media(adapter: &Adapter, base: &ModelFiles) {
    let mut beside = adapter
        .sites
        .iter()
        .filter(|site| base.is_beside(&site.name));
    if let Some(first) = beside.next() {
        tracing::warn!(
            "{} and {} more adapted modules are for other media than text: they are merged, and have no effect on text",
            first.name,
            beside.count()
        );
    }
}

/// As [`read_fitting`], but refuses an adapter that changes nothing, unless `force`.
pub fn read_effective_on(path: &Path, base: &ModelFiles, force: bool) -> Result<Adapter> {
    let adapter = read_fitting(path, base)?;
    require_effect(&adapter, path, force)?;
    Ok(adapter)
}

/// Warns if the chat template, tokenizer or settings differ from those that an adapter brings or was trained with; see
/// [`other_conversation`].
pub fn warn_of_conversation(
    path: &Path,
    base: &Path,
    settings: ConversationSettings<'_>,
) -> Result<()> {
    for warning in other_conversation(path, base, settings)? {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Warns about the settings that an adapter was trained with, for output formats that do not record them.
pub fn warn_of_settings(path: &Path) {
    // An unreadable record was refused earlier.
    let record = training_record(path).ok().flatten().unwrap_or_default();
    let (config, mut settings) = (&record["config"], Vec::new());
    if let Some(template) = config["model"]["chat_template"].as_str() {
        settings.push(format!("chat_template {template}"));
    }
    let variables = &config["data"]["template_variables"];
    if variables
        .as_object()
        .is_some_and(|variables| !variables.is_empty())
    {
        settings.push(format!("template_variables {variables}"));
    }
    let is_of_prompts = !matches!(
        record["train"]["format"].as_str(),
        Some("messages" | "sharegpt" | "text")
    );
    if config["data"]["apply_chat_template"] == false && is_of_prompts {
        settings.push("apply_chat_template = false".to_owned());
    }
    if !settings.is_empty() {
        tracing::warn!(
            "the adapter was trained with {}, which what is written does not record: use it the same way",
            settings.join(", ")
        );
    }
}

/// Warns about what was left out when the adapter was read.
fn tell(adapter: &Adapter, path: &Path) {
    for note in &adapter.notes {
        tracing::warn!("`{}`: {note}", path.display());
    }
}

/// Refuses an adapter that changes nothing, unless `force`.
pub fn require_effect(adapter: &Adapter, path: &Path, force: bool) -> Result<()> {
    if force || adapter.has_effect()? {
        return Ok(());
    }
    let message = format!(
        "`{}` changes nothing: B A is zero at every site; was it saved before training? Pass --force to go on",
        path.display()
    );
    Err(Problem::sentence("no-effect", message).into())
}
