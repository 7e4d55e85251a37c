//! The command line, as clap structs and nothing else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Fine-tune language models with MonteCLoRA (Bayesian LoRA) and serve the result with mistral.rs.
#[derive(Debug, Parser)]
#[command(name = "monteclora", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// More logging on stderr; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Form of the log on stderr.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole job on a real model in minutes: train, compare with the base, collapse, serve.
    Quickstart(QuickstartArgs),
    /// A commented run.toml for a model and a data file.
    Init(InitArgs),
    /// Fine-tune as run.toml says.
    Train(TrainArgs),
    /// Scores of a base and an adapter on a data file: loss, perplexity, token accuracy, multiple choice, calibration.
    Eval(EvalArgs),
    /// One self-contained HTML page about a training run.
    Report(ReportArgs),
    /// Data files: every bad row, rows with what is trained marked, lengths.
    #[command(subcommand)]
    Data(DataCommand),
    /// Posterior mean as a plain LoRA directory.
    Collapse(CollapseArgs),
    /// Between adapter formats: PEFT, plain LoRA, GGUF, mlx-lm.
    Convert(ConvertArgs),
    /// Posterior draws, each a plain LoRA directory.
    Sample(SampleArgs),
    /// A full model directory with the adapter merged in.
    Merge(MergeArgs),
    /// What a model or adapter holds.
    Inspect(InspectArgs),
    /// Every problem of an adapter, for a base and for runtimes.
    Validate(ValidateArgs),
    /// Logits of our decoder against mistral.rs and against a recorded reference.
    #[cfg(feature = "mistralrs")]
    Parity(ParityArgs),
    /// mistral.rs's OpenAI-compatible server with adapters loaded.
    #[cfg(feature = "mistralrs")]
    Serve(ServeArgs),
    /// An adapter into service on a running server: canary, swap, verification, and the way back.
    #[cfg(feature = "mistralrs")]
    Deploy(DeployArgs),
    /// The generation that an alias had before.
    #[cfg(feature = "mistralrs")]
    Rollback(RollbackArgs),
    /// What a running server serves.
    #[cfg(feature = "mistralrs")]
    Status(StatusArgs),
    /// GGUF base model to a Hugging Face directory.
    ImportGguf(ImportGgufArgs),
    /// What this build and this machine can do.
    Doctor(DoctorArgs),
    /// Shell completions on stdout.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Measurements that anyone can repeat.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// Element type of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DtypeArg {
    /// f32 on a CPU.
    #[default]
    Auto,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

/// Which base model, and where it runs; the names are those of mistral.rs.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Local directory, Hub id, or local .gguf file.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: String,
    /// How it is fetched and run.
    #[command(flatten)]
    pub options: ModelOptions,
}

/// How a base model is fetched and run.
#[derive(Debug, Clone, Args)]
pub struct ModelOptions {
    /// Branch, tag or commit on the Hub.
    #[arg(long)]
    pub revision: Option<String>,
    /// Element type of the base's weights in memory.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeArg,
    /// Stay on the CPU where the build supports an accelerator.
    #[arg(long)]
    pub cpu: bool,
    /// Hub token: `literal:TOKEN`, `env:VARIABLE`, `path:FILE`, `cache` or `none`.
    #[arg(long, default_value = "cache")]
    pub token_source: String,
    /// Jinja file in place of the model's chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// `quickstart`
#[derive(Debug, Args)]
pub struct QuickstartArgs {
    /// Base model; by default SmolLM2-135M-Instruct from the cache, the Hub or PyPI.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Where adapter and reports go.
    #[arg(long, default_value = "quickstart-out")]
    pub output_dir: PathBuf,
    /// Write into an output directory that is not empty.
    #[arg(long)]
    pub force: bool,
    /// Passes over the training tickets.
    #[arg(long, hide = true)]
    pub max_steps: Option<u64>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `init`
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Training rows, JSON Lines.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Validation rows; without them the run has no evaluation, best model or early stopping.
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// The file to write.
    #[arg(short, long, value_name = "FILE", default_value = "run.toml")]
    pub output: PathBuf,
    /// Where training is to write.
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub output_dir: PathBuf,
    /// Replace a file that exists.
    #[arg(long)]
    pub force: bool,
}

/// `train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run's TOML file.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Overrides a key of the file.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,
    /// Continue: `auto` for the newest checkpoint of the output directory, or a checkpoint directory.
    #[arg(long, value_name = "auto|DIR")]
    pub resume: Option<String>,
    /// Check everything, print sites, sizes and lengths, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Write into an output directory that is not empty.
    #[arg(long)]
    pub force: bool,
    /// Stay on the CPU where the build supports an accelerator.
    #[arg(long)]
    pub cpu: bool,
    /// One JSON object on stdout at the end.
    #[arg(long)]
    pub json: bool,
}

/// `eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory; its posterior mean is scored beside the base.
    #[arg(short, long)]
    pub adapter: Option<PathBuf>,
    /// Rows to evaluate on; rows with `choices` are scored as multiple choice too.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Rows at a time.
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Longest row in tokens; by default min(1024, the model's limit).
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// Take prompt and completion as they are instead of as a conversation.
    #[arg(long)]
    pub no_chat_template: bool,
    /// Bins of equal width of the expected calibration error.
    #[arg(long, default_value_t = crate::config::EvalConfig::default().ece_bins)]
    pub ece_bins: usize,
    /// Compare choices by log-likelihood a token instead of the log-likelihood of the whole choice.
    #[arg(long)]
    pub length_normalised: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `report`
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The run's output directory; the run may still be going on.
    #[arg(value_name = "OUT")]
    pub output_dir: PathBuf,
    /// Where the page goes, in place of a report made before; by default OUT/report.html.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `data`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Every bad row as `file:line: field: problem; fix`; exit code 3 if there is one.
    Check(DataCheckArgs),
    /// Rows as the model sees them, with the trained tokens marked.
    Preview(DataPreviewArgs),
    /// Lengths in tokens, how many rows are overlong, how full packs get.
    Stats(DataStatsArgs),
}

/// Which rows, and how they are turned into tokens.
#[derive(Debug, Args)]
pub struct DataSourceArgs {
    /// Data files, directories with train/valid/test files, or data sets on the Hub (hf://datasets/ORG/NAME).
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The run.toml whose model, data and options are meant; what is given here goes before it.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides a key of the file.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE", requires = "config")]
    pub overrides: Vec<String>,
    /// Model whose tokenizer and chat template are used: local directory, Hub id, or local .gguf file.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Branch, tag or commit of the model on the Hub.
    #[arg(long, requires = "model_id")]
    pub revision: Option<String>,
    /// Hub token: `literal:TOKEN`, `env:VARIABLE`, `path:FILE`, `cache` or `none`.
    #[arg(long, default_value = "cache")]
    pub token_source: String,
    /// Jinja file in place of the model's chat template.
    #[arg(long, value_name = "TEMPLATE")]
    pub chat_template: Option<PathBuf>,
    /// Only this split.
    #[arg(long, value_enum)]
    pub split: Option<crate::data::Split>,
    /// Format of the rows; by default detected over all of them.
    #[arg(long, value_enum)]
    pub format: Option<crate::config::DataFormat>,
    /// Name that the files give to a field, such as prompt=question.
    #[arg(long = "field", value_name = "FIELD=NAME")]
    pub fields: Vec<String>,
    /// Which turns are trained; by default every assistant turn.
    #[arg(long, value_enum)]
    pub train_on: Option<crate::data::TrainOn>,
    /// Longest example in tokens; by default min(1024, the model's limit).
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// What happens to a longer one; by default it is an error.
    #[arg(long, value_enum)]
    pub overlong: Option<crate::data::Overlong>,
    /// Take prompt and completion as they are instead of as a conversation.
    #[arg(long)]
    pub no_chat_template: bool,
}

/// `data check`
#[derive(Debug, Args)]
pub struct DataCheckArgs {
    /// What is checked.
    #[command(flatten)]
    pub source: DataSourceArgs,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// When output is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ColorArg {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never: brackets mark what is trained.
    Never,
}

/// `data preview`
#[derive(Debug, Args)]
pub struct DataPreviewArgs {
    /// What is shown.
    #[command(flatten)]
    pub source: DataSourceArgs,
    /// Rows of each file, from its first.
    #[arg(short = 'n', long, default_value_t = 3)]
    pub rows: usize,
    /// The rows that begin in these lines instead.
    #[arg(long = "line", value_name = "LINE")]
    pub lines: Vec<usize>,
    /// One token a line, with its id.
    #[arg(long)]
    pub tokens: bool,
    /// When trained tokens are coloured; otherwise they stand in brackets.
    #[arg(long, value_enum, default_value_t)]
    pub color: ColorArg,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `data stats`
#[derive(Debug, Args)]
pub struct DataStatsArgs {
    /// What is measured.
    #[command(flatten)]
    pub source: DataSourceArgs,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

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

/// Formats that `convert` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum SourceFormatArg {
    /// By content and extension.
    #[default]
    Auto,
    /// PEFT directory, LoRA or MonteCLoRA.
    #[value(alias = "lora")]
    Peft,
    /// mlx-lm adapter directory.
    Mlx,
    /// GGUF LoRA file.
    Gguf,
}

/// Formats that `convert` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TargetFormatArg {
    /// PEFT directory with the whole posterior, if there is one.
    Peft,
    /// Plain LoRA that mistral.rs, vLLM and PEFT all accept: the posterior mean.
    Lora,
    /// One GGUF file for llama.cpp: the posterior mean.
    Gguf,
    /// mlx-lm adapter directory: the posterior mean.
    Mlx,
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
    #[arg(long, value_enum)]
    pub to: TargetFormatArg,
    /// Format to read.
    #[arg(long, value_enum, default_value_t)]
    pub from: SourceFormatArg,
    /// Base model, for GGUF: its config.json tells the head counts.
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
    #[arg(long, default_value_t = 42)]
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
    /// Runtime that is to load it: mistralrs, mistralrs-0.9, vllm, llamacpp or peft.
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
    /// Fail with exit code 5 when the largest difference exceeds this.
    #[arg(long)]
    pub tolerance: Option<f64>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `serve`
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// serve.toml
    #[arg(short, long, value_name = "FILE", required_unless_present = "model_id")]
    pub config: Option<PathBuf>,
    /// Base model, instead of a file.
    #[arg(
        short,
        long = "model-id",
        value_name = "MODEL",
        conflicts_with = "config"
    )]
    pub model_id: Option<String>,
    /// An adapter of that base.
    #[arg(long = "adapter", value_name = "ALIAS=PATH", requires = "model_id")]
    pub adapters: Vec<String>,
    /// Address to bind.
    #[arg(long)]
    pub host: Option<String>,
    /// Port to bind.
    #[arg(long)]
    pub port: Option<u16>,
    /// How it is fetched and run.
    #[command(flatten)]
    pub options: ModelOptions,
}

/// Which server, and the right to change it.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// Address of `monteclora serve`, or of mistral.rs 0.9.
    #[arg(long = "server", value_name = "URL")]
    pub url: String,
    /// File whose first line is the administrator's key; without it the variable MONTECLORA_KEY.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Seconds that a request may take; loading a model is the longest.
    #[arg(long, default_value_t = 600)]
    pub timeout: u64,
}

/// What a new generation is asked before and after it is swapped in.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// A question that must be answered with some text; may be repeated.
    #[arg(long = "prompt", value_name = "TEXT")]
    pub prompts: Vec<String>,
    /// A text that must occur in an answer; may be repeated.
    #[arg(long = "expect", value_name = "TEXT")]
    pub expected: Vec<String>,
}

/// `deploy`
#[derive(Debug, Args)]
pub struct DeployArgs {
    /// Adapter directory, raw MonteCLoRA or plain LoRA.
    pub adapter: PathBuf,
    /// Name that clients send as `model`.
    #[arg(long)]
    pub alias: String,
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as seen from here; the release is written below it.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: PathBuf,
    /// Name of the base on the server, where it has several.
    #[arg(long, value_name = "NAME")]
    pub base: Option<String>,
    /// Base model to check names and shapes against before the server is asked.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// The canary.
    #[command(flatten)]
    pub check: CheckArgs,
    /// Accept an adapter that changes nothing.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `rollback`
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Name that clients send as `model`.
    #[arg(long)]
    pub alias: String,
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as seen from here.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: PathBuf,
    /// Beginning of the generation to bring back; the one before by default.
    #[arg(long, value_name = "GENERATION")]
    pub to: Option<String>,
    /// What it is asked.
    #[command(flatten)]
    pub check: CheckArgs,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as seen from here, to list releases too.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: Option<PathBuf>,
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

/// `doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `bench`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Training steps on random tokens, every position labelled.
    Train(BenchTrainArgs),
    /// The machine's matrix product, which bounds a training step.
    Matmul(BenchMatmulArgs),
}

/// `bench matmul`
#[derive(Debug, Args)]
pub struct BenchMatmulArgs {
    /// Rows and columns of the square f32 matrices.
    #[arg(long, default_value_t = 1024)]
    pub size: usize,
    /// Multiply in bfloat16, as `train.bf16` does.
    #[arg(long)]
    pub bf16: bool,
    /// Products; the first is left out of the median.
    #[arg(long, default_value_t = 40)]
    pub steps: usize,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// What a benchmark trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BenchMethod {
    /// MonteCLoRA, 8 samples, entropy on.
    #[default]
    Monteclora,
    /// Plain LoRA.
    Lora,
}

/// `bench train`
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What is trained.
    #[arg(long, value_enum, default_value_t)]
    pub method: BenchMethod,
    /// Sequences a step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens a sequence.
    #[arg(long, default_value_t = 128)]
    pub seq: usize,
    /// Steps; the first is left out of the median.
    #[arg(long, default_value_t = 6)]
    pub steps: usize,
    /// Mixture components N.
    #[arg(long, default_value_t = 8)]
    pub num_samples: usize,
    /// Rank of the adapters; alpha is twice as much.
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// Measure random weights of the sizes in MODEL's config.json, which is all the directory needs to hold.
    #[arg(long)]
    pub random_weights: bool,
    /// Keep only block inputs and compute the rest again.
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Products with frozen weights in bfloat16, as `train.bf16`; implies `--dtype bf16`.
    #[arg(long)]
    pub bf16: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
