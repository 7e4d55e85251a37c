//! The command line, as clap structs and nothing else.

mod adapter;
mod bench;
mod data;
mod help;
mod serve;
mod train;

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use serde::de::value::{Error, StringDeserializer};

pub use adapter::{
    CollapseArgs, ConvertArgs, ConvertDtypeArg, EngineArg, ImportDtypeArg, ImportGgufArgs,
    InspectArgs, MergeArgs, ParityArgs, SampleArgs, ValidateArgs,
};
pub use bench::{BenchCommand, BenchMatmulArgs, BenchMethod, BenchTrainArgs};
pub use data::{ColorArg, DataCheckArgs, DataCommand, DataPreviewArgs, DataSourceArgs};
pub use help::{command, hint};
pub use serve::{CheckArgs, DeployArgs, RollbackArgs, ServeArgs, ServerArgs, StatusArgs};
pub use train::{
    CalibrateArgs, ChatArgs, CriterionArg, EvalArgs, FitArgs, GeometryArg, InitArgs, PredictArgs,
    QuickstartArgs, ReportArgs, ScoringArgs, TrainArgs, TrainKeys,
};

use crate::config::{DTYPES, DtypeChoice};

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

/// The commands.
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
    /// Answers to a prompt or to the rows of a file, and how sure the posterior is of them.
    Predict(PredictArgs),
    /// A conversation at the terminal, with how sure each answer is.
    Chat(ChatArgs),
    /// A posterior around any LoRA: how wide its noise may be, judged on held-out rows.
    Fit(FitArgs),
    /// A temperature that makes answers as sure as they are right, and a confidence below which to give none.
    Calibrate(CalibrateArgs),
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
    #[command(visible_alias = "fuse", alias = "merge-lora")]
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
    /// Man pages, one per command, into a directory.
    Man {
        /// Directory, which may be new.
        dir: PathBuf,
    },
    /// Shell completions on stdout.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Measurements that anyone can repeat.
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
    /// Local directory, Hub id, or local .gguf file. With an adapter by default the base that the adapter names.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
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
    #[arg(long, value_parser = dtypes(), default_value = "auto")]
    pub dtype: DtypeChoice,
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

/// `doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
