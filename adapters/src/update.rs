//! What changes a frozen projection in one pass. [`LowRank`] is one such update; a method may bring its own, and the
//! decoder knows only [`Update`].

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::linear::FrozenLinear;
use crate::product::{self, Factor, Product, sum_of_products};

/// An update of a frozen projection `x W^T + b`, with the values that its factors have in one pass.
///
/// The backward pass has two steps, because the gradient may arrive before the projection's input is known:
/// [`Update::pull`] needs no input, [`Update::gradients`] does.
pub trait Update: Debug + Send + Sync {
    /// The tensors that have gradients, in the order of [`Update::gradients`].
    fn factors(&self) -> Vec<&Tensor>;

    /// Returns the output `[tokens, out]` of the updated `linear` at `x` `[tokens, in]`, and what the backward pass
    /// needs.
    ///
    /// `dropout` is a mask `[tokens, in]` of `0` and `1/(1-p)` on the input of the update; the base reads `x` without
    /// it. If `residual` `[tokens, out]` is given, the result is added to it.
    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)>;

    /// Propagates `upstream` `[tokens, out]`, the gradient of the output, back to the frozen product.
    fn pull(&self, upstream: &Tensor, saved: &[Tensor]) -> Result<Pulled>;

    /// The update's part of the input's gradient, as products that are summed: none unless the update reads the input by
    /// itself. The caller applies the dropout mask.
    fn input_terms<'a>(&'a self, _pulled: &'a Pulled) -> Vec<Product<'a>> {
        Vec::new()
    }

    /// Gradients of the factors at the projection's input `x`.
    fn gradients(&self, x: &Tensor, saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>>;
}

/// A gradient on its way back through an update.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Gradient of the frozen product, `[tokens, out]`. An update that scales the output also scales this gradient.
    pub frozen: Tensor,
    /// Other tensors that the update needs again.
    pub own: Vec<Tensor>,
}

/// The low-rank update of a module, `y += scaling * (x A^T) B^T`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A (the mean, or the effective A of a draw), `[r, in]`.
    pub a: Tensor,
    /// B, `[out, r]`.
    pub b: Tensor,
    /// `alpha / r`, or `alpha / sqrt r` with `use_rslora`.
    pub scaling: f64,
}

impl From<LowRank> for Arc<dyn Update> {
    fn from(update: LowRank) -> Self {
        Arc::new(update)
    }
}

impl Update for LowRank {
    fn factors(&self) -> Vec<&Tensor> {
        vec![&self.a, &self.b]
    }

    /// Saves `drop(x) A^T` `[tokens, r]`, and `drop(x)` if there is dropout.
    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let dropped = dropout.map(|mask| x * mask).transpose()?;
        let hidden = product::matmul_nt(dropped.as_ref().unwrap_or(x), &self.a)?; // [tokens, r]
        let through_b = Product::scaled(
            Factor::Plain(&hidden),
            Factor::Transposed(&self.b),
            self.scaling,
        );
        let start = linear.start(residual)?;
        let y = linear.product(x, &[through_b], start.as_ref())?;
        Ok((y, std::iter::once(hidden).chain(dropped).collect()))
    }

    /// Gradient of `drop(x) A^T`: `scaling g B`, `[tokens, r]`.
    fn pull(&self, upstream: &Tensor, _saved: &[Tensor]) -> Result<Pulled> {
        let through_b = Product::scaled(
            Factor::Plain(upstream),
            Factor::Plain(&self.b),
            self.scaling,
        );
        let grad_hidden = sum_of_products(None, &[through_b])?;
        Ok(Pulled {
            frozen: upstream.clone(),
            own: vec![grad_hidden],
        })
    }

    /// `scaling (g B) A`.
    fn input_terms<'a>(&'a self, pulled: &'a Pulled) -> Vec<Product<'a>> {
        let through_a = |grad| Product::new(Factor::Plain(grad), Factor::Plain(&self.a));
        pulled.own.iter().map(through_a).collect()
    }

    /// `dA = scaling (g B)^T drop(x)`, `dB = scaling g^T (drop(x) A^T)`.
    fn gradients(&self, x: &Tensor, saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>> {
        let mut gradients = Vec::with_capacity(2);
        for (hidden, grad_hidden) in saved.iter().zip(&pulled.own) {
            gradients.push(product::matmul_tn(grad_hidden, saved.get(1).unwrap_or(x))?);
            let through_b = Product::scaled(
                Factor::Transposed(&pulled.frozen),
                Factor::Plain(hidden),
                self.scaling,
            );
            gradients.push(sum_of_products(None, &[through_b])?);
        }
        Ok(gradients)
    }
}
