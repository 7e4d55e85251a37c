//! Arguments of the commands that turn or look into adapters and models.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueEnum};
use monteclora_converters::FORMATS;

use super::ModelArgs;
use crate::eval::DEFAULT_SEED;

/// `collapse`
#[derive(Debug, Args)]
pub struct CollapseArgs {
    /// Adapter directory.
    pub adapter: PathBuf,
    /// New output directory.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a non-empty directory, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// The formats that `convert` reads. Those that are read as another is are taken and not shown.
fn read_formats() -> Vec<PossibleValue> {
    let formats = FORMATS.iter().map(|format| {
        let value = PossibleValue::new(format.about().name).aliases(format.about().aliases);
        match format.about().reads {
            Some(help) => value.help(help),
            None => value.hide(true),
        }
    });
    let auto = PossibleValue::new("auto").help("By content and extension");
    std::iter::once(auto).chain(formats).collect()
}

/// The formats that `convert` writes.
fn written_formats() -> Vec<PossibleValue> {
    let formats = FORMATS.iter();
    formats
        .filter_map(|format| {
            let value = PossibleValue::new(format.about().name).aliases(format.about().aliases);
            Some(value.help(format.about().writes?))
        })
        .collect()
}

/// The dtypes that `convert` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConvertDtypeArg {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    Bf16,
}

/// `convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Adapter directory or GGUF file to convert.
    pub source: PathBuf,
    /// New output directory; for GGUF a file.
    #[arg(short, long, value_name = "DST")]
    pub output: PathBuf,
    /// Adapter format to write.
    #[arg(long, value_parser = PossibleValuesParser::new(written_formats()))]
    pub to: String,
    /// Adapter format to read.
    #[arg(long, value_parser = PossibleValuesParser::new(read_formats()), default_value = "auto")]
    pub from: String,
    /// Base model to compare names, shapes and stored weights with. GGUF needs the base's config.json (head counts).
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// dtype of A and B. Default: the dtype of the source.
    #[arg(long, value_enum)]
    pub dtype: Option<ConvertDtypeArg>,
    /// Overwrite existing output, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `sample`
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// MonteCLoRA adapter directory.
    pub adapter: PathBuf,
    /// Number of posterior draws.
    #[arg(short, value_name = "K", default_value_t = 1)]
    pub k: usize,
    /// Random seed of the draws.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// New directory for the draws `draw-0000`, `draw-0001`, ...
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a non-empty directory, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `merge`
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory, or GGUF LoRA.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: PathBuf,
    /// New model directory.
    #[arg(short, long, alias = "save-path", value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a non-empty directory, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `push`
#[derive(Debug, Args)]
pub struct PushArgs {
    /// Adapter directory. A model card, README.md, is written into it unless it already has one of yours.
    pub adapter: PathBuf,
    /// Hub repository: ORG/NAME, or NAME for one of your own. Created if missing.
    pub repo: String,
    /// Make the repository private if it is new.
    #[arg(long)]
    pub private: bool,
    /// Output of `eval --json`, for the card.
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// Branch to push to.
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// Commit message.
    #[arg(long, value_name = "TEXT", default_value = "Adapter by monteclora")]
    pub message: String,
    /// Hub token: `literal:TOKEN`, `env:VARIABLE`, `path:FILE` or `cache`.
    #[arg(long, default_value = "cache")]
    pub token_source: String,
    /// Push even if the adapter changes nothing.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Adapter or model: a directory, a GGUF file, or the Hub id of a model.
    pub path: PathBuf,
    /// List every module; by default many modules of one kind are one line.
    #[arg(long)]
    pub all: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `validate`
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Adapter directory, or GGUF LoRA.
    pub adapter: PathBuf,
    /// Base model whose names and shapes are checked.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Runtime that will load the adapter: mistralrs, mistralrs-0.9, vllm, llamacpp, peft or mlx.
    #[arg(long = "for", value_name = "RUNTIME")]
    pub runtimes: Vec<String>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Which decoder `parity` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum EngineArg {
    /// Our decoder.
    Ours,
    /// mistral.rs in this process.
    Mistralrs,
    /// Both.
    #[default]
    Both,
}

/// `parity`
#[derive(Debug, Args)]
pub struct ParityArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory.
    #[arg(short, long)]
    pub adapter: Option<PathBuf>,
    /// Decoder to run.
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineArg,
    /// safetensors file with recorded `input_ids`, `logits` and optionally `base_logits`.
    #[arg(long, value_name = "FILE")]
    pub reference: Option<PathBuf>,
    /// Text to compare on. Default: a built-in text.
    #[arg(long, conflicts_with = "reference")]
    pub prompt: Option<String>,
    /// Compare conversation texts instead of logits: the text trained and served here, and the text that mistral.rs alone
    /// writes with the model's chat template. Shows the first difference of each.
    #[arg(long, conflicts_with_all = ["engine", "reference", "prompt", "isq", "tolerance"])]
    pub chat: bool,
    /// Rows whose conversations are compared. Default: built-in rows.
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub data: Option<PathBuf>,
    /// Quantise in mistral.rs while loading, as `in_situ_quant` in serve.toml: 8, Q4K, ... With an adapter, also compare with
    /// the base that has the adapter merged in, quantised in the same way.
    #[arg(long, value_name = "TYPE")]
    pub isq: Option<String>,
    /// Fail with exit code 5 if the largest difference exceeds this. With --isq and an adapter: the difference to the merged
    /// base.
    #[arg(long)]
    pub tolerance: Option<f64>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// The dtype that `import-gguf` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ImportDtypeArg {
    /// bfloat16: half the size of f32.
    Bf16,
    /// 32-bit float: every value of the file exactly.
    #[default]
    F32,
}

/// `import-gguf`
#[derive(Debug, Args)]
pub struct ImportGgufArgs {
    /// GGUF file to convert.
    pub file: PathBuf,
    /// New model directory.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// dtype of the weights.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: ImportDtypeArg,
    /// Replace a non-empty directory.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
