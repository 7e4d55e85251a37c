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
    /// Small model to fetch (once) and train.
    #[arg(long, value_parser = sample_models(), default_value = SMOLLM2.name)]
    pub model: String,
    /// Base model to use instead: local directory, Hub id or .gguf file. A base without a chat template is trained on plain
    /// prompts.
    #[arg(
        short,
        long = "model-id",
        value_name = "MODEL",
        conflicts_with = "model"
    )]
    pub model_id: Option<String>,
    /// Output directory for adapter and reports.
    #[arg(long, default_value = "quickstart-out")]
    pub output_dir: PathBuf,
    /// Write into a non-empty output directory.
    #[arg(long)]
    pub force: bool,
    /// Number of optimiser steps.
    #[arg(long, hide = true)]
    pub max_steps: Option<u64>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `init`
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Training rows, as JSON Lines.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Validation rows. Without them: no evaluation, best model or early stopping.
    #[arg(long, value_name = "FILE")]
    pub valid: Option<PathBuf>,
    /// Config file to write.
    #[arg(short, long, value_name = "FILE", default_value = "run.toml")]
    pub output: PathBuf,
    /// Output directory of the training run.
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub output_dir: PathBuf,
    /// Replace an existing file.
    #[arg(long)]
    pub force: bool,
}

/// `train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// TOML file of the run. Without it, -m and --data are enough.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override any key of the file.
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    pub overrides: Vec<String>,
    /// The usual keys by names of their own.
    #[command(flatten)]
    pub keys: TrainKeys,
    /// Resume from a checkpoint: `auto` (newest in the output directory) or a checkpoint directory.
    #[arg(long, value_name = "auto|DIR")]
    pub resume: Option<String>,
    /// Check everything and print sites, sizes and lengths. Write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Write into a non-empty output directory.
    #[arg(long)]
    pub force: bool,
    /// Run on the CPU even if the build supports an accelerator.
    #[arg(long)]
    pub cpu: bool,
    /// Print one JSON object on stdout at the end.
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
    /// data.train: a file, a Hub data set, or a directory with train.jsonl and optionally valid.jsonl.
    #[arg(long, alias = "dataset", value_name = "FILE|DIR")]
    pub data: Option<String>,
    /// data.valid: rows to evaluate on during the run.
    #[arg(long, value_name = "FILE")]
    pub valid: Option<String>,
    /// train.output_dir. Default, if the file does not set it: "out".
    #[arg(short, long, aliases = ["output", "adapter-path", "save-path"], value_name = "DIR")]
    pub output_dir: Option<String>,
    /// lora.method: monteclora (the default), lora, lora-fa, adalora, dora, lorta, neat, ssf, sara or second-order.
    #[arg(long)]
    pub method: Option<String>,
    /// lora.r: LoRA rank.
    #[arg(long, visible_alias = "rank", aliases = ["lora-rank", "r"])]
    pub lora_r: Option<u64>,
    /// lora.lora_alpha: LoRA alpha.
    #[arg(long, alias = "alpha")]
    pub lora_alpha: Option<f64>,
    /// lora.lora_dropout: LoRA dropout.
    #[arg(long, alias = "dropout")]
    pub lora_dropout: Option<f64>,
    /// lora.target_modules: "all-linear", or comma-separated names.
    #[arg(
        long,
        alias = "lora-target-modules",
        value_name = "NAMES",
        value_delimiter = ','
    )]
    pub target_modules: Vec<String>,
    /// train.learning_rate: peak learning rate.
    #[arg(long, visible_alias = "lr")]
    pub learning_rate: Option<f64>,
    /// train.num_train_epochs: epochs.
    #[arg(long, visible_alias = "num-train-epochs", alias = "num-epochs")]
    pub epochs: Option<f64>,
    /// train.max_steps: optimiser steps, instead of epochs.
    #[arg(long, visible_alias = "iters", alias = "steps")]
    pub max_steps: Option<u64>,
    /// train.per_device_train_batch_size: batch size.
    #[arg(
        long,
        visible_alias = "per-device-train-batch-size",
        alias = "micro-batch-size"
    )]
    pub batch_size: Option<u64>,
    /// train.gradient_accumulation_steps: batches per optimiser step.
    #[arg(long, alias = "grad-accumulation-steps")]
    pub gradient_accumulation_steps: Option<u64>,
    /// data.max_seq_length: longest example, in tokens.
    #[arg(long, visible_alias = "max-length", aliases = ["max-seq-len", "sequence-len", "cutoff-len"])]
    pub max_seq_length: Option<u64>,
    /// train.warmup_ratio: share of the steps used for warm-up.
    #[arg(long)]
    pub warmup_ratio: Option<f64>,
    /// train.save_steps: optimiser steps between checkpoints.
    #[arg(long, alias = "save-every")]
    pub save_steps: Option<u64>,
    /// train.eval_steps: optimiser steps between evaluations.
    #[arg(long, alias = "steps-per-eval")]
    pub eval_steps: Option<u64>,
    /// train.gradient_checkpointing: recompute blocks to save memory.
    #[arg(long, alias = "grad-checkpoint")]
    pub gradient_checkpointing: bool,
    /// train.bf16: mixed precision in bfloat16.
    #[arg(long)]
    pub bf16: bool,
    /// seed: random seed.
    #[arg(long)]
    pub seed: Option<u64>,
}

impl TrainKeys {
    /// The keys that were given, as `--set` takes them.
    pub fn overrides(&self) -> Vec<String> {
        let value = |value: toml::Value| Some(value.to_string());
        let text = |text: &Option<String>| text.as_deref().and_then(|text| value(text.into()));
        // Too large a number for TOML is refused where the key is read.
        let count = |n: Option<u64>| n.map(|n| n.to_string());
        let number = |x: Option<f64>| x.and_then(|x| value(x.into()));
        let flag = |on: bool| on.then(|| true.to_string());
        let modules = match self.target_modules.as_slice() {
            [] => None,
            [all] if all == "all-linear" => value(all.as_str().into()),
            names => value(names.to_vec().into()),
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
    /// Seed of the draws. The same seed gives the same draws as `sample`.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// Longest row, in tokens, at most the model's limit. Default: min(1024, the limit); for `predict` the limit.
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// Batch size, in rows. Default: as many rows as have about 2048 tokens.
    #[arg(long, value_name = "ROWS")]
    pub batch_size: Option<usize>,
    /// Use prompt and completion as plain text, without the chat template.
    #[arg(long)]
    pub no_chat_template: bool,
    /// Compare choices by log-likelihood per token instead of by total log-likelihood.
    #[arg(long)]
    pub length_normalised: bool,
}

/// `eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory. The posterior mean is scored beside the base. Several adapters of one base are scored as an ensemble:
    /// the average of their means.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: Vec<PathBuf>,
    /// Rows to evaluate on. Rows with `choices` are also scored as multiple choice.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Number of posterior draws to average and score beside the mean. Takes K times the time of the mean.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Use only the first N rows.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Score the validation rows of a directory or data set, not its test rows.
    #[arg(long, hide = true)]
    pub held_out: bool,
    /// Skip the base, which takes as long as an adapter.
    #[arg(long, requires = "adapter")]
    pub no_base: bool,
    /// Number of equal-width bins of the expected calibration error.
    #[arg(long, default_value_t = ECE_BINS)]
    pub ece_bins: usize,
    /// Write the result of every row, one JSON object per line.
    #[arg(long, value_name = "FILE")]
    pub per_row: Option<PathBuf>,
    /// Write an HTML page with scores, reliability diagrams and risk-coverage curves.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print one JSON object on stdout.
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
    /// Adapter directory. Its posterior mean answers. With several adapters of one base, the first answers and the average of
    /// all gives the confidence; the average answers choices.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: Vec<PathBuf>,
    /// User message.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// System message for --prompt.
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    pub system: Option<String>,
    /// Sampling temperature of the answer to --prompt: softmax(logits / T). 0 takes the most likely token.
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        requires = "prompt",
        conflicts_with_all = ["choices", "posterior_samples", "abstain"]
    )]
    pub temperature: f64,
    /// Answer --prompt with one of these texts, as in a row with `choices`. Include the space before a choice if needed: " no"
    /// " yes".
    #[arg(long, value_name = "TEXT", num_args = 2.., requires = "prompt")]
    pub choices: Vec<String>,
    /// Rows to answer. Answers in the rows are ignored. Rows with `choices` are answered with one of the choices.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Number of posterior draws for the confidence of an answer. Takes about 2 K times the answer's time.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// Withhold answers below the confidence that `calibrate --target-error` found.
    #[arg(long, requires = "adapter")]
    pub abstain: bool,
    /// Maximum tokens per answer.
    #[arg(long, alias = "max-new-tokens", default_value_t = 256)]
    pub max_tokens: usize,
    /// How questions are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory, or GGUF LoRA. /adapter changes it during the conversation.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: Option<PathBuf>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Sampling temperature: softmax(logits / T). 0 takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Random seed of token sampling.
    #[arg(long, default_value_t = DEFAULT_SEED)]
    pub seed: u64,
    /// Maximum tokens per answer.
    #[arg(long, alias = "max-new-tokens", default_value_t = 512)]
    pub max_tokens: usize,
    /// Number of posterior draws for an answer's confidence. Takes about 2 K times the answer's time.
    #[arg(long, value_name = "K", requires = "adapter")]
    pub posterior_samples: Option<usize>,
    /// Do not show confidence.
    #[arg(long)]
    pub no_confidence: bool,
    /// Use the question as plain text, without the chat template.
    #[arg(long)]
    pub no_chat_template: bool,
}

/// How the noise depends on the row of A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum GeometryArg {
    /// The better of `rows` and `svd`, by the criterion.
    #[default]
    Auto,
    /// The same noise on all rows of A.
    Rows,
    /// Noise on A in the basis of B's singular vectors, divided by the singular values.
    Svd,
}

/// How `fit` chooses a noise scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CriterionArg {
    /// Lowest negative log-likelihood of the average over the draws; for choices, after a temperature.
    #[default]
    Nll,
    /// Largest scale that raises the average's negative log-likelihood by at most --tolerance.
    Tolerance,
}

/// `fit`
#[derive(Debug, Args)]
pub struct FitArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory or GGUF LoRA, from any trainer. Its mean does not change.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: PathBuf,
    /// Held-out rows, none used in training.
    #[arg(long, value_name = "VALID")]
    pub data: PathBuf,
    /// New directory for a PEFT MonteCLoRA adapter and fit.json.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// How the noise depends on the row of A.
    #[arg(long, value_enum, default_value_t)]
    pub geometry: GeometryArg,
    /// How the noise scale is chosen.
    #[arg(long, value_enum, default_value_t)]
    pub criterion: CriterionArg,
    /// Allowed relative increase, for --criterion tolerance.
    #[arg(long, value_name = "SHARE", default_value_t = 0.003)]
    pub tolerance: f64,
    /// Number of posterior draws to average.
    #[arg(long, value_name = "K", default_value_t = 4)]
    pub draws: usize,
    /// Maximum rows used, a random sample under --seed.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub rows: usize,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Write into a non-empty directory.
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `calibrate`
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapter directory. calibration.json is written into it.
    #[arg(short, long, alias = "adapter-path")]
    pub adapter: PathBuf,
    /// Held-out rows, none used in training or by `fit`.
    #[arg(long, value_name = "VALID")]
    pub data: PathBuf,
    /// Also calibrate the average over K posterior draws.
    #[arg(long, value_name = "K")]
    pub posterior_samples: Option<usize>,
    /// Find the confidence threshold for answering, so that at most this share of the given answers is wrong.
    #[arg(long, value_name = "SHARE")]
    pub target_error: Option<f64>,
    /// Maximum tokens per answer, for rows without `choices`.
    #[arg(long, alias = "max-new-tokens", default_value_t = 256)]
    pub max_tokens: usize,
    /// How rows are scored.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `report`
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Output directory of the run, which may still be running.
    #[arg(value_name = "OUT")]
    pub output_dir: PathBuf,
    /// Scores to show: what `eval --json` printed; by default OUT/eval.json, where there is one.
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// Answers to show, the first five: what `predict --data --json` printed; by default OUT/answers.json, where there is one.
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
    /// HTML file to write; an older report is replaced. Default: OUT/report.html.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
