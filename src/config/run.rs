//! The sections of run.toml: one structure each, with its keys as PEFT and Hugging Face spell them and its defaults.

use std::path::PathBuf;
use std::sync::LazyLock;

use indexmap::IndexMap;
use monteclora_adapters::methods::METHODS;
use monteclora_adapters::methods::monteclora::{MonteCloraConfig, Preset};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

use crate::data::{
    BatchOptions, EncodeOptions, FieldNames, Overlong, Remedies, RowFormat, RowSchema, TrainOn,
};

/// A training run, checked. Made by [`RunConfig::load`]; serialises to the JSON that run.json records.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Root of every random stream: initial values, order of rows, dropout, noise.
    pub seed: u64,
    /// `[model]`
    pub model: ModelConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[lora]`
    pub lora: LoraConfig,
    /// `[train]`
    pub train: TrainConfig,
    /// `[eval]`
    pub eval: EvalConfig,
    /// What was asked for and has no effect, for the user to read.
    #[serde(skip)]
    pub notes: Vec<String>,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            model: ModelConfig::default(),
            data: DataConfig::default(),
            lora: LoraConfig::default(),
            train: TrainConfig::default(),
            eval: EvalConfig::default(),
            notes: Vec::new(),
        }
    }
}

/// `[model]`: the frozen base.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A local directory, a Hub id, or a local GGUF file. Required: empty in the default.
    pub model_id: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
    /// Type of the base's weights in memory.
    pub dtype: DtypeChoice,
    /// A Jinja (or JSON) file in place of the model's own chat template.
    pub chat_template: Option<PathBuf>,
}

/// Type of the base's weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// f32 on a CPU.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// 16 bits.
    F16,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Training rows: a file, a directory with train and perhaps valid files, or a data set on the Hub
    /// (`hf://datasets/ORG/NAME`). Required: empty in the default.
    pub train: PathBuf,
    /// Validation rows; without, evaluation, best model and early stopping are off. By default those of the directory
    /// that `train` names, if it has any.
    pub valid: Option<PathBuf>,
    /// Format of the rows.
    pub format: DataFormat,
    /// Field -> its name in the files, such as `{ prompt = "question", completion = "answer" }`.
    #[serde(skip_serializing_if = "FieldNames::is_empty")]
    pub fields: FieldNames,
    /// Prompt rows as one user and one assistant turn; otherwise prompt, completion and end token, tokenised apart.
    pub apply_chat_template: bool,
    /// Which turns of a conversation carry loss.
    pub train_on: TrainOn,
    /// Longest example in tokens, at least 2; `None` is min(1024, the model's max_position_embeddings).
    pub max_seq_length: Option<usize>,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// Whether examples are put together up to `max_seq_length` tokens; the batch size then counts packs.
    pub packing: bool,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: PathBuf::new(),
            valid: None,
            format: DataFormat::Auto,
            fields: FieldNames::default(),
            apply_chat_template: true,
            train_on: TrainOn::Assistant,
            max_seq_length: None,
            overlong: Overlong::Error,
            packing: true,
        }
    }
}

impl DataConfig {
    /// The length limit in tokens for a model of so many positions.
    pub fn max_seq_length_for(&self, max_position_embeddings: usize) -> usize {
        self.max_seq_length
            .unwrap_or(max_position_embeddings.min(1024))
    }

    /// How rows are read.
    pub fn row_schema(&self) -> RowSchema {
        RowSchema {
            format: self.format.row_format(),
            fields: self.fields.clone(),
        }
    }

    /// How rows become examples, given the length limit.
    pub fn encode_options(&self, max_seq_length: usize) -> EncodeOptions {
        EncodeOptions {
            train_on: self.train_on,
            apply_chat_template: self.apply_chat_template,
            max_seq_length,
            overlong: self.overlong,
            remedies: Remedies::Keys,
        }
    }
}

/// `data.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// Found out over all rows.
    Auto,
    /// `{"messages": [{"role", "content"}], "tools"?}`.
    Messages,
    /// `{"prompt", "completion"}`.
    PromptCompletion,
    /// `{"instruction", "input"?, "output", "system"?}`.
    Alpaca,
    /// `{"conversations": [{"from", "value"}], "system"?}`.
    Sharegpt,
    /// `{"text"}`.
    Text,
}

impl DataFormat {
    /// The format, or `None` to detect it.
    pub fn row_format(self) -> Option<RowFormat> {
        match self {
            Self::Auto => None,
            Self::Messages => Some(RowFormat::Messages),
            Self::PromptCompletion => Some(RowFormat::PromptCompletion),
            Self::Alpaca => Some(RowFormat::Alpaca),
            Self::Sharegpt => Some(RowFormat::Sharegpt),
            Self::Text => Some(RowFormat::Text),
        }
    }
}

/// What is trained: the name of a registered method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Method(pub &'static str);

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        static NAMES: LazyLock<Vec<&str>> =
            LazyLock::new(|| METHODS.iter().map(|kind| kind.name).collect());
        let given = String::deserialize(deserializer)?;
        let known = NAMES.iter().find(|name| **name == given);
        known
            .map(|name| Self(name))
            .ok_or_else(|| D::Error::unknown_variant(&given, &NAMES))
    }
}

/// One value or a list of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list of them")]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> From<OneOrMany<T>> for Vec<T> {
    fn from(values: OneOrMany<T>) -> Self {
        match values {
            OneOrMany::One(value) => vec![value],
            OneOrMany::Many(values) => values,
        }
    }
}

/// A list, of which a single value stands for itself.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(source: D) -> Result<Vec<T>, D::Error> {
    OneOrMany::deserialize(source).map(Vec::from)
}

/// As [`list`], of a key that may be absent.
fn some_list<'de, D, T>(source: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    list(source).map(Some)
}

/// Which modules a list or pattern selects; PEFT's rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OneOrMany<String>", into = "OneOrMany<String>")]
pub enum ModuleSelection {
    /// Every linear layer of the decoder blocks.
    AllLinear,
    /// Module names: the whole path, or its end after a dot.
    Names(Vec<String>),
    /// A regular expression that matches the whole path.
    Regex(String),
}

impl From<OneOrMany<String>> for ModuleSelection {
    fn from(value: OneOrMany<String>) -> Self {
        match value {
            OneOrMany::One(name) if name.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            OneOrMany::One(pattern) => Self::Regex(pattern),
            OneOrMany::Many(names) => Self::Names(names),
        }
    }
}

impl From<ModuleSelection> for OneOrMany<String> {
    fn from(selection: ModuleSelection) -> Self {
        match selection {
            ModuleSelection::AllLinear => Self::One("all-linear".to_owned()),
            ModuleSelection::Names(names) => Self::Many(names),
            ModuleSelection::Regex(pattern) => Self::One(pattern),
        }
    }
}

/// `[lora]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// What is trained.
    pub method: Method,
    /// An adapter directory to start from; its shape then stands for the keys of this section that were not given.
    pub init_from: Option<PathBuf>,
    /// With `init_from`, the keys of `[lora]` and `[lora.monteclora]` that were given, as dotted paths.
    #[serde(skip)]
    pub given: Vec<String>,
    /// Rank, at least 1.
    pub r: usize,
    /// Above 0. The update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub lora_alpha: f64,
    /// Probability that an input of A is zeroed in training, in [0, 1).
    pub lora_dropout: f64,
    /// Which modules are adapted.
    pub target_modules: ModuleSelection,
    /// Which of them are not.
    pub exclude_modules: Option<ModuleSelection>,
    /// Indices of the layers that are adapted; `None` is all.
    #[serde(deserialize_with = "some_list")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the list that the layers are in, where it is not the usual one.
    #[serde(deserialize_with = "list")]
    pub layers_pattern: Vec<String>,
    /// Rank by module pattern; the first that matches, in the file's order.
    pub rank_pattern: IndexMap<String, usize>,
    /// Alpha by module pattern; the first that matches, in the file's order.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Scale by the square root of the rank.
    pub use_rslora: bool,
    /// `[lora.monteclora]`; `None` for the other methods, whose files may keep the section.
    pub monteclora: Option<MonteCloraConfig>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            method: Method(METHODS[0].name),
            init_from: None,
            given: Vec::new(),
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: ModuleSelection::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            use_rslora: false,
            monteclora: Some(MonteCloraConfig::default()),
        }
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// To 0 in a straight line.
    Linear,
    /// To 0 along half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

/// Where metrics go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// metrics.jsonl.
    Jsonl,
    /// TensorBoard event files.
    Tensorboard,
}

/// `[train]`, with Hugging Face's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Where the adapter goes. Required: empty in the default.
    pub output_dir: PathBuf,
    /// Passes over the training rows, above 0; a part of a pass is allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_train_epochs: Option<f64>,
    /// Optimiser steps, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Examples (packs, with packing) that go through the model at once, at least 1.
    pub per_device_train_batch_size: usize,
    /// Batches an optimiser step, at least 1.
    pub gradient_accumulation_steps: usize,
    /// Largest learning rate of A and B, above 0.
    pub learning_rate: f64,
    /// Largest learning rate of the variational parameters, above 0; by default [`Preset::variational_rate_ratio`] times
    /// `learning_rate`.
    pub variational_learning_rate: f64,
    /// Learning rate of B over that of A, above 0; LoRA+ recommends 16 (Hayou et al. 2024, arXiv:2402.12354).
    pub loraplus_lr_ratio: f64,
    /// How the learning rate falls.
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of the steps over which the learning rate rises from 0, in [0, 1].
    pub warmup_ratio: f64,
    /// Steps over which it rises; takes the place of `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// AdamW's decoupled decay, at least 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment, in [0, 1).
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment, in [0, 1).
    pub adam_beta2: f64,
    /// AdamW's epsilon, above 0.
    pub adam_epsilon: f64,
    /// Largest norm of the whole gradient, at least 0; 0 is no limit.
    pub max_grad_norm: f64,
    /// Optimiser steps between `train` lines of metrics.jsonl, at least 1.
    pub logging_steps: u64,
    /// Optimiser steps between evaluations, at least 1.
    pub eval_steps: u64,
    /// Optimiser steps between checkpoints, at least 1.
    pub save_steps: u64,
    /// Checkpoints kept; 0 is all.
    pub save_total_limit: usize,
    /// Whether the adapter of the lowest validation loss is the one written at the end; off without `data.valid`.
    pub load_best_model_at_end: bool,
    /// Evaluations without improvement that end the run; 0 is off, and so is a run without `data.valid`.
    pub early_stopping_patience: u64,
    /// Where metrics go.
    #[serde(deserialize_with = "list")]
    pub report_to: Vec<Report>,
    /// Whether blocks are computed again in the backward pass to save memory.
    pub gradient_checkpointing: bool,
    /// Mixed precision: products with frozen weights in bfloat16, faster on processors with AVX512-BF16; sums, adapter and
    /// everything else stay f32. Weights are then held in bfloat16 (`model.dtype` "auto" or "bf16").
    pub bf16: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::new(),
            num_train_epochs: Some(1.0),
            max_steps: None,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: 5e-4,
            variational_learning_rate: 5e-4 * Preset::default().variational_rate_ratio(),
            loraplus_lr_ratio: 1.0,
            lr_scheduler_type: LrSchedulerType::Linear,
            warmup_ratio: 0.03,
            warmup_steps: None,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            logging_steps: 10,
            eval_steps: 100,
            save_steps: 100,
            save_total_limit: 3,
            load_best_model_at_end: true,
            early_stopping_patience: 0,
            report_to: vec![Report::Jsonl],
            gradient_checkpointing: false,
            bf16: false,
        }
    }
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Posterior draws averaged beside the mean; 0 is none.
    pub posterior_samples: usize,
    /// Bins of the expected calibration error, at least 1.
    pub ece_bins: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            posterior_samples: 0,
            ece_bins: 15,
        }
    }
}

impl RunConfig {
    /// How training examples are put into batches, given the length limit.
    pub fn batch_options(&self, max_seq_length: usize) -> BatchOptions {
        BatchOptions {
            batch_size: self.train.per_device_train_batch_size,
            pack_tokens: self.data.packing.then_some(max_seq_length),
            shuffle_seed: Some(self.seed),
        }
    }
}
