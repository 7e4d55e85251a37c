//! Arguments of the commands around a server.

use std::path::PathBuf;

use clap::Args;

use super::ModelOptions;

/// `serve`
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Path of serve.toml.
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["model_id", "adapters"])]
    pub config: Option<PathBuf>,
    /// Base model, instead of a file. Default with --adapter: the base that the first adapter names.
    #[arg(
        short,
        long = "model-id",
        value_name = "MODEL",
        conflicts_with = "config"
    )]
    pub model_id: Option<String>,
    /// Adapter of this base; may be repeated.
    #[arg(long = "adapter", value_name = "ALIAS=PATH", conflicts_with = "config")]
    pub adapters: Vec<String>,
    /// Score answers: how sure each is, by `POST /v1/monteclora/score`. Needs a second copy of the base in memory.
    #[arg(long, conflicts_with = "config")]
    pub uncertainty: bool,
    /// Address to bind.
    #[arg(long)]
    pub host: Option<String>,
    /// Port to bind.
    #[arg(long)]
    pub port: Option<u16>,
    /// Serve adapters that change nothing (B A is zero).
    #[arg(long)]
    pub force: bool,
    /// How the model is fetched and run.
    #[command(flatten)]
    pub options: ModelOptions,
}

/// Which server, and the right to change it.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// Address of `monteclora serve`, or of mistral.rs 0.9.
    #[arg(long = "server", value_name = "URL")]
    pub url: String,
    /// File whose first line is the admin key. Without it: environment variable MONTECLORA_KEY.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Timeout per request, in seconds. Loading a model takes longest.
    #[arg(long, default_value_t = 600)]
    pub timeout: u64,
}

/// What a new generation is asked before and after it is swapped in.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Question that must be answered; may be repeated. Default: "Say in one sentence what you can do.". An empty answer
    /// passes, unless --expect requires a text.
    #[arg(long = "prompt", value_name = "TEXT")]
    pub prompts: Vec<String>,
    /// System message of every question, for an adapter trained with one.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Text that at least one answer must contain; may be repeated.
    #[arg(long = "expect", value_name = "TEXT")]
    pub expected: Vec<String>,
}

/// `deploy`
#[derive(Debug, Args)]
pub struct DeployArgs {
    /// Adapter directory, raw MonteCLoRA or plain LoRA.
    pub adapter: PathBuf,
    /// Model name that clients send as `model`.
    #[arg(long)]
    pub alias: String,
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as a path on this machine. The release is written below it.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: PathBuf,
    /// Name of the base on the server, if the server has several.
    #[arg(long, value_name = "NAME")]
    pub base: Option<String>,
    /// Base model to check names and shapes against before the server is contacted.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// The canary.
    #[command(flatten)]
    pub check: CheckArgs,
    /// Accept an adapter that changes nothing. The server must also run with --force.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `rollback`
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Model name that clients send as `model`.
    #[arg(long)]
    pub alias: String,
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as a path on this machine.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: PathBuf,
    /// Generation to restore, or its first characters. Default: the previous one.
    #[arg(long, value_name = "GENERATION")]
    pub to: Option<String>,
    /// What it is asked.
    #[command(flatten)]
    pub check: CheckArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's adapter root, as a path on this machine, to also list releases.
    #[arg(long, value_name = "DIR")]
    pub adapter_root: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
