//! A frozen projection that an [`Update`] may change. Its backward pass computes no gradient of the base weight.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::{Result, expect_shape};
use crate::product::{Factor, Precision, Product, sum_of_products};
use crate::update::{Pulled, Update};
use crate::weights::Weight;

/// A projection of the base model; its weight is never trained.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Arc<dyn Weight>,
    bias: Option<Tensor>,
    precision: Precision,
}

/// One projection in the backward pass, with the gradient of its output.
#[derive(Debug)]
pub struct Branch<'a> {
    linear: &'a FrozenLinear,
    update: Option<&'a dyn Update>,
    pulled: Pulled,
    /// The dropout mask of its forward pass.
    dropout: Option<Tensor>,
}

/// Computes `dx = sum_branches g W + (terms of the update) * mask`, `[tokens, in]`: the gradient of an input that
/// several projections may share, accumulated in one buffer.
pub fn input_gradient(branches: &[Branch<'_>]) -> Result<Tensor> {
    let mut products = Vec::with_capacity(2 * branches.len());
    for branch in branches {
        let weight = Factor::Plain(branch.linear.weight());
        let through_w = Product::new(Factor::Plain(&branch.pulled.frozen), weight);
        products.push(through_w.with_precision(branch.linear.precision));
        if branch.dropout.is_none() {
            products.extend(branch.input_terms());
        }
    }
    let mut total = sum_of_products(None, &products)?;
    for branch in branches {
        let terms = branch.input_terms();
        if let (Some(mask), false) = (&branch.dropout, terms.is_empty()) {
            total = (total + (sum_of_products(None, &terms)? * mask)?)?;
        }
    }
    Ok(total)
}

impl Branch<'_> {
    fn input_terms(&self) -> Vec<Product<'_>> {
        self.update
            .map_or_else(Vec::new, |update| update.input_terms(&self.pulled))
    }

    /// Returns the gradients of the update's factors at the projection's input `x`; empty without an update.
    pub fn gradients(&self, x: &Tensor, saved: &[Tensor]) -> Result<Vec<Tensor>> {
        match self.update {
            Some(update) => update.gradients(x, saved, &self.pulled),
            None => Ok(Vec::new()),
        }
    }
}

impl FrozenLinear {
    /// Creates a projection with `weight` `[out, in]` and optional `bias` `[out]`.
    pub fn new(weight: Arc<dyn Weight>, bias: Option<Tensor>) -> Result<Self> {
        let (out, _) = weight.dims()?;
        if let Some(bias) = &bias {
            expect_shape("bias", &[out], bias.dims())?;
        }
        Ok(Self {
            weight,
            bias,
            precision: Precision::Single,
        })
    }

    /// Sets the precision of the weight's products, forward and backward; the update's products stay f32.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// The weight, to keep.
    pub fn shared_weight(&self) -> Arc<dyn Weight> {
        self.weight.clone()
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &dyn Weight {
        self.weight.as_ref()
    }

    /// Returns what the product is added to: `residual` plus the bias, or the one of them that exists.
    pub fn start(&self, residual: Option<&Tensor>) -> Result<Option<Tensor>> {
        Ok(match (residual, &self.bias) {
            (Some(residual), Some(bias)) => Some(residual.broadcast_add(bias)?),
            (residual, bias) => residual.or(bias.as_ref()).cloned(),
        })
    }

    /// `start + x W^T + more` for `x` `[tokens, in]`, in one sum of products.
    pub fn product(
        &self,
        x: &Tensor,
        more: &[Product<'_>],
        start: Option<&Tensor>,
    ) -> Result<Tensor> {
        let base = Product::new(Factor::Plain(x), Factor::Transposed(self.weight()));
        let mut products = vec![base.with_precision(self.precision)];
        products.extend_from_slice(more);
        sum_of_products(start, &products)
    }

    /// Applies the projection, changed by `update`, to `x` `[tokens, in]`. Returns the output and what the backward
    /// pass needs; see [`Update::forward`].
    pub fn forward(
        &self,
        x: &Tensor,
        update: Option<&dyn Update>,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        match update {
            Some(update) => update.forward(self, x, dropout, residual),
            None => {
                let start = self.start(residual)?;
                Ok((self.product(x, &[], start.as_ref())?, Vec::new()))
            }
        }
    }

    /// Begins the backward pass from `upstream` `[tokens, out]`, the gradient of the output of [`Self::forward`] with
    /// the same `update` and `dropout`. It never computes the gradient of the base weight.
    pub fn backward<'a>(
        &'a self,
        upstream: &Tensor,
        saved: &[Tensor],
        update: Option<&'a dyn Update>,
        dropout: Option<Tensor>,
    ) -> Result<Branch<'a>> {
        let pulled = match update {
            Some(update) => update.pull(upstream, saved)?,
            None => Pulled {
                frozen: upstream.clone(),
                own: Vec::new(),
            },
        };
        Ok(Branch {
            linear: self,
            update,
            pulled,
            dropout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::LowRank;
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
            let linear = FrozenLinear::new(Arc::new(weight), Some(bias))?;
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
            let branch = linear.backward(&upstream, &saved, Some(&adapter), mask)?;
            let mut ours = vec![input_gradient(std::slice::from_ref(&branch))?];
            ours.extend(branch.gradients(&input, &saved)?);
            assert_eq!(ours.len(), 1 + adapter.factors().len());
            for (ours, var) in ours.into_iter().zip([&x, &a, &b]) {
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
        let linear = FrozenLinear::new(Arc::new(matrix(6, 5, 1.0)?), None)?;
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
