//! A mixture of experts instead of the feed-forward layer: a router sends each token through a few of many small
//! layers. All weights are frozen, so the backward pass computes only the gradient of the input: through the experts,
//! and through the router's weights.

use std::cmp::Ordering;

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::device::{to_device, to_host};
use monteclora_adapters::{FrozenLinear, Precision, input_gradient};

use super::activation::Gate;
use super::{Part, Pass};
use crate::model::adapter::AdapterGradients;
use crate::model::generate::LayerCache;
use monteclora_adapters::Result;

/// A mixture of experts: `sum over the chosen e of w_e down_e(act(gate_e(x)) * up_e(x))`, where w are the router's
/// probabilities.
#[derive(Debug)]
pub(crate) struct Experts {
    /// Maps the input to one score per expert.
    pub(crate) router: FrozenLinear,
    /// Gate, up and down of each expert.
    pub(crate) experts: Vec<[FrozenLinear; 3]>,
    /// Number of experts per token.
    pub(crate) per_token: usize,
    /// Whether the chosen weights are divided by their sum.
    pub(crate) is_normalised: bool,
    pub(crate) gate: Gate,
}

/// The experts that the router chose for the tokens of a pass.
#[derive(Debug)]
pub(crate) struct Routing {
    /// The router's softmax, one row per token.
    probabilities: Vec<Vec<f32>>,
    /// Sum of the chosen experts' probabilities, per token.
    sums: Vec<f32>,
    /// The tokens of each expert.
    tokens: Vec<Vec<u32>>,
}

/// The values that the backward pass reads.
#[derive(Debug)]
pub(crate) struct Kept {
    routing: Routing,
}

impl Experts {
    /// Computes products with the experts' weights in `precision`. The router stays in float32, as in transformers.
    pub(crate) fn set_precision(&mut self, precision: Precision) {
        for linear in self.experts.iter_mut().flatten() {
            linear.set_precision(precision);
        }
    }

    /// The router's choice for `x` `[tokens, hidden]`: the most probable experts. Of equally probable experts the first
    /// counts.
    fn route(&self, x: &Tensor) -> Result<Routing> {
        let logits = self.router.forward(x, None, None, None)?.0;
        let logits = to_host::<f32>(&logits.to_dtype(DType::F32)?)?;
        let rows = logits.chunks_exact(self.experts.len());
        let mut routing = Routing {
            probabilities: rows.map(<[f32]>::to_vec).collect(),
            sums: Vec::new(),
            tokens: vec![Vec::new(); self.experts.len()],
        };
        for (token, row) in routing.probabilities.iter_mut().enumerate() {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for value in row.iter_mut() {
                *value = (*value - largest).exp();
            }
            let sum: f32 = row.iter().sum();
            for value in row.iter_mut() {
                *value /= sum;
            }
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].partial_cmp(&row[*a]).unwrap_or(Ordering::Equal));
            order.truncate(self.per_token);
            routing
                .sums
                .push(order.iter().map(|expert| row[*expert]).sum());
            for expert in order {
                routing.tokens[expert].push(token as u32);
            }
        }
        Ok(routing)
    }

    /// The weight of an expert for one of its tokens.
    fn weight(&self, routing: &Routing, token: u32, expert: usize) -> f32 {
        let token = token as usize;
        let probability = routing.probabilities[token][expert];
        match self.is_normalised {
            true => probability / routing.sums[token],
            false => probability,
        }
    }

    /// The weights of an expert for all its tokens, `[tokens, 1]`.
    fn weights(&self, routing: &Routing, expert: usize, device: &Device) -> Result<Tensor> {
        let tokens = &routing.tokens[expert];
        let weights = tokens
            .iter()
            .map(|token| self.weight(routing, *token, expert));
        let weights: Vec<f32> = weights.collect();
        to_device(weights, (tokens.len(), 1), device)
    }

    /// Gradient of the router's input. `of_weights` contains the gradients of the weights, per expert and token.
    ///
    /// Let p be the softmax and w = p / S the weights, where S is the sum of the chosen probabilities, or 1 without
    /// normalisation. With normalisation `dp_e = (dw_e - sum dw w) / S`, otherwise `dp_e = dw_e`. The gradient of the
    /// logits is `p (dp - sum dp p)`.
    fn through_router(
        &self,
        routing: &Routing,
        of_weights: &[Vec<f32>],
        like: &Tensor,
    ) -> Result<Tensor> {
        let (n_tokens, n_experts) = (routing.sums.len(), self.experts.len());
        let mut grads = vec![0f32; n_tokens * n_experts];
        for (expert, tokens) in routing.tokens.iter().enumerate() {
            for (token, grad) in tokens.iter().zip(&of_weights[expert]) {
                grads[*token as usize * n_experts + expert] = *grad;
            }
        }
        if self.is_normalised {
            let mut along = vec![0f32; n_tokens];
            for (expert, tokens) in routing.tokens.iter().enumerate() {
                for (token, grad) in tokens.iter().zip(&of_weights[expert]) {
                    along[*token as usize] += grad * self.weight(routing, *token, expert);
                }
            }
            for (expert, tokens) in routing.tokens.iter().enumerate() {
                for token in tokens {
                    let token = *token as usize;
                    let grad = &mut grads[token * n_experts + expert];
                    *grad = (*grad - along[token]) / routing.sums[token];
                }
            }
        }
        for (row, p) in grads
            .chunks_exact_mut(n_experts)
            .zip(&routing.probabilities)
        {
            let mean: f32 = row.iter().zip(p).map(|(grad, p)| grad * p).sum();
            for (grad, p) in row.iter_mut().zip(p) {
                *grad = p * (*grad - mean);
            }
        }
        let grads = to_device(grads, (n_tokens, n_experts), like.device())?;
        back(&self.router, &grads.to_dtype(like.dtype())?)
    }
}

/// Gradient of the input of a frozen module.
fn back(linear: &FrozenLinear, upstream: &Tensor) -> Result<Tensor> {
    input_gradient(&[linear.backward(upstream, &Vec::new(), None, None)?])
}

/// `[tokens]` as an index.
fn index(tokens: &[u32], device: &Device) -> Result<Tensor> {
    to_device(tokens.to_vec(), tokens.len(), device)
}

impl Part for Experts {
    type Kept = Kept;

    fn forward(
        &self,
        x: &Tensor,
        _pass: &Pass<'_>,
        residual: Option<&Tensor>,
        _cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Kept)> {
        let routing = self.route(x)?;
        let mut sum = match residual {
            Some(residual) => residual.clone(),
            None => x.zeros_like()?,
        };
        for (expert, [gate, up, down]) in self.experts.iter().enumerate() {
            if routing.tokens[expert].is_empty() {
                continue;
            }
            let rows = index(&routing.tokens[expert], x.device())?;
            let x = x.index_select(&rows, 0)?;
            let gate = gate.forward(&x, None, None, None)?.0;
            let up = up.forward(&x, None, None, None)?.0;
            let activated = (self.gate.forward)(&gate, &up)?;
            let y = down.forward(&activated, None, None, None)?.0;
            let y = y.broadcast_mul(&self.weights(&routing, expert, x.device())?)?;
            sum = sum.index_add(&rows, &y, 0)?;
        }
        Ok((sum, Kept { routing }))
    }

    fn backward(
        &self,
        input: &dyn Fn() -> Result<Tensor>,
        kept: &Kept,
        upstream: Tensor,
        _pass: &Pass<'_>,
        _gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        if !wanted {
            return Ok(None);
        }
        let (x, routing) = (input()?, &kept.routing);
        let mut of_weights = vec![Vec::new(); self.experts.len()];
        let mut sum = x.zeros_like()?;
        for (expert, [gate_of, up_of, down]) in self.experts.iter().enumerate() {
            if routing.tokens[expert].is_empty() {
                continue;
            }
            let rows = index(&routing.tokens[expert], x.device())?;
            let (x, upstream) = (x.index_select(&rows, 0)?, upstream.index_select(&rows, 0)?);
            let gate = gate_of.forward(&x, None, None, None)?.0;
            let up = up_of.forward(&x, None, None, None)?.0;
            let through_down = back(down, &upstream)?;
            // <upstream, down(activated)> equals <through_down, activated>, so the output need not be recomputed.
            let activated = (self.gate.forward)(&gate, &up)?;
            let products = (&through_down * &activated)?.sum(1)?.to_dtype(DType::F32)?;
            of_weights[expert] = to_host(&products)?;
            let weights = self.weights(routing, expert, x.device())?;
            let through_down = through_down.broadcast_mul(&weights)?;
            let inner = (self.gate.backward)(&gate, &up, &through_down)?;
            let grad = (back(gate_of, &inner.grad_gate)? + back(up_of, &inner.grad_up)?)?;
            sum = sum.index_add(&rows, &grad, 0)?;
        }
        let through_router = self.through_router(routing, &of_weights, &x)?;
        Ok(Some((sum + through_router)?))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use monteclora_converters::architecture::Activation;

    use super::super::gradient_tests::{check, dot};
    use super::super::testing::{devices, largest_difference, matrix, matrix_on};
    use super::*;
    use crate::model::adapter::ActiveAdapter;
    use crate::model::parts::attention::Masks;

    fn experts(per_token: usize, is_normalised: bool, device: &Device) -> Result<Experts> {
        let linear = |outputs: usize, inputs: usize, seed: f64| {
            let weight = (matrix_on(device, outputs, inputs, seed) * 0.3)?;
            FrozenLinear::new(Arc::new(weight), None)
        };
        let one = |seed: f64| -> Result<[FrozenLinear; 3]> {
            Ok([
                linear(7, 6, seed)?,
                linear(7, 6, seed + 0.3)?,
                linear(6, 7, seed + 0.6)?,
            ])
        };
        Ok(Experts {
            router: linear(5, 6, 0.05)?,
            experts: (0..5).map(|e| one(f64::from(e))).collect::<Result<_>>()?,
            per_token,
            is_normalised,
            gate: Gate::of(Activation::Silu).expect("computed"),
        })
    }

    fn run(experts: &Experts, x: &Tensor, upstream: Option<&Tensor>) -> Result<Tensor> {
        let adapter = ActiveAdapter::default();
        let pass = Pass {
            rotations: &[],
            segments: &[],
            keys: None,
            masks: &Masks::default(),
            adapter: &adapter,
            dropout: None,
        };
        let (y, kept) = experts.forward(x, &pass, None, None)?;
        match upstream {
            None => Ok(y),
            Some(upstream) => {
                let input = || Ok(x.clone());
                let sums = &mut AdapterGradients::default();
                let grad = experts.backward(&input, &kept, upstream.clone(), &pass, sums, true)?;
                Ok(grad.expect("wanted"))
            }
        }
    }

    #[test]
    fn gradient_is_finite_differences() -> Result<()> {
        let kinds = [(2, true), (2, false), (1, true), (5, false)];
        let kinds = kinds
            .iter()
            .flat_map(|kind| devices().iter().map(move |d| (kind, d)));
        for ((per_token, is_normalised), device) in kinds {
            let experts = experts(*per_token, *is_normalised, device)?;
            let [x, upstream] = [0.4, 0.8].map(|seed| matrix_on(device, 9, 6, seed));
            let gradient = run(&experts, &x, Some(&upstream))?;
            check(&[x], &[gradient], |inputs| {
                dot(&run(&experts, &inputs[0], None)?, &upstream)
            })?;
        }
        Ok(())
    }

    /// With all experts chosen, the result equals the dense sum of all experts with their probabilities.
    #[test]
    fn all_experts_are_the_dense_mixture() -> Result<()> {
        let experts = experts(5, true, &Device::Cpu)?;
        let x = matrix(9, 6, 0.4);
        let logits = experts.router.forward(&x, None, None, None)?.0;
        let weights = candle_nn::ops::softmax(&logits, 1)?;
        let mut sum = x.zeros_like()?;
        for (e, [gate, up, down]) in experts.experts.iter().enumerate() {
            let inner = (gate.forward(&x, None, None, None)?.0.silu()?
                * up.forward(&x, None, None, None)?.0)?;
            let y = down.forward(&inner, None, None, None)?.0;
            sum = (sum + y.broadcast_mul(&weights.narrow(1, e, 1)?)?)?;
        }
        assert!(largest_difference(&run(&experts, &x, None)?, &sum) < 1e-6);
        Ok(())
    }
}
