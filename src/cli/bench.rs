//! Arguments of the `bench` commands.

use clap::{Args, Subcommand, ValueEnum};

use super::ModelArgs;

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
