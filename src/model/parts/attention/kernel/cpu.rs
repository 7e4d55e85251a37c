//! Attention over f32 slices on the CPU: one task per segment and head, in blocks of queries. Probabilities are never
//! kept.

use std::ops::Range;

use candle_core::{Device, Tensor};
use monteclora_adapters::linalg::{Strided, gemm_f32};
use monteclora_adapters::simd::{dot, dot_fused, dots_fused, largest, vectorised};
use rayon::prelude::*;

use super::{Heads, Segment};
use crate::model::parts::activation::{exp, tanh};
use crate::model::parts::build_rows;

/// Number of query rows per block. Keys after the last query of a block are never multiplied.
const BLOCK: usize = 64;

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

/// Output `[tokens, heads * dim]` and the logarithm of each softmax's denominator, `[heads, tokens]`.
pub(super) fn forward(
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
                let (scores_of, rows_of) = ((rows, columns, dim), (rows, dim, columns));
                scores.clear();
                scores.resize(rows * columns, 0.0);
                let queries = head(q, segment.query_start + first, *h, heads.query, dim);
                let keys = head(k, segment.key_start + from, kv, heads.key_value, dim);
                gemm_f32(
                    scores_of,
                    &mut scores,
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
                            if let Some(cap) = heads.softcap {
                                for score in &mut row[start..end] {
                                    *score = cap * tanh(*score / cap);
                                }
                            }
                            log_sums.push(softmax_row(row, start, end));
                        }
                    },
                );
                let values = head(v, segment.key_start + from, kv, heads.key_value, dim);
                gemm_f32(
                    rows_of,
                    &mut out[first * dim..],
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

/// [`forward`] where every segment has one query, as in decoding: one task per segment and key head, which reads each
/// key and value once for all query heads of the group.
pub(super) fn forward_single(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tokens: usize,
    segments: &[Segment],
    heads: Heads,
) -> candle_core::Result<Tensor> {
    let Heads {
        query,
        key_value,
        dim,
        ..
    } = heads;
    let (group, scale) = (heads.group(), heads.scale());
    let (width, of_keys) = (query * dim, key_value * dim);
    let mut out = vec![0f32; tokens * width];
    let tasks = out.par_chunks_mut(group * dim).enumerate();
    tasks.for_each(|(task, out)| {
        let (segment, head) = (&segments[task / key_value], task % key_value);
        let visible = heads.visible(segment, 0);
        let queries = &q[segment.query_start * width + head * group * dim..][..group * dim];
        let place = |key: usize| {
            let at = (segment.key_start + key) * of_keys + head * dim;
            at..at + dim
        };
        vectorised(
            #[inline(always)]
            || {
                let n_keys = visible.len();
                let mut scores = vec![0f32; group * n_keys];
                for (query, scores) in queries
                    .chunks_exact(dim)
                    .zip(scores.chunks_exact_mut(n_keys))
                {
                    let mut keys = visible.clone().map(|key| &k[place(key)]);
                    let (fours, rest) = scores.as_chunks_mut::<4>();
                    for scores in fours {
                        let keys = std::array::from_fn(|_| keys.next().unwrap_or_default());
                        let [sums] = dots_fused([query], keys);
                        *scores = sums.map(|sum| scale * sum);
                    }
                    for (score, key) in rest.iter_mut().zip(keys) {
                        *score = scale * dot_fused(query, key);
                    }
                }
                for scores in scores.chunks_exact_mut(n_keys) {
                    if let Some(cap) = heads.softcap {
                        for score in scores.iter_mut() {
                            *score = cap * tanh(*score / cap);
                        }
                    }
                    softmax_row(scores, 0, n_keys);
                }
                for (column, key) in visible.enumerate() {
                    let value = &v[place(key)];
                    for (member, out) in out.chunks_exact_mut(dim).enumerate() {
                        let p = scores[member * n_keys + column];
                        for (out, value) in out.iter_mut().zip(value) {
                            *out = p.mul_add(*value, *out);
                        }
                    }
                }
            },
        );
    });
    Tensor::from_vec(out, (tokens, width), &Device::Cpu)
}

/// For each row, its segment and its index within the segment.
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

/// Concatenates the heads of each segment, `part(segment, head)` `[len, dim]`, to `[rows, heads * dim]`.
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

/// Softmax over `row[start..end]`, with zeros outside. Returns the logarithm of the sum of exponentials.
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

/// The inputs of the backward pass.
pub(super) struct Backward<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) output: &'a [f32],
    pub(super) upstream: &'a [f32],
    pub(super) log_sums: &'a [f32],
    pub(super) tokens: usize,
    pub(super) heads: Heads,
}

impl Backward<'_> {
    /// Gradients with respect to q, k (of `keys` rows) and v.
    pub(super) fn run(
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
        // One task per segment and key/value head: only this task adds to the head's gradients, in a fixed order.
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
                let (scores_of, rows_of) = ((rows, columns, dim), (rows, dim, columns));
                let keys_of = (columns, dim, rows);
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
                    scores_of,
                    &mut probabilities,
                    queries,
                    turned(keys),
                    scale,
                    false,
                );
                gemm_f32(
                    scores_of,
                    &mut grad_scores,
                    upstream,
                    turned(values),
                    1.0,
                    false,
                );
                let mut block = Scores {
                    probabilities: &mut probabilities,
                    gradients: &mut grad_scores,
                    columns,
                    softcap: self.heads.softcap,
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
                gemm_f32(keys_of, block_k, turned_scores, queries, scale, true);
                let turned_probabilities = Strided::transposed(&probabilities, columns);
                gemm_f32(
                    keys_of,
                    &mut dv[from * dim..],
                    turned_probabilities,
                    upstream,
                    1.0,
                    true,
                );
                let scores = Strided::rows(&grad_scores, columns);
                gemm_f32(rows_of, &mut dq[first * dim..], scores, keys, scale, false);
            }
            dqs.push(dq);
        }
        (dqs, dk, dv)
    }
}

/// A block of scores, row-major, and the gradients of their probabilities.
struct Scores<'a> {
    probabilities: &'a mut [f32],
    gradients: &'a mut [f32],
    columns: usize,
    softcap: Option<f32>,
}

impl Scores<'_> {
    /// Replaces the scores of row `i` by probabilities, and the gradients of the probabilities by the gradients of the
    /// scores, `dS = P * (dP - delta)`, times the slope of the scores' bound if they have one. Both are zero for hidden
    /// keys.
    #[inline(always)]
    fn softmax_backward(&mut self, i: usize, visible: Range<usize>, log_sum: f32, delta: f32) {
        let row = i * self.columns..(i + 1) * self.columns;
        let p = &mut self.probabilities[row.clone()];
        let s = &mut self.gradients[row];
        for hidden in [0..visible.start, visible.end..self.columns] {
            p[hidden.clone()].fill(0.0);
            s[hidden].fill(0.0);
        }
        let both = p[visible.clone()].iter_mut().zip(&mut s[visible]);
        match self.softcap {
            None => {
                for (p, s) in both {
                    *p = exp(*p - log_sum);
                    *s = *p * (*s - delta);
                }
            }
            Some(cap) => {
                for (p, s) in both {
                    let bent = tanh(*p / cap);
                    *p = exp(cap * bent - log_sum);
                    *s = *p * (*s - delta) * (1.0 - bent * bent);
                }
            }
        }
    }
}
