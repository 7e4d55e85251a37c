//! Arguments of the `bench` commands.

use clap::{Args, Subcommand, ValueEnum};

use super::ModelArgs;

/// `bench`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure training steps on random tokens, every position labelled.
    Train(BenchTrainArgs),
    /// Measure the machine's matrix product, which bounds a training step.
    Matmul(BenchMatmulArgs),
    /// Measure greedy decoding after random prompts.
    Generate(BenchGenerateArgs),
}

/// `bench generate`
#[derive(Debug, Args)]
pub struct BenchGenerateArgs {
    /// Base model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Number of texts that are continued together.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Tokens of the longest prompt.
    #[arg(long, default_value_t = 32)]
    pub prompt: usize,
    /// Give the prompts different lengths, from half of --prompt to all of it.
    #[arg(long)]
    pub ragged: bool,
    /// Number of tokens that are generated for each text.
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,
    /// Use random weights of the sizes in MODEL's config.json. The directory needs no other file.
    #[arg(long)]
    pub random_weights: bool,
    /// Number of runs. The fastest counts.
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// `bench matmul`
#[derive(Debug, Args)]
pub struct BenchMatmulArgs {
    /// Rows and columns of the square f32 matrices.
    #[arg(long, default_value_t = 1024)]
    pub size: usize,
    /// Multiply in bfloat16, as with `train.bf16`.
    #[arg(long)]
    pub bf16: bool,
    /// Number of products. The first is excluded from the median.
    #[arg(long, default_value_t = 40)]
    pub steps: usize,
    /// Print one JSON object on stdout.
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
    /// Method to train.
    #[arg(long, value_enum, default_value_t)]
    pub method: BenchMethod,
    /// Sequences per step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 128)]
    pub seq: usize,
    /// Number of steps. The first is excluded from the median.
    #[arg(long, default_value_t = 6)]
    pub steps: usize,
    /// Number of mixture components N.
    #[arg(long, default_value_t = 8)]
    pub num_samples: usize,
    /// Rank of the adapters. Alpha is twice the rank.
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// Use random weights of the sizes in MODEL's config.json. The directory needs no other file.
    #[arg(long)]
    pub random_weights: bool,
    /// Keep only block inputs and recompute the rest.
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Multiply with frozen weights in bfloat16, as `train.bf16`. Implies `--dtype bf16`.
    #[arg(long)]
    pub bf16: bool,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
