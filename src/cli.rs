//! The command line, as clap structs and nothing else.

mod adapter;
mod bench;
mod data;
mod help;
mod serve;
mod train;
mod tune;

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use serde::de::value::{Error, StringDeserializer};

pub use adapter::{
    CollapseArgs, ConvertArgs, ConvertDtypeArg, EngineArg, ImportDtypeArg, ImportGgufArgs,
    InspectArgs, MergeArgs, ParityArgs, PushArgs, SampleArgs, ValidateArgs,
};
pub use bench::{BenchCommand, BenchGenerateArgs, BenchMatmulArgs, BenchMethod, BenchTrainArgs};
pub use data::{ColorArg, DataCheckArgs, DataCommand, DataPreviewArgs, DataSourceArgs};
pub use help::{command, hint};
pub use serve::{CheckArgs, DeployArgs, RollbackArgs, ServeArgs, ServerArgs, StatusArgs};
pub use train::{
    CalibrateArgs, ChatArgs, CriterionArg, EvalArgs, FitArgs, GeometryArg, InitArgs, PredictArgs,
    QuickstartArgs, ReportArgs, ScoringArgs, TrainArgs, TrainKeys,
};
pub use tune::TuneArgs;

use crate::config::{DTYPES, DtypeChoice};

/// Fine-tune language models with MonteCLoRA (Bayesian LoRA) and serve the result with mistral.rs.
#[derive(Debug, Parser)]
#[command(name = "monteclora", version, max_term_width = 100)]
pub struct Cli {
    /// Command to run.
    #[command(subcommand)]
    pub command: Command,
    /// Log more on stderr. Give it twice to log everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Format of the log on stderr.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Plain text lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Try a real model in minutes: train, compare with the base, collapse, serve.
    Quickstart(QuickstartArgs),
    /// Write a commented run.toml for a model and a data file.
    Init(InitArgs),
    /// Fine-tune a model as run.toml says.
    Train(TrainArgs),
    /// Search for settings: many runs, compared on validation rows.
    Tune(TuneArgs),
    /// Score a base and an adapter on a data file: loss, perplexity, token accuracy, multiple choice, calibration.
    Eval(EvalArgs),
    /// Answer a prompt or the rows of a file, with the posterior's confidence.
    Predict(PredictArgs),
    /// Chat with a model in the terminal, with the confidence of each answer.
    Chat(ChatArgs),
    /// Fit a posterior around any LoRA: noise width chosen on held-out rows.
    Fit(FitArgs),
    /// Calibrate confidence: fit a temperature and a threshold for giving no answer.
    Calibrate(CalibrateArgs),
    /// Write one self-contained HTML page about a training run.
    Report(ReportArgs),
    /// Inspect data files: every bad row, rows with trained tokens marked, lengths.
    #[command(subcommand)]
    Data(DataCommand),
    /// Write the posterior mean as a plain LoRA directory.
    Collapse(CollapseArgs),
    /// Convert an adapter between formats: PEFT, plain LoRA, GGUF, mlx-lm.
    Convert(ConvertArgs),
    /// Write posterior draws, each as a plain LoRA directory.
    Sample(SampleArgs),
    /// Merge an adapter into its base and write a full model directory.
    #[command(visible_alias = "fuse", alias = "merge-lora")]
    Merge(MergeArgs),
    /// Push an adapter to the Hugging Face Hub, with a model card.
    Push(PushArgs),
    /// Show the contents of a model or adapter.
    Inspect(InspectArgs),
    /// Report every problem of an adapter, for a base and for runtimes.
    Validate(ValidateArgs),
    /// Compare logits of our decoder with mistral.rs and with a recorded reference.
    #[cfg(feature = "mistralrs")]
    Parity(ParityArgs),
    /// Run mistral.rs's OpenAI-compatible server with adapters loaded.
    #[cfg(feature = "mistralrs")]
    Serve(ServeArgs),
    /// Deploy an adapter to a running server: canary, swap, verification, and rollback.
    #[cfg(feature = "mistralrs")]
    Deploy(DeployArgs),
    /// Restore the previous generation of an alias.
    #[cfg(feature = "mistralrs")]
    Rollback(RollbackArgs),
    /// Show what a running server serves.
    #[cfg(feature = "mistralrs")]
    Status(StatusArgs),
    /// Convert a GGUF base model to a Hugging Face directory.
    ImportGguf(ImportGgufArgs),
    /// Show what this build and this machine support.
    Doctor(DoctorArgs),
    /// Write man pages, one per command, into a directory.
    Man {
        /// Output directory; created if missing.
        dir: PathBuf,
    },
    /// Print shell completions on stdout.
    Completions {
        /// Shell to complete for.
        shell: clap_complete::Shell,
    },
    /// Measure speed with repeatable benchmarks.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// The element types of a base: `auto`, and the narrowest of the others first.
fn dtypes() -> impl TypedValueParser<Value = DtypeChoice> {
    let (auto, others) = DTYPES.split_at(1);
    let all = auto.iter().chain(others.iter().rev());
    PossibleValuesParser::new(all.map(|[name, _, help]| PossibleValue::new(*name).help(*help)))
        .try_map(|name| DtypeChoice::deserialize(StringDeserializer::<Error>::new(name)))
}

/// Which base model, and where it runs; the names are those of mistral.rs.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Base model: local directory, Hub id, or local .gguf file. Default with an adapter: the base that the adapter names.
    #[arg(
        short,
        long = "model-id",
        visible_alias = "model",
        value_name = "MODEL"
    )]
    pub model_id: Option<String>,
    /// How the model is fetched and run.
    #[command(flatten)]
    pub options: ModelOptions,
}

/// How a base model is fetched and run.
#[derive(Debug, Clone, Args)]
pub struct ModelOptions {
    /// Branch, tag or commit on the Hub.
    #[arg(long)]
    pub revision: Option<String>,
    /// dtype of the base's weights in memory.
    #[arg(long, value_parser = dtypes(), default_value = "auto")]
    pub dtype: DtypeChoice,
    /// Run on the CPU even if the build supports an accelerator.
    #[arg(long)]
    pub cpu: bool,
    /// Hub token: `literal:TOKEN`, `env:VARIABLE`, `path:FILE`, `cache` or `none`.
    #[arg(long, default_value = "cache")]
    pub token_source: String,
    /// Jinja file that replaces the model's chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// `doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
