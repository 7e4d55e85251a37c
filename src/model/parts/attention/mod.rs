//! Causal self-attention with its projections, norms on queries and keys, and rotation.

pub(super) mod kernel;

use candle_core::Tensor;

use kernel::Attended;
pub(crate) use kernel::Heads;
pub use kernel::Segment;
pub(crate) use kernel::plain::{Masks, SCORES};

use super::norm::Norm;
use super::projections::{Projections, Saved};
use super::rotary::Rotation;
use super::{Part, Pass};
use crate::model::adapter::AdapterGradients;
use crate::model::generate::LayerCache;
use monteclora_adapters::Result;

/// An attention layer.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Queries, keys and values.
    pub(crate) inner: Projections,
    pub(crate) output: Projections,
    /// Norms on queries and on keys.
    pub(crate) norms: [Option<Norm>; 2],
    pub(crate) heads: Heads,
    /// Index of the rotation in [`Pass::rotations`] for queries and keys, if they are rotated.
    pub(crate) rope: Option<usize>,
}

/// The activations that the backward pass reads.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Queries and keys before their norms, if they have norms.
    raw: [Option<Tensor>; 2],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
    saved: [Saved; 2],
}

impl Attention {
    fn rotation<'a>(&self, pass: &Pass<'a>) -> Option<&'a Rotation> {
        self.rope.and_then(|rope| pass.rotations.get(rope))
    }
}

impl Part for Attention {
    type Kept = Kept;

    /// With a cache, attention also reads the keys and values of earlier tokens.
    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Kept)> {
        let (outputs, saved_inner) = self.inner.forward(x, pass, None)?;
        let [q, k, mut v] = super::parts(outputs)?;
        let mut raw = [None, None];
        let mut turned = Vec::with_capacity(2);
        for ((mut x, norm), raw) in [q, k].into_iter().zip(&self.norms).zip(&mut raw) {
            if let Some(norm) = norm {
                x = norm.forward(raw.insert(x))?;
            }
            if let Some(rotation) = self.rotation(pass) {
                x = rotation.forward(&x)?;
            }
            turned.push(x);
        }
        let [mut q, mut k] = super::parts(turned)?;
        if let Some(rotation) = self.rotation(pass) {
            q = rotation.scale_queries(q)?;
        }
        if let Some(cache) = cache {
            (k, v) = cache.extend(&k, &v, pass.segments)?;
        }
        if let Some(rows) = pass.keys {
            (k, v) = (k.index_select(rows, 0)?, v.index_select(rows, 0)?);
        }
        let attended = kernel::forward(&q, &k, &v, pass.segments, self.heads, pass.masks)?;
        let (outputs, saved_output) = self.output.forward(&attended.output, pass, residual)?;
        let [y] = super::parts(outputs)?;
        let kept = Kept {
            raw,
            q,
            k,
            v,
            attended,
            saved: [saved_inner, saved_output],
        };
        Ok((y, kept))
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
        let [saved_inner, saved_output] = &kept.saved;
        let attended = &kept.attended;
        let output = self.output.backward(&[upstream], saved_output, pass)?;
        output.finish(&attended.output, saved_output, gradients)?;
        let through_output = output.input_gradient()?;
        drop(output);
        let (mut grad_q, grad_k, grad_v) = kernel::backward(
            (&kept.q, &kept.k, &kept.v),
            attended,
            &through_output,
            pass.segments,
            self.heads,
            pass.masks,
        )?;
        if let Some(rotation) = self.rotation(pass) {
            grad_q = rotation.scale_queries(grad_q)?;
        }
        let mut upstream = Vec::with_capacity(3);
        for ((mut grad, norm), raw) in [grad_q, grad_k].into_iter().zip(&self.norms).zip(&kept.raw)
        {
            if let Some(rotation) = self.rotation(pass) {
                grad = rotation.backward(&grad)?;
            }
            if let (Some(norm), Some(raw)) = (norm, raw) {
                grad = norm.backward(raw, &grad, None)?;
            }
            upstream.push(grad);
        }
        upstream.push(grad_v);
        let x = input()?;
        let inner = self.inner.backward(&upstream, saved_inner, pass)?;
        inner.finish(&x, saved_inner, gradients)?;
        wanted.then(|| inner.input_gradient()).transpose()
    }
}
