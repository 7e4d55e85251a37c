//! Attention as a composition of candle's operations, for every device.

use candle_core::{D, DType, Tensor};

use super::{Heads, Segment};
use monteclora_adapters::Result;

/// One segment as batched matrices.
pub(super) struct PlainSegment {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    heads: Heads,
}

impl PlainSegment {
    pub(super) fn new(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segment: &Segment,
        heads: Heads,
    ) -> Result<Self> {
        let split = |x: &Tensor, start, len, n: usize| -> Result<Tensor> {
            let x = x.narrow(0, start, len)?.reshape((len, n, heads.dim))?;
            Ok(x.transpose(0, 1)?.contiguous()?)
        };
        let repeat = |x: Tensor| -> Result<Tensor> {
            let (n, len, dim) = x.dims3()?;
            let x = x.unsqueeze(1)?.expand((n, heads.group(), len, dim))?;
            Ok(x.contiguous()?.reshape((heads.query, len, dim))?)
        };
        let mask: Vec<f32> = (0..segment.query_len)
            .flat_map(|i| {
                let visible = heads.visible(segment, i);
                (0..segment.key_len).map(move |j| {
                    if visible.contains(&j) {
                        0.0
                    } else {
                        f32::NEG_INFINITY
                    }
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (segment.query_len, segment.key_len), q.device())?;
        Ok(Self {
            q: split(q, segment.query_start, segment.query_len, heads.query)?,
            k: repeat(split(
                k,
                segment.key_start,
                segment.key_len,
                heads.key_value,
            )?)?,
            v: repeat(split(
                v,
                segment.key_start,
                segment.key_len,
                heads.key_value,
            )?)?,
            mask: mask.to_dtype(q.dtype())?,
            heads,
        })
    }

    /// `[queries, heads * dim]`.
    pub(super) fn output(&self) -> Result<Tensor> {
        self.join(&self.probabilities()?.matmul(&self.v)?)
    }

    /// `[heads, queries, keys]`, before the mask.
    fn scores(&self) -> Result<Tensor> {
        Ok((self.q.matmul(&self.k.transpose(1, 2)?)? * f64::from(self.heads.scale()))?)
    }

    /// `[heads, queries, keys]`; the softmax runs in f32.
    fn probabilities(&self) -> Result<Tensor> {
        let mut scores = self.scores()?;
        if let Some(cap) = self.heads.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let scores = scores.broadcast_add(&self.mask)?.to_dtype(DType::F32)?;
        let shifted = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
            .exp()?;
        let p = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
        Ok(p.to_dtype(self.q.dtype())?)
    }

    fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (n, len, dim) = x.dims3()?;
        Ok(x.transpose(0, 1)?.contiguous()?.reshape((len, n * dim))?)
    }

    fn sum_groups(&self, x: &Tensor) -> Result<Tensor> {
        let (_, len, dim) = x.dims3()?;
        let x = x.reshape((self.heads.key_value, self.heads.group(), len, dim))?;
        self.join(&x.sum(1)?)
    }

    /// Gradients with respect to q, k and v for `upstream` `[queries, heads * dim]`.
    pub(super) fn backward(&self, upstream: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (n, len, dim) = self.q.dims3()?;
        let upstream = upstream
            .reshape((len, n, dim))?
            .transpose(0, 1)?
            .contiguous()?;
        let p = self.probabilities()?;
        let dv = p.transpose(1, 2)?.contiguous()?.matmul(&upstream)?;
        let dp = upstream.matmul(&self.v.transpose(1, 2)?)?;
        let delta = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let mut ds = ((p * dp.broadcast_sub(&delta)?)? * f64::from(self.heads.scale()))?;
        if let Some(cap) = self.heads.softcap.map(f64::from) {
            let bent = (self.scores()? / cap)?.tanh()?;
            ds = (&ds * (1.0 - bent.sqr()?)?)?;
        }
        let dq = ds.matmul(&self.k)?;
        let dk = ds.transpose(1, 2)?.contiguous()?.matmul(&self.q)?;
        Ok((
            self.join(&dq)?,
            self.sum_groups(&dk)?,
            self.sum_groups(&dv)?,
        ))
    }
}
