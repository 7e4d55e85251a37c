//! The settings of a loader, checked when it is built.

use std::path::PathBuf;

use candle_core::Device;
use mistralrs_core::{DeviceMapSetting, IsqType, ModelDType, PagedAttentionConfig};

use super::MonteCloraLoader;
use crate::error::{Error, Result};

/// Settings of a [`MonteCloraLoader`]; [`MonteCloraLoader::builder`] makes it.
#[derive(Clone)]
pub struct MonteCloraLoaderBuilder(pub(super) MonteCloraLoader);

impl MonteCloraLoaderBuilder {
    /// Sets the directory of a raw MonteCLoRA or plain LoRA adapter to merge. Without an adapter the base is loaded as
    /// it is.
    pub fn adapter(mut self, source: impl Into<PathBuf>) -> Self {
        self.0.adapter = Some(source.into());
        self
    }

    /// Sets the element type of the weights. `auto`, the default, is f32 on a CPU and mistral.rs's choice elsewhere.
    pub fn dtype(mut self, dtype: ModelDType) -> Self {
        self.0.dtype = dtype;
        self
    }

    /// Sets the device to load to; the CPU by default.
    pub fn device(mut self, device: Device) -> Self {
        self.0.device = device;
        self
    }

    /// Sets the quantisation that mistral.rs applies while loading, after the merge.
    pub fn in_situ_quant(mut self, isq: Option<IsqType>) -> Self {
        self.0.isq = isq;
        self
    }

    /// Sets a chat template file (`.jinja`, or `.json` with `chat_template`) that replaces the model's own.
    pub fn chat_template(mut self, path: Option<PathBuf>) -> Self {
        self.0.chat_template = path;
        self
    }

    /// Sets the placement of layers on devices. The default is automatic on accelerators and one device on a CPU.
    pub fn device_map(mut self, device_map: DeviceMapSetting) -> Self {
        self.0.device_map = Some(device_map);
        self
    }

    /// Sets the paged attention settings, which are passed through; none by default.
    pub fn paged_attention(mut self, config: Option<PagedAttentionConfig>) -> Self {
        self.0.paged_attention = config;
        self
    }

    /// Loads an adapter even if it changes nothing.
    pub fn force(mut self, force: bool) -> Self {
        self.0.force = force;
        self
    }

    /// Sets whether mistral.rs shows progress bars while it loads; by default it does not.
    pub fn progress(mut self, progress: bool) -> Self {
        self.0.silent = !progress;
        self
    }

    /// Sets the directory for the temporary overlay, which is as large as the merged tensors in float32. The default is
    /// the system's temporary directory.
    pub fn staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.staging_root = Some(dir.into());
        self
    }

    /// Checks the settings and returns the loader.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] for a name that [`check_public_name`] refuses, and for bf16 on a CPU.
    pub fn build(self) -> Result<MonteCloraLoader> {
        check_public_name(&self.0.name)?;
        if self.0.device.is_cpu() && self.0.dtype == ModelDType::BF16 {
            let message = "bf16 has no matrix product on a CPU here; use f32 or f16";
            return Err(Error::setting("dtype", message));
        }
        Ok(self.0)
    }
}

/// Maximum length of a public name, in bytes.
const MAX_NAME: usize = 200;

/// Refuses names that cannot be a model's public name: empty, too long, `default`, a path, or with characters that
/// routing uses.
///
/// # Errors
/// Returns an error that gives the name and says what names may be.
pub fn check_public_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_alphanumeric() || "-_.:/".contains(c);
    let is_path =
        name.starts_with(['/', '.', '~', '-']) || name.contains("..") || name.contains('\\');
    if name.is_empty()
        || name.len() > MAX_NAME
        || name == "default"
        || is_path
        || !name.chars().all(allowed)
    {
        let message = format!(
            "`{name}` cannot be a public model name; use up to {MAX_NAME} letters, digits, `-`, `_`, `.`, `:` and slashes, not a path, not `default`, no `-` first"
        );
        return Err(Error::setting("name", message));
    }
    Ok(())
}
