//! A frozen projection that may carry a low-rank adapter: forward, and the backward that computes no gradient of the base.

use candle_core::Tensor;

use crate::error::{Result, expect_shape};
use crate::product::{self, Factor, Precision, Product, sum_of_products};

/// A projection of the base model; its weight is never a variable.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
    precision: Precision,
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

/// One projection's part in the gradient of an input that several may share.
#[derive(Debug, Clone, Copy)]
pub struct Branch<'a> {
    /// The projection.
    pub linear: &'a FrozenLinear,
    /// Gradient of its output, `[tokens, out]`.
    pub upstream: &'a Tensor,
    /// Its adapter, with [`LowRank::hidden_gradient`] of the same upstream.
    pub adapter: Option<(&'a LowRank, &'a Tensor)>,
    /// The mask its forward pass was given.
    pub dropout: Option<&'a Tensor>,
}

/// `dx = sum_branches g W + (g_hidden A) * mask`, `[tokens, in]`, accumulated in one buffer.
pub fn input_gradient(branches: &[Branch<'_>]) -> Result<Tensor> {
    let mut products = Vec::with_capacity(2 * branches.len());
    for branch in branches {
        let weight = Factor::Plain(&branch.linear.weight);
        let through_w = Product::new(Factor::Plain(branch.upstream), weight);
        products.push(through_w.with_precision(branch.linear.precision));
        if let (Some((adapter, grad_hidden)), None) = (branch.adapter, branch.dropout) {
            products.push(Product::new(
                Factor::Plain(grad_hidden),
                Factor::Plain(&adapter.a),
            ));
        }
    }
    let mut total = sum_of_products(None, &products)?;
    for branch in branches {
        if let (Some((adapter, grad_hidden)), Some(mask)) = (branch.adapter, branch.dropout) {
            let through_a = product::matmul_nn(grad_hidden, &adapter.a)?;
            total = (total + (through_a * mask)?)?;
        }
    }
    Ok(total)
}

impl LowRank {
    /// Gradient of `x A^T` for `upstream` `[tokens, out]`: `scaling g B`, `[tokens, r]`.
    pub fn hidden_gradient(&self, upstream: &Tensor) -> Result<Tensor> {
        let up_b = Product::scaled(
            Factor::Plain(upstream),
            Factor::Plain(&self.b),
            self.scaling,
        );
        sum_of_products(None, &[up_b])
    }

    /// Gradients of A and B: `dA = g_hidden^T drop(x)`, `dB = scaling g^T (drop(x) A^T)`; none where the forward pass ran without
    /// an adapter.
    pub fn gradients(
        &self,
        x: &Tensor,
        saved: &Saved,
        upstream: &Tensor,
        grad_hidden: &Tensor,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let Some(hidden) = &saved.hidden else {
            return Ok(None);
        };
        let grad_a = product::matmul_tn(grad_hidden, saved.dropped.as_ref().unwrap_or(x))?;
        let through_b = Product::scaled(
            Factor::Transposed(upstream),
            Factor::Plain(hidden),
            self.scaling,
        );
        Ok(Some((grad_a, sum_of_products(None, &[through_b])?)))
    }
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
            precision: Precision::Single,
        })
    }

    /// The same projection with products of its weight computed in `precision`, forward and backward; the low-rank path stays f32.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
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
    /// `1/(1-p)` on the adapter's input. With `residual` `[tokens, out]` the result is added to it.
    pub fn forward(
        &self,
        x: &Tensor,
        adapter: Option<&LowRank>,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Saved)> {
        let both = match (residual, &self.bias) {
            (Some(residual), Some(bias)) => Some(residual.broadcast_add(bias)?),
            _ => None,
        };
        let start = both.as_ref().or(residual).or(self.bias.as_ref());
        let base = Product::new(Factor::Plain(x), Factor::Transposed(&self.weight))
            .with_precision(self.precision);
        let Some(adapter) = adapter else {
            let saved = Saved {
                hidden: None,
                dropped: None,
            };
            return Ok((sum_of_products(start, &[base])?, saved));
        };
        let dropped = dropout.map(|mask| x * mask).transpose()?;
        let hidden = product::matmul_nt(dropped.as_ref().unwrap_or(x), &adapter.a)?; // [tokens, r]
        let low_rank = Product::scaled(
            Factor::Plain(&hidden),
            Factor::Transposed(&adapter.b),
            adapter.scaling,
        );
        let y = sum_of_products(start, &[base, low_rank])?;
        let hidden = Some(hidden);
        Ok((y, Saved { hidden, dropped }))
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
        let grad_hidden = adapter
            .map(|adapter| adapter.hidden_gradient(upstream))
            .transpose()?;
        let pair = adapter.zip(grad_hidden.as_ref());
        let branch = Branch {
            linear: self,
            upstream,
            adapter: pair,
            dropout,
        };
        Ok(Gradients {
            input: input.then(|| input_gradient(&[branch])).transpose()?,
            adapter: match pair {
                Some((adapter, grad_hidden)) => {
                    adapter.gradients(x, saved, upstream, grad_hidden)?
                }
                None => None,
            },
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
            let (y, saved) = linear.forward(&input, Some(&adapter), mask.as_ref(), None)?;
            assert!(largest_difference(&y, &plain)? < 1e-5);
            let residual = matrix(tokens, n_out, 0.8)?;
            let (onto, _) =
                linear.forward(&input, Some(&adapter), mask.as_ref(), Some(&residual))?;
            assert!(largest_difference(&onto, &(&residual + &plain)?)? < 1e-5);
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
        let (base, _) = linear.forward(&x, None, None, None)?;
        let (adapted, _) = linear.forward(&x, Some(&adapter), None, None)?;
        assert_eq!(largest_difference(&base, &adapted)?, 0.0);
        Ok(())
    }
}
