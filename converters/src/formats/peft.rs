//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`, with the whole posterior if there is
//! one.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::lora::{LoraOptions, LoraReport};
use super::{About, Format, ReadOptions, Written, mlx};
use crate::adapter::Adapter;
use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::json;
use crate::source::Source;
use crate::tensors::dtype::DType;
use crate::validate::runtime::Runtime;

pub(crate) mod config_read;
pub(crate) mod config_write;
mod names;
pub(crate) mod read;
mod stored;
pub(crate) mod write;

/// PEFT's directory, LoRA or MonteCLoRA.
#[derive(Debug)]
pub(crate) struct Peft;

impl Format for Peft {
    fn about(&self) -> &'static About {
        &About {
            name: "peft",
            aliases: &[],
            label: "PEFT directory",
            reads: Some("PEFT directory, LoRA or MonteCLoRA"),
            writes: Some("PEFT directory with the whole posterior, if there is one"),
            file_name: None,
            needs_base: false,
            keeps_posterior: true,
            has_peft_settings: true,
            runtimes: &Runtime::OF_PEFT,
        }
    }

    fn sniff(&self, path: &Path) -> bool {
        let Ok(source) = Source::of(path) else {
            return false;
        };
        let keys = json::read_object(&source.dir.join(read::CONFIG_FILE));
        keys.is_ok_and(|keys| keys.contains_key("peft_type") && !mlx::claims(&source, &keys))
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let source = Source::of(path)?;
        let index = format!("{}.index.json", read::WEIGHTS_FILE);
        let mut files = vec![source.dir.join(read::CONFIG_FILE), source.dir.join(index)];
        match source.open_weights(read::WEIGHTS_STEM) {
            Ok(weights) => files.extend(weights.paths),
            // Problems with a file, and a pickle, are reported when the file is read.
            Err(_) => {
                let listed = source.dir.read_dir().into_iter().flatten().flatten();
                files.extend(listed.map(|entry| entry.path()).filter(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name.starts_with(read::WEIGHTS_STEM) && name.ends_with(".safetensors")
                }));
            }
        }
        Ok(files)
    }

    fn read(&self, path: &Path, options: &ReadOptions<'_>) -> Result<Adapter> {
        read::read_source(&Source::of(path)?, options, true)
    }

    /// Writes every setting and the whole posterior as they are.
    fn write(
        &self,
        adapter: &Adapter,
        path: &Path,
        options: &LoraOptions,
        _base_config: Option<&Map<String, Value>>,
    ) -> Result<Written> {
        let written = match options.dtype {
            Some(dtype) => adapter.with_dtype(dtype)?,
            None => adapter.clone(),
        };
        write::write_dir(path, options, &written.peft_json(), &written)?;
        let kept = AdapterConfig::from_json(&written.config.to_json().to_string(), path)?.other;
        let dropped = adapter.config.other.keys();
        let pairs = adapter.sites.iter().zip(&written.sites);
        let converted = pairs.filter(|(old, new)| {
            [(&old.lora_a, &new.lora_a), (&old.lora_b, &new.lora_b)]
                .iter()
                .any(|(old, new)| old.dtype() != new.dtype() || old.dtype() == DType::F64)
        });
        let has_posterior = adapter.config.monteclora.is_some();
        Ok(Written {
            what: match written.config.peft_format() {
                "peft-monteclora" => "PEFT MonteCLoRA",
                "peft-adalora" => "PEFT AdaLoRA",
                "peft-dora" => "PEFT DoRA",
                "peft-lora" => "PEFT LoRA",
                _ => "an update that only this project reads",
            },
            report: LoraReport {
                r: adapter.config.r,
                lora_alpha: adapter.config.lora_alpha,
                converted: converted.map(|(site, _)| site.name.clone()).collect(),
                dropped_keys: dropped.filter(|key| !kept.contains_key(*key)).cloned().collect(),
                ..LoraReport::default()
            },
            note: has_posterior.then_some(
                "the whole posterior is kept; the sampler's last random draw, which is no parameter, is written as I and 1/N",
            ),
        })
    }
}

impl Adapter {
    /// Reads a PEFT directory: `adapter_config.json` and `adapter_model.safetensors` (or its shards).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_dir(dir: &Path) -> Result<Self> {
        read::read_source(&Source::directory(dir), &ReadOptions::default(), true)
    }

    /// Reads only the posterior mean of a PEFT directory, as plain LoRA. `monteclora_config` and the sampler's tensors
    /// are not read, even if they are incomplete.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_dir_as_lora(dir: &Path) -> Result<Self> {
        read::read_source(&Source::directory(dir), &ReadOptions::default(), false)
    }

    /// Whether the configuration comes from the authors' own code (LCS2-IIITD/MonteCLoRA). It saves A and B only, so such
    /// an adapter is its mean: no posterior is stored, and its `sample_scaler`, applied twice there, has no meaning here.
    pub fn is_authors_dialect(&self) -> bool {
        let other = &self.config.other;
        let is_off = other.get("use_monteclora") == Some(&Value::Bool(false));
        !is_off
            && config_read::AUTHORS
                .iter()
                .any(|key| other.contains_key(*key))
    }
}

impl AdapterConfig {
    /// Reads the text of an `adapter_config.json`; `origin` is named in errors.
    ///
    /// # Errors
    /// Returns `json` if the text is not JSON, or a refusal with every key that is not understood.
    ///
    /// ```
    /// use monteclora_converters::AdapterConfig;
    /// let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
    ///     "rank_pattern": {"layers.1.self_attn.q_proj": 6}}"#;
    /// let config = AdapterConfig::from_json(text, "adapter_config.json".as_ref())?;
    /// assert_eq!(config.rank_for("model.layers.1.self_attn.q_proj")?, 6);
    /// assert_eq!(config.scaling_for("model.layers.0.self_attn.q_proj")?, 2.0);
    /// # Ok::<(), monteclora_converters::Error>(())
    /// ```
    pub fn from_json(text: &str, origin: &Path) -> Result<Self> {
        let mut problems = Vec::new();
        let config = config_read::from_object(json::parse_object(text, origin)?, &mut problems);
        Error::refuse_any(origin, problems)?;
        Ok(config)
    }

    /// Returns the object that PEFT 0.20 and later read without a warning: every key that they know, sorted.
    pub fn to_json(&self) -> Value {
        config_write::to_json(self)
    }
}
