//! Causal attention over ragged segments (block-diagonal, so packed rows never see each other), with grouped key/value heads.

use std::ops::Range;

use candle_core::{D, DType, Tensor};
use monteclora_adapters::linalg::{Strided, gemm_f32, on_cpu};
use monteclora_adapters::simd::{dot, largest, vectorised};
use rayon::prelude::*;

use super::build_rows;
use super::swiglu::exp;
use crate::model::Result;

/// Query rows handled at a time; keys above the diagonal of a block are never multiplied.
const BLOCK: usize = 64;

/// One sequence of a batch: its rows among the queries and among the keys. The last query sees the last key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub query_start: usize,
    /// Number of query rows.
    pub query_len: usize,
    /// First key row.
    pub key_start: usize,
    /// Number of key rows, at least `query_len`.
    pub key_len: usize,
}

/// Sizes that do not change within a layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`.
    pub key_value: usize,
    /// Entries a head.
    pub dim: usize,
    /// Keys a query may look back on, itself included; all when none.
    pub window: Option<usize>,
}

impl Heads {
    fn scale(&self) -> f32 {
        (self.dim as f32).sqrt().recip()
    }

    fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// Keys visible to query `i` of `segment`, relative to the segment's first key.
    fn visible(&self, segment: &Segment, i: usize) -> Range<usize> {
        let end = segment.key_len - segment.query_len + i + 1;
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        start..end
    }
}

/// Output and the logarithm of each softmax's denominator, `[query heads, tokens]` (empty off the CPU path).
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[tokens, query heads * dim]`.
    pub output: Tensor,
    log_sums: Vec<f32>,
}

/// `softmax(q k^T / sqrt(dim)) v` within each segment; `q` `[tokens, heads * dim]`, `k`, `v` `[keys, key_value * dim]`.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    heads: Heads,
) -> Result<Attended> {
    let tokens = q.dims2()?.0;
    let fast = on_cpu([q, k, v], |[q, k, v]| {
        forward_cpu(q, k, v, tokens, segments, heads)
    })?;
    if let Some(attended) = fast {
        let (output, log_sums) = attended?;
        return Ok(Attended { output, log_sums });
    }
    let mut outputs = Vec::with_capacity(segments.len());
    for segment in segments {
        let part = PlainSegment::new(q, k, v, segment, heads)?;
        outputs.push(part.join(&part.probabilities()?.matmul(&part.v)?)?);
    }
    Ok(Attended {
        output: Tensor::cat(&outputs, 0)?,
        log_sums: Vec::new(),
    })
}

/// Gradients with respect to q, k and v for `upstream` `[tokens, heads * dim]`; probabilities are computed again.
///
/// With `P` the probabilities: `dV = P^T dO`, `dS = P * (dO V^T - rowsum(dO * O))`, `dQ = dS K / sqrt(dim)`,
/// `dK = dS^T Q / sqrt(dim)`; key/value gradients sum over the query heads of a group.
pub fn backward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    attended: &Attended,
    upstream: &Tensor,
    segments: &[Segment],
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tokens, keys) = (q.dims2()?.0, k.dims2()?.0);
    if !attended.log_sums.is_empty() {
        let tensors = [q, k, v, &attended.output, upstream];
        let fast = on_cpu(tensors, |[q, k, v, output, upstream]| {
            let inputs = Backward {
                q,
                k,
                v,
                output,
                upstream,
                log_sums: &attended.log_sums,
                tokens,
                heads,
            };
            inputs.run(keys, segments)
        })?;
        if let Some(gradients) = fast {
            return Ok(gradients?);
        }
    }
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    for segment in segments {
        let part = PlainSegment::new(q, k, v, segment, heads)?;
        let (dq, dk, dv) =
            part.backward(&upstream.narrow(0, segment.query_start, segment.query_len)?)?;
        dqs.push(dq);
        dks.push(dk);
        dvs.push(dv);
    }
    Ok((
        Tensor::cat(&dqs, 0)?,
        Tensor::cat(&dks, 0)?,
        Tensor::cat(&dvs, 0)?,
    ))
}

fn head<'a>(data: &'a [f32], row: usize, head: usize, n_heads: usize, dim: usize) -> Strided<'a> {
    let width = n_heads * dim;
    Strided {
        data: &data[row * width + head * dim..],
        row: width,
        column: 1,
    }
}

fn turned(view: Strided<'_>) -> Strided<'_> {
    Strided {
        data: view.data,
        row: view.column,
        column: view.row,
    }
}

fn forward_cpu(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tokens: usize,
    segments: &[Segment],
    heads: Heads,
) -> candle_core::Result<(Tensor, Vec<f32>)> {
    let dim = heads.dim;
    let tasks: Vec<(&Segment, usize)> = segments
        .iter()
        .flat_map(|s| (0..heads.query).map(move |h| (s, h)))
        .collect();
    let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks
        .par_iter()
        .map(|(segment, h)| {
            let kv = h / heads.group();
            let mut out = vec![0f32; segment.query_len * dim];
            let mut log_sums = Vec::with_capacity(segment.query_len);
            let mut scores = Vec::new();
            for first in (0..segment.query_len).step_by(BLOCK) {
                let rows = BLOCK.min(segment.query_len - first);
                let from = heads.visible(segment, first).start;
                let columns = heads.visible(segment, first + rows - 1).end - from;
                scores.clear();
                scores.resize(rows * columns, 0.0);
                let queries = head(q, segment.query_start + first, *h, heads.query, dim);
                let keys = head(k, segment.key_start + from, kv, heads.key_value, dim);
                gemm_f32(
                    (rows, columns, dim),
                    &mut scores,
                    columns,
                    false,
                    queries,
                    turned(keys),
                    heads.scale(),
                    false,
                );
                vectorised(
                    #[inline(always)]
                    || {
                        for (i, row) in scores.chunks_exact_mut(columns).enumerate() {
                            let visible = heads.visible(segment, first + i);
                            let (start, end) = (visible.start - from, visible.end - from);
                            log_sums.push(softmax_row(row, start, end));
                        }
                    },
                );
                let values = head(v, segment.key_start + from, kv, heads.key_value, dim);
                gemm_f32(
                    (rows, dim, columns),
                    &mut out[first * dim..],
                    dim,
                    false,
                    Strided::rows(&scores, columns),
                    values,
                    1.0,
                    false,
                );
            }
            (out, log_sums)
        })
        .collect();
    let mut log_sums = vec![0f32; heads.query * tokens];
    for ((segment, h), (_, sums)) in tasks.iter().zip(&parts) {
        let start = h * tokens + segment.query_start;
        log_sums[start..start + segment.query_len].copy_from_slice(sums);
    }
    let owners = owners(tokens, segments, |s| (s.query_start, s.query_len));
    let output = gather_heads(&owners, heads.query, dim, |segment, h| {
        &parts[segment * heads.query + h].0
    })?;
    Ok((output, log_sums))
}

/// For each row, the segment it belongs to and its place there.
fn owners(
    rows: usize,
    segments: &[Segment],
    range: impl Fn(&Segment) -> (usize, usize),
) -> Vec<Option<(usize, usize)>> {
    let mut owners = vec![None; rows];
    for (index, segment) in segments.iter().enumerate() {
        let (start, len) = range(segment);
        for (place, owner) in owners[start..start + len].iter_mut().enumerate() {
            *owner = Some((index, place));
        }
    }
    owners
}

/// Lays the heads of each segment, `part(segment, head)` `[len, dim]`, side by side: `[rows, heads * dim]`.
fn gather_heads<'a>(
    owners: &[Option<(usize, usize)>],
    n_heads: usize,
    dim: usize,
    part: impl Fn(usize, usize) -> &'a [f32] + Sync,
) -> candle_core::Result<Tensor> {
    let [gathered] = build_rows(
        owners.len(),
        n_heads * dim,
        #[inline(always)]
        |row, [out]| {
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let values = owners[row]
                    .map(|(segment, place)| &part(segment, head)[place * dim..][..dim])
                    .unwrap_or_default();
                for (i, out) in out.iter_mut().enumerate() {
                    out.write(values.get(i).copied().unwrap_or_default());
                }
            }
        },
    )?;
    Ok(gathered)
}

/// Softmax over `row[start..end]`, zero outside; returns the logarithm of the sum of exponentials.
#[inline(always)]
fn softmax_row(row: &mut [f32], start: usize, end: usize) -> f32 {
    row[..start].fill(0.0);
    row[end..].fill(0.0);
    let row = &mut row[start..end];
    let largest = largest(row);
    for value in row.iter_mut() {
        *value = exp(*value - largest);
    }
    let sum = dot([&*row]);
    let inverse = sum.recip();
    for value in row.iter_mut() {
        *value *= inverse;
    }
    largest + sum.ln()
}

struct Backward<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    output: &'a [f32],
    upstream: &'a [f32],
    log_sums: &'a [f32],
    tokens: usize,
    heads: Heads,
}

impl Backward<'_> {
    fn run(
        &self,
        keys: usize,
        segments: &[Segment],
    ) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
        let Heads {
            query,
            key_value,
            dim,
            ..
        } = self.heads;
        let group = self.heads.group();
        let tasks: Vec<(&Segment, usize)> = segments
            .iter()
            .flat_map(|s| (0..key_value).map(move |h| (s, h)))
            .collect();
        // One task a key/value head: it alone adds to that head's gradients, in a fixed order.
        let parts: Vec<_> = tasks
            .par_iter()
            .map(|(segment, kv)| self.key_value_head(segment, *kv))
            .collect();
        let of = |segment: usize, kv: usize| &parts[segment * key_value + kv];
        let queries = owners(self.tokens, segments, |s| (s.query_start, s.query_len));
        let keys = owners(keys, segments, |s| (s.key_start, s.key_len));
        Ok((
            gather_heads(&queries, query, dim, |s, h| &of(s, h / group).0[h % group])?,
            gather_heads(&keys, key_value, dim, |s, kv| &of(s, kv).1)?,
            gather_heads(&keys, key_value, dim, |s, kv| &of(s, kv).2)?,
        ))
    }

    fn key_value_head(&self, segment: &Segment, kv: usize) -> (Vec<Vec<f32>>, Vec<f32>, Vec<f32>) {
        let Heads {
            query,
            key_value,
            dim,
            ..
        } = self.heads;
        let scale = self.heads.scale();
        let group = self.heads.group();
        let mut dqs = Vec::with_capacity(group);
        let mut dk = vec![0f32; segment.key_len * dim];
        let mut dv = vec![0f32; segment.key_len * dim];
        let (mut probabilities, mut grad_scores) = (Vec::new(), Vec::new());
        for h in kv * group..(kv + 1) * group {
            let mut dq = vec![0f32; segment.query_len * dim];
            for first in (0..segment.query_len).step_by(BLOCK) {
                let rows = BLOCK.min(segment.query_len - first);
                let from = self.heads.visible(segment, first).start;
                let columns = self.heads.visible(segment, first + rows - 1).end - from;
                let row0 = segment.query_start + first;
                let queries = head(self.q, row0, h, query, dim);
                let upstream = head(self.upstream, row0, h, query, dim);
                let keys = head(self.k, segment.key_start + from, kv, key_value, dim);
                let values = head(self.v, segment.key_start + from, kv, key_value, dim);
                for buffer in [&mut probabilities, &mut grad_scores] {
                    buffer.clear();
                    buffer.resize(rows * columns, 0f32);
                }
                gemm_f32(
                    (rows, columns, dim),
                    &mut probabilities,
                    columns,
                    false,
                    queries,
                    turned(keys),
                    scale,
                    false,
                );
                gemm_f32(
                    (rows, columns, dim),
                    &mut grad_scores,
                    columns,
                    false,
                    upstream,
                    turned(values),
                    1.0,
                    false,
                );
                let mut block = Scores {
                    probabilities: &mut probabilities,
                    gradients: &mut grad_scores,
                    columns,
                };
                vectorised(
                    #[inline(always)]
                    || {
                        for i in 0..rows {
                            let visible = self.heads.visible(segment, first + i);
                            let at = (row0 + i) * query * dim + h * dim;
                            let (g, o) = (&self.upstream[at..at + dim], &self.output[at..at + dim]);
                            block.softmax_backward(
                                i,
                                visible.start - from..visible.end - from,
                                self.log_sums[h * self.tokens + row0 + i],
                                dot([g, o]),
                            );
                        }
                    },
                );
                let block_k = &mut dk[from * dim..];
                let turned_scores = Strided::transposed(&grad_scores, columns);
                gemm_f32(
                    (columns, dim, rows),
                    block_k,
                    dim,
                    true,
                    turned_scores,
                    queries,
                    scale,
                    false,
                );
                let turned_probabilities = Strided::transposed(&probabilities, columns);
                gemm_f32(
                    (columns, dim, rows),
                    &mut dv[from * dim..],
                    dim,
                    true,
                    turned_probabilities,
                    upstream,
                    1.0,
                    false,
                );
                let scores = Strided::rows(&grad_scores, columns);
                gemm_f32(
                    (rows, dim, columns),
                    &mut dq[first * dim..],
                    dim,
                    false,
                    scores,
                    keys,
                    scale,
                    false,
                );
            }
            dqs.push(dq);
        }
        (dqs, dk, dv)
    }
}

/// A block of scores, row-major, and the gradients of its probabilities.
struct Scores<'a> {
    probabilities: &'a mut [f32],
    gradients: &'a mut [f32],
    columns: usize,
}

impl Scores<'_> {
    /// Turns row `i` into probabilities and their gradients into those of the scores, `dS = P * (dP - delta)`; zero where the key
    /// is hidden.
    #[inline(always)]
    fn softmax_backward(&mut self, i: usize, visible: Range<usize>, log_sum: f32, delta: f32) {
        let row = i * self.columns..(i + 1) * self.columns;
        let p = &mut self.probabilities[row.clone()];
        let s = &mut self.gradients[row];
        for hidden in [0..visible.start, visible.end..self.columns] {
            p[hidden.clone()].fill(0.0);
            s[hidden].fill(0.0);
        }
        for (p, s) in p[visible.clone()].iter_mut().zip(&mut s[visible]) {
            *p = exp(*p - log_sum);
            *s = *p * (*s - delta);
        }
    }
}

/// One segment as batched matrices, for devices without the loops above.
struct PlainSegment {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    heads: Heads,
}

impl PlainSegment {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, segment: &Segment, heads: Heads) -> Result<Self> {
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

    /// `[heads, queries, keys]`; the softmax runs in f32.
    fn probabilities(&self) -> Result<Tensor> {
        let scores = (self.q.matmul(&self.k.transpose(1, 2)?)? * f64::from(self.heads.scale()))?;
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

    fn backward(&self, upstream: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (n, len, dim) = self.q.dims3()?;
        let upstream = upstream
            .reshape((len, n, dim))?
            .transpose(0, 1)?
            .contiguous()?;
        let p = self.probabilities()?;
        let dv = p.transpose(1, 2)?.contiguous()?.matmul(&upstream)?;
        let dp = upstream.matmul(&self.v.transpose(1, 2)?)?;
        let delta = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let ds = ((p * dp.broadcast_sub(&delta)?)? * f64::from(self.heads.scale()))?;
        let dq = ds.matmul(&self.k)?;
        let dk = ds.transpose(1, 2)?.contiguous()?.matmul(&self.q)?;
        Ok((
            self.join(&dq)?,
            self.sum_groups(&dk)?,
            self.sum_groups(&dv)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{largest_difference, matrix};
    use super::*;
    use proptest::prelude::*;

    fn segments(lengths: &[(usize, usize)]) -> Vec<Segment> {
        let (mut query_start, mut key_start) = (0, 0);
        lengths
            .iter()
            .map(|(query_len, extra)| {
                let segment = Segment {
                    query_start,
                    query_len: *query_len,
                    key_start,
                    key_len: query_len + extra,
                };
                query_start += query_len;
                key_start += query_len + extra;
                segment
            })
            .collect()
    }

    fn plain(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: &[Segment],
        heads: Heads,
    ) -> Result<Tensor> {
        let parts = segments
            .iter()
            .map(|s| {
                let part = PlainSegment::new(q, k, v, s, heads)?;
                part.join(&part.probabilities()?.matmul(&part.v)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Loops, plain composition and candle's automatic differentiation agree on ragged, windowed, grouped shapes.
        #[test]
        fn fast_equals_plain_and_autograd(
            lengths in prop::collection::vec((1usize..90, 0usize..5), 1..4),
            groups in 1usize..4,
            key_value in 1usize..3,
            window in prop::option::of(1usize..70),
        ) {
            let heads = Heads { query: key_value * groups, key_value, dim: 6, window };
            let segments = segments(&lengths);
            let queries: usize = segments.iter().map(|s| s.query_len).sum();
            let keys: usize = segments.iter().map(|s| s.key_len).sum();
            let q = candle_core::Var::from_tensor(&matrix(queries, heads.query * 6, 0.1)).expect("var");
            let k = candle_core::Var::from_tensor(&matrix(keys, key_value * 6, 0.2)).expect("var");
            let v = candle_core::Var::from_tensor(&matrix(keys, key_value * 6, 0.3)).expect("var");
            let upstream = matrix(queries, heads.query * 6, 0.4);
            let reference = plain(q.as_tensor(), k.as_tensor(), v.as_tensor(), &segments, heads).expect("plain");
            let grads = (&reference * &upstream).and_then(|p| p.sum_all()).and_then(|s| s.backward()).expect("autograd");
            let (q0, k0, v0) = (q.as_tensor().detach(), k.as_tensor().detach(), v.as_tensor().detach());
            let attended = forward(&q0, &k0, &v0, &segments, heads).expect("forward");
            prop_assert!(largest_difference(&attended.output, &reference) < 1e-5);
            let fast = backward((&q0, &k0, &v0), &attended, &upstream, &segments, heads).expect("backward");
            let composed = Attended { output: attended.output.clone(), log_sums: Vec::new() };
            let slow = backward((&q0, &k0, &v0), &composed, &upstream, &segments, heads).expect("plain backward");
            let expected = [&q, &k, &v].map(|var| grads.get(var.as_tensor()).expect("gradient"));
            for ((fast, slow), expected) in [fast.0, fast.1, fast.2].iter().zip([slow.0, slow.1, slow.2]).zip(expected) {
                prop_assert!(largest_difference(fast, expected) < 2e-5);
                prop_assert!(largest_difference(&slow, expected) < 2e-5);
            }
        }
    }
}
