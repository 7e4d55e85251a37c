//! LoRTA (Hounie et al. 2024, arXiv:2410.04060): one low-rank tensor over the embedding, the head dimension, the heads, the layers and
//! the attention matrices.
//!
//! The update of matrix `m` (q, k, v or o) of layer `l` at head `h` is a sum of r rank-one terms (section 4):
//! `Delta W[l, h, m] = s sum_k C_L[l, k] C_M[m, k] C_H[h, k] U[:, k] V[:, k]^T`, with `U` `[hidden, r]` and `V` `[head_dim, r]`. All
//! modules share the five factors, so a run trains `r (hidden + head_dim + heads + layers + 4)` values. The update of a module is
//! exported exactly as a plain LoRA of rank r. Keys and values of a model with fewer heads for them use the first rows of `C_H`;
//! that, and which factor starts at zero, could not be verified from the paper.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::Site;
use monteclora_converters::architecture::Role;

use super::lora::LORA;
use super::parameter::{tensors, unlike};
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, Parameter, Storage, Value, Weighting,
};
use crate::error::Result;
use crate::noise::{Key, Noise, Purpose};
use crate::update::{LowRank, Update};

pub(super) static KIND: Kind = Kind {
    name: "lorta",
    about: "One low-rank tensor over all layers, heads and attention matrices. Exported as a plain LoRA.",
    metrics: DIVERGENCES,
    export: Export::PlainLora,
    unread: &["train.loraplus_lr_ratio"],
    new: |_| Ok(Arc::new(Lorta)),
};

/// The attention matrices, in the order of `C_M`.
const MATRICES: [Role; 4] = [Role::Query, Role::Key, Role::Value, Role::Output];

#[derive(Debug)]
struct Lorta;

/// Where a module is in the tensor.
#[derive(Debug, Clone, Copy)]
struct Slice {
    layer: usize,
    matrix: usize,
    head_dim: usize,
    n_heads: usize,
    hidden: usize,
}

impl Slice {
    /// The place of an attention projection; `None` for every other module.
    fn of(module: &Module) -> Option<Self> {
        let attention = module.attention?;
        let matrix = MATRICES.iter().position(|role| *role == attention.role)?;
        let (wide, hidden) = match attention.role {
            Role::Output => (module.in_features, module.out_features),
            _ => (module.out_features, module.in_features),
        };
        Some(Self {
            layer: attention.layer,
            matrix,
            head_dim: attention.head_dim,
            n_heads: wide / attention.head_dim,
            hidden,
        })
    }

    fn required(module: &Module) -> Result<Self> {
        Self::of(module).ok_or_else(|| not_attention(module))
    }
}

fn not_attention(module: &Module) -> crate::Error {
    let message =
        "is not one of the projections q, k, v and o of an attention layer, which LoRTA adapts";
    let fix = "set lora.target_modules to the names of these, such as [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]";
    module.refused(message, fix)
}

/// Sizes of the five factors.
fn sizes(modules: &[Module]) -> Option<[(&'static str, usize); 5]> {
    let slices = modules.iter().filter_map(Slice::of);
    let slices: Vec<Slice> = slices.collect();
    let most = |size: fn(&Slice) -> usize| slices.iter().map(size).max();
    Some([
        ("lorta_embedding", most(|slice| slice.hidden)?),
        ("lorta_head_dim", most(|slice| slice.head_dim)?),
        ("lorta_heads", most(|slice| slice.n_heads)?),
        ("lorta_layers", most(|slice| slice.layer)? + 1),
        ("lorta_matrices", MATRICES.len()),
    ])
}

/// The five factors in the order of [`sizes`].
struct Factors<'a>([&'a Tensor; 5]);

impl<'a> Factors<'a> {
    fn of(values: &[&'a Value]) -> Result<Self> {
        Ok(Self(tensors(values)?))
    }

    /// `C_L[l] C_M[m]`, `[r]`.
    fn weights(&self, slice: Slice) -> Result<Tensor> {
        let [_, _, _, layers, matrices] = self.0;
        Ok((layers.get(slice.layer)? * matrices.get(slice.matrix)?)?)
    }

    /// `U C_L[l] C_M[m]`, `[hidden, r]`: the side of the embedding.
    fn embedding_side(&self, slice: Slice) -> Result<Tensor> {
        Ok(self.0[0].broadcast_mul(&self.weights(slice)?)?)
    }

    /// `C_H[h] V[j]` for every head and place in it, `[heads head_dim, r]`: the side of the heads.
    fn head_side(&self, slice: Slice) -> Result<Tensor> {
        let [_, head_dim, heads, _, _] = self.0;
        let rank = head_dim.dim(1)?;
        let heads = heads.narrow(0, 0, slice.n_heads)?.unsqueeze(1)?;
        let product = heads.broadcast_mul(&head_dim.unsqueeze(0)?)?;
        Ok(product.reshape((slice.n_heads * slice.head_dim, rank))?)
    }

    fn low_rank(&self, module: &Module) -> Result<LowRank> {
        let slice = Slice::required(module)?;
        let (embedding, heads) = (self.embedding_side(slice)?, self.head_side(slice)?);
        let (a, b) = match MATRICES[slice.matrix] {
            Role::Output => (heads, embedding),
            _ => (embedding, heads),
        };
        Ok(LowRank {
            a: a.t()?.contiguous()?,
            b,
            scaling: module.scaling,
        })
    }
}

impl Method for Lorta {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn takes(&self, module: &Module) -> bool {
        Slice::of(module).is_some()
    }

    fn check(&self, modules: &[Module]) -> Result<()> {
        for module in modules {
            Slice::required(module)?;
        }
        let ranks = modules.iter().map(|module| module.rank);
        let head_dims = modules
            .iter()
            .filter_map(|module| Some(module.attention?.head_dim));
        let hidden = modules
            .iter()
            .filter_map(|module| Some(Slice::of(module)?.hidden));
        for (what, values) in [
            ("rank", ranks.collect::<Vec<_>>()),
            ("head dimension", head_dims.collect()),
            ("hidden size", hidden.collect()),
        ] {
            if let Some(other) = values.iter().position(|value| *value != values[0]) {
                let message = format!(
                    "has another {what} than {}, and LoRTA shares its factors",
                    modules[0].name
                );
                let fix = "leave out lora.rank_pattern, or adapt fewer modules";
                return Err(modules[other].refused(message, fix));
            }
        }
        Ok(())
    }

    fn parameters(&self, _module: &Module) -> Vec<Parameter> {
        Vec::new()
    }

    fn initial(&self, _module: &Module, _key: Key) -> Vec<Vec<f32>> {
        Vec::new()
    }

    /// `U` `[hidden, r]`, `V` `[head_dim, r]`, `C_H` `[heads, r]`, `C_L` `[layers, r]` and `C_M` `[4, r]`.
    fn shared(&self, modules: &[Module]) -> Vec<Parameter> {
        let rank = modules.first().map_or(0, |module| module.rank);
        let sizes = sizes(modules).into_iter().flatten();
        let parameters = sizes.enumerate().map(|(idx, (name, size))| Parameter {
            name,
            peft: None,
            shape: vec![size, rank],
            storage: Storage::Tensor,
            group: Group::Weight,
            // V starts at zero, which hides the others at the first step.
            reached: Some(u64::from(idx != 1)),
        });
        parameters.collect()
    }

    /// `U` uniform in `(-1/sqrt(hidden), 1/sqrt(hidden))` as LoRA's A, `V` zero, the others one with uniform noise of a tenth.
    fn initial_shared(&self, modules: &[Module], key: Key) -> Vec<Vec<f32>> {
        let Some(sizes) = sizes(modules) else {
            return Vec::new();
        };
        let rank = modules.first().map_or(0, |module| module.rank);
        let counts = sizes.map(|(_, size)| size * rank);
        let uniforms = key.uniforms(Purpose::InitialA, counts.iter().sum());
        let mut rest = uniforms.as_slice();
        let mut initial = Vec::with_capacity(sizes.len());
        for (idx, count) in counts.into_iter().enumerate() {
            let (own, others) = rest.split_at(count);
            rest = others;
            let bound = (sizes[0].1 as f64).sqrt().recip();
            let value = |u: &f64| match idx {
                0 => (2.0 * u - 1.0) * bound,
                1 => 0.0,
                _ => 1.0 + 0.1 * (2.0 * u - 1.0),
            };
            initial.push(own.iter().map(|u| value(u) as f32).collect());
        }
        initial
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        Ok(Arc::new(Factors::of(values)?.low_rank(module)?))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        Ok(Box::new(DrawnSlice {
            update: self.mean(module, values)?,
            slice: Slice::required(module)?,
            factors: Factors::of(values)?.0.map(Tensor::clone),
        }))
    }

    /// The two factors of the module's update, and a gradient of every shared factor.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.rank * (module.in_features + module.out_features)
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let LowRank { a, b, .. } = Factors::of(values)?.low_rank(module)?;
        LORA.export(module, &[&Value::Tensor(a), &Value::Tensor(b)])
    }
}

#[derive(Debug)]
struct DrawnSlice {
    update: Arc<dyn Update>,
    slice: Slice,
    factors: [Tensor; 5],
}

/// `part` as rows `first..` of zeros `[rows, r]`.
fn placed(part: &Tensor, first: usize, rows: usize) -> Result<Tensor> {
    let (n, rank) = part.dims2()?;
    let zeros = |rows: usize| Tensor::zeros((rows, rank), part.dtype(), part.device());
    let after = rows - first - n;
    let whole = Tensor::cat(&[&zeros(first)?, part, &zeros(after)?], 0)?;
    Ok(whole)
}

impl Drawn for DrawnSlice {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    /// With `E` the gradient of the embedding's side `[hidden, r]` and `H` that of the heads' side: `dU = E w` for
    /// `w = C_L[l] C_M[m]`, `dw = sum_i E_i U_i`, `dV_j = sum_h H_hj C_H[h]`, `dC_H[h] = sum_j H_hj V_j`.
    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], _weight: f64) -> Result<Vec<Value>> {
        let [a, b] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        let slice = self.slice;
        let factors = Factors(self.factors.each_ref());
        let [embedding, head_dim, heads, layers, matrices] = factors.0;
        let a = a.t()?.contiguous()?;
        let (of_embedding, of_heads) = match MATRICES[slice.matrix] {
            Role::Output => (b, &a),
            _ => (&a, b),
        };
        let rank = head_dim.dim(1)?;
        let of_heads = of_heads.reshape((slice.n_heads, slice.head_dim, rank))?;
        let own_heads = heads.narrow(0, 0, slice.n_heads)?;
        let grad_embedding = of_embedding.broadcast_mul(&factors.weights(slice)?)?;
        let grad_w = (of_embedding * embedding)?.sum_keepdim(0)?; // [1, r]
        let grad_head_dim = of_heads.broadcast_mul(&own_heads.unsqueeze(1)?)?.sum(0)?;
        let grad_heads = of_heads.broadcast_mul(&head_dim.unsqueeze(0)?)?.sum(1)?;
        let grad_layer = (&grad_w * matrices.narrow(0, slice.matrix, 1)?)?;
        let grad_matrix = (&grad_w * layers.narrow(0, slice.layer, 1)?)?;
        let gradients = [
            grad_embedding,
            grad_head_dim,
            placed(&grad_heads, 0, heads.dim(0)?)?,
            placed(&grad_layer, slice.layer, layers.dim(0)?)?,
            placed(&grad_matrix, slice.matrix, matrices.dim(0)?)?,
        ];
        Ok(gradients.into_iter().map(Value::Tensor).collect())
    }
}
