//! Reading a checkpoint's tensors into a decoder, every missing or misshapen one reported at once.

use std::path::Path;
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use monteclora_adapters::FrozenLinear;
use monteclora_adapters::noise::{Key, Purpose};
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
    /// Type of embedding and projections.
    weights: DType,
    problems: Mutex<Vec<String>>,
}

impl Loader<'_> {
    fn problem(&self, text: String) {
        if let Ok(mut problems) = self.problems.lock() {
            problems.push(text);
        }
    }

    /// The tensor `name`, or a placeholder after noting the problem.
    fn required(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        match self.optional(name, shape, dtype)? {
            Some(tensor) => Ok(tensor),
            None => {
                self.problem(format!("{name}: missing"));
                Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?)
            }
        }
    }

    fn optional(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        let cpu = match self.source {
            Source::Random(seed) => match shape {
                [_, columns] => random(seed, name, *columns, shape, dtype)?,
                _ if name.ends_with("norm.weight") => Tensor::ones(shape, dtype, &Device::Cpu)?,
                _ => return Ok(None),
            },
            Source::Files(files) => {
                let Some(tensor) = files.get(name) else {
                    return Ok(None);
                };
                if tensor.shape() != shape {
                    self.problem(format!(
                        "{name}: expected shape {shape:?}, found {:?}",
                        tensor.shape()
                    ));
                    return Ok(Some(Tensor::zeros(shape, dtype, &Device::Cpu)?));
                }
                match dtype {
                    DType::BF16 => Tensor::from_vec(to_bf16(&tensor)?, shape, &Device::Cpu)?,
                    _ => Tensor::from_vec(tensor.to_f32()?, shape, &Device::Cpu)?,
                }
            }
        };
        Ok(Some(cpu.to_device(self.device)?))
    }

    fn linear(&self, site: SiteId) -> Result<FrozenLinear> {
        let (in_features, out_features) = site.shape(self.config);
        let name = site.name();
        let weight = self.required(
            &format!("{name}.weight"),
            &[out_features, in_features],
            self.weights,
        )?;
        // A bias in the file is used whatever the configuration calls it: dropping it would be silently wrong.
        let bias = self.optional(&format!("{name}.bias"), &[out_features], DType::F32)?;
        Ok(FrozenLinear::new(weight, bias)?)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let config = self.config;
        let prefix = format!("model.layers.{index}");
        let norm = |name: &str| {
            self.required(
                &format!("{prefix}.{name}.weight"),
                &[config.hidden_size],
                DType::F32,
            )
        };
        let head_norm = |name: &str| {
            self.required(
                &format!("{prefix}.self_attn.{name}.weight"),
                &[config.head_dim],
                DType::F32,
            )
        };
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

/// The values as bf16, without a copy in f32 in between.
fn to_bf16(tensor: &formats::Tensor) -> Result<Vec<bf16>> {
    let bytes = tensor.bytes();
    Ok(match tensor.dtype() {
        formats::DType::BF16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]))
            .collect(),
        formats::DType::F32 => bytes
            .chunks_exact(4)
            .map(|b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        _ => tensor.to_f32()?.into_iter().map(bf16::from_f32).collect(),
    })
}

fn random(seed: u64, name: &str, columns: usize, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let len: usize = shape.iter().product();
    let key = Key::new(seed, name, 0);
    let fill = |(row, out): (usize, &mut [f32])| {
        let values = key.uniforms_f32_from(Purpose::InitialA, row * columns, columns);
        for (out, u) in out.iter_mut().zip(values) {
            *out = (2.0 * u - 1.0) * RANDOM_BOUND;
        }
    };
    Ok(match dtype {
        DType::BF16 => {
            let mut values = vec![bf16::ZERO; len];
            values
                .par_chunks_mut(columns)
                .enumerate()
                .for_each(|(row, out)| {
                    let mut single = vec![0f32; columns];
                    fill((row, &mut single));
                    for (out, v) in out.iter_mut().zip(single) {
                        *out = bf16::from_f32(v);
                    }
                });
            Tensor::from_vec(values, shape, &Device::Cpu)?
        }
        _ => {
            let mut values = vec![0f32; len];
            values.par_chunks_mut(columns).enumerate().for_each(fill);
            Tensor::from_vec(values, shape, &Device::Cpu)?
        }
    })
}

/// Builds the decoder that `config` describes from `source`.
pub(super) fn decoder(
    config: ModelShape,
    dir: &Path,
    source: Source<'_>,
    device: &Device,
    weights: DType,
) -> Result<Decoder> {
    if !matches!(weights, DType::F32 | DType::BF16) {
        return Err(Error::WeightType(weights.as_str()));
    }
    let loader = Loader {
        source,
        config: &config,
        device,
        weights,
        problems: Mutex::new(Vec::new()),
    };
    let embedding = loader.required(
        "model.embed_tokens.weight",
        &[config.vocab_size, config.hidden_size],
        weights,
    )?;
    let head = if config.tie_word_embeddings {
        FrozenLinear::new(embedding.clone(), None)?
    } else {
        loader.linear(SiteId::Head)?
    };
    let norm = loader.required("model.norm.weight", &[config.hidden_size], DType::F32)?;
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
    use crate::model::{ActiveAdapter, PassOptions, Sequences};
    use monteclora_adapters::LowRank;

    /// bf16 is how weights are held, not how is computed: a decoder with the same rounded weights in f32 agrees to rounding.
    #[test]
    fn bf16_weights_are_rounded_weights() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 24, "intermediate_size": 210, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}"#,
        )?;
        let narrow = Decoder::random(dir.path(), &Device::Cpu, DType::BF16, 3)?;
        assert_eq!(narrow.embedding.dtype(), DType::BF16);
        let mut wide = Decoder::random(dir.path(), &Device::Cpu, DType::F32, 3)?;
        let round = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        wide.embedding = round(&wide.embedding)?;
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
                a: random(1, "a", inputs, &[3, inputs], DType::F32)?,
                b: random(1, "b", 3, &[outputs, 3], DType::F32)?,
                scaling: 2.0,
            },
        )]);
        let sequences = Sequences::new(&[vec![5u32, 9, 300, 7, 0], vec![1, 2, 3]]);
        let targets = [(0, 9), (2, 7), (6, 3)];
        let run = |decoder: &Decoder| -> Result<(Tensor, Tensor)> {
            let pass = PassOptions::default();
            let loss = decoder.loss_and_gradients(&sequences, &targets, &adapter, 1.0, pass)?;
            let gradients = loss.gradients.unwrap_or_default();
            let (a, b) = gradients.get(site).expect("the site is adapted");
            let both = Tensor::cat(&[a.flatten_all()?, b.flatten_all()?], 0)?;
            Ok((decoder.logits(&sequences, &adapter)?, both))
        };
        let ((logits, gradients), (expected, exact)) = (run(&narrow)?, run(&wide)?);
        for (found, expected) in [(logits, expected), (gradients, exact)] {
            let scale = expected.abs()?.max_all()?.to_scalar::<f32>()?;
            let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(
                scale > 0.0 && difference < 1e-5 * scale,
                "{difference} of {scale}"
            );
        }
        Ok(())
    }
}
