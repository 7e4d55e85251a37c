//! The gated feed-forward layer: `down(act(gate(x)) * up(x))`.

use candle_core::Tensor;

use super::activation::{Backward, Gate};
use super::projections::{Projections, Saved};
use super::{Part, Pass};
use crate::model::adapter::AdapterGradients;
use crate::model::generate::LayerCache;
use monteclora_adapters::Result;

/// A gated feed-forward layer.
#[derive(Debug)]
pub(crate) struct FeedForward {
    /// Gate and what it multiplies.
    pub(crate) inner: Projections,
    pub(crate) down: Projections,
    pub(crate) gate: Gate,
}

/// What its backward pass reads; the product of the activation is cheap and computed again.
#[derive(Debug)]
pub(crate) struct Kept {
    gate: Tensor,
    up: Tensor,
    saved: [Saved; 2],
}

impl Part for FeedForward {
    type Kept = Kept;

    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
        _cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Kept)> {
        let (outputs, saved_inner) = self.inner.forward(x, pass, None)?;
        let [gate, up] = super::parts(outputs)?;
        let activated = (self.gate.forward)(&gate, &up)?;
        let (outputs, saved_down) = self.down.forward(&activated, pass, residual)?;
        let [y] = super::parts(outputs)?;
        let saved = [saved_inner, saved_down];
        Ok((y, Kept { gate, up, saved }))
    }

    fn backward(
        &self,
        input: &dyn Fn() -> Result<Tensor>,
        kept: &Kept,
        upstream: Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        let [saved_inner, saved_down] = &kept.saved;
        let down = self
            .down
            .backward(&[upstream], &kept.gate, saved_down, pass)?;
        let through_down = down.input_gradient()?;
        let Backward {
            activated,
            grad_gate,
            grad_up,
        } = (self.gate.backward)(&kept.gate, &kept.up, &through_down)?;
        drop(through_down);
        down.finish(&activated, saved_down, gradients)?;
        drop((down, activated));
        let x = input()?;
        let inner = self
            .inner
            .backward(&[grad_gate, grad_up], &x, saved_inner, pass)?;
        inner.finish(&x, saved_inner, gradients)?;
        wanted.then(|| inner.input_gradient()).transpose()
    }
}
