//! Reading a checkpoint's tensors into a decoder, every missing or misshapen one reported at once.

use std::sync::Mutex;

use candle_core::{Device, Tensor};
use monteclora_adapters::FrozenLinear;
use monteclora_converters::ModelFiles;
use rayon::prelude::*;

use super::adapter::{Projection, SiteId};
use super::config::{Family, ModelConfig};
use super::decoder::Decoder;
use super::layer::Layer;
use super::ops::attention::Heads;
use super::{Error, Result};

struct Loader<'a> {
    files: &'a ModelFiles,
    config: &'a ModelConfig,
    device: &'a Device,
    problems: Mutex<Vec<String>>,
}

impl Loader<'_> {
    fn problem(&self, text: String) {
        if let Ok(mut problems) = self.problems.lock() {
            problems.push(text);
        }
    }

    /// The tensor `name`, or a placeholder after noting the problem.
    fn required(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.optional(name, shape)? {
            Some(tensor) => Ok(tensor),
            None => {
                self.problem(format!("{name}: missing"));
                Ok(Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu)?)
            }
        }
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(tensor) = self.files.get(name) else {
            return Ok(None);
        };
        if tensor.shape() != shape {
            self.problem(format!(
                "{name}: expected shape {shape:?}, found {:?}",
                tensor.shape()
            ));
            return Ok(Some(Tensor::zeros(
                shape,
                candle_core::DType::F32,
                &Device::Cpu,
            )?));
        }
        let values = tensor.to_f32()?;
        let cpu = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Ok(Some(cpu.to_device(self.device)?))
    }

    fn linear(&self, site: SiteId) -> Result<FrozenLinear> {
        let (in_features, out_features) = site.shape(self.config);
        let name = site.name();
        let weight = self.required(&format!("{name}.weight"), &[out_features, in_features])?;
        // A bias in the file is used whatever the configuration calls it: dropping it would be silently wrong.
        let bias = self.optional(&format!("{name}.bias"), &[out_features])?;
        Ok(FrozenLinear::new(weight, bias)?)
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let config = self.config;
        let prefix = format!("model.layers.{index}");
        let norm =
            |name: &str| self.required(&format!("{prefix}.{name}.weight"), &[config.hidden_size]);
        let head_norm = |name: &str| {
            self.required(
                &format!("{prefix}.self_attn.{name}.weight"),
                &[config.head_dim],
            )
        };
        let linear = |projection| self.linear(SiteId::Block(index, projection));
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
            head_norms: match config.family {
                Family::Qwen3 => Some((head_norm("q_norm")?, head_norm("k_norm")?)),
                _ => None,
            },
            heads: Heads {
                query: config.num_attention_heads,
                key_value: config.num_key_value_heads,
                dim: config.head_dim,
                window: config.windows[index],
            },
            eps: config.rms_norm_eps,
        })
    }
}

/// Builds the decoder that `config` describes from `files`.
pub(super) fn decoder(config: ModelConfig, files: &ModelFiles, device: &Device) -> Result<Decoder> {
    let loader = Loader {
        files,
        config: &config,
        device,
        problems: Mutex::new(Vec::new()),
    };
    let embedding = loader.required(
        "model.embed_tokens.weight",
        &[config.vocab_size, config.hidden_size],
    )?;
    let head = if config.tie_word_embeddings {
        FrozenLinear::new(embedding.clone(), None)?
    } else {
        loader.linear(SiteId::Head)?
    };
    let norm = loader.required("model.norm.weight", &[config.hidden_size])?;
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
            path: files.dir().to_owned(),
            problems,
        });
    }
    Ok(Decoder {
        directory: files.dir().to_owned(),
        embedding,
        layers,
        norm,
        head,
        device: device.clone(),
        config,
    })
}
