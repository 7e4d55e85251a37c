//! The whole decoder: hidden states, logits, and the task loss with the gradients of the active adapter.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::Precision;
use monteclora_adapters::device::to_device;
use monteclora_adapters::weights::{AUTO, Kind, Weight};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{LinearModule, ModelFiles};

use super::adapter::{ActiveAdapter, AdapterGradients, ModuleId};
use super::block::{Block, Kept};
use super::dropout::Dropout;
use super::generate::LayerCache;
use super::load;
use super::parts::Pass;
use super::parts::attention::{Masks, Segment};
use super::parts::embedding::Embedding;
use super::parts::head::Head;
use super::parts::rotary::Rotation;
use super::{Result, read_shape};

/// A frozen decoder on one device. Weights are float32, bfloat16 or blocks of quantised values. Norms are float32, and
/// so is the arithmetic, unless [`Decoder::with_precision`] changes it.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: ModelShape,
    pub(super) directory: PathBuf,
    pub(super) embedding: Embedding,
    pub(super) blocks: Vec<Block>,
    pub(super) head: Head,
    pub(super) device: Device,
}

/// The sequences of a batch, concatenated without padding.
#[derive(Debug, Clone, Default)]
pub struct Sequences {
    /// Token ids, `[tokens]`.
    pub tokens: Vec<u32>,
    /// Position of each token within its sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// The rows of each sequence.
    pub segments: Vec<Segment>,
}

impl Sequences {
    /// Concatenates `sequences`, each starting at position 0.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S]) -> Self {
        let mut batch = Self::default();
        for sequence in sequences {
            batch.push(sequence.as_ref());
        }
        batch
    }

    /// Appends a sequence that starts at position 0, and returns its index.
    pub fn push(&mut self, sequence: &[u32]) -> usize {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(sequence);
        self.positions.extend(0..sequence.len() as u32);
        self.segments.push(Segment {
            query_start: start,
            query_len: sequence.len(),
            key_start: start,
            key_len: sequence.len(),
        });
        self.segments.len() - 1
    }

    /// The tokens of a sequence.
    pub fn sequence(&self, index: usize) -> &[u32] {
        let segment = &self.segments[index];
        &self.tokens[segment.query_start..][..segment.query_len]
    }
}

/// Losses of the labelled positions and, if a scale was given, the gradients of `scale` times their sum.
#[derive(Debug)]
pub struct TaskLoss {
    /// Negative log-likelihood of each target, nats.
    pub nll: Vec<f32>,
    /// Whether each target was the most likely token.
    pub correct: Vec<bool>,
    /// Gradients of the adapter's modules, if a scale was given.
    pub gradients: Option<AdapterGradients>,
}

impl TaskLoss {
    /// Sum of the negative log-likelihoods, nats.
    pub fn total(&self) -> f64 {
        self.nll.iter().map(|v| f64::from(*v)).sum()
    }
}

/// Options of a training pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassOptions<'a> {
    /// Dropout on the adapters' inputs.
    pub dropout: Option<&'a Dropout>,
    /// Whether to keep only each block's input and recompute the other activations in the backward pass.
    pub checkpointing: bool,
}

impl Decoder {
    /// Loads a Hugging Face directory on `device`. Weights become float32; blocks of quantised values stay as they are.
    ///
    /// # Errors
    /// As [`read_shape`] and [`ModelFiles::check`], or if a tensor is missing or has the wrong shape.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        Self::load_as(dir, device, &AUTO)
    }

    /// Loads a Hugging Face directory and holds embedding and projections as `weights`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_as(dir: &Path, device: &Device, weights: &'static Kind) -> Result<Self> {
        let files = ModelFiles::open(dir)?;
        files.check()?;
        let source = load::Source::Files(&files);
        load::decoder(read_shape(dir)?, dir, source, device, weights)
    }

    /// A decoder with the sizes in `dir`'s config.json and random weights that depend on `seed`. It is for
    /// measurements.
    ///
    /// # Errors
    /// As [`Self::load_as`].
    pub fn random(dir: &Path, device: &Device, weights: &'static Kind, seed: u64) -> Result<Self> {
        let config = read_shape(dir)?;
        load::decoder(config, dir, load::Source::Random(seed), device, weights)
    }

    /// The frozen weight of a module, `[out, in]`; `None` for a module that carries no update.
    pub fn weight(&self, id: ModuleId) -> Option<Arc<dyn Weight>> {
        if id == self.head.id {
            return Some(self.head.linear.shared_weight());
        }
        let mut projections = self.blocks.iter().flat_map(Block::projections);
        let found = projections.find(|projection| projection.id == id)?;
        Some(found.linear.shared_weight())
    }

    /// Computes the products with frozen weights in `precision`, forward and backward.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.head.linear.set_precision(precision);
        for block in &mut self.blocks {
            block.set_precision(precision);
        }
        self
    }

    /// Sizes and options of the model.
    pub fn config(&self) -> &ModelShape {
        &self.config
    }

    /// The directory that the decoder was loaded from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a row may depend on the length of its whole sequence, on tokens after it, too: so it is with rotations that
    /// change beyond a length (LongRoPE, dynamic). A sequence does not tell there what its beginning alone would give.
    pub fn depends_on_length(&self) -> bool {
        let ropes = &self.config.ropes;
        ropes.iter().any(|rope| rope.threshold().is_some())
    }

    /// The device that the decoder computes on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every projection that can carry an update, with its module path.
    pub fn linear_modules(config: &ModelShape) -> Vec<LinearModule> {
        config.linear_modules()
    }

    pub(super) fn rotations(&self, sequences: &Sequences) -> Result<Vec<Rotation>> {
        let (config, ropes) = (&self.config, self.config.ropes.iter());
        let heads = (config.family.rotary.pairs, config.head_dim);
        let (positions, segments) = (&sequences.positions, &sequences.segments);
        ropes
            .map(|rope| Rotation::new(rope, heads, positions, segments, &self.device))
            .collect()
    }

    /// Hidden states before the last norm, `[tokens, hidden]`. Nothing is kept for a backward pass. With caches, attention
    /// also reads keys and values of earlier tokens.
    pub(super) fn hidden(
        &self,
        sequences: &Sequences,
        adapter: &ActiveAdapter,
        mut caches: Option<&mut [LayerCache]>,
    ) -> Result<Tensor> {
        let pass = Pass {
            rotations: &self.rotations(sequences)?,
            segments: &sequences.segments,
            keys: None,
            masks: &Masks::default(),
            adapter,
            dropout: None,
        };
        let mut x = self.embedding.forward(&sequences.tokens)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[index]);
            x = block.forward(&x, &pass, cache)?.0;
        }
        Ok(x)
    }

    pub(super) fn head_logits(&self, hidden: &Tensor, adapter: &ActiveAdapter) -> Result<Tensor> {
        self.head.logits(&self.head.norm.forward(hidden)?, adapter)
    }

    /// Logits of every position, `[tokens, vocab]`.
    pub fn logits(&self, sequences: &Sequences, adapter: &ActiveAdapter) -> Result<Tensor> {
        let hidden = self.hidden(sequences, adapter, None)?;
        self.head_logits(&hidden, adapter)
    }

    /// Losses at `targets` without gradients. A target is a row of `sequences` and the token that it should predict.
    pub fn evaluate(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
    ) -> Result<TaskLoss> {
        self.shared(sequences, targets, [adapter])?
            .evaluate(adapter)
    }

    /// Losses at `targets`, and the gradients of `scale` times their sum for every module of `adapter`.
    pub fn loss_and_gradients(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
        scale: f64,
        options: PassOptions<'_>,
    ) -> Result<TaskLoss> {
        on_pool(|| self.forward_and_backward(sequences, targets, adapter, scale, options))
    }

    fn forward_and_backward(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
        scale: f64,
        options: PassOptions<'_>,
    ) -> Result<TaskLoss> {
        let pass = Pass {
            rotations: &self.rotations(sequences)?,
            segments: &sequences.segments,
            keys: None,
            masks: &Masks::default(),
            adapter,
            dropout: options.dropout,
        };
        let mut tape: Vec<(Tensor, Option<Kept>)> = Vec::with_capacity(self.blocks.len());
        let mut x = self.embedding.forward(&sequences.tokens)?;
        for block in &self.blocks {
            let (y, kept) = block.forward(&x, &pass, None)?;
            tape.push((x, (!options.checkpointing).then_some(kept)));
            x = y;
        }
        let (rows, labels) = split(targets);
        let index = to_device(rows, targets.len(), &self.device)?;
        let selected = x.index_select(&index, 0)?;
        let loss = self.head.losses(&selected, &labels, adapter, Some(scale))?;
        let mut gradients = AdapterGradients::default();
        gradients.add(self.head.id, loss.grad_factors)?;
        // Blocks below the lowest one with an update need no gradient.
        let is_adapted = |block: &Block| block.projections().any(|p| adapter.get(p.id).is_some());
        let lowest = self.blocks.iter().position(is_adapted);
        if let (Some(grad_selected), Some(lowest)) = (loss.grad_hidden, lowest) {
            let zeros = Tensor::zeros(x.dims(), DType::F32, &self.device)?;
            let mut upstream = zeros.index_add(&index, &grad_selected, 0)?;
            while let Some((x, kept)) = tape.pop() {
                let block = &self.blocks[tape.len()];
                let kept = match kept {
                    Some(kept) => kept,
                    None => block.forward(&x, &pass, None)?.1,
                };
                let wanted = tape.len() > lowest;
                match block.backward(&x, &kept, &upstream, &pass, &mut gradients, wanted)? {
                    Some(grad) => upstream = grad,
                    None => break,
                }
            }
        }
        Ok(TaskLoss {
            nll: loss.nll,
            correct: loss.correct,
            gradients: Some(gradients),
        })
    }
}

/// Runs `pass` on a worker of the thread pool. A pass starts thousands of parallel loops, and starting one from outside
/// the pool must wake a worker first.
pub(super) fn on_pool<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| pass())
}

pub(super) fn split(targets: &[(usize, u32)]) -> (Vec<u32>, Vec<u32>) {
    targets
        .iter()
        .map(|(row, label)| (*row as u32, *label))
        .unzip()
}
