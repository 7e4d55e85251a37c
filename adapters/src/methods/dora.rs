//! DoRA (Liu et al. 2024, arXiv:2402.09353): the direction of each row of the updated weight, with a trained magnitude.
//!
//! `W' = m / ||W + s B A|| * (W + s B A)` row by row (eq. 5), where the norm is over the input. As in PEFT, and as section
//! 4.3 of the paper proposes, the norm is a constant in the backward pass. The paper's defaults are those of LoRA; the
//! magnitude has LoRA's learning rate and weight decay.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use monteclora_converters::{AdapterConfig, Beyond, Site};

use super::lora::LORA;
use super::parameter::unlike;
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, Parameter, Storage, Value, Weighting,
};
use crate::device::to_device;
use crate::error::Result;
use crate::linalg::row_dots;
use crate::linear::FrozenLinear;
use crate::noise::{Key, Noise};
use crate::product::{Factor, Product, matmul_nt, matmul_tn, sum_of_products};
use crate::update::{LowRank, Pulled, Update};
use crate::weights::{Weight, row_squares};

pub(super) static KIND: Kind = Kind {
    name: "dora",
    about: "LoRA of the direction of each row of a weight, with a trained magnitude. No plain LoRA.",
    metrics: DIVERGENCES,
    export: Export::MergeOnly,
    unread: &[],
    new: |_| Ok(Arc::new(Dora)),
};

/// PEFT's name of the magnitude, below the module.
const MAGNITUDE: &str = "lora_magnitude_vector";

#[derive(Debug)]
struct Dora;

impl Method for Dora {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn configure(&self, config: &mut AdapterConfig, _total_steps: u64) -> Result<()> {
        config.use_dora = true;
        Ok(())
    }

    /// LoRA's A and B, and the magnitude `m` `[out]`.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let mut parameters = LORA.parameters(module);
        parameters.push(Parameter {
            name: "magnitude",
            peft: Some(MAGNITUDE),
            shape: vec![module.out_features],
            storage: Storage::Tensor,
            group: Group::Weight,
            reached: Some(0),
        });
        parameters
    }

    /// LoRA's. The magnitude follows from the frozen weight: see [`Method::initial_from_base`].
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let mut initial = LORA.initial(module, key);
        initial.push(vec![1.0; module.out_features]);
        initial
    }

    fn needs_base(&self) -> bool {
        true
    }

    /// `m = ||W||` row by row, so that the first update is none.
    fn initial_from_base(&self, module: &Module, _key: Key) -> Result<Vec<Option<Vec<f32>>>> {
        let norms = row_squares(module.weight()?.as_ref())?;
        let norms = norms.into_iter().map(|square| square.sqrt() as f32);
        Ok(vec![None, None, Some(norms.collect())])
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        let [factors @ .., Value::Tensor(magnitude)] = values else {
            return Err(unlike(&[3], &[values.len()]));
        };
        let [Value::Tensor(a), Value::Tensor(b)] = factors else {
            return Err(unlike(&[3], &[values.len()]));
        };
        let low_rank = LowRank {
            a: a.clone(),
            b: b.clone(),
            scaling: module.scaling,
        };
        let weight = module.frozen.as_ref().map(|frozen| frozen.0.clone());
        Ok(Arc::new(DoraUpdate::new(
            low_rank,
            magnitude.clone(),
            weight,
        )))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        Ok(Box::new(super::lora::Plain(self.mean(module, values)?)))
    }

    /// The norm's products, and the output before the magnitude.
    fn kept_values(&self, module: &Module) -> usize {
        module.rank + module.out_features
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let [factors @ .., magnitude] = values else {
            return Err(unlike(&[3], &[values.len()]));
        };
        Ok(Site {
            beyond: Some(Beyond::Magnitude(magnitude.to_format()?)),
            ..LORA.export(module, factors)?
        })
    }
}

/// `W' = diag(m / n) (W + s B A)` with `n_i = ||(W + s B A)_i||`, a constant in the backward pass.
///
/// Without dropout the output is `z m/n + b` with `z = x W^T + s x A^T B^T`. With dropout, PEFT's form is taken:
/// `x W^T + b + z_d m/n - x_d W^T`, where `z_d` is `z` at the input with dropout `x_d`.
#[derive(Debug)]
pub struct DoraUpdate {
    low_rank: LowRank,
    magnitude: Tensor,
    /// The frozen weight, which the backward pass with dropout needs.
    weight: Option<Arc<dyn Weight>>,
    /// `m / n` and `1 / n`, `[out]` each, once the weight is known.
    scales: OnceLock<[Tensor; 2]>,
}

impl DoraUpdate {
    /// The update of A, B and the magnitude `[out]` of a module with this frozen weight.
    pub fn new(low_rank: LowRank, magnitude: Tensor, weight: Option<Arc<dyn Weight>>) -> Self {
        Self {
            low_rank,
            magnitude,
            weight,
            scales: OnceLock::new(),
        }
    }

    /// `m / n` and `1 / n`. By `n_i^2 = ||W_i||^2 + 2 s B_i . (A W^T)_i + s^2 B_i A A^T B_i^T` no matrix of the weight's size is
    /// formed.
    fn scales(&self, weight: &dyn Weight) -> Result<&[Tensor; 2]> {
        if let Some(scales) = self.scales.get() {
            return Ok(scales);
        }
        let LowRank { a, b, scaling } = &self.low_rank;
        let through = matmul_nt(a, weight)?.t()?.contiguous()?; // [out, r]
        let gram = matmul_nt(a, a)?; // [r, r]
        let b_gram = matmul_nt(b, &gram)?; // [out, r]
        let cross = row_dots(b, &through)?;
        let own = row_dots(b, &b_gram)?;
        let squares = row_squares(weight)?;
        let inverse = squares.iter().zip(&cross).zip(&own).map(|((w, c), o)| {
            let square = w + 2.0 * scaling * c + scaling * scaling * o;
            // A row of zeros has no direction, and stays zero.
            match square > f64::from(f32::MIN_POSITIVE) {
                true => square.sqrt().recip() as f32,
                false => 0.0,
            }
        });
        let inverse: Vec<f32> = inverse.collect();
        let n = inverse.len();
        let inverse = to_device(inverse, n, a.device())?;
        let scales = [(&self.magnitude * &inverse)?, inverse];
        Ok(self.scales.get_or_init(|| scales))
    }

    fn known_scales(&self) -> Result<&[Tensor; 2]> {
        let unknown =
            || candle_core::Error::Msg("a backward pass without a forward pass".to_owned());
        Ok(self.scales.get().ok_or_else(unknown)?)
    }
}

impl Update for DoraUpdate {
    fn factors(&self) -> Vec<&Tensor> {
        vec![&self.low_rank.a, &self.low_rank.b, &self.magnitude]
    }

    /// Saves `x_d A^T` `[tokens, r]`, `z` `[tokens, out]`, and `x_d` if there is dropout.
    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let [ratio, _] = self.scales(linear.weight())?;
        let dropped = dropout.map(|mask| x * mask).transpose()?;
        let read = dropped.as_ref().unwrap_or(x);
        let hidden = matmul_nt(read, &self.low_rank.a)?; // [tokens, r]
        let through_b = Product::scaled(
            Factor::Plain(&hidden),
            Factor::Transposed(&self.low_rank.b),
            self.low_rank.scaling,
        );
        let z = linear.product(read, &[through_b], None)?; // [tokens, out]
        let mut y = z.broadcast_mul(ratio)?;
        if dropped.is_some() {
            let plain = linear.product(x, &[], None)?;
            y = ((y + plain)? - linear.product(read, &[], None)?)?;
        }
        if let Some(start) = linear.start(residual)? {
            y = y.broadcast_add(&start)?;
        }
        let saved = [hidden, z].into_iter().chain(dropped).collect();
        Ok((y, saved))
    }

    /// With `u` the upstream gradient: `own` is `s (u m/n) B`, and `u m/n` or with dropout `u (m/n - 1)`.
    fn pull(&self, upstream: &Tensor, saved: &[Tensor]) -> Result<Pulled> {
        let [ratio, _] = self.known_scales()?;
        let scaled = upstream.broadcast_mul(ratio)?;
        let through_b = Product::scaled(
            Factor::Plain(&scaled),
            Factor::Plain(&self.low_rank.b),
            self.low_rank.scaling,
        );
        let grad_hidden = sum_of_products(None, &[through_b])?;
        Ok(match saved.len() {
            // The mask applies to what the update reads alone: the base's own part goes back unmasked.
            3 => Pulled {
                frozen: upstream.clone(),
                own: vec![
                    grad_hidden,
                    scaled.clone(),
                    (&scaled - upstream)?,
                    upstream.clone(),
                ],
            },
            _ => Pulled {
                frozen: scaled.clone(),
                own: vec![grad_hidden, scaled, upstream.clone()],
            },
        })
    }

    fn input_terms<'a>(&'a self, pulled: &'a Pulled) -> Vec<Product<'a>> {
        let mut terms = vec![Product::new(
            Factor::Plain(&pulled.own[0]),
            Factor::Plain(&self.low_rank.a),
        )];
        if let ([_, _, beyond, _], Some(weight)) = (&pulled.own[..], &self.weight) {
            let weight = Factor::Plain(weight.as_ref());
            terms.push(Product::new(Factor::Plain(beyond), weight));
        }
        terms
    }

    /// `dA = s (u m/n B)^T x_d`, `dB = s (u m/n)^T (x_d A^T)`, `dm = sum over the tokens of u z / n`.
    fn gradients(&self, x: &Tensor, saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>> {
        let [_, inverse] = self.known_scales()?;
        let (Some(upstream), [hidden, z, ..], [grad_hidden, scaled, ..]) =
            (pulled.own.last(), saved, &pulled.own[..])
        else {
            return Ok(Vec::new());
        };
        let grad_a = matmul_tn(grad_hidden, saved.get(2).unwrap_or(x))?;
        let through_b = Product::scaled(
            Factor::Transposed(scaled),
            Factor::Plain(hidden),
            self.low_rank.scaling,
        );
        let grad_b = sum_of_products(None, &[through_b])?;
        let grad_m = ((upstream * z)?.sum(0)? * inverse)?;
        Ok(vec![grad_a, grad_b, grad_m])
    }
}
