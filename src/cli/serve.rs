//! Arguments of the commands around a server.

use std::path::PathBuf;

use clap::Args;

use super::ModelOptions;

/// `serve`
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// serve.toml
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["model_id", "adapters"])]
    pub config: Option<PathBuf>,
    /// Base model, instead of a file; with --adapter by default the base that the first adapter names.
    #[arg(
        short,
        long = "model-id",
        value_name = "MODEL",
        conflicts_with = "config"
    )]
    pub model_id: Option<String>,
    /// An adapter of that base.
    #[arg(long = "adapter", value_name = "ALIAS=PATH", conflicts_with = "config")]
    pub adapters: Vec<String>,
    /// Address to bind.
    #[arg(long)]
    pub host: Option<String>,
    /// Port to bind.
    #[arg(long)]
    pub port: Option<u16>,
    /// Serve adapters that change nothing, B A being zero.
    #[arg(long)]
    pub force: bool,
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
    /// A question that must be answered; may be repeated. By default "Say in one sentence what you can do.". An empty answer passes,
    /// unless --expect asks for a text.
    #[arg(long = "prompt", value_name = "TEXT")]
    pub prompts: Vec<String>,
    /// The system message of every question, for an adapter that was trained with one.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
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
    /// Accept an adapter that changes nothing; the server has to be one that runs with --force too.
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
