//! Arguments of the `data` commands.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// `data`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Every bad row as `file:line: field: problem; fix`; exit code 3 if there is one.
    Check(DataCheckArgs),
    /// Rows as the model sees them, with the trained tokens marked.
    Preview(DataPreviewArgs),
    /// Lengths in tokens, how many rows are overlong, how full packs get.
    Stats(DataCheckArgs),
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

/// `data check` and `data stats`
#[derive(Debug, Args)]
pub struct DataCheckArgs {
    /// What is checked or measured.
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
