//! The gated feed-forward layer, `down(act(gate(x)) * up(x))`, or a mixture of experts instead.

use candle_core::Tensor;

use super::activation::{Backward, Gate};
use super::experts::{self, Experts};
use super::projections::{Projections, Saved};
use super::{Part, Pass};
use crate::model::adapter::AdapterGradients;
use crate::model::generate::LayerCache;
use monteclora_adapters::Result;

/// The second sublayer of a block.
#[derive(Debug)]
pub(crate) enum FeedForwardPart {
    /// One layer for all tokens.
    Gated(FeedForward),
    /// Several layers; each token goes through a few of them.
    Experts(Experts),
}

/// The values that the backward pass reads.
#[derive(Debug)]
pub(crate) enum KeptPart {
    Gated(Kept),
    Experts(experts::Kept),
}

impl Part for FeedForwardPart {
    type Kept = KeptPart;

    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, KeptPart)> {
        match self {
            Self::Gated(layer) => {
                let (y, kept) = layer.forward(x, pass, residual, cache)?;
                Ok((y, KeptPart::Gated(kept)))
            }
            Self::Experts(experts) => {
                let (y, kept) = experts.forward(x, pass, residual, cache)?;
                Ok((y, KeptPart::Experts(kept)))
            }
        }
    }

    fn backward(
        &self,
        input: &dyn Fn() -> Result<Tensor>,
        kept: &KeptPart,
        upstream: Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        match (self, kept) {
            (Self::Gated(layer), KeptPart::Gated(kept)) => {
                layer.backward(input, kept, upstream, pass, gradients, wanted)
            }
            (Self::Experts(experts), KeptPart::Experts(kept)) => {
                experts.backward(input, kept, upstream, pass, gradients, wanted)
            }
            _ => Err(candle_core::Error::Msg("kept by another part".to_owned()).into()),
        }
    }
}

/// A gated feed-forward layer.
#[derive(Debug)]
pub(crate) struct FeedForward {
    /// Gate and up.
    pub(crate) inner: Projections,
    pub(crate) down: Projections,
    pub(crate) gate: Gate,
}

/// The activations that the backward pass reads. The product `act(gate) * up` is cheap and recomputed.
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
        let down = self.down.backward(&[upstream], saved_down, pass)?;
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
            .backward(&[grad_gate, grad_up], saved_inner, pass)?;
        inner.finish(&x, saved_inner, gradients)?;
        wanted.then(|| inner.input_gradient()).transpose()
    }
}
