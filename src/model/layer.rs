//! One block of the decoder: forward, and backward from what the forward kept.

use candle_core::Tensor;
use monteclora_adapters::{FrozenLinear, Saved};

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
    saved: [Saved; 7],
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
    ) -> Result<(Tensor, Saved)> {
        let site = self.site(projection);
        let mask = self.mask(site, x, pass)?;
        let linear = &self.projections[projection as usize];
        Ok(linear.forward(x, pass.adapter.get(site), mask.as_ref())?)
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
        let (q, saved_q) = self.project(Projection::Query, &normed, pass)?;
        let (k, saved_k) = self.project(Projection::Key, &normed, pass)?;
        let (v, saved_v) = self.project(Projection::Value, &normed, pass)?;
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
        let (o, saved_o) = self.project(Projection::Output, &attended.output, pass)?;
        let middle = (x + o)?;
        let normed = rms_norm::forward(&middle, &self.post_norm, self.eps)?;
        let (gate, saved_gate) = self.project(Projection::Gate, &normed, pass)?;
        let (up, saved_up) = self.project(Projection::Up, &normed, pass)?;
        let activated = swiglu::forward(&gate, &up)?;
        let (down, saved_down) = self.project(Projection::Down, &activated, pass)?;
        let y = (&middle + down)?;
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
        let mut back = |projection: Projection,
                        x: &Tensor,
                        upstream: &Tensor,
                        input: bool|
         -> Result<Option<Tensor>> {
            let site = self.site(projection);
            let mask = self.mask(site, x, pass)?;
            let grads = self.projections[projection as usize].backward(
                x,
                &kept.saved[projection as usize],
                upstream,
                pass.adapter.get(site),
                mask.as_ref(),
                input,
            )?;
            gradients.add(site, grads.adapter)?;
            Ok(grads.input)
        };
        let activated = swiglu::forward(&kept.gate, &kept.up)?;
        let through_down = sum(vec![back(Projection::Down, &activated, upstream, true)?])?;
        drop(activated);
        let (grad_gate, grad_up) = swiglu::backward(&kept.gate, &kept.up, &through_down)?;
        let normed = rms_norm::forward(&kept.middle, &self.post_norm, self.eps)?;
        let grad_normed = sum(vec![
            back(Projection::Gate, &normed, &grad_gate, true)?,
            back(Projection::Up, &normed, &grad_up, true)?,
        ])?;
        let grad_middle = (upstream
            + rms_norm::backward(&kept.middle, &self.post_norm, self.eps, &grad_normed)?)?;
        let grad_attended = sum(vec![back(
            Projection::Output,
            &kept.attended.output,
            &grad_middle,
            true,
        )?])?;
        let (grad_q, grad_k, grad_v) = attention::backward(
            (&kept.q, &kept.k, &kept.v),
            &kept.attended,
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
        let parts = vec![
            back(Projection::Query, &normed, &grad_q, input)?,
            back(Projection::Key, &normed, &grad_k, input)?,
            back(Projection::Value, &normed, &grad_v, input)?,
        ];
        if !input {
            return Ok(None);
        }
        let through_norm = rms_norm::backward(x, &self.input_norm, self.eps, &sum(parts)?)?;
        Ok(Some((grad_middle + through_norm)?))
    }
}

fn sum(parts: Vec<Option<Tensor>>) -> Result<Tensor> {
    let mut total: Option<Tensor> = None;
    for part in parts.into_iter().flatten() {
        total = Some(match total {
            None => part,
            Some(total) => (total + part)?,
        });
    }
    Ok(total.ok_or_else(|| {
        candle_core::Error::Msg("a backward pass without any gradient".to_owned())
    })?)
}
