//! Reading a checkpoint's tensors into a decoder, every missing or misshapen one reported at once.

use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::FrozenLinear;
use monteclora_adapters::noise::{Key, Purpose};
use monteclora_adapters::weights::{Kind, Weight};
use monteclora_converters as formats;
use monteclora_converters::ModelFiles;
use monteclora_converters::architecture::{Extent, ModelShape, NormPlace, Role};
use rayon::prelude::*;

use super::adapter::{Projection, SiteId};
use super::decoder::Decoder;
use super::layer::Layer;
use super::ops::attention::Heads;
use super::{Error, Result};

/// Where a decoder's tensors come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    /// The files of a model directory.
    Files(&'a ModelFiles),
    /// Uniform numbers of the spread that checkpoints start from, under this seed; norms are one.
    Random(u64),
}

/// Half-width of the random weights: the standard deviation is 0.02.
const RANDOM_BOUND: f32 = 0.034_641_016;

struct Loader<'a> {
    source: Source<'a>,
    config: &'a ModelShape,
    device: &'a Device,
    /// How embedding and projections are held.
    kind: &'static Kind,
    problems: Mutex<Vec<String>>,
}

impl Loader<'_> {
    fn problem(&self, text: String) {
        if let Ok(mut problems) = self.problems.lock() {
            problems.push(text);
        }
    }

    /// The tensor `name`, or a placeholder after noting that it is missing or of another shape.
    fn required(&self, name: &str, shape: &[usize]) -> Result<formats::Tensor> {
        match self.optional(name, shape)? {
            Some(tensor) => Ok(tensor),
            None => {
                self.problem(format!("{name}: missing"));
                zeros(shape)
            }
        }
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<formats::Tensor>> {
        Ok(match self.source {
            Source::Random(seed) => match shape {
                [_, columns] => Some(random(seed, name, *columns, shape)?),
                _ if name.ends_with("norm.weight") => {
                    let ones = vec![1.0; shape.iter().product()];
                    Some(formats::Tensor::from_f32(shape, ones)?)
                }
                _ => None,
            },
            Source::Files(files) => match files.get(name) {
                Some(tensor) if tensor.shape() != shape => {
                    self.problem(format!(
                        "{name}: expected shape {shape:?}, found {:?}",
                        tensor.shape()
                    ));
                    Some(zeros(shape)?)
                }
                found => found,
            },
        })
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Arc<dyn Weight>> {
        Ok((self.kind.hold)(
            &self.required(name, &shape)?,
            self.device,
        )?)
    }

    fn vector(&self, tensor: &formats::Tensor) -> Result<Tensor> {
        let cpu = Tensor::from_vec(tensor.to_f32()?, tensor.shape(), &Device::Cpu)?;
        Ok(cpu.to_device(self.device)?)
    }

    fn norm(&self, name: &str, len: usize) -> Result<Tensor> {
        self.vector(&self.required(&format!("{name}.weight"), &[len])?)
    }

    fn linear(&self, site: SiteId) -> Result<FrozenLinear> {
        let (in_features, out_features) = site.shape(self.config);
        let name = site.name();
        let weight = self.matrix(&format!("{name}.weight"), [out_features, in_features])?;
        // A bias in the file is used whatever the configuration calls it: dropping it would be silently wrong.
        let bias = self.optional(&format!("{name}.bias"), &[out_features])?;
        let bias = bias.map(|bias| self.vector(&bias)).transpose()?;
        Ok(FrozenLinear::new(weight, bias)?)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let config = self.config;
        let prefix = format!("model.layers.{index}");
        let norm = |name: &str| self.norm(&format!("{prefix}.{name}"), config.hidden_size);
        let head_norm =
            |name: &str| self.norm(&format!("{prefix}.self_attn.{name}"), config.head_dim);
        let linear = |projection| self.linear(SiteId::Block(index, projection));
        let on_heads = NormPlace::On(Role::Query, Extent::Head);
        let has_head_norms = config
            .family
            .norms
            .iter()
            .any(|norm| norm.place == on_heads);
        Ok(Layer {
            index,
            input_norm: norm("input_layernorm")?,
            post_norm: norm("post_attention_layernorm")?,
            projections: [
                linear(Projection::Query)?,
                linear(Projection::Key)?,
                linear(Projection::Value)?,
                linear(Projection::Output)?,
                linear(Projection::Gate)?,
                linear(Projection::Up)?,
                linear(Projection::Down)?,
            ],
            head_norms: match has_head_norms {
                true => Some((head_norm("q_norm")?, head_norm("k_norm")?)),
                false => None,
            },
            heads: Heads {
                query: config.num_attention_heads,
                key_value: config.num_key_value_heads,
                dim: config.head_dim,
                window: config.layers[index].window,
            },
            eps: config.rms_norm_eps,
        })
    }
}

fn zeros(shape: &[usize]) -> Result<formats::Tensor> {
    let values = vec![0.0; shape.iter().product()];
    Ok(formats::Tensor::from_f32(shape, values)?)
}

fn random(seed: u64, name: &str, columns: usize, shape: &[usize]) -> Result<formats::Tensor> {
    let key = Key::new(seed, name, 0);
    let mut values = vec![0f32; shape.iter().product()];
    values
        .par_chunks_mut(columns)
        .enumerate()
        .for_each(|(row, out)| {
            let values = key.uniforms_f32_from(Purpose::InitialA, row * columns, columns);
            for (out, u) in out.iter_mut().zip(values) {
                *out = (2.0 * u - 1.0) * RANDOM_BOUND;
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
    weights: DType,
) -> Result<Decoder> {
    let kind = Kind::find(weights.as_str()).ok_or(Error::WeightType(weights.as_str()))?;
    let loader = Loader {
        source,
        config: &config,
        device,
        kind,
        problems: Mutex::new(Vec::new()),
    };
    let embedding = loader.matrix(
        "model.embed_tokens.weight",
        [config.vocab_size, config.hidden_size],
    )?;
    let head = if config.tie_word_embeddings {
        FrozenLinear::new(embedding.clone(), None)?
    } else {
        loader.linear(SiteId::Head)?
    };
    let norm = loader.norm("model.norm", config.hidden_size)?;
    let layers = (0..config.num_hidden_layers)
        .into_par_iter()
        .map(|index| loader.layer(index))
        .collect::<Result<Vec<_>>>()?;
    let mut problems = loader.problems.into_inner().unwrap_or_default();
    if !problems.is_empty() {
        problems.sort();
        let hidden = problems.len().saturating_sub(20);
        problems.truncate(20);
        if hidden > 0 {
            problems.push(format!("and {hidden} more"));
        }
        return Err(Error::Weights {
            path: dir.to_owned(),
            problems,
        });
    }
    Ok(Decoder {
        directory: dir.to_owned(),
        embedding,
        layers,
        norm,
        head,
        device: device.clone(),
        config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::testing::matrix;
    use crate::model::{ActiveAdapter, PassOptions, Sequences};
    use monteclora_adapters::LowRank;

    /// bf16 is how weights are held, not how is computed: a decoder with the same rounded weights in f32 agrees to the bit.
    #[test]
    fn bf16_weights_are_rounded_weights() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 24, "intermediate_size": 210, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}"#,
        )?;
        let narrow = Decoder::random(dir.path(), &Device::Cpu, DType::BF16, 3)?;
        assert_eq!(narrow.embedding.bytes(), 2 * 301 * 24);
        let mut wide = Decoder::random(dir.path(), &Device::Cpu, DType::F32, 3)?;
        let round = |weight: &dyn Weight| -> Result<Arc<dyn Weight>> {
            let rounded = weight.tensor()?.to_dtype(DType::BF16)?;
            Ok(Arc::new(rounded.to_dtype(DType::F32)?))
        };
        wide.embedding = round(wide.embedding.as_ref())?;
        wide.head = FrozenLinear::new(round(wide.head.weight())?, None)?;
        for layer in &mut wide.layers {
            for linear in &mut layer.projections {
                *linear = FrozenLinear::new(round(linear.weight())?, None)?;
            }
        }
        let site = SiteId::Block(0, Projection::Down);
        let (inputs, outputs) = site.shape(narrow.config());
        let adapter = ActiveAdapter::new([(
            site,
            LowRank {
                a: matrix(3, inputs, 0.1),
                b: matrix(outputs, 3, 0.2),
                scaling: 2.0,
            },
        )]);
        let sequences = Sequences::new(&[vec![5u32, 9, 300, 7, 0], vec![1, 2, 3]]);
        let targets = [(0, 9), (2, 7), (6, 3)];
        let run = |decoder: &Decoder| -> Result<(Tensor, Tensor)> {
            let pass = PassOptions::default();
            let loss = decoder.loss_and_gradients(&sequences, &targets, &adapter, 1.0, pass)?;
            let gradients = loss.gradients.unwrap_or_default();
            let of_factors = gradients.get(site).expect("the site is adapted");
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
