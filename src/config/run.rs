//! The sections of run.toml: one structure each, with its keys as PEFT and Hugging Face spell them and its defaults.

use std::path::PathBuf;
use std::sync::LazyLock;

use indexmap::IndexMap;
use monteclora_adapters::methods::METHODS;
use monteclora_adapters::methods::monteclora::{MonteCloraConfig, Preset};
use monteclora_adapters::methods::{AdaLoraConfig, SaraConfig, SecondOrderConfig, SsfConfig};
use monteclora_adapters::weights::{KINDS, Kind};
use monteclora_converters::Problem;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::data::{
    BatchOptions, EncodeOptions, FieldNames, Overlong, Remedies, RowFormat, RowSchema, TrainOn,
};

/// Declares a section with the default of every key beside it.
macro_rules! section {
    (
        $(#[$about:meta])*
        pub struct $name:ident { $($(#[$meta:meta])* pub $key:ident: $type:ty = $default:expr,)* }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $($(#[$meta])* pub $key: $type,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }
    };
}

section! {
    /// A training run, checked. Made by [`RunConfig::load`]; serialises to the JSON that run.json records.
    pub struct RunConfig {
        /// Random seed of initial values, order of rows, dropout and noise.
        pub seed: u64 = 42,
        /// `[model]`
        pub model: ModelConfig = ModelConfig::default(),
        /// `[data]`
        pub data: DataConfig = DataConfig::default(),
        /// `[lora]`
        pub lora: LoraConfig = LoraConfig::default(),
        /// `[train]`
        pub train: TrainConfig = TrainConfig::default(),
        /// `[eval]`
        pub eval: EvalConfig = EvalConfig::default(),
        /// What was asked for and has no effect, for the user to read.
        #[serde(skip)]
        pub notes: Vec<String> = Vec::new(),
    }
}

/// `[model]`: the frozen base.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Base model: local directory, Hub id, or local GGUF file. Required; the default is empty.
    pub model_id: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
    /// dtype of the base's weights in memory.
    pub dtype: DtypeChoice,
    /// Jinja (or JSON) file that replaces the model's chat template.
    pub chat_template: Option<PathBuf>,
}

/// Every type of the base's weights: its name, and what the reference of run.toml and a command's help say of it. They are
/// the registered kinds, with `f16` for what is merged or served.
pub static DTYPES: LazyLock<Vec<[&str; 3]>> = LazyLock::new(|| {
    let kinds = KINDS.iter().map(|kind| [kind.name, kind.about, kind.help]);
    let mut all = vec![[
        "auto",
        "blocks of a quantised base as they are, other weights as f32",
        "Blocks of a quantised base as they are, other weights as f32",
    ]];
    all.extend(kinds.chain([["f16", "16 bits", "Half precision"]]));
    all
});

/// One of [`DTYPES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DtypeChoice(pub &'static str);

impl Default for DtypeChoice {
    fn default() -> Self {
        Self("auto")
    }
}

impl<'de> Deserialize<'de> for DtypeChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        static NAMES: LazyLock<Vec<&str>> =
            LazyLock::new(|| DTYPES.iter().map(|[name, ..]| *name).collect());
        registered(deserializer, &NAMES).map(Self)
    }
}

impl DtypeChoice {
    /// How weights are held; `auto` stands for a kind.
    ///
    /// # Errors
    /// None holds them so: `holder` and the names, between `quote`s, say what can be asked for.
    pub fn kind(
        self,
        auto: &'static Kind,
        holder: &str,
        quote: &str,
    ) -> Result<&'static Kind, Problem> {
        if self == Self::default() {
            return Ok(auto);
        }
        let list = |first: Option<&'static str>, quote| {
            let names = first.into_iter().chain(KINDS.iter().map(|kind| kind.name));
            let names: Vec<_> = names.map(|name| format!("{quote}{name}{quote}")).collect();
            let names = names.join(", ");
            let split = names.rsplit_once(", ");
            split.map_or(names.clone(), |(before, last)| {
                format!("{before} or {last}")
            })
        };
        Kind::find(self.0).ok_or_else(|| {
            let (held, names) = (list(None, ""), list(Some("auto"), quote));
            Problem::usage(format!("{holder} holds weights as {held}; use {names}"))
        })
    }
}

/// One of `names`.
fn registered<'de, D: Deserializer<'de>>(
    source: D,
    names: &'static [&'static str],
) -> Result<&'static str, D::Error> {
    let given = String::deserialize(source)?;
    // Others write `DoRA` and `second_order`.
    let spelt = given.replace('_', "-");
    let is_it = |name: &&str| *name == given || name.eq_ignore_ascii_case(&spelt);
    let known = names.iter().copied().find(is_it);
    known.ok_or_else(|| D::Error::unknown_variant(&given, names))
}

section! {
    /// `[data]`
    pub struct DataConfig {
        /// Training rows: a file, a directory with train and optionally valid files, or a data set on the Hub
        /// (`hf://datasets/ORG/NAME`). Required; the default is empty.
        pub train: PathBuf = PathBuf::new(),
        /// Validation rows. Without them, evaluation, best model and early stopping are off. Default: the validation files in
        /// the directory `train`, if any.
        pub valid: Option<PathBuf> = None,
        /// Format of the rows.
        pub format: DataFormat = DataFormat::Auto,
        /// Names of the fields in the files, such as `{ prompt = "question", completion = "answer" }`.
        #[serde(skip_serializing_if = "FieldNames::is_empty")]
        pub fields: FieldNames = FieldNames::default(),
        /// Treat a prompt row as one user and one assistant turn. If false, tokenise prompt, completion and end token
        /// separately.
        pub apply_chat_template: bool = true,
        /// Variables of the chat template, such as `{ enable_thinking = false }`. A row's variables override them.
        #[serde(skip_serializing_if = "Map::is_empty")]
        pub template_variables: Map<String, Value> = Map::new(),
        /// Turns of a conversation that count in the loss.
        pub train_on: TrainOn = TrainOn::Assistant,
        /// Longest example, in tokens, at least 2. Default: min(1024, the model's max_position_embeddings).
        pub max_seq_length: Option<usize> = None,
        /// Treatment of longer examples.
        pub overlong: Overlong = Overlong::Error,
        /// Pack examples together up to `max_seq_length` tokens. The batch size then counts packs.
        pub packing: bool = true,
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
    /// Detected from all rows.
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
        registered(deserializer, &NAMES).map(Self)
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

/// As [`list`], with the reason why a text is no sink.
fn reports<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<Report>, D::Error> {
    let texts: Vec<String> = list(source)?;
    let reports = texts.into_iter().map(Report::try_from);
    reports.collect::<Result<_, _>>().map_err(D::Error::custom)
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
    /// Every linear layer in the decoder blocks.
    AllLinear,
    /// Module names: the full path, or its end after a dot.
    Names(Vec<String>),
    /// A regular expression that matches the full path.
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

section! {
    /// `[lora]`
    pub struct LoraConfig {
        /// Training method.
        pub method: Method = Method(METHODS[0].name),
        /// Adapter directory to start from. Keys of this section that are not given come from the adapter's shape.
        pub init_from: Option<PathBuf> = None,
        /// With `init_from`, the keys of `[lora]` and `[lora.monteclora]` that were given, as dotted paths.
        #[serde(skip)]
        pub given: Vec<String> = Vec::new(),
        /// LoRA rank, at least 1.
        pub r: usize = 16,
        /// LoRA alpha, above 0. The update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        pub lora_alpha: f64 = 32.0,
        /// Dropout: probability that an input of A is zeroed in training, in [0, 1).
        pub lora_dropout: f64 = 0.0,
        /// Modules to adapt.
        pub target_modules: ModuleSelection = ModuleSelection::AllLinear,
        /// Modules not to adapt.
        pub exclude_modules: Option<ModuleSelection> = None,
        /// Indices of the layers to adapt, from 0, such as `[26, 27, 28, 29]`; a single number is that one layer. Default: all.
        #[serde(deserialize_with = "some_list")]
        pub layers_to_transform: Option<Vec<usize>> = None,
        /// Names of the module list that holds the layers, if not the usual one.
        #[serde(deserialize_with = "list")]
        pub layers_pattern: Vec<String> = Vec::new(),
        /// Rank per module pattern. The first match in file order applies.
        pub rank_pattern: IndexMap<String, usize> = IndexMap::new(),
        /// Alpha per module pattern. The first match in file order applies.
        pub alpha_pattern: IndexMap<String, f64> = IndexMap::new(),
        /// Divide alpha by the square root of the rank.
        pub use_rslora: bool = false,
        /// `[lora.monteclora]`; `None` for the other methods, whose files may keep the section.
        pub monteclora: Option<MonteCloraConfig> = Some(MonteCloraConfig::default()),
        /// `[lora.adalora]`; `None` for the other methods.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adalora: Option<AdaLoraConfig> = Some(AdaLoraConfig::default()),
        /// `[lora.ssf]`; `None` for the other methods.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ssf: Option<SsfConfig> = Some(SsfConfig::default()),
        /// `[lora.sara]`; `None` for the other methods.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub sara: Option<SaraConfig> = Some(SaraConfig::default()),
        /// `[lora.second_order]`; `None` for the other methods.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub second_order: Option<SecondOrderConfig> = Some(SecondOrderConfig::default()),
    }
}

/// Decay of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Linear decay to 0.
    Linear,
    /// Half-cosine decay to 0.
    Cosine,
    /// No decay.
    Constant,
}

/// Outputs for metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Report {
    /// The file metrics.jsonl.
    Jsonl,
    /// TensorBoard event files.
    Tensorboard,
    /// `command:...`: a shell command that gets the lines of metrics.jsonl on standard input.
    Command(String),
}

const COMMAND: &str = "command:";

impl TryFrom<String> for Report {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let command = text.strip_prefix(COMMAND).map(str::trim);
        match (text.as_str(), command) {
            ("jsonl", _) => Ok(Self::Jsonl),
            ("tensorboard", _) => Ok(Self::Tensorboard),
            (_, Some(command)) if !command.is_empty() => Ok(Self::Command(command.to_owned())),
            _ => Err(format!(
                "found {text:?}, expected \"jsonl\", \"tensorboard\", or \"command:...\" that reads the metrics on its standard input, as examples/wandb_sink.py does"
            )),
        }
    }
}

impl From<Report> for String {
    fn from(report: Report) -> Self {
        match report {
            Report::Jsonl => "jsonl".to_owned(),
            Report::Tensorboard => "tensorboard".to_owned(),
            Report::Command(command) => format!("{COMMAND}{command}"),
        }
    }
}

section! {
    /// `[train]`, with Hugging Face's names.
    pub struct TrainConfig {
        /// Output directory of the adapter. Required; the default is empty.
        pub output_dir: PathBuf = PathBuf::new(),
        /// Epochs over the training rows, above 0. May be fractional.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub num_train_epochs: Option<f64> = Some(1.0),
        /// Optimiser steps, at least 1, instead of `num_train_epochs`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub max_steps: Option<u64> = None,
        /// Batch size: examples (packs, with packing) per forward pass, at least 1.
        pub per_device_train_batch_size: usize = 8,
        /// Batches per optimiser step, at least 1.
        pub gradient_accumulation_steps: usize = 1,
        /// Peak learning rate of A and B, above 0.
        pub learning_rate: f64 = 5e-4,
        /// Peak learning rate of the variational parameters, at least 0. 0 freezes them. Default: `learning_rate` times 10, or
        /// times 1 with the preset "peft".
        pub variational_learning_rate: f64 = 5e-4 * Preset::default().variational_rate_ratio(),
        /// Ratio of the learning rates of B and A, above 0. LoRA+ recommends 16 (Hayou et al. 2024, arXiv:2402.12354).
        pub loraplus_lr_ratio: f64 = 1.0,
        /// Learning rate decay after warm-up.
        pub lr_scheduler_type: LrSchedulerType = LrSchedulerType::Linear,
        /// Share of the steps over which the learning rate rises from 0, in [0, 1].
        pub warmup_ratio: f64 = 0.03,
        /// Steps of warm-up, instead of `warmup_ratio`.
        pub warmup_steps: Option<u64> = None,
        /// AdamW weight decay (decoupled), at least 0.
        pub weight_decay: f64 = 0.0,
        /// AdamW beta1: decay of the first moment, in [0, 1).
        pub adam_beta1: f64 = 0.9,
        /// AdamW beta2: decay of the second moment, in [0, 1).
        pub adam_beta2: f64 = 0.999,
        /// AdamW epsilon, above 0.
        pub adam_epsilon: f64 = 1e-8,
        /// Maximum norm of the whole gradient, at least 0. 0 means no limit.
        pub max_grad_norm: f64 = 1.0,
        /// Optimiser steps between `train` lines of metrics.jsonl, at least 1.
        pub logging_steps: u64 = 10,
        /// Optimiser steps between evaluations, at least 1.
        pub eval_steps: u64 = 100,
        /// Optimiser steps between checkpoints, at least 1.
        pub save_steps: u64 = 100,
        /// Checkpoints to keep. 0 means all.
        pub save_total_limit: usize = 3,
        /// Write the adapter with the lowest validation loss at the end. Off without `data.valid`.
        pub load_best_model_at_end: bool = true,
        /// Evaluations without improvement after which training stops. 0 means off. Off without `data.valid`.
        pub early_stopping_patience: u64 = 0,
        /// Outputs for metrics.
        #[serde(deserialize_with = "reports")]
        pub report_to: Vec<Report> = vec![Report::Jsonl],
        /// Recompute blocks in the backward pass, to save memory.
        pub gradient_checkpointing: bool = false,
        /// Mixed precision: products with frozen weights in bfloat16. Faster on AMD processors with AVX512-BF16, slower on other CPUs. Sums, adapter and
        /// everything else stay f32; on other devices than the CPU the result of each such product is rounded to bfloat16. Frozen weights are held in bfloat16 (`model.dtype` "auto" or "bf16").
        pub bf16: bool = false,
        /// On CUDA, multiply float32 matrices in TF32: factors of 10 bits after the point instead of 23, several times as
        /// fast. Without effect on other devices.
        pub tf32: bool = false,
    }
}

/// Bins of the expected calibration error where nothing else is asked for.
pub const ECE_BINS: usize = 15;

section! {
    /// `[eval]`
    pub struct EvalConfig {
        /// Posterior draws to average beside the mean. 0 means none.
        pub posterior_samples: usize = 0,
        /// Number of bins of the expected calibration error, at least 1.
        pub ece_bins: usize = ECE_BINS,
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
