//! What several verbs need: a base with its tokenizer and template, an adapter's configuration, the record of a run.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use monteclora_adapters::Objective;
use monteclora_converters::{
    AdapterConfig, ExcludeModules, ModelFiles, MonteCloraSettings, TargetModules,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::config::{
    self, LoraConfig, LrSchedulerType, Method, ModuleSelection, Report, RunConfig,
};
use crate::data::{ChatTemplate, Dataset, EncodeOptions, Encoder, Tokenizer};
use crate::hub::Located;
use crate::train::metrics::Sinks;
use crate::train::{AdamWSettings, Shape, TrainSettings};

/// Bytes of each end of a file that go into a fingerprint.
const SAMPLE: usize = 1 << 20;

/// The encoder of the model in `dir`.
pub fn encoder(
    dir: &Path,
    chat_template: Option<&Path>,
    options: EncodeOptions,
) -> Result<Arc<Encoder>> {
    let tokenizer = Tokenizer::from_dir(dir)?;
    let template = ChatTemplate::from_dir(dir, chat_template, SystemTime::now())?;
    Ok(Arc::new(Encoder::new(tokenizer, template, options)))
}

/// PEFT's configuration for what `[lora]` asks of `base`.
pub fn adapter_config(lora: &LoraConfig, base: &Located) -> AdapterConfig {
    let targets = |selection: &ModuleSelection| match selection {
        ModuleSelection::AllLinear => TargetModules::AllLinear,
        ModuleSelection::Names(names) => TargetModules::List(names.clone()),
        ModuleSelection::Regex(pattern) => TargetModules::Regex(pattern.clone()),
    };
    AdapterConfig {
        base_model_name_or_path: Some(base.name.clone()),
        revision: base.revision.clone(),
        r: lora.r,
        lora_alpha: lora.lora_alpha,
        lora_dropout: lora.lora_dropout,
        target_modules: targets(&lora.target_modules),
        exclude_modules: lora
            .exclude_modules
            .as_ref()
            .map(|selection| match selection {
                ModuleSelection::AllLinear => ExcludeModules::Regex(".*".to_owned()),
                ModuleSelection::Names(names) => ExcludeModules::List(names.clone()),
                ModuleSelection::Regex(pattern) => ExcludeModules::Regex(pattern.clone()),
            }),
        layers_to_transform: lora.layers_to_transform.clone(),
        layers_pattern: (!lora.layers_pattern.is_empty()).then(|| lora.layers_pattern.clone()),
        rank_pattern: lora.rank_pattern.clone(),
        alpha_pattern: lora.alpha_pattern.clone(),
        use_rslora: lora.use_rslora,
        task_type: Some("CAUSAL_LM".to_owned()),
        inference_mode: true,
        monteclora: lora.monteclora.as_ref().map(monteclora_settings),
        ..AdapterConfig::default()
    }
}

/// The method's settings in PEFT's terms; PEFT allocates its noise buffer even for inference, so it is written as 1.
pub fn monteclora_settings(config: &config::MonteCloraConfig) -> MonteCloraSettings {
    MonteCloraSettings {
        num_samples: config.num_samples,
        sample_scaler: config.sample_scaler,
        kl_loss_weight: config.kl_loss_weight,
        dirichlet_prior: config.dirichlet_prior,
        use_entropy: config.use_entropy,
        buffer_size: 1,
    }
}

/// The divergences' formulas that `[lora.monteclora]` asks for.
pub fn objective(lora: &LoraConfig) -> Objective {
    match lora.monteclora.as_ref().map(|m| m.objective) {
        Some(config::Objective::Peft) => Objective::Peft,
        _ => Objective::Exact,
    }
}

/// What the training loop is told by a run's configuration.
pub fn train_settings(run: &RunConfig, max_seq_length: usize) -> TrainSettings {
    let train = &run.train;
    TrainSettings {
        seed: run.seed,
        num_train_epochs: train.num_train_epochs.unwrap_or_default(),
        max_steps: train.max_steps,
        batch_size: train.per_device_train_batch_size,
        pack_tokens: run.data.packing.then_some(max_seq_length),
        gradient_accumulation_steps: train.gradient_accumulation_steps,
        learning_rate: train.learning_rate,
        variational_learning_rate: train.variational_learning_rate,
        shape: match train.lr_scheduler_type {
            LrSchedulerType::Linear => Shape::Linear,
            LrSchedulerType::Cosine => Shape::Cosine,
            LrSchedulerType::Constant => Shape::Constant,
        },
        warmup_ratio: train.warmup_ratio,
        warmup_steps: train.warmup_steps,
        kl_warmup_ratio: run
            .lora
            .monteclora
            .as_ref()
            .map_or(0.0, |m| m.kl_warmup_ratio),
        adamw: AdamWSettings {
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            epsilon: train.adam_epsilon,
            weight_decay: train.weight_decay,
            train_a: run.lora.method != Method::LoraFa,
            loraplus_lr_ratio: train.loraplus_lr_ratio,
        },
        max_grad_norm: train.max_grad_norm,
        lora_dropout: run.lora.lora_dropout,
        gradient_checkpointing: train.gradient_checkpointing,
        logging_steps: train.logging_steps,
        eval_steps: train.eval_steps,
        save_steps: train.save_steps,
        save_total_limit: train.save_total_limit,
        load_best_model_at_end: train.load_best_model_at_end && run.data.valid.is_some(),
        early_stopping_patience: if run.data.valid.is_some() {
            train.early_stopping_patience
        } else {
            0
        },
        sinks: Sinks {
            jsonl: train.report_to.contains(&Report::Jsonl),
            tensorboard: train.report_to.contains(&Report::Tensorboard),
        },
    }
}

/// What `run.json` records.
#[derive(Debug, Clone, Serialize)]
pub struct RunRecord {
    /// The resolved configuration.
    pub config: serde_json::Value,
    /// Root of every random stream.
    pub seed: u64,
    /// Version of this program.
    pub monteclora: &'static str,
    /// Versions of what computes.
    pub versions: Versions,
    /// The base.
    pub base: BaseRecord,
    /// Training rows.
    pub train: DataRecord,
    /// Validation rows.
    pub valid: Option<DataRecord>,
    /// SHA-256 of the chat template's text.
    pub chat_template_sha256: Option<String>,
    /// SHA-256 of tokenizer.json.
    pub tokenizer_sha256: Option<String>,
    /// Adapted modules.
    pub sites: Vec<String>,
    /// Trainable values.
    pub trainable_parameters: usize,
    /// Optimiser steps planned.
    pub total_steps: u64,
    /// The step at which the run ended and its adapter was written; none while it is under way.
    pub finished_step: Option<u64>,
}

/// The version of candle-core that Cargo.toml pins; a test compares the two.
const CANDLE: &str = "0.10.2";

/// Versions of what computes a run's numbers.
#[derive(Debug, Clone, Serialize)]
pub struct Versions {
    /// This program.
    pub monteclora: &'static str,
    /// The tensor library.
    pub candle: &'static str,
    /// Operating system and processor architecture.
    pub platform: String,
    /// Where the tensors are: `cpu`, `cuda` or `metal`.
    pub device: &'static str,
}

impl Versions {
    /// Those of this process with its tensors on `device`.
    pub fn here(device: &candle_core::Device) -> Self {
        Self {
            monteclora: env!("CARGO_PKG_VERSION"),
            candle: CANDLE,
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            device: match device {
                candle_core::Device::Cpu => "cpu",
                candle_core::Device::Cuda(_) => "cuda",
                candle_core::Device::Metal(_) => "metal",
            },
        }
    }
}

/// The `finished_step` of a run.json; none if there is no such file or the run is under way.
pub fn finished_step(path: &Path) -> Option<u64> {
    let text = std::fs::read(path).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
    record["finished_step"].as_u64()
}

/// The base of a run.
#[derive(Debug, Clone, Serialize)]
pub struct BaseRecord {
    /// As given.
    pub model_id: String,
    /// Commit on the Hub.
    pub revision: Option<String>,
    /// See [`fingerprint`].
    pub fingerprint: String,
}

/// A data file of a run.
#[derive(Debug, Clone, Serialize)]
pub struct DataRecord {
    /// The file, directory or data set on the Hub, as it was named.
    pub path: String,
    /// Its commit on the Hub, where it came from there.
    pub revision: Option<String>,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Sequences in it.
    pub examples: usize,
    /// Tokens in it.
    pub tokens: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
}

impl DataRecord {
    /// The record of `data`.
    pub fn new(data: &Dataset) -> Self {
        Self {
            path: data.path().display().to_string(),
            revision: data.revision().map(str::to_owned),
            sha256: data.sha256(),
            examples: data.len(),
            tokens: data.stats().tokens.total,
            trained_tokens: data.stats().trained_tokens.total,
        }
    }
}

/// Identity of a base without reading all of it: SHA-256 over config.json and, for every weight file, its length and its
/// first and last MiB (the first holds every tensor's name, type, shape and place).
pub fn fingerprint(files: &ModelFiles) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut hasher = Sha256::new();
    hasher.update(std::fs::read(files.config_path())?);
    for path in files.files() {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        hasher.update(length.to_le_bytes());
        let mut buffer = vec![0; SAMPLE.min(length as usize)];
        file.read_exact(&mut buffer)?;
        hasher.update(&buffer);
        file.seek(SeekFrom::End(-(buffer.len() as i64)))?;
        file.read_exact(&mut buffer)?;
        hasher.update(&buffer);
    }
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of a file's bytes, or none where it is missing.
pub fn file_sha256(path: &Path) -> Option<String> {
    std::fs::read(path)
        .ok()
        .map(|bytes| hex(&Sha256::digest(bytes)))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn candle_is_the_version_that_is_built() {
        let lock = include_str!("../Cargo.lock");
        let entry = format!("name = \"candle-core\"\nversion = \"{}\"\n", super::CANDLE);
        assert!(lock.contains(&entry));
    }
}
