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
    /// New directory.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a directory that is not empty, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// The formats that `convert` reads. Those that are read as another is are taken and not shown.
fn read_formats() -> Vec<PossibleValue> {
    let formats = FORMATS.iter().map(|format| {
        let value = PossibleValue::new(format.about().name);
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
            Some(PossibleValue::new(format.about().name).help(format.about().writes?))
        })
        .collect()
}

/// Element types that `convert` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConvertDtypeArg {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// `convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Adapter directory or GGUF file.
    pub source: PathBuf,
    /// New directory, or file for GGUF.
    #[arg(short, long, value_name = "DST")]
    pub output: PathBuf,
    /// Format to write.
    #[arg(long, value_parser = PossibleValuesParser::new(written_formats()))]
    pub to: String,
    /// Format to read.
    #[arg(long, value_parser = PossibleValuesParser::new(read_formats()), default_value = "auto")]
    pub from: String,
    /// Base model: names, shapes and stored weights are compared with it. GGUF needs its config.json (head counts).
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Element type of A and B; the source's by default.
    #[arg(long, value_enum)]
    pub dtype: Option<ConvertDtypeArg>,
    /// Write over what is there, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `sample`
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// MonteCLoRA adapter directory.
    pub adapter: PathBuf,
    /// Number of draws.
    #[arg(short, value_name = "K", default_value_t = 1)]
    pub k: usize,
    /// Seed of the draws.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// New directory; draws are `draw-0000`, `draw-0001`, ... in it.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a directory that is not empty, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
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
    #[arg(short, long)]
    pub adapter: PathBuf,
    /// New model directory.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Write into a directory that is not empty, and accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Adapter or model directory, or GGUF file of either.
    pub path: PathBuf,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `validate`
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Adapter directory, or GGUF LoRA.
    pub adapter: PathBuf,
    /// Base model to check names and shapes against.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Runtime that is to load it: mistralrs, mistralrs-0.9, vllm, llamacpp, peft or mlx.
    #[arg(long = "for", value_name = "RUNTIME")]
    pub runtimes: Vec<String>,
    /// One JSON object on stdout.
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
    /// Which decoder runs.
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineArg,
    /// Recorded `input_ids`, `logits` and perhaps `base_logits` in a safetensors file.
    #[arg(long, value_name = "FILE")]
    pub reference: Option<PathBuf>,
    /// Text to compare on; a built-in one by default.
    #[arg(long, conflicts_with = "reference")]
    pub prompt: Option<String>,
    /// Compare the text of conversations instead: as it is trained and served here, and as mistral.rs alone writes it with the
    /// model's chat template. Shows the first difference of each.
    #[arg(long, conflicts_with_all = ["engine", "reference", "prompt", "isq", "tolerance"])]
    pub chat: bool,
    /// Rows whose conversations are compared; built-in ones by default.
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub data: Option<PathBuf>,
    /// Let mistral.rs quantise while loading, as `in_situ_quant` of serve.toml does: 8, Q4K, ... With an adapter, also
    /// compares with the base that has the adapter merged into it, quantised alike.
    #[arg(long, value_name = "TYPE")]
    pub isq: Option<String>,
    /// Fail with exit code 5 when the largest difference exceeds this; with --isq and an adapter, that to the merged base.
    #[arg(long)]
    pub tolerance: Option<f64>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Element type that `import-gguf` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ImportDtypeArg {
    /// bfloat16, half the size.
    Bf16,
    /// Single precision: every value of the file exactly.
    #[default]
    F32,
}

/// `import-gguf`
#[derive(Debug, Args)]
pub struct ImportGgufArgs {
    /// The GGUF file.
    pub file: PathBuf,
    /// New model directory.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: ImportDtypeArg,
    /// Replace a directory that is not empty.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
