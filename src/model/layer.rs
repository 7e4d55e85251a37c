//! One block of the decoder: forward, and backward from what the forward kept.

use candle_core::Tensor;
use monteclora_adapters::{Branch, FrozenLinear, input_gradient};

use super::Result;
use super::adapter::{ActiveAdapter, AdapterGradients, Projection, SiteId};
use super::decoder::Dropout;
use super::generate::LayerCache;
use super::ops::attention::{self, Attended, Heads, Segment};
use super::ops::rope::Rotation;
use super::ops::{rms_norm, swiglu};

/// Frozen weights of one block.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) index: usize,
    pub(crate) input_norm: Tensor,
    pub(crate) post_norm: Tensor,
    /// In the order of [`Projection::ALL`].
    pub(crate) projections: [FrozenLinear; 7],
    /// Norms over the heads of q and k (Qwen3), `[head_dim]`.
    pub(crate) head_norms: Option<(Tensor, Tensor)>,
    pub(crate) heads: Heads,
    pub(crate) eps: f64,
}

/// What all blocks of one pass share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) rotation: &'a Rotation,
    pub(crate) segments: &'a [Segment],
    pub(crate) adapter: &'a ActiveAdapter,
    pub(crate) dropout: Option<&'a Dropout>,
}

/// Activations that the backward pass reads; the rest is cheap and computed again.
#[derive(Debug)]
pub(crate) struct Kept {
    /// q and k before their head norms, where there are any.
    raw: Option<(Tensor, Tensor)>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
    middle: Tensor,
    gate: Tensor,
    up: Tensor,
    /// What the update of each projection keeps.
    saved: [Vec<Tensor>; 7],
}

impl Layer {
    fn site(&self, projection: Projection) -> SiteId {
        SiteId::Block(self.index, projection)
    }

    fn project(
        &self,
        projection: Projection,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let site = self.site(projection);
        let mask = self.mask(site, x, pass)?;
        let linear = &self.projections[projection as usize];
        Ok(linear.forward(x, pass.adapter.get(site), mask.as_ref(), residual)?)
    }

    fn mask(&self, site: SiteId, x: &Tensor, pass: &Pass<'_>) -> Result<Option<Tensor>> {
        match (pass.dropout, pass.adapter.get(site)) {
            (Some(dropout), Some(_)) => Ok(Some(dropout.mask(site, pass.segments, x)?)),
            _ => Ok(None),
        }
    }

    /// The block at `x` `[tokens, hidden]`; with a cache, keys and values of earlier tokens take part.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Kept)> {
        let normed = rms_norm::forward(x, &self.input_norm, self.eps)?;
        let (q, saved_q) = self.project(Projection::Query, &normed, pass, None)?;
        let (k, saved_k) = self.project(Projection::Key, &normed, pass, None)?;
        let (v, saved_v) = self.project(Projection::Value, &normed, pass, None)?;
        let (raw, q, k) = match &self.head_norms {
            None => (None, q, k),
            Some((q_norm, k_norm)) => {
                let (normed_q, normed_k) =
                    (self.head_norm(&q, q_norm)?, self.head_norm(&k, k_norm)?);
                (Some((q, k)), normed_q, normed_k)
            }
        };
        let q = pass.rotation.forward(&q)?;
        let mut k = pass.rotation.forward(&k)?;
        let mut v = v;
        if let Some(cache) = cache {
            (k, v) = cache.extend(&k, &v, pass.segments)?;
        }
        let attended = attention::forward(&q, &k, &v, pass.segments, self.heads)?;
        let (middle, saved_o) =
            self.project(Projection::Output, &attended.output, pass, Some(x))?;
        let normed = rms_norm::forward(&middle, &self.post_norm, self.eps)?;
        let (gate, saved_gate) = self.project(Projection::Gate, &normed, pass, None)?;
        let (up, saved_up) = self.project(Projection::Up, &normed, pass, None)?;
        let activated = swiglu::forward(&gate, &up)?;
        let (y, saved_down) = self.project(Projection::Down, &activated, pass, Some(&middle))?;
        let saved = [
            saved_q, saved_k, saved_v, saved_o, saved_gate, saved_up, saved_down,
        ];
        Ok((
            y,
            Kept {
                raw,
                q,
                k,
                v,
                attended,
                middle,
                gate,
                up,
                saved,
            },
        ))
    }

    fn head_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let heads = x.reshape((tokens * width / self.heads.dim, self.heads.dim))?;
        Ok(rms_norm::forward(&heads, weight, self.eps)?.reshape((tokens, width))?)
    }

    fn head_norm_backward(&self, x: &Tensor, weight: &Tensor, upstream: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let shape = (tokens * width / self.heads.dim, self.heads.dim);
        let grad = rms_norm::backward(
            &x.reshape(shape)?,
            weight,
            self.eps,
            &upstream.reshape(shape)?,
            None,
        )?;
        Ok(grad.reshape((tokens, width))?)
    }

    /// Adds the gradients of this block's sites to `gradients` and returns that of `x`, unless `input` is false.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        kept: &Kept,
        upstream: &Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        input: bool,
    ) -> Result<Option<Tensor>> {
        let down = self.branch(Projection::Down, upstream, &kept.gate, kept, pass)?;
        let through_down = input_gradient(std::slice::from_ref(&down))?;
        let swiglu::Backward {
            activated,
            grad_gate,
            grad_up,
        } = swiglu::backward(&kept.gate, &kept.up, &through_down)?;
        drop(through_down);
        self.finish(Projection::Down, &down, &activated, kept, gradients)?;
        drop((down, activated));

        let normed = rms_norm::forward(&kept.middle, &self.post_norm, self.eps)?;
        let branches = [
            self.branch(Projection::Gate, &grad_gate, &normed, kept, pass)?,
            self.branch(Projection::Up, &grad_up, &normed, kept, pass)?,
        ];
        for (projection, branch) in [Projection::Gate, Projection::Up].iter().zip(&branches) {
            self.finish(*projection, branch, &normed, kept, gradients)?;
        }
        let grad_normed = input_gradient(&branches)?;
        drop(branches);
        drop((grad_gate, grad_up));
        let grad_middle = rms_norm::backward(
            &kept.middle,
            &self.post_norm,
            self.eps,
            &grad_normed,
            Some(upstream),
        )?;

        let attended = &kept.attended;
        let through = &attended.output;
        let output = self.branch(Projection::Output, &grad_middle, through, kept, pass)?;
        self.finish(Projection::Output, &output, through, kept, gradients)?;
        let grad_attended = input_gradient(&[output])?;
        let (grad_q, grad_k, grad_v) = attention::backward(
            (&kept.q, &kept.k, &kept.v),
            attended,
            &grad_attended,
            pass.segments,
            self.heads,
        )?;
        let mut grad_q = pass.rotation.backward(&grad_q)?;
        let mut grad_k = pass.rotation.backward(&grad_k)?;
        if let (Some((raw_q, raw_k)), Some((q_norm, k_norm))) = (&kept.raw, &self.head_norms) {
            grad_q = self.head_norm_backward(raw_q, q_norm, &grad_q)?;
            grad_k = self.head_norm_backward(raw_k, k_norm, &grad_k)?;
        }

        let normed = rms_norm::forward(x, &self.input_norm, self.eps)?;
        let branches = [
            self.branch(Projection::Query, &grad_q, &normed, kept, pass)?,
            self.branch(Projection::Key, &grad_k, &normed, kept, pass)?,
            self.branch(Projection::Value, &grad_v, &normed, kept, pass)?,
        ];
        for (projection, branch) in Projection::ALL.iter().zip(&branches) {
            self.finish(*projection, branch, &normed, kept, gradients)?;
        }
        if !input {
            return Ok(None);
        }
        let grad_normed = input_gradient(&branches)?;
        let grad = rms_norm::backward(
            x,
            &self.input_norm,
            self.eps,
            &grad_normed,
            Some(&grad_middle),
        )?;
        Ok(Some(grad))
    }

    /// `projection` with the gradient of its output; `like` has the shape of its input.
    fn branch<'a>(
        &'a self,
        projection: Projection,
        upstream: &Tensor,
        like: &Tensor,
        kept: &Kept,
        pass: &Pass<'a>,
    ) -> Result<Branch<'a>> {
        let site = self.site(projection);
        let (linear, saved) = (
            &self.projections[projection as usize],
            &kept.saved[projection as usize],
        );
        let mask = self.mask(site, like, pass)?;
        Ok(linear.backward(upstream, saved, pass.adapter.get(site), mask)?)
    }

    /// Adds the gradients of the update of `projection`, at its input `x`, to `gradients`.
    fn finish(
        &self,
        projection: Projection,
        branch: &Branch<'_>,
        x: &Tensor,
        kept: &Kept,
        gradients: &mut AdapterGradients,
    ) -> Result<()> {
        let of_factors = branch.gradients(x, &kept.saved[projection as usize])?;
        gradients.add(self.site(projection), of_factors)
    }
}
