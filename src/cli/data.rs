//! Arguments of the `data` commands.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// `data`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// List every bad row as `file:line: field: problem; fix`; exit code 3 if any.
    Check(DataCheckArgs),
    /// Show rows as the model sees them, with the trained tokens marked.
    Preview(DataPreviewArgs),
    /// Show lengths in tokens, the number of overlong rows and how full packs are.
    Stats(DataCheckArgs),
}

/// Which rows, and how they are turned into tokens.
#[derive(Debug, Args)]
pub struct DataSourceArgs {
    /// Data files, directories with train/valid/test files, or data sets on the Hub (hf://datasets/ORG/NAME).
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// run.toml to take model, data and options from. Flags given here override the file.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a key of the file.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE", requires = "config")]
    pub overrides: Vec<String>,
    /// Model whose tokenizer and chat template are used: local directory, Hub id or local .gguf file.
    #[arg(short, long = "model-id", value_name = "MODEL")]
    pub model_id: Option<String>,
    /// Branch, tag or commit of the model on the Hub.
    #[arg(long, requires = "model_id")]
    pub revision: Option<String>,
    /// Hub token: `literal:TOKEN`, `env:VARIABLE`, `path:FILE`, `cache` or `none`.
    #[arg(long, default_value = "cache")]
    pub token_source: String,
    /// Jinja file that replaces the model's chat template.
    #[arg(long, value_name = "TEMPLATE")]
    pub chat_template: Option<PathBuf>,
    /// Use only this split.
    #[arg(long, value_enum)]
    pub split: Option<crate::data::Split>,
    /// Format of the rows. Default: detected from all rows.
    #[arg(long, value_enum)]
    pub format: Option<crate::config::DataFormat>,
    /// Name of a field in the files, such as prompt=question.
    #[arg(long = "field", value_name = "FIELD=NAME")]
    pub fields: Vec<String>,
    /// Turns to train on. Default: every assistant turn.
    #[arg(long, value_enum)]
    pub train_on: Option<crate::data::TrainOn>,
    /// Longest example, in tokens. Default: min(1024, the model's limit).
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// Treatment of longer examples. Default: error.
    #[arg(long, value_enum)]
    pub overlong: Option<crate::data::Overlong>,
    /// Use prompt and completion as plain text, without the chat template.
    #[arg(long)]
    pub no_chat_template: bool,
}

/// `data check` and `data stats`
#[derive(Debug, Args)]
pub struct DataCheckArgs {
    /// What is checked or measured.
    #[command(flatten)]
    pub source: DataSourceArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// When output is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ColorArg {
    /// Colour on a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always colour.
    Always,
    /// Never colour. Brackets mark trained tokens.
    Never,
}

/// `data preview`
#[derive(Debug, Args)]
pub struct DataPreviewArgs {
    /// What is shown.
    #[command(flatten)]
    pub source: DataSourceArgs,
    /// Number of rows per file, from the first row.
    #[arg(short = 'n', long, default_value_t = 3)]
    pub rows: usize,
    /// Show the rows that begin at these lines instead.
    #[arg(long = "line", value_name = "LINE")]
    pub lines: Vec<usize>,
    /// Show one token per line, with its id.
    #[arg(long)]
    pub tokens: bool,
    /// When to colour trained tokens. Without colour they are in brackets.
    #[arg(long, value_enum, default_value_t)]
    pub color: ColorArg,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
