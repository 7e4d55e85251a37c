//! A model's sizes and options, and the modules and tensors that they determine.

use super::family::HEAD;
use super::{
    Activation, Bias, Experts, Extent, Family, NormPlace, Projection, Role, Rope, Wrapper,
};
use crate::targets::LinearModule;

/// A decoder as its config.json describes it: sizes, options, and the properties of each layer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// The decoder family: modules, norms and names.
    pub family: &'static Family,
    /// The multimodal model that contains the decoder, if any.
    pub wrapper: Option<&'static Wrapper>,
    /// Number of vocabulary entries.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Number of entries of a head, even; need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Longest sequence that the model supports.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The activation function of the gate.
    pub activation: Activation,
    /// Factors in the computation.
    pub multipliers: Multipliers,
    /// The bound on attention scores, if there is one; see [`super::Softcap`].
    pub score_cap: Option<f64>,
    /// The bound on logits, if there is one.
    pub logit_cap: Option<f64>,
    /// Sizes of the mixture of experts, if layers have one.
    pub experts: Option<ExpertSizes>,
    /// Keys of biases that are true; see [`Bias::Key`].
    pub bias_keys: Vec<&'static str>,
    /// The rotary embeddings that layers use.
    pub ropes: Vec<Rope>,
    /// One entry per block.
    pub layers: Vec<Layer>,
}

/// Properties of a single layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Number of keys that a query attends to, including its own; `None` means all.
    pub window: Option<usize>,
    /// Index in [`ModelShape::ropes`] of the rotation of queries and keys; `None` means no rotation.
    pub rope: Option<usize>,
    /// Whether a mixture of experts replaces the feed-forward layer.
    pub has_experts: bool,
}

/// Sizes of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Number of experts.
    pub count: usize,
    /// Number of experts per token, at most `count`.
    pub per_token: usize,
    /// Width of an expert.
    pub width: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub is_normalised: bool,
}

/// Factors in the computation; see [`super::Multiplier`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Multipliers {
    /// On embeddings, not yet rounded to their type; 1 if the family has none.
    pub embedding: f64,
    /// On the products of queries and keys; `None` means `head_dim^-1/2`.
    pub attention: Option<f64>,
    /// On what a sublayer adds to the residual; 1 if the family has none.
    pub residual: f64,
    /// The divisor of logits; 1 if the family has none.
    pub logits_divisor: f64,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self {
            embedding: 1.0,
            attention: None,
            residual: 1.0,
            logits_divisor: 1.0,
        }
    }
}

/// A linear module that can carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Path in memory, such as `model.layers.0.self_attn.q_proj` or `lm_head`.
    pub name: String,
    /// Its block; `None` for the output head.
    pub layer: Option<usize>,
    /// The projection that it computes.
    pub projection: &'static Projection,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output, all fused parts together.
    pub out_features: usize,
    /// Whether it has a bias.
    pub has_bias: bool,
}

/// A tensor that a checkpoint holds.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorShape {
    /// Name in memory, which for most models is also the name in a Hugging Face directory; see [`Wrapper`].
    pub name: String,
    /// Name in a GGUF file.
    pub gguf_name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Whether llama.cpp stores the rows of each head interleaved.
    pub interleaved: bool,
    /// Index of the part of llama.cpp's tensor that it is, and the number of equal parts; (0, 1) for the whole tensor.
    pub part: (usize, usize),
    /// Offset of llama.cpp's values relative to those of the checkpoint.
    pub offset: f32,
}

impl ModelShape {
    /// The class of transformers that reads the model.
    pub fn class_name(&self) -> &'static str {
        self.wrapper
            .map_or(self.family.class_name, |wrapper| wrapper.class_name)
    }

    /// Path of the decoder without its head.
    pub fn body(&self) -> &'static str {
        self.wrapper.map_or(BODY, |wrapper| wrapper.body)
    }

    /// Path of a block.
    pub fn block(&self, layer: usize) -> String {
        format!("{}.layers.{layer}", self.body())
    }

    /// Path of the embedding of tokens.
    pub fn embedding(&self) -> String {
        format!("{}.embed_tokens", self.body())
    }

    /// Path of the last norm.
    pub fn final_norm(&self) -> String {
        format!("{}.norm", self.body())
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together, which is also the width of all value heads.
    pub fn key_value_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Returns every linear module: those of the blocks in the order of checkpoints, then the output head, even if it
    /// is the embedding.
    pub fn modules(&self) -> impl Iterator<Item = Module> + '_ {
        (0..self.num_hidden_layers)
            .flat_map(move |layer| {
                let projections = self.family.projections.iter();
                let there = projections.filter(move |projection| self.has(layer, projection));
                there.map(move |projection| self.module(Some(layer), projection))
            })
            .chain([self.module(None, &HEAD)])
    }

    /// As [`Self::modules`], with only what an adapter needs of each module.
    pub fn linear_modules(&self) -> Vec<LinearModule> {
        self.modules()
            .map(|module| LinearModule {
                name: module.name,
                in_features: module.in_features,
                out_features: module.out_features,
            })
            .collect()
    }

    /// Whether a layer has this projection. A layer with experts has no other feed-forward layer.
    fn has(&self, layer: usize, projection: &Projection) -> bool {
        let is_feed_forward = matches!(
            projection.parts.first(),
            Some(Role::Gate | Role::Up | Role::Down)
        );
        !(is_feed_forward
            && self
                .layers
                .get(layer)
                .is_some_and(|layer| layer.has_experts))
    }

    /// Returns the names and the sizes of the mixture of experts, if layers have one.
    pub fn mixture(&self) -> Option<(&'static Experts, ExpertSizes)> {
        Some((self.family.experts?, self.experts?))
    }

    fn module(&self, layer: Option<usize>, projection: &'static Projection) -> Module {
        let features = projection.parts.iter().map(|role| role.features(self));
        Module {
            name: match layer {
                Some(layer) => format!("{}.{}", self.block(layer), projection.name),
                None => projection.name.to_owned(),
            },
            layer,
            projection,
            in_features: features.clone().next().map_or(0, |(inputs, _)| inputs),
            out_features: features.map(|(_, outputs)| outputs).sum(),
            has_bias: match projection.bias {
                Bias::No => false,
                Bias::Yes => true,
                Bias::Key(key) => self.bias_keys.contains(&key),
            },
        }
    }

    /// Number of entries of a norm's weight.
    pub fn norm_width(&self, place: NormPlace) -> usize {
        match place {
            NormPlace::On(_, Extent::Head) => self.head_dim,
            NormPlace::On(role, Extent::Whole) => role.features(self).1,
            _ => self.hidden_size,
        }
    }

    /// Returns every tensor that a checkpoint of this model holds; the output head only if it is not the embedding.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let plain = |name: &str, gguf_name: &str, shape: &[usize]| TensorShape {
            name: format!("{name}.weight"),
            gguf_name: format!("{gguf_name}.weight"),
            shape: shape.to_vec(),
            interleaved: false,
            part: (0, 1),
            offset: 0.0,
        };
        let offset = self.family.norm_offset;
        let mut tensors = vec![
            plain(
                &self.embedding(),
                "token_embd",
                &[self.vocab_size, self.hidden_size],
            ),
            TensorShape {
                offset,
                ..plain(&self.final_norm(), "output_norm", &[self.hidden_size])
            },
        ];
        for layer in 0..self.num_hidden_layers {
            tensors.extend(self.family.norms.iter().map(|norm| TensorShape {
                offset,
                ..plain(
                    &format!("{}.{}", self.block(layer), norm.name),
                    &format!("blk.{layer}.{}", norm.gguf_name),
                    &[self.norm_width(norm.place)],
                )
            }));
            if let (Some((experts, sizes)), true) = (self.mixture(), self.layers[layer].has_experts)
            {
                let (hf, gguf) = (self.block(layer), format!("blk.{layer}"));
                tensors.push(plain(
                    &format!("{hf}.{}", experts.router),
                    &format!("{gguf}.{}", experts.gguf_router),
                    &[sizes.count, self.hidden_size],
                ));
                let (inner, hidden) = (sizes.width, self.hidden_size);
                let shapes = [[inner, hidden], [inner, hidden], [hidden, inner]];
                for expert in 0..sizes.count {
                    let named = experts.projections.iter().zip(shapes);
                    tensors.extend(named.map(|((name, gguf_name), shape)| TensorShape {
                        part: (expert, sizes.count),
                        ..plain(
                            &format!("{hf}.{}.{expert}.{name}", experts.path),
                            &format!("{gguf}.{gguf_name}"),
                            &shape,
                        )
                    }));
                }
            }
        }
        for module in self.modules() {
            if module.layer.is_none() && self.tie_word_embeddings {
                continue;
            }
            let (name, gguf_name) = (&module.name, module.gguf_name());
            let interleaved = self.family.interleaves(module.projection);
            tensors.push(TensorShape {
                interleaved,
                ..plain(name, &gguf_name, &[module.out_features, module.in_features])
            });
            if module.has_bias {
                tensors.push(TensorShape {
                    name: format!("{name}.bias"),
                    gguf_name: format!("{gguf_name}.bias"),
                    interleaved,
                    ..plain("", "", &[module.out_features])
                });
            }
        }
        tensors
    }
}

/// Path of a decoder that is the whole model.
pub(crate) const BODY: &str = "model";

impl Module {
    /// llama.cpp's name of the module.
    pub fn gguf_name(&self) -> String {
        match self.layer {
            Some(layer) => format!("blk.{layer}.{}", self.projection.gguf_name),
            None => self.projection.gguf_name.to_owned(),
        }
    }
}

impl Family {
    /// Whether llama.cpp stores the rows of this projection's heads interleaved.
    pub fn interleaves(&self, projection: &Projection) -> bool {
        self.gguf.interleaved && matches!(projection.parts, [Role::Query | Role::Key])
    }
}
