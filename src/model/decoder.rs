//! The whole decoder: hidden states, logits, and the task loss with the gradients of the active adapter.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::noise::{Key, Purpose};
use monteclora_adapters::weights::Weight;
use monteclora_adapters::{FrozenLinear, Precision};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{LinearModule, ModelFiles};

use super::adapter::{ActiveAdapter, AdapterGradients, SiteId};
use super::generate::LayerCache;
use super::layer::{Kept, Layer, Pass};
use super::load;
use super::ops::attention::Segment;
use super::ops::rope::Rotation;
use super::ops::{cross_entropy, rms_norm};
use super::{Error, Result, read_shape};

/// A frozen decoder on one device: weights in f32 or bf16, norms and arithmetic in f32 unless [`Decoder::with_precision`] says
/// otherwise.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: ModelShape,
    pub(super) directory: PathBuf,
    pub(super) embedding: Arc<dyn Weight>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: FrozenLinear,
    pub(super) device: Device,
}

/// Ragged sequences of a batch, concatenated; nothing is padded.
#[derive(Debug, Clone, Default)]
pub struct Sequences {
    /// Token ids, `[tokens]`.
    pub tokens: Vec<u32>,
    /// Position of each token within its sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// Where each sequence lies.
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

/// Dropout on the adapters' inputs; a function of seed, step, site, row and position alone.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability that an input is dropped, in `[0, 1)`.
    pub probability: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser step.
    pub step: u64,
    /// Identity of each segment's row in the data, so that a row's mask does not depend on its batch.
    pub rows: Vec<u64>,
}

impl Dropout {
    pub(super) fn mask(&self, site: SiteId, segments: &[Segment], like: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = like.dims2()?;
        let keep = (1.0 / (1.0 - self.probability)) as f32;
        let mut mask = vec![0f32; tokens * columns];
        for (segment, row) in segments.iter().zip(&self.rows) {
            let key = Key::new(
                self.seed ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                &site.name(),
                self.step,
            );
            let start = segment.query_start * columns;
            let values = key.uniforms_f32_from(Purpose::Dropout, 0, segment.query_len * columns);
            for (slot, u) in mask[start..].iter_mut().zip(values) {
                *slot = if f64::from(u) < self.probability {
                    0.0
                } else {
                    keep
                };
            }
        }
        Ok(Tensor::from_vec(mask, (tokens, columns), &Device::Cpu)?
            .to_device(&self.device(like))?)
    }

    fn device(&self, like: &Tensor) -> Device {
        like.device().clone()
    }
}

/// Losses of the labelled positions and, when a scale was given, gradients of `scale` times their sum.
#[derive(Debug)]
pub struct TaskLoss {
    /// Negative log-likelihood of each target, nats.
    pub nll: Vec<f32>,
    /// Whether each target was the most likely token.
    pub correct: Vec<bool>,
    /// Gradients of the adapter's sites.
    pub gradients: Option<AdapterGradients>,
}

impl TaskLoss {
    /// Sum of the negative log-likelihoods, nats.
    pub fn total(&self) -> f64 {
        self.nll.iter().map(|v| f64::from(*v)).sum()
    }
}

/// How a training pass runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassOptions<'a> {
    /// Dropout on the adapters' inputs.
    pub dropout: Option<&'a Dropout>,
    /// Keep only each block's input and compute the rest again in the backward pass.
    pub checkpointing: bool,
}

impl Decoder {
    /// Loads a Hugging Face directory in float32 on `device`.
    ///
    /// # Errors
    /// What [`read_shape`] refuses; missing or misshapen tensors, all of them at once.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        Self::load_as(dir, device, DType::F32)
    }

    /// Loads a Hugging Face directory with embedding and projections held as `weights`: f32, or bf16 at half the memory, widened
    /// piece by piece where they are multiplied.
    ///
    /// # Errors
    /// As [`Self::load`]; [`Error::WeightType`] for any other type.
    pub fn load_as(dir: &Path, device: &Device, weights: DType) -> Result<Self> {
        let config = read_shape(dir)?;
        let files = ModelFiles::open(dir)?;
        load::decoder(config, dir, load::Source::Files(&files), device, weights)
    }

    /// A decoder of the sizes in `dir`'s config.json with random weights, a function of `seed`; for measurements.
    ///
    /// # Errors
    /// As [`Self::load_as`].
    pub fn random(dir: &Path, device: &Device, weights: DType, seed: u64) -> Result<Self> {
        let config = read_shape(dir)?;
        load::decoder(config, dir, load::Source::Random(seed), device, weights)
    }

    /// The same decoder with products of its frozen weights computed in `precision`, forward and backward.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.head = self.head.with_precision(precision);
        for layer in &mut self.layers {
            layer.projections = layer
                .projections
                .each_ref()
                .map(|linear| linear.clone().with_precision(precision));
        }
        self
    }

    /// Sizes and switches.
    pub fn config(&self) -> &ModelShape {
        &self.config
    }

    /// Where it was loaded from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every projection that can carry an adapter, by module path.
    pub fn linear_modules(config: &ModelShape) -> Vec<LinearModule> {
        config.linear_modules()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let vocab_size = self.config.vocab_size;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
            return Err(Error::Token {
                token: *token,
                vocab_size,
            });
        }
        Ok(self.embedding.gather(tokens)?)
    }

    pub(super) fn rotation(&self, positions: &[u32]) -> Result<Rotation> {
        Rotation::new(
            positions,
            &self.config.ropes[0].inverse_frequencies,
            &self.device,
        )
    }

    /// Normalised hidden states `[tokens, hidden]`, without keeping anything for a backward pass.
    pub(super) fn hidden(
        &self,
        sequences: &Sequences,
        adapter: &ActiveAdapter,
        mut caches: Option<&mut [LayerCache]>,
    ) -> Result<Tensor> {
        let rotation = self.rotation(&sequences.positions)?;
        let pass = Pass {
            rotation: &rotation,
            segments: &sequences.segments,
            adapter,
            dropout: None,
        };
        let mut x = self.embed(&sequences.tokens)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[index]);
            x = layer.forward(&x, &pass, cache)?.0;
        }
        Ok(x)
    }

    pub(super) fn head_logits(&self, hidden: &Tensor, adapter: &ActiveAdapter) -> Result<Tensor> {
        let normed = rms_norm::forward(hidden, &self.norm, self.config.rms_norm_eps)?;
        Ok(self
            .head
            .forward(&normed, adapter.get(SiteId::Head), None, None)?
            .0)
    }

    /// Logits of every position, `[tokens, vocab]`.
    pub fn logits(&self, sequences: &Sequences, adapter: &ActiveAdapter) -> Result<Tensor> {
        let hidden = self.hidden(sequences, adapter, None)?;
        self.head_logits(&hidden, adapter)
    }

    /// Losses at `targets`, pairs of a row of `sequences` and the token it should predict; no gradients.
    pub fn evaluate(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
    ) -> Result<TaskLoss> {
        let hidden = self.hidden(sequences, adapter, None)?;
        let (rows, labels) = split(targets);
        let selected = hidden.index_select(&Tensor::new(rows, &self.device)?, 0)?;
        let normed = rms_norm::forward(&selected, &self.norm, self.config.rms_norm_eps)?;
        let loss = cross_entropy::evaluate(
            &self.head,
            adapter.get(SiteId::Head),
            &normed,
            &labels,
            None,
        )?;
        Ok(TaskLoss {
            nll: loss.nll,
            correct: loss.correct,
            gradients: None,
        })
    }

    /// Losses at `targets`, and the gradients of `scale` times their sum at every site of `adapter`.
    pub fn loss_and_gradients(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
        scale: f64,
        options: PassOptions<'_>,
    ) -> Result<TaskLoss> {
        // On a worker of the pool, so that the thousands of parallel loops below start without waking one from outside.
        rayon::scope(|_| self.forward_and_backward(sequences, targets, adapter, scale, options))
    }

    fn forward_and_backward(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapter: &ActiveAdapter,
        scale: f64,
        options: PassOptions<'_>,
    ) -> Result<TaskLoss> {
        let rotation = self.rotation(&sequences.positions)?;
        let pass = Pass {
            rotation: &rotation,
            segments: &sequences.segments,
            adapter,
            dropout: options.dropout,
        };
        let mut tape: Vec<(Tensor, Option<Kept>)> = Vec::with_capacity(self.layers.len());
        let mut x = self.embed(&sequences.tokens)?;
        for layer in &self.layers {
            let (y, kept) = layer.forward(&x, &pass, None)?;
            tape.push((x, (!options.checkpointing).then_some(kept)));
            x = y;
        }
        let (rows, labels) = split(targets);
        let index = Tensor::new(rows, &self.device)?;
        let selected = x.index_select(&index, 0)?;
        let eps = self.config.rms_norm_eps;
        let normed = rms_norm::forward(&selected, &self.norm, eps)?;
        let loss = cross_entropy::evaluate(
            &self.head,
            adapter.get(SiteId::Head),
            &normed,
            &labels,
            Some(scale),
        )?;
        let mut gradients = AdapterGradients::default();
        gradients.add(SiteId::Head, loss.grad_factors)?;
        if let Some(grad_normed) = loss.grad_hidden {
            let grad_selected = rms_norm::backward(&selected, &self.norm, eps, &grad_normed, None)?;
            let zeros = Tensor::zeros(x.dims(), DType::F32, &self.device)?;
            let mut upstream = zeros.index_add(&index, &grad_selected, 0)?;
            // Blocks below the lowest adapted one need no gradient at all.
            let lowest = adapter
                .sites()
                .filter_map(|site| match site {
                    SiteId::Block(layer, _) => Some(layer),
                    SiteId::Head => None,
                })
                .min();
            while let Some((x, kept)) = tape.pop() {
                let layer = &self.layers[tape.len()];
                if lowest.is_none_or(|lowest| layer.index < lowest) {
                    break;
                }
                let kept = match kept {
                    Some(kept) => kept,
                    None => layer.forward(&x, &pass, None)?.1,
                };
                let input = Some(layer.index) != lowest;
                match layer.backward(&x, &kept, &upstream, &pass, &mut gradients, input)? {
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

pub(super) fn split(targets: &[(usize, u32)]) -> (Vec<u32>, Vec<u32>) {
    targets
        .iter()
        .map(|(row, label)| (*row as u32, *label))
        .unzip()
}
