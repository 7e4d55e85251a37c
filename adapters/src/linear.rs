//! A frozen projection that may carry a low-rank adapter: forward, and the backward that computes no gradient of the base.

use candle_core::Tensor;

use crate::error::{Result, expect_shape};
use crate::linalg::{self, Factor, sum_of_products};

/// A projection of the base model; its weight is never a variable.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// The low-rank path of a site, `y += scaling * (x A^T) B^T`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A (the mean, or the effective A of a draw), `[r, in]`.
    pub a: Tensor,
    /// B, `[out, r]`.
    pub b: Tensor,
    /// `alpha / r`, or `alpha / sqrt r` with `use_rslora`.
    pub scaling: f64,
}

/// What the backward pass of an adapted projection needs besides its input.
#[derive(Debug, Clone)]
pub struct Saved {
    /// `x A^T`, `[tokens, r]`; none without an adapter.
    hidden: Option<Tensor>,
    /// The adapter's input when dropout changed it.
    dropped: Option<Tensor>,
}

/// Gradients of one projection.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// With respect to the input, `[tokens, in]`.
    pub input: Option<Tensor>,
    /// With respect to A and B of the adapter.
    pub adapter: Option<(Tensor, Tensor)>,
}

impl FrozenLinear {
    /// A projection with `weight` `[out, in]` and optional `bias` `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out, _) = weight.dims2()?;
        if let Some(bias) = &bias {
            expect_shape("bias", &[out], bias.dims())?;
        }
        Ok(Self {
            weight: weight.detach(),
            bias,
        })
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Number of inputs.
    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// Number of outputs.
    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    /// `x W^T + b + scaling (drop(x) A^T) B^T` for `x` `[tokens, in]`; `dropout` is a mask `[tokens, in]` of `0` and
    /// `1/(1-p)` on the adapter's input.
    pub fn forward(
        &self,
        x: &Tensor,
        adapter: Option<&LowRank>,
        dropout: Option<&Tensor>,
    ) -> Result<(Tensor, Saved)> {
        let base = (Factor::Plain(x), Factor::Transposed(&self.weight), 1.0);
        let (mut y, saved) = match adapter {
            None => (
                sum_of_products(&[base])?,
                Saved {
                    hidden: None,
                    dropped: None,
                },
            ),
            Some(adapter) => {
                let dropped = dropout.map(|mask| x * mask).transpose()?;
                let hidden = linalg::matmul_nt(dropped.as_ref().unwrap_or(x), &adapter.a)?; // [tokens, r]
                let low_rank = (
                    Factor::Plain(&hidden),
                    Factor::Transposed(&adapter.b),
                    adapter.scaling,
                );
                let y = sum_of_products(&[base, low_rank])?;
                let hidden = Some(hidden);
                (y, Saved { hidden, dropped })
            }
        };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        Ok((y, saved))
    }

    /// Gradients for `upstream` `[tokens, out]` at input `x` `[tokens, in]`:
    /// `dx = g W + scaling ((g B) A) * mask`, `dA = scaling (g B)^T drop(x)`, `dB = scaling g^T (drop(x) A^T)`.
    ///
    /// The base's own gradient is never formed. `dx` is left out when `input` is false (the first layer needs none).
    pub fn backward(
        &self,
        x: &Tensor,
        saved: &Saved,
        upstream: &Tensor,
        adapter: Option<&LowRank>,
        dropout: Option<&Tensor>,
        input: bool,
    ) -> Result<Gradients> {
        let through_base = (Factor::Plain(upstream), Factor::Plain(&self.weight), 1.0);
        let (Some(adapter), Some(hidden)) = (adapter, &saved.hidden) else {
            return Ok(Gradients {
                input: input
                    .then(|| sum_of_products(&[through_base]))
                    .transpose()?,
                adapter: None,
            });
        };
        let up_b = (
            Factor::Plain(upstream),
            Factor::Plain(&adapter.b),
            adapter.scaling,
        );
        let grad_hidden = sum_of_products(&[up_b])?; // [tokens, r]
        let grad_a = linalg::matmul_tn(&grad_hidden, saved.dropped.as_ref().unwrap_or(x))?;
        let grad_b = sum_of_products(&[(
            Factor::Transposed(upstream),
            Factor::Plain(hidden),
            adapter.scaling,
        )])?;
        let grad_input = match (input, dropout) {
            (false, _) => None,
            (true, None) => {
                let through_a = (Factor::Plain(&grad_hidden), Factor::Plain(&adapter.a), 1.0);
                Some(sum_of_products(&[through_base, through_a])?)
            }
            (true, Some(mask)) => {
                let through_a = (linalg::matmul_nn(&grad_hidden, &adapter.a)? * mask)?;
                Some((sum_of_products(&[through_base])? + through_a)?)
            }
        };
        Ok(Gradients {
            input: grad_input,
            adapter: Some((grad_a, grad_b)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    fn matrix(rows: usize, columns: usize, seed: f64) -> Result<Tensor> {
        let values = (0..rows * columns)
            .map(|i| ((i as f64 + seed) * 0.73).sin() as f32)
            .collect::<Vec<_>>();
        Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        Ok((a - b)?
            .abs()?
            .max_all()?
            .to_dtype(DType::F32)?
            .to_scalar()?)
    }

    /// The hand-written backward against candle's automatic differentiation of the plain composition.
    #[test]
    fn backward_equals_autograd() -> Result<()> {
        for (tokens, n_in, n_out, r, dropout) in [
            (5, 7, 3, 2, false),
            (33, 65, 17, 4, true),
            (1, 4, 4, 1, false),
        ] {
            let weight = matrix(n_out, n_in, 0.1)?;
            let bias = matrix(1, n_out, 0.9)?.flatten_all()?;
            let x = Var::from_tensor(&matrix(tokens, n_in, 0.2)?)?;
            let a = Var::from_tensor(&matrix(r, n_in, 0.3)?)?;
            let b = Var::from_tensor(&matrix(n_out, r, 0.4)?)?;
            let mask = dropout
                .then(|| {
                    matrix(tokens, n_in, 0.6)
                        .and_then(|m| Ok((m.gt(0.0)?.to_dtype(DType::F32)? * 2.0)?))
                })
                .transpose()?;
            let upstream = matrix(tokens, n_out, 0.5)?;
            let path = match &mask {
                Some(mask) => (x.as_tensor() * mask)?,
                None => x.as_tensor().clone(),
            };
            let plain = (x.matmul(&weight.t()?)?.broadcast_add(&bias)?
                + (path.matmul(&a.t()?)?.matmul(&b.t()?)? * 0.5)?)?;
            let grads = (&plain * &upstream)?.sum_all()?.backward()?;
            let linear = FrozenLinear::new(weight, Some(bias))?;
            let adapter = LowRank {
                a: a.as_tensor().detach(),
                b: b.as_tensor().detach(),
                scaling: 0.5,
            };
            let input = x.as_tensor().detach();
            let (y, saved) = linear.forward(&input, Some(&adapter), mask.as_ref())?;
            assert!(largest_difference(&y, &plain)? < 1e-5);
            let ours = linear.backward(
                &input,
                &saved,
                &upstream,
                Some(&adapter),
                mask.as_ref(),
                true,
            )?;
            let (grad_a, grad_b) = ours.adapter.expect("an adapter was given");
            let pairs = [
                (ours.input.expect("was asked for"), &x),
                (grad_a, &a),
                (grad_b, &b),
            ];
            for (ours, var) in pairs {
                let theirs = grads
                    .get(var.as_tensor())
                    .expect("a variable has a gradient");
                assert!(largest_difference(&ours, theirs)? < 1e-4);
            }
        }
        Ok(())
    }

    /// B = 0 gives the base layer exactly.
    #[test]
    fn zero_b_is_the_base() -> Result<()> {
        let linear = FrozenLinear::new(matrix(6, 5, 1.0)?, None)?;
        let x = matrix(4, 5, 2.0)?;
        let adapter = LowRank {
            a: matrix(3, 5, 3.0)?,
            b: Tensor::zeros((6, 3), DType::F32, &Device::Cpu)?,
            scaling: 2.0,
        };
        let (base, _) = linear.forward(&x, None, None)?;
        let (adapted, _) = linear.forward(&x, Some(&adapter), None)?;
        assert_eq!(largest_difference(&base, &adapted)?, 0.0);
        Ok(())
    }
}
