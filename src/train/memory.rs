//! Estimates the peak memory of a run, from its structure, before it starts: the resident memory on a CPU, and that of the
//! device elsewhere. Only the estimate for a CPU was compared with measurements.

use monteclora_adapters::methods::{Group, Method, Module, Storage};
use monteclora_converters::architecture::{ModelShape, NormPlace};
use serde::Serialize;

use crate::data::{BatchOptions, epoch_plan};
use crate::model::parts::attention::SCORES;
use crate::model::parts::head::CHUNK;
use crate::system::status_bytes;

/// Bytes of a computed value: float32, independent of how the base's weights are held.
const F32: u64 = 4;
/// Bytes of the program, a tokenizer of usual size, and threads with their buffers.
pub const PROGRAM: u64 = 80 << 20;
/// The part of [`PROGRAM`] that is not anonymous memory: code and mapped files.
const CODE: u64 = 40 << 20;
/// Unused memory that the allocator holds, as a share of the memory that a step allocates and frees; measured.
const HELD: f64 = 0.15;
/// Number of epochs that are planned to find the largest batch.
const EPOCHS: u64 = 3;

/// Everything that determines the memory of a run.
#[derive(Debug, Clone)]
pub struct MemoryInputs<'a> {
    /// Sizes of the base model.
    pub model: &'a ModelShape,
    /// Bytes of the base model's tensors in memory.
    pub weights: u64,
    /// Bytes of the base model's files that are mapped while they are read.
    pub base_bytes: u64,
    /// The adapted modules.
    pub sites: &'a [Module],
    /// The training method.
    pub method: &'a dyn Method,
    /// Number of tokens of every example.
    pub lengths: &'a [usize],
    /// Share of the tokens that carry loss, in (0, 1].
    pub trained_share: f64,
    /// How examples are put into batches.
    pub batches: BatchOptions,
    /// Whether there is dropout on the adapters' inputs.
    pub dropout: bool,
    /// Whether blocks are recomputed in the backward pass.
    pub gradient_checkpointing: bool,
    /// Bytes of program and tokenizer: [`PROGRAM`], or the [measured size](program_bytes) once they are loaded.
    pub program: u64,
    /// Whether the run computes on the CPU, whose loops keep no scores of attention.
    pub on_cpu: bool,
}

/// Bytes of program and tokenizer now, before weights are loaded. A vocabulary of 262,000 tokens takes about 200 MB.
pub fn program_bytes() -> u64 {
    let own = status_bytes("RssAnon:").unwrap_or(0);
    PROGRAM.max(own + CODE)
}

/// Estimated bytes by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// Frozen weights.
    pub weights: u64,
    /// Trained parameters with posterior draw, gradients and moments.
    pub adapter: u64,
    /// Activations that the forward pass keeps for the backward pass.
    pub activations: u64,
    /// Temporary tensors of one block and of the output head.
    pub working: u64,
    /// Program, tokenizer, and unused memory that the allocator holds.
    pub process: u64,
    /// The peak: that of loading (weights and mapped files) or that of a step (weights and all the rest), plus the
    /// program.
    pub peak: u64,
    /// Number of tokens of the largest batch.
    pub batch_tokens: u64,
}

impl MemoryEstimate {
    /// Estimates the memory of a run.
    ///
    /// Per token, a block keeps its input, the sum after attention, q, k, v, the attention's output, gate, up, the
    /// input of each norm after one of these, and `x A^T` of each site; with dropout also its input and its mask. With checkpointing, each block keeps only its
    /// input, and one block at a time keeps the rest. A mixture of experts keeps none of its inner activations.
    pub fn of(inputs: &MemoryInputs<'_>) -> Self {
        let model = inputs.model;
        let batch_tokens = largest_batch(inputs.lengths, &inputs.batches);
        let hidden = model.hidden_size as u64;
        let mixed = model
            .layers
            .iter()
            .filter(|layer| layer.has_experts)
            .count() as u64;
        // The width of the widest block. With experts, each token has values in several of them.
        let through = model
            .experts
            .map_or(0, |experts| experts.per_token * experts.width);
        let middle = match mixed < model.num_hidden_layers as u64 {
            true => model.intermediate_size as u64,
            false => 0,
        };
        let query = (model.num_attention_heads * model.head_dim) as u64;
        let key_value = (model.num_key_value_heads * model.head_dim) as u64;
        let blocks = model.num_hidden_layers as u64;
        // The sum over all blocks.
        let sites = inputs.sites.iter();
        let ranks: u64 = sites
            .filter(|module| module.name.contains(".layers."))
            .map(|module| {
                // The input without what is dropped, and the mask, of a byte per value.
                let dropped = match inputs.dropout {
                    true => module.in_features + module.in_features.div_ceil(4),
                    false => 0,
                };
                inputs.method.kept_values(module) + dropped
            })
            .sum::<usize>() as u64;
        let behind = model.family.norms.iter().map(|norm| match norm.place {
            NormPlace::BeforeAttention | NormPlace::BeforeFeedForward => 0,
            NormPlace::AfterAttention | NormPlace::AfterFeedForward => hidden,
            NormPlace::On(role, _) => role.features(model).1 as u64,
        });
        let inside = hidden + 2 * query + 2 * key_value + behind.sum::<u64>();
        let kept = if inputs.gradient_checkpointing {
            blocks * hidden + inside + 2 * middle + ranks.div_ceil(blocks.max(1))
        } else {
            blocks * (hidden + inside) + (blocks - mixed) * 2 * middle + ranks
        };
        // Gate, up, their gradients and the activation; a residual, two norms and their gradients.
        let block_working = 5 * middle.max(through as u64) + 6 * hidden;
        let labels = ((batch_tokens as f64 * inputs.trained_share).ceil() as u64).max(1);
        let logits = labels.min(CHUNK as u64) * model.vocab_size as u64 + 4 * labels * hidden;
        // Value, two gradients (of the task and of the whole loss), two moments, and the tensors of the method's draw.
        // Vectors are small and not counted.
        let adapter = F32
            * inputs
                .sites
                .iter()
                .map(|module| {
                    let parameters = inputs.method.parameters(module);
                    let tensors = parameters.iter().filter(|p| p.storage == Storage::Tensor);
                    let held = tensors.map(|p| match p.group {
                        Group::State => p.n_values(),
                        _ => 5 * p.n_values(),
                    });
                    (held.sum::<usize>() + inputs.method.working_values(module)) as u64
                })
                .sum::<u64>();
        let weights = inputs.weights;
        let activations = batch_tokens * kept * F32;
        let attention = match inputs.on_cpu {
            true => 0,
            false => SCORES_HELD * scores(inputs),
        };
        let working = (batch_tokens * block_working + attention).max(logits) * F32;
        let moving = adapter + activations + working;
        let held = (HELD * moving as f64) as u64;
        let step = weights + moving + held;
        Self {
            weights,
            adapter,
            activations,
            working,
            process: inputs.program + held,
            peak: inputs.program + step.max(weights + inputs.base_bytes),
            batch_tokens,
        }
    }
}

/// Matrices of scores that the backward pass of attention holds together off the CPU: probabilities, their gradients, and
/// what lies between.
const SCORES_HELD: u64 = 5;

/// Number of scores of attention that exist together off the CPU: those of the longest sequence, or of several sequences of
/// a batch up to a bound.
fn scores(inputs: &MemoryInputs<'_>) -> u64 {
    let heads = inputs.model.num_attention_heads as u64;
    let square = |idx: &usize| heads * (inputs.lengths[*idx] as u64).pow(2);
    let batches = (0..EPOCHS).flat_map(|epoch| epoch_plan(inputs.lengths, &inputs.batches, epoch));
    let of_batches = batches.map(|batch| {
        let longest = batch.iter().map(square).max().unwrap_or(0);
        let all: u64 = batch.iter().map(square).sum();
        all.min(longest.max(SCORES as u64))
    });
    of_batches.max().unwrap_or(0)
}

/// Number of tokens of the largest batch in the first epochs.
fn largest_batch(lengths: &[usize], options: &BatchOptions) -> u64 {
    (0..EPOCHS)
        .flat_map(|epoch| epoch_plan(lengths, options, epoch))
        .map(|batch| batch.iter().map(|idx| lengths[*idx] as u64).sum())
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::tiny_llama;
    use crate::model::{Decoder, read_shape};
    use monteclora_adapters::methods;
    use monteclora_converters::ModelFiles;

    /// An estimate on the tiny model, changed by `change`.
    fn estimate(change: impl FnOnce(&mut MemoryInputs<'_>)) -> MemoryEstimate {
        estimate_of("monteclora", change)
    }

    fn estimate_of(name: &str, change: impl FnOnce(&mut MemoryInputs<'_>)) -> MemoryEstimate {
        let model = read_shape(&tiny_llama()).expect("reads");
        let files = ModelFiles::open(tiny_llama()).expect("opens");
        let base_values: u64 = files
            .names()
            .filter_map(|name| files.info(name))
            .map(|(_, shape)| shape.iter().product::<usize>() as u64)
            .sum();
        let sites: Vec<_> = Decoder::linear_modules(&model)
            .into_iter()
            .filter(|module| module.name != "lm_head")
            .map(|module| Module {
                name: module.name,
                in_features: module.in_features,
                out_features: module.out_features,
                rank: 4,
                alpha: 8.0,
                has_bias: false,
                attention: None,
                frozen: None,
                scaling: 2.0,
            })
            .collect();
        let kind = methods::find(name).expect("registered");
        let method = (kind.new)(&serde_json::json!({})).expect("made");
        let mut inputs = MemoryInputs {
            model: &model,
            weights: F32 * base_values,
            base_bytes: 0,
            sites: &sites,
            method: method.as_ref(),
            lengths: &[100; 8],
            trained_share: 0.5,
            batches: BatchOptions {
                batch_size: 2,
                pack_tokens: None,
                shuffle_seed: Some(1),
            },
            dropout: false,
            gradient_checkpointing: false,
            program: PROGRAM,
            on_cpu: true,
        };
        change(&mut inputs);
        MemoryEstimate::of(&inputs)
    }

    #[test]
    fn every_term_follows_what_causes_it() {
        let base = estimate(|_| {});
        assert_eq!(base.batch_tokens, 200);
        let twice = estimate(|inputs| inputs.batches.batch_size = 4);
        assert_eq!(
            (twice.batch_tokens, twice.activations),
            (400, 2 * base.activations)
        );
        assert_eq!((twice.weights, twice.adapter), (base.weights, base.adapter));

        let half = estimate(|inputs| inputs.weights /= 2);
        assert_eq!(
            (2 * half.weights, half.activations),
            (base.weights, base.activations)
        );

        let packed = estimate(|inputs| inputs.batches.pack_tokens = Some(350));
        assert_eq!(packed.batch_tokens, 600, "two packs of three");

        let lean = estimate(|inputs| inputs.gradient_checkpointing = true);
        assert!(lean.activations < base.activations);

        let plain = estimate_of("lora", |_| {});
        let a: usize = 4 * Decoder::linear_modules(&read_shape(&tiny_llama()).expect("reads"))
            .iter()
            .filter(|module| module.name != "lm_head")
            .map(|module| module.in_features)
            .sum::<usize>();
        assert_eq!(base.adapter - plain.adapter, 2 * F32 * a as u64);

        let dropped = estimate(|inputs| inputs.dropout = true);
        let inputs = a as u64 / 4;
        assert_eq!(
            dropped.activations - base.activations,
            200 * (F32 + 1) * inputs
        );

        let large = estimate(|inputs| inputs.program += 1 << 30);
        assert_eq!(large.peak, base.peak + (1 << 30));

        // Two sequences of 100 tokens each, or one of 200, in every head.
        let heads = read_shape(&tiny_llama())
            .expect("reads")
            .num_attention_heads as u64;
        let elsewhere = estimate(|inputs| inputs.on_cpu = false);
        let scores = 2 * heads * 100 * 100;
        assert_eq!(elsewhere.working - base.working, SCORES_HELD * F32 * scores);
        let longer = estimate(|inputs| {
            inputs.on_cpu = false;
            inputs.lengths = &[200; 8];
            inputs.batches.batch_size = 1;
        });
        assert_eq!(
            longer.working - elsewhere.working,
            SCORES_HELD * F32 * scores
        );

        // Files that are mapped while they are read can be the peak.
        let loading = estimate(|inputs| inputs.base_bytes = 1 << 40);
        assert_eq!(loading.peak, PROGRAM + base.weights + (1 << 40));
        assert_eq!(
            base.peak,
            base.process + base.weights + base.adapter + base.activations + base.working
        );
    }

    /// Kept activations of the tiny model, counted by hand from its config.json.
    #[test]
    fn activations_are_counted_by_hand() {
        let model = read_shape(&tiny_llama()).expect("reads");
        let (h, i) = (model.hidden_size, model.intermediate_size);
        let (q, kv) = (
            model.num_attention_heads * model.head_dim,
            model.num_key_value_heads * model.head_dim,
        );
        let block = h /* input */ + h /* after attention */ + q + kv + kv + q /* attended */ + i + i + 7 * 4;
        let expected = 200 * model.num_hidden_layers * block * 4;
        assert_eq!(estimate(|_| {}).activations, expected as u64);
    }
}
