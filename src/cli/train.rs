//! Arguments of the commands around a training run.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueEnum};

use super::ModelArgs;
use crate::config::ECE_BINS;
use crate::eval::DEFAULT_SEED;
use crate::sample_models::{SAMPLE_MODELS, SMOLLM2};

/// The models that `quickstart` fetches.
fn sample_models() -> PossibleValuesParser {
    let values = SAMPLE_MODELS.map(|model| PossibleValue::new(model.name).help(model.about));
    PossibleValuesParser::new(values)
}

/// `quickstart`
#[derive(Debug, Args)]
pub struct QuickstartArgs {
    /// Which small model is fetched, once, and trained.
    #[arg(long, value_parser = sample_models(), default_value = SMOLLM2.name)]
    pub model: String,
    /// A base of your own in place of it: a local directory, a Hub id or a .gguf file. One without a chat template is trained on plain
    /// prompts.
    #[arg(
        short,
        long = "model-id",
        value_name = "MODEL",
        conflicts_with = "model"
    )]
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
    /// The run's TOML file. Without it, -m and --data are enough.
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["model_id", "data"])]
    pub config: Option<PathBuf>,
    /// Overrides any key of the file.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,
    /// The usual keys by names of their own.
    #[command(flatten)]
    pub keys: TrainKeys,
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

/// Keys of run.toml that have flags of their own, by the names that other trainers give them.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Keys of run.toml")]
pub struct TrainKeys {
    /// model.model_id: local directory, Hub id, or local .gguf file.
    #[arg(
        short,
        long = "model-id",
        visible_alias = "model",
        value_name = "MODEL"
    )]
    pub model_id: Option<String>,
    /// data.train: a file, a Hub data set, or a directory with train.jsonl and perhaps valid.jsonl.
    #[arg(long, alias = "dataset", value_name = "FILE|DIR")]
    pub data: Option<String>,
    /// data.valid: rows to evaluate on during the run.
    #[arg(long, value_name = "FILE")]
    pub valid: Option<String>,
    /// train.output_dir; "out" where neither a file nor this says.
    #[arg(short, long, aliases = ["output", "adapter-path", "save-path"], value_name = "DIR")]
    pub output_dir: Option<String>,
    /// lora.method
    #[arg(long)]
    pub method: Option<String>,
    /// lora.r
    #[arg(long, visible_alias = "rank", aliases = ["lora-rank", "r"])]
    pub lora_r: Option<u64>,
    /// lora.lora_alpha
    #[arg(long, alias = "alpha")]
    pub lora_alpha: Option<f64>,
    /// lora.lora_dropout
    #[arg(long, alias = "dropout")]
    pub lora_dropout: Option<f64>,
    /// lora.target_modules: "all-linear", or names with commas between them.
    #[arg(
        long,
        alias = "lora-target-modules",
        value_name = "NAMES",
        value_delimiter = ','
    )]
    pub target_modules: Vec<String>,
    /// train.learning_rate
    #[arg(long, visible_alias = "lr")]
    pub learning_rate: Option<f64>,
    /// train.num_train_epochs
    #[arg(long, visible_alias = "num-train-epochs", alias = "num-epochs")]
    pub epochs: Option<f64>,
    /// train.max_steps
    #[arg(long, visible_alias = "iters", alias = "steps")]
    pub max_steps: Option<u64>,
    /// train.per_device_train_batch_size
    #[arg(
        long,
        visible_alias = "per-device-train-batch-size",
        alias = "micro-batch-size"
    )]
    pub batch_size: Option<u64>,
    /// train.gradient_accumulation_steps
    #[arg(long, alias = "grad-accumulation-steps")]
    pub gradient_accumulation_steps: Option<u64>,
    /// data.max_seq_length
    #[arg(long, visible_alias = "max-length", aliases = ["max-seq-len", "sequence-len", "cutoff-len"])]
    pub max_seq_length: Option<u64>,
    /// train.warmup_ratio
    #[arg(long)]
    pub warmup_ratio: Option<f64>,
    /// train.save_steps
    #[arg(long, alias = "save-every")]
    pub save_steps: Option<u64>,
    /// train.eval_steps
    #[arg(long, alias = "steps-per-eval")]
    pub eval_steps: Option<u64>,
    /// train.gradient_checkpointing
    #[arg(long, alias = "grad-checkpoint")]
    pub gradient_checkpointing: bool,
    /// train.bf16
    #[arg(long)]
    pub bf16: bool,
    /// seed
    #[arg(long)]
    pub seed: Option<u64>,
}

impl TrainKeys {
    /// The keys that were given, as `--set` takes them.
    pub fn overrides(&self) -> Vec<String> {
        let text = |text: &Option<String>| text.as_ref().map(|t| toml::Value::from(t.as_str()));
        let count = |n: Option<u64>| n.and_then(|n| i64::try_from(n).ok()).map(toml::Value::from);
        let number = |x: Option<f64>| x.map(toml::Value::from);
        let flag = |on: bool| on.then(|| toml::Value::from(true));
        let modules = match self.target_modules.as_slice() {
            [] => None,
            [all] if all == "all-linear" => Some(toml::Value::from("all-linear")),
            names => Some(toml::Value::from(names.to_vec())),
        };
        let given = [
            ("model.model_id", text(&self.model_id)),
            ("data.train", text(&self.data)),
            ("data.valid", text(&self.valid)),
            ("train.output_dir", text(&self.output_dir)),
            ("lora.method", text(&self.method)),
            ("lora.r", count(self.lora_r)),
            ("lora.lora_alpha", number(self.lora_alpha)),
            ("lora.lora_dropout", number(self.lora_dropout)),
            ("lora.target_modules", modules),
            ("train.learning_rate", number(self.learning_rate)),
            ("train.num_train_epochs", number(self.epochs)),
            ("train.max_steps", count(self.max_steps)),
            ("train.per_device_train_batch_size", count(self.batch_size)),
            (
                "train.gradient_accumulation_steps",
                count(self.gradient_accumulation_steps),
            ),
            ("data.max_seq_length", count(self.max_seq_length)),
            ("train.warmup_ratio", number(self.warmup_ratio)),
            ("train.save_steps", count(self.save_steps)),
            ("train.eval_steps", count(self.eval_steps)),
            (
                "train.gradient_checkpointing",
                flag(self.gradient_checkpointing),
            ),
            ("train.bf16", flag(self.bf16)),
            ("seed", count(self.seed)),
        ];
        let given = given.into_iter();
        given
            .filter_map(|(key, value)| Some(format!("{key}={}", value?)))
            .collect()
    }
}

/// How rows are scored.
#[derive(Debug, Clone, Args)]
pub struct ScoringArgs {
    /// Seed of the draws; the same seed gives those of `sample`.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// Longest row in tokens, at most the model's limit; by default min(1024, that limit), and for `predict` the limit.
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// Rows at a time; by default as many as have about 2048 tokens.
    #[arg(long, value_name = "ROWS")]
    pub batch_size: Option<usize>,
    /// Take prompt and completion as they are instead of as a conversation.
    #[arg(long)]
    pub no_chat_template: bool,
    /// Compare choices by log-likelihood per token instead of the log-likelihood of the whole choice.
    #[arg(long)]
    pub length_normalised: bool,
}

/// `eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory; its posterior mean is scored beside the base. Several on one base are scored as an ensemble: the
    /// average of their means.
    #[arg(short, long)]
    pub adapter: Vec<PathBuf>,
    /// Rows to evaluate on; rows with `choices` are scored as multiple choice too.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Posterior draws whose predictions are averaged and scored beside the mean; takes K times the mean's time.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Only the first N rows.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Leave the base out, which takes as long as an adapter.
    #[arg(long, requires = "adapter")]
    pub no_base: bool,
    /// Bins of equal width of the expected calibration error.
    #[arg(long, default_value_t = ECE_BINS)]
    pub ece_bins: usize,
    /// Write what is said of every row, one JSON object per line.
    #[arg(long, value_name = "FILE")]
    pub per_row: Option<PathBuf>,
    /// Write a page with scores, reliability diagrams and risk-coverage curves.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `predict`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("question").required(true).args(["prompt", "data"]))]
pub struct PredictArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory; its posterior mean answers. Of several on one base the first answers, and the average of all says how
    /// sure that is; choices are answered by the average.
    #[arg(short, long)]
    pub adapter: Vec<PathBuf>,
    /// The user's message.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// The system message of --prompt.
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    pub system: Option<String>,
    /// Draw the tokens of the answer to --prompt from softmax(logits / T); 0 takes the most likely one.
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        requires = "prompt",
        conflicts_with_all = ["choices", "posterior_samples", "abstain"]
    )]
    pub temperature: f64,
    /// Answer --prompt by one of these texts, as a row with `choices`; a space that belongs to a choice is part of it: " no" " yes".
    #[arg(long, value_name = "TEXT", num_args = 2.., requires = "prompt")]
    pub choices: Vec<String>,
    /// Rows to answer; their own answers are not looked at. Rows with `choices` are answered by one of them.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Posterior draws that say how sure the answer is; takes about 2 K times the time of the answer.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// Give no answer below the confidence that `calibrate --target-error` found.
    #[arg(long, requires = "adapter")]
    pub abstain: bool,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    /// How questions are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory, or GGUF LoRA; /adapter takes another during the conversation.
    #[arg(short, long)]
    pub adapter: Option<PathBuf>,
    /// The system message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Draw tokens from softmax(logits / T); 0 takes the most likely one.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Of the draws of tokens.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 512)]
    pub max_tokens: usize,
    /// Posterior draws that say how sure an answer is; takes about 2 K times the time of the answer.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// Leave out how sure an answer is.
    #[arg(long)]
    pub no_confidence: bool,
    /// Take a question as it is instead of as a conversation.
    #[arg(long)]
    pub no_chat_template: bool,
}

/// How noise depends on the row of A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum GeometryArg {
    /// The better of the two by the criterion.
    #[default]
    Auto,
    /// The same noise on all rows of A.
    Rows,
    /// Noise on A in the basis of B's singular vectors, over the singular values.
    Svd,
}

/// By what `fit` judges a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CriterionArg {
    /// The least negative log-likelihood of the average over the draws; of choices, after a temperature.
    #[default]
    Nll,
    /// The largest scale that raises the negative log-likelihood of the average by at most --tolerance.
    Tolerance,
}

/// `fit`
#[derive(Debug, Args)]
pub struct FitArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory or GGUF LoRA, whoever trained it; its mean stays.
    #[arg(short, long)]
    pub adapter: PathBuf,
    /// Held-out rows, none of which was trained on.
    #[arg(long, value_name = "VALID")]
    pub data: PathBuf,
    /// New directory: a PEFT MonteCLoRA adapter with fit.json beside it.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// How the noise depends on the row of A.
    #[arg(long, value_enum, default_value_t)]
    pub geometry: GeometryArg,
    /// By what a scale is judged.
    #[arg(long, value_enum, default_value_t)]
    pub criterion: CriterionArg,
    /// For --criterion tolerance, the share.
    #[arg(long, value_name = "SHARE", default_value_t = 0.003)]
    pub tolerance: f64,
    /// Posterior draws whose average is judged.
    #[arg(long, value_name = "K", default_value_t = 4)]
    pub draws: usize,
    /// Rows that are used at most, a sample under --seed.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub rows: usize,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Write into a directory that is not empty.
    #[arg(long)]
    pub force: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `calibrate`
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory; calibration.json is written into it.
    #[arg(short, long)]
    pub adapter: PathBuf,
    /// Held-out rows, none of which was trained on or fitted to.
    #[arg(long, value_name = "VALID")]
    pub data: PathBuf,
    /// Also calibrate the average over so many posterior draws.
    #[arg(long, value_name = "K")]
    pub posterior_samples: Option<usize>,
    /// Find the confidence below which answers are not to be given, so that at most this share of those that are given is wrong.
    #[arg(long, value_name = "SHARE")]
    pub target_error: Option<f64>,
    /// Most tokens of an answer, for rows without `choices`.
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
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
