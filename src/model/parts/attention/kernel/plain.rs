//! Attention as a composition of candle's operations, for every device. Segments of equal lengths are computed together.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};

use super::{Heads, Segment};
use monteclora_adapters::Result;
use monteclora_adapters::device::to_device;

/// Added to the score of a hidden key. It is finite, so that the sum is right where a compiler assumes that there are
/// no infinities, as Metal's does; its exponential is 0.
const HIDDEN: f64 = -1e30;

/// Largest number of scores that are computed together, unless one segment has more.
pub(crate) const SCORES: usize = 1 << 27;

/// The masks of a pass. Layers share them, so each is built once.
#[derive(Debug, Default)]
pub(crate) struct Masks(Mutex<HashMap<Lengths, Tensor>>);

/// What a mask depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Lengths {
    query: usize,
    key: usize,
    /// The window, if it hides a key.
    window: Option<usize>,
}

impl Masks {
    /// `[queries, keys]`, f32: 0 for a visible key and [`HIDDEN`] for a hidden one; `None` if none is hidden.
    fn get(&self, lengths: Lengths, device: &Device) -> Result<Option<Tensor>> {
        if lengths.query == 1 && lengths.window.is_none() {
            return Ok(None);
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mask) = known.get(&lengths) {
            return Ok(Some(mask.clone()));
        }
        let mask = lengths.mask(device)?;
        known.insert(lengths, mask.clone());
        Ok(Some(mask))
    }
}

impl Lengths {
    /// Computes the mask on `device`.
    fn mask(self, device: &Device) -> Result<Tensor> {
        let first = self.key - self.query;
        let places: Vec<f32> = (0..self.key).map(|key| key as f32).collect();
        let keys = to_device(places, (1, self.key), device)?;
        let own = keys.narrow(1, first, self.query)?.t()?;
        let ahead = keys.broadcast_sub(&own)?; // [queries, keys]
        let mut hidden = ahead.gt(0f64)?.to_dtype(DType::F32)?;
        if let Some(window) = self.window {
            hidden = (hidden + ahead.le(-(window as f64))?.to_dtype(DType::F32)?)?;
        }
        Ok((hidden * HIDDEN)?)
    }
}

/// Segments of equal lengths.
#[derive(Debug)]
struct Batch {
    /// Indices of the segments, ascending.
    segments: Vec<usize>,
    query_starts: Vec<usize>,
    key_starts: Vec<usize>,
    lengths: Lengths,
}

/// Divides `segments` into batches of equal lengths.
fn batches(segments: &[Segment], heads: Heads) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut open: HashMap<Lengths, usize> = HashMap::new();
    for (index, segment) in segments.iter().enumerate() {
        let lengths = Lengths {
            query: segment.query_len,
            key: segment.key_len,
            window: heads.window.filter(|window| *window < segment.key_len),
        };
        let scores = heads.query * lengths.query * lengths.key;
        let most = (SCORES / scores.max(1)).max(1);
        let place = open.get(&lengths).copied();
        let place = match place.filter(|place| batches[*place].segments.len() < most) {
            Some(place) => place,
            None => {
                open.insert(lengths, batches.len());
                batches.push(Batch {
                    segments: Vec::new(),
                    query_starts: Vec::new(),
                    key_starts: Vec::new(),
                    lengths,
                });
                batches.len() - 1
            }
        };
        let batch = &mut batches[place];
        batch.segments.push(index);
        batch.query_starts.push(segment.query_start);
        batch.key_starts.push(segment.key_start);
    }
    batches
}

/// The rows `start..start + len` of `x` for each start, one after the other.
fn rows(x: &Tensor, starts: &[usize], len: usize) -> Result<Tensor> {
    if let [first, ..] = starts
        && starts.windows(2).all(|pair| pair[1] == pair[0] + len)
    {
        return Ok(x.narrow(0, *first, starts.len() * len)?);
    }
    let parts = starts.iter().map(|start| x.narrow(0, *start, len));
    let parts = parts.collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// Puts the rows of the batches, `len` per segment, into the order of the segments.
fn in_order(parts: &[Tensor], batches: &[Batch], len: impl Fn(&Batch) -> usize) -> Result<Tensor> {
    if let [all] = parts {
        return Ok(all.clone());
    }
    let mut of_segments = Vec::new();
    for (part, batch) in parts.iter().zip(batches) {
        for (place, segment) in batch.segments.iter().enumerate() {
            let rows = part.narrow(0, place * len(batch), len(batch))?;
            of_segments.push((*segment, rows));
        }
    }
    of_segments.sort_by_key(|(segment, _)| *segment);
    let rows: Vec<Tensor> = of_segments.into_iter().map(|(_, rows)| rows).collect();
    Ok(Tensor::cat(&rows, 0)?)
}

/// The output `[tokens, query heads * dim]`.
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    heads: Heads,
    masks: &Masks,
) -> Result<Tensor> {
    let batches = batches(segments, heads);
    let outputs = batches
        .iter()
        .map(|batch| PlainBatch::new((q, k, v), batch, heads, masks)?.output())
        .collect::<Result<Vec<_>>>()?;
    in_order(&outputs, &batches, |batch| batch.lengths.query)
}

/// Gradients with respect to q, k and v for `upstream`, the gradient of `output`, both `[tokens, query heads * dim]`.
pub(super) fn backward(
    inputs: (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    upstream: &Tensor,
    segments: &[Segment],
    heads: Heads,
    masks: &Masks,
) -> Result<(Tensor, Tensor, Tensor)> {
    let batches = batches(segments, heads);
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    for batch in &batches {
        let part = PlainBatch::new(inputs, batch, heads, masks)?;
        let (dq, dk, dv) = part.backward(output, upstream)?;
        dqs.push(dq);
        dks.push(dk);
        dvs.push(dv);
    }
    let of_keys = |parts: &[Tensor]| in_order(parts, &batches, |batch| batch.lengths.key);
    let dq = in_order(&dqs, &batches, |batch| batch.lengths.query)?;
    Ok((dq, of_keys(&dks)?, of_keys(&dvs)?))
}

/// One batch as stacked matrices, one for each segment and key/value head. The queries of the heads that share a
/// key/value head are rows of one matrix, so that keys and values are not repeated.
struct PlainBatch<'a> {
    /// `[segments * key/value heads, group * queries, dim]`.
    q: Tensor,
    /// `[segments * key/value heads, keys, dim]`.
    k: Tensor,
    /// As `k`.
    v: Tensor,
    mask: Option<Tensor>,
    heads: Heads,
    batch: &'a Batch,
}

impl<'a> PlainBatch<'a> {
    fn new(
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        batch: &'a Batch,
        heads: Heads,
        masks: &Masks,
    ) -> Result<Self> {
        let of_keys = |x: &Tensor| -> Result<Tensor> {
            let (n, len) = (batch.segments.len(), batch.lengths.key);
            let x =
                rows(x, &batch.key_starts, len)?.reshape((n, len, heads.key_value, heads.dim))?;
            let x = x.transpose(1, 2)?.contiguous()?;
            Ok(x.reshape((n * heads.key_value, len, heads.dim))?)
        };
        Ok(Self {
            q: Self::of_queries(q, batch, heads)?,
            k: of_keys(k)?,
            v: of_keys(v)?,
            mask: masks.get(batch.lengths, q.device())?,
            heads,
            batch,
        })
    }

    /// Stacks the batch's rows of `x` `[tokens, query heads * dim]` as the queries are.
    fn of_queries(x: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor> {
        let (n, len) = (batch.segments.len(), batch.lengths.query);
        let (key_value, group) = (heads.key_value, heads.group());
        let x = rows(x, &batch.query_starts, len)?;
        let x = x.reshape((n, len, key_value, group, heads.dim))?;
        let x = x.permute((0, 2, 3, 1, 4))?.contiguous()?;
        Ok(x.reshape((n * key_value, group * len, heads.dim))?)
    }

    /// Undoes [`Self::of_queries`]: `[segments * queries, query heads * dim]`.
    fn join_queries(&self, x: &Tensor) -> Result<Tensor> {
        let (n, len) = (self.batch.segments.len(), self.batch.lengths.query);
        let (key_value, group, dim) = (self.heads.key_value, self.heads.group(), self.heads.dim);
        let x = x.reshape((n, key_value, group, len, dim))?;
        let x = x.permute((0, 3, 1, 2, 4))?.contiguous()?;
        Ok(x.reshape((n * len, key_value * group * dim))?)
    }

    /// `[segments * keys, key/value heads * dim]`.
    fn join_keys(&self, x: &Tensor) -> Result<Tensor> {
        let (n, len) = (self.batch.segments.len(), self.batch.lengths.key);
        let (key_value, dim) = (self.heads.key_value, self.heads.dim);
        let x = x.reshape((n, key_value, len, dim))?;
        Ok(x.transpose(1, 2)?
            .contiguous()?
            .reshape((n * len, key_value * dim))?)
    }

    fn output(&self) -> Result<Tensor> {
        self.join_queries(&self.probabilities()?.matmul(&self.v)?)
    }

    /// `[segments * key/value heads, group * queries, keys]`, before the mask.
    fn scores(&self) -> Result<Tensor> {
        Ok((self.q.matmul(&self.k.transpose(1, 2)?)? * f64::from(self.heads.scale()))?)
    }

    /// As [`Self::scores`]; the softmax runs in f32.
    fn probabilities(&self) -> Result<Tensor> {
        let mut scores = self.scores()?;
        if let Some(cap) = self.heads.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        let stacked = scores.dims3()?;
        let mut scores = scores.to_dtype(DType::F32)?;
        if let Some(mask) = &self.mask {
            let Lengths { query, key, .. } = self.batch.lengths;
            let n = self.batch.segments.len() * self.heads.query;
            let masked = scores.reshape((n, query, key))?.broadcast_add(mask)?;
            scores = masked.reshape(stacked)?;
        }
        let shifted = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
            .exp()?;
        let p = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
        Ok(p.to_dtype(self.q.dtype())?)
    }

    /// Gradients with respect to the batch's rows of q, k and v.
    fn backward(&self, output: &Tensor, upstream: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let of_queries = |x| Self::of_queries(x, self.batch, self.heads);
        let (output, upstream) = (of_queries(output)?, of_queries(upstream)?);
        let delta = (&output * &upstream)?.sum_keepdim(D::Minus1)?;
        let p = self.probabilities()?;
        let dv = p.transpose(1, 2)?.matmul(&upstream)?;
        let dp = upstream.matmul(&self.v.transpose(1, 2)?)?;
        let mut ds = ((p * dp.broadcast_sub(&delta)?)? * f64::from(self.heads.scale()))?;
        if let Some(cap) = self.heads.softcap.map(f64::from) {
            let bent = (self.scores()? / cap)?.tanh()?;
            ds = (&ds * (1.0 - bent.sqr()?)?)?;
        }
        let dq = ds.matmul(&self.k)?;
        let dk = ds.transpose(1, 2)?.matmul(&self.q)?;
        Ok((
            self.join_queries(&dq)?,
            self.join_keys(&dk)?,
            self.join_keys(&dv)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(window: Option<usize>) -> Heads {
        Heads {
            query: 4,
            key_value: 2,
            dim: 6,
            window,
            scale: None,
            softcap: None,
        }
    }

    fn segment(query: (usize, usize), key: (usize, usize)) -> Segment {
        Segment {
            query_start: query.0,
            query_len: query.1,
            key_start: key.0,
            key_len: key.1,
        }
    }

    /// A mask hides the keys that [`Heads::visible`] does not name, with finite numbers.
    #[test]
    fn masks_hide_what_is_not_visible() -> Result<()> {
        let masks = Masks::default();
        for (query_len, key_len) in [(5, 5), (3, 8), (1, 6), (1, 1)] {
            for window in [None, Some(1), Some(3), Some(8), Some(100)] {
                let heads = heads(window);
                let segment = segment((0, query_len), (0, key_len));
                let lengths = batches(&[segment], heads)[0].lengths;
                let found = match masks.get(lengths, &Device::Cpu)? {
                    Some(mask) => mask.to_vec2::<f32>()?,
                    None => vec![vec![0.0; key_len]; query_len],
                };
                for (i, row) in found.iter().enumerate() {
                    let visible = heads.visible(&segment, i);
                    for (j, value) in row.iter().enumerate() {
                        let expected = if visible.contains(&j) { 0.0 } else { -1e30 };
                        assert_eq!(*value, expected, "{query_len} {key_len} {window:?}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_mask_is_built_once() -> Result<()> {
        let masks = Masks::default();
        let x = Tensor::zeros((12, 24), DType::F32, &Device::Cpu)?;
        let k = x.narrow(1, 0, 12)?;
        let segments = [0, 4, 8].map(|start| segment((start, 4), (start, 4)));
        for _layer in 0..3 {
            forward(&x, &k, &k, &segments, heads(None), &masks)?;
            forward(&x, &k, &k, &segments, heads(Some(2)), &masks)?;
            // This window hides nothing, so the mask is that without a window.
            forward(&x, &k, &k, &segments, heads(Some(4)), &masks)?;
        }
        assert_eq!(masks.0.lock().expect("no panic").len(), 2);
        Ok(())
    }

    #[test]
    fn segments_of_equal_lengths_are_one_batch_of_bounded_size() {
        let segments = [(0, 3), (3, 5), (8, 3), (11, 3)].map(|at| segment(at, at));
        let found = batches(&segments, heads(None));
        let found: Vec<&[usize]> = found.iter().map(|batch| &batch.segments[..]).collect();
        assert_eq!(found, [&[0, 2, 3][..], &[1]]);
        let long = SCORES.isqrt() / 2;
        let segments = [0, 1, 2].map(|i| segment((i * long, long), (i * long, long)));
        let sizes: Vec<usize> = batches(&segments, heads(None))
            .iter()
            .map(|batch| batch.segments.len())
            .collect();
        assert_eq!(sizes, [1, 1, 1]);
    }
}
