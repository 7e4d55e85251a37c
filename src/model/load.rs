//! Reads a checkpoint's tensors into a decoder, and reports all missing or misshapen tensors together.

use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use half::bf16;
use monteclora_adapters::FrozenLinear;
use monteclora_adapters::device::{each, to_device, to_host};
use monteclora_adapters::noise::{Key, Purpose};
use monteclora_adapters::weights::{BF16, Kind, Weight};
use monteclora_converters as formats;
use monteclora_converters::architecture::{ModelShape, Module, NormPlace, Role};
use monteclora_converters::{ModelFiles, Problem};
use rayon::prelude::*;

use super::adapter::ModuleId;
use super::block::{Block, Sublayer};
use super::decoder::Decoder;
use super::parts::activation::Gate;
use super::parts::attention::{Attention, Heads};
use super::parts::embedding::Embedding;
use super::parts::experts::Experts;
use super::parts::feed_forward::{FeedForward, FeedForwardPart};
use super::parts::head::Head;
use super::parts::norm::Norm;
use super::parts::projections::{Projection, Projections};
use monteclora_adapters::Result;

/// Where a decoder's tensors come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    /// The files of a model directory, [checked](ModelFiles::check).
    Files(&'a ModelFiles),
    /// Uniform random numbers under this seed, with the usual standard deviation of initial weights. Norms are one.
    Random(u64),
}

/// Bound of the uniform random weights; their standard deviation is 0.02.
const RANDOM_BOUND: f32 = 0.034_641_016;

struct Loader<'a> {
    source: Source<'a>,
    shape: &'a ModelShape,
    device: &'a Device,
    /// How embedding and projections are held in memory.
    kind: &'static Kind,
    problems: Mutex<Vec<String>>,
}

impl Loader<'_> {
    fn problem(&self, text: String) {
        if let Ok(mut problems) = self.problems.lock() {
            problems.push(text);
        }
    }

    /// The tensor `name`. If it is missing or has another shape, a problem is recorded and the result is a placeholder.
    fn required(&self, name: &str, shape: &[usize]) -> Result<formats::Tensor> {
        match self.source {
            Source::Random(seed) => match shape {
                [_, columns] => random(seed, name, *columns, shape, self.kind),
                _ if name.ends_with("norm.weight") => {
                    let one = 1.0 - self.shape.family.norm_offset;
                    let ones = vec![one; shape.iter().product()];
                    Ok(formats::Tensor::from_f32(shape, ones)?)
                }
                _ => zeros(shape),
            },
            Source::Files(files) => match files.get(name) {
                Some(tensor) if tensor.shape() == shape => Ok(tensor),
                found => {
                    self.problem(match found {
                        None => format!("{name}: missing"),
                        Some(tensor) => {
                            let found = tensor.shape();
                            format!("{name}: expected shape {shape:?}, found {found:?}")
                        }
                    });
                    zeros(shape)
                }
            },
        }
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Arc<dyn Weight>> {
        let tensor = self.required(name, &shape)?;
        if let Some(fault) = tensor.blocks().and_then(formats::BlockMatrix::fault) {
            self.problem(format!("{name}: {fault}; fetch the model again"));
        }
        (self.kind.hold)(&tensor, self.device)
    }

    fn vector(&self, tensor: &formats::Tensor) -> Result<Tensor> {
        to_device(tensor.to_f32()?, tensor.shape(), self.device)
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let weight = self.vector(&self.required(&format!("{name}.weight"), &[width])?)?;
        let offset = self.shape.family.norm_offset;
        Ok(Norm {
            weight: match offset == 0.0 {
                true => weight,
                false => (weight + f64::from(offset))?,
            },
            eps: self.shape.rms_norm_eps,
        })
    }

    /// The last norm, divided by the divisor of the logits, since logits are linear in its output.
    fn last_norm(&self) -> Result<Norm> {
        let mut norm = self.norm(&self.shape.final_norm(), self.shape.hidden_size)?;
        let divisor = self.shape.multipliers.logits_divisor;
        if divisor != 1.0 {
            norm.weight = (norm.weight / divisor)?;
        }
        Ok(norm)
    }

    /// Rounds a number as the embedding's values are rounded.
    fn rounded(&self, value: f64) -> Result<f32> {
        let held = formats::Tensor::from_f32(&[1, 1], vec![value as f32])?;
        let held = (self.kind.hold)(&held, self.device)?.gather(&[0])?;
        Ok(to_host::<f32>(&held)?.into_iter().sum())
    }

    /// The norm of block `layer` at a place that `is_there` accepts, if there is one.
    fn norm_at(&self, layer: usize, is_there: impl Fn(NormPlace) -> bool) -> Result<Option<Norm>> {
        let mut norms = self.shape.family.norms.iter();
        norms
            .find(|norm| is_there(norm.place))
            .map(|norm| {
                let name = format!("{}.{}", self.shape.block(layer), norm.name);
                self.norm(&name, self.shape.norm_width(norm.place))
            })
            .transpose()
    }

    fn linear(&self, module: &Module) -> Result<FrozenLinear> {
        let (out_features, in_features) = (module.out_features, module.in_features);
        let name = &module.name;
        let weight = self.matrix(&format!("{name}.weight"), [out_features, in_features])?;
        let bias =
            (module.has_bias).then(|| self.required(&format!("{name}.bias"), &[out_features]));
        let bias = bias.transpose()?;
        let bias = bias.map(|bias| self.vector(&bias)).transpose()?;
        FrozenLinear::new(weight, bias)
    }

    /// The modules of block `layer` that compute `roles`, in order.
    fn projections(&self, layer: usize, roles: &[Role]) -> Result<Projections> {
        let computes = |module: &Module| module.projection.parts.iter().all(|p| roles.contains(p));
        ModuleId::all(self.shape)
            .filter(|(_, module)| module.layer == Some(layer) && computes(module))
            .map(|(id, module)| {
                let parts = module.projection.parts.iter();
                Ok(Projection {
                    id,
                    linear: self.linear(&module)?,
                    parts: parts.map(|role| role.features(self.shape).1).collect(),
                    name: module.name,
                })
            })
            .collect::<Result<_>>()
            .map(Projections)
    }

    fn gate(&self) -> Result<Gate> {
        let unknown = || candle_core::Error::Msg("an activation that is not computed".to_owned());
        Ok(Gate::of(self.shape.activation).ok_or_else(unknown)?)
    }

    fn feed_forward(&self, layer: usize) -> Result<FeedForwardPart> {
        if let (Some((experts, sizes)), true) =
            (self.shape.mixture(), self.shape.layers[layer].has_experts)
        {
            let frozen = |name: &str, shape| {
                let name = format!("{}.{name}.weight", self.shape.block(layer));
                FrozenLinear::new(self.matrix(&name, shape)?, None)
            };
            let (inner, hidden) = (sizes.width, self.shape.hidden_size);
            let [gate, up, down] = experts.projections.map(|(name, _)| name);
            let one = |expert: usize| -> Result<[FrozenLinear; 3]> {
                let path = format!("{}.{expert}", experts.path);
                Ok([
                    frozen(&format!("{path}.{gate}"), [inner, hidden])?,
                    frozen(&format!("{path}.{up}"), [inner, hidden])?,
                    frozen(&format!("{path}.{down}"), [hidden, inner])?,
                ])
            };
            return Ok(FeedForwardPart::Experts(Experts {
                router: frozen(experts.router, [sizes.count, hidden])?,
                experts: (0..sizes.count).map(one).collect::<Result<_>>()?,
                per_token: sizes.per_token,
                is_normalised: sizes.is_normalised,
                gate: self.gate()?,
            }));
        }
        Ok(FeedForwardPart::Gated(FeedForward {
            inner: self.projections(layer, FEED_FORWARD)?,
            down: self.projections(layer, &[Role::Down])?,
            gate: self.gate()?,
        }))
    }

    fn block(&self, layer: usize) -> Result<Block> {
        let shape = self.shape;
        let options = shape.layers[layer];
        let at = |place| self.norm_at(layer, |found| found == place);
        let on = |role| {
            self.norm_at(
                layer,
                |found| matches!(found, NormPlace::On(on, _) if on == role),
            )
        };
        Ok(Block {
            attention: Sublayer {
                before: at(NormPlace::BeforeAttention)?,
                part: Attention {
                    inner: self.projections(layer, ATTENTION)?,
                    output: self.projections(layer, &[Role::Output])?,
                    norms: [on(Role::Query)?, on(Role::Key)?],
                    heads: Heads {
                        query: shape.num_attention_heads,
                        key_value: shape.num_key_value_heads,
                        dim: shape.head_dim,
                        window: options.window,
                        scale: shape.multipliers.attention.map(|scale| scale as f32),
                        softcap: shape.score_cap.map(|cap| cap as f32),
                    },
                    rope: options.rope,
                },
                after: at(NormPlace::AfterAttention)?,
                scale: shape.multipliers.residual,
            },
            feed_forward: Sublayer {
                before: at(NormPlace::BeforeFeedForward)?,
                part: self.feed_forward(layer)?,
                after: at(NormPlace::AfterFeedForward)?,
                scale: shape.multipliers.residual,
            },
        })
    }
}

/// The roles of the modules that read attention's input.
const ATTENTION: &[Role] = &[Role::Query, Role::Key, Role::Value];
/// The roles of the modules that read the feed-forward layer's input.
const FEED_FORWARD: &[Role] = &[Role::Gate, Role::Up];

/// The features of a model that this decoder does not support, as one problem per feature.
pub(super) fn not_computed(shape: &ModelShape) -> Vec<Problem> {
    let family = shape.family;
    let refused = |name: &str, message: String, fix: &str| {
        Problem::new("model-config", format!("config.json: {name}"), message, fix)
    };
    let mut problems = Vec::new();
    if Gate::of(shape.activation).is_none() {
        let message = format!("activation `{}` is not supported", shape.activation.name());
        let fix = "supported are silu and gelu_pytorch_tanh";
        problems.push(refused(family.activation_key, message, fix));
    }
    for norm in family.norms {
        if let NormPlace::On(role, _) = norm.place
            && !matches!(role, Role::Query | Role::Key)
        {
            let message = format!("the norm `{}` is not supported", norm.name);
            problems.push(refused(
                "model_type",
                message,
                "only those on queries and keys are",
            ));
        }
    }
    let is_all_experts = !shape.layers.is_empty() && shape.layers.iter().all(|l| l.has_experts);
    let feed_forward: &[&[Role]] = match is_all_experts {
        true => &[],
        false => &[FEED_FORWARD, &[Role::Down]],
    };
    for roles in [ATTENTION, &[Role::Output]].iter().chain(feed_forward) {
        let parts = family
            .projections
            .iter()
            .flat_map(|projection| projection.parts);
        let found: Vec<Role> = parts.copied().filter(|role| roles.contains(role)).collect();
        if found != *roles {
            let message = format!("projections of {found:?} are not supported");
            problems.push(refused(
                "model_type",
                message,
                "a block has one of each role, in order",
            ));
        }
    }
    problems
}

fn zeros(shape: &[usize]) -> Result<formats::Tensor> {
    let values = vec![0.0; shape.iter().product()];
    Ok(formats::Tensor::from_f32(shape, values)?)
}

/// A matrix of random values, in bfloat16 if the weights are held so: the same values, and no wide copy of a large embedding.
fn random(
    seed: u64,
    name: &str,
    columns: usize,
    shape: &[usize],
    kind: &Kind,
) -> Result<formats::Tensor> {
    let key = Key::new(seed, name, 0);
    let row = |row: usize| {
        let values = key.uniforms_f32_from(Purpose::InitialA, row * columns, columns);
        values.into_iter().map(|u| (2.0 * u - 1.0) * RANDOM_BOUND)
    };
    let n_values = shape.iter().product::<usize>();
    if kind.name == BF16.name {
        let mut bytes = vec![0u8; 2 * n_values];
        let rows = bytes.par_chunks_mut(2 * columns).enumerate();
        rows.for_each(|(idx, out)| {
            for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(row(idx)) {
                *out = bf16::from_f32(value).to_le_bytes();
            }
        });
        return Ok(formats::Tensor::from_bytes(
            formats::DType::BF16,
            shape,
            bytes,
        )?);
    }
    let mut values = vec![0f32; n_values];
    let rows = values.par_chunks_mut(columns).enumerate();
    rows.for_each(|(idx, out)| {
        for (out, value) in out.iter_mut().zip(row(idx)) {
            *out = value;
        }
    });
    Ok(formats::Tensor::from_f32(shape, values)?)
}

/// Builds the decoder that `config` describes from `source`.
pub(super) fn decoder(
    config: ModelShape,
    dir: &Path,
    source: Source<'_>,
    device: &Device,
    kind: &'static Kind,
) -> Result<Decoder> {
    let loader = Loader {
        source,
        shape: &config,
        device,
        kind,
        problems: Mutex::new(Vec::new()),
    };
    let embedding = loader.matrix(
        &format!("{}.weight", config.embedding()),
        [config.vocab_size, config.hidden_size],
    )?;
    let (id, head) = ModuleId::all(&config)
        .last()
        .ok_or_else(|| candle_core::Error::Msg("a decoder without a head".to_owned()))?;
    let head = Head {
        id,
        norm: loader.last_norm()?,
        linear: match config.tie_word_embeddings {
            true => FrozenLinear::new(embedding.clone(), None)?,
            false => loader.linear(&head)?,
        },
        cap: config.logit_cap.map(|cap| cap as f32),
    };
    let embedding = Embedding {
        scale: loader.rounded(config.multipliers.embedding)?,
        table: embedding,
    };
    let blocks = each(device, 0..config.num_hidden_layers, |layer| {
        loader.block(layer)
    })?;
    let mut problems = loader.problems.into_inner().unwrap_or_default();
    if !problems.is_empty() {
        problems.sort();
        let hidden = problems.len().saturating_sub(20);
        problems.truncate(20);
        if hidden > 0 {
            problems.push(format!("and {hidden} more"));
        }
        let (dir, problems) = (dir.display(), problems.join("; "));
        let message =
            format!("`{dir}` does not hold the model its config.json describes: {problems}");
        return Err(Problem::sentence("weights", message).into());
    }
    Ok(Decoder {
        directory: dir.to_owned(),
        embedding,
        blocks,
        head,
        device: device.clone(),
        config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parts::testing::{devices, matrix_on};
    use crate::model::{ActiveAdapter, PassOptions, Sequences};
    use candle_core::DType;
    use monteclora_adapters::LowRank;
    use monteclora_adapters::weights::{BF16, F32};

    /// bfloat16 affects how weights are held, not the arithmetic: a decoder with the same rounded weights in float32
    /// agrees to the bit.
    #[test]
    fn bf16_weights_are_rounded_weights() -> std::result::Result<(), Box<dyn std::error::Error>> {
        devices().iter().try_for_each(bf16_weights_are_rounded_on)
    }

    fn bf16_weights_are_rounded_on(
        device: &Device,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 24, "intermediate_size": 210, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}"#,
        )?;
        let narrow = Decoder::random(dir.path(), device, &BF16, 3)?;
        assert_eq!(narrow.embedding.table.bytes(), 2 * 301 * 24);
        let mut wide = Decoder::random(dir.path(), device, &F32, 3)?;
        let round = |weight: &dyn Weight| -> Result<Arc<dyn Weight>> {
            let rounded = weight.tensor()?.to_dtype(DType::BF16)?;
            Ok(Arc::new(rounded.to_dtype(DType::F32)?))
        };
        wide.embedding.table = round(wide.embedding.table.as_ref())?;
        wide.head.linear = FrozenLinear::new(round(wide.head.linear.weight())?, None)?;
        for projection in wide.blocks.iter_mut().flat_map(Block::projections_mut) {
            projection.linear = FrozenLinear::new(round(projection.linear.weight())?, None)?;
        }
        let name = "model.layers.0.mlp.down_proj";
        let (id, module) = ModuleId::all(narrow.config())
            .find(|(_, module)| module.name == name)
            .expect("every block has one");
        let low_rank = LowRank {
            a: matrix_on(device, 3, module.in_features, 0.1),
            b: matrix_on(device, module.out_features, 3, 0.2),
            scaling: 2.0,
        };
        let adapter = ActiveAdapter::new([(id, low_rank)]);
        let sequences = Sequences::new(&[vec![5u32, 9, 300, 7, 0], vec![1, 2, 3]]);
        let targets = [(0, 9), (2, 7), (6, 3)];
        let run = |decoder: &Decoder| -> Result<(Tensor, Tensor)> {
            let pass = PassOptions::default();
            let loss = decoder.loss_and_gradients(&sequences, &targets, &adapter, 1.0, pass)?;
            let gradients = loss.gradients.unwrap_or_default();
            let of_factors = gradients.get(id).expect("the module is adapted");
            let flat = of_factors.iter().map(Tensor::flatten_all);
            let both = Tensor::cat(&flat.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
            Ok((decoder.logits(&sequences, &adapter)?, both))
        };
        let ((logits, gradients), (expected, exact)) = (run(&narrow)?, run(&wide)?);
        for (found, expected) in [(logits, expected), (gradients, exact)] {
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            let (found, expected) = (flat(&found)?, flat(&expected)?);
            assert!(expected.iter().any(|v| *v != 0.0));
            assert_eq!(found, expected);
        }
        Ok(())
    }
}
