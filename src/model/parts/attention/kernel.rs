//! Causal attention over segments of different lengths, with grouped key/value heads. It is block-diagonal: packed rows
//! never see each other.

mod cpu;
pub(crate) mod plain;

use std::ops::Range;

use candle_core::Tensor;
use monteclora_adapters::linalg::on_cpu;
use monteclora_adapters::simd::has_fused;

use monteclora_adapters::Result;
use plain::Masks;

/// One sequence of a batch: its query rows and its key rows. The last query sees the last key.
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

/// Sizes and constants of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Number of query heads.
    pub(crate) query: usize,
    /// Number of key and value heads; divides `query`.
    pub(crate) key_value: usize,
    /// Number of entries per head.
    pub(crate) dim: usize,
    /// Number of keys that a query sees, its own included. `None` for all.
    pub(crate) window: Option<usize>,
    /// Factor of the scores. `None` for `dim^-1/2`.
    pub(crate) scale: Option<f32>,
    /// The bound on scores, `cap * tanh(score / cap)`, if there is one.
    pub(crate) softcap: Option<f32>,
}

impl Heads {
    fn scale(&self) -> f32 {
        self.scale
            .unwrap_or_else(|| (self.dim as f32).sqrt().recip())
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

/// The output, and the logarithm of each softmax's denominator, `[query heads, tokens]`. The logarithms are empty
/// unless the CPU loops computed them.
#[derive(Debug, Clone)]
pub(crate) struct Attended {
    /// `[tokens, query heads * dim]`.
    pub(crate) output: Tensor,
    log_sums: Vec<f32>,
}

/// `softmax(cap(scale q k^T)) v` within each segment; `q` `[tokens, heads * dim]`, `k`, `v` `[keys, key_value * dim]`.
pub(crate) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    heads: Heads,
    masks: &Masks,
) -> Result<Attended> {
    let tokens = q.dims2()?.0;
    let mut rows = segments.iter().zip(0..tokens);
    let is_single =
        segments.len() == tokens && rows.all(|(s, row)| (s.query_start, s.query_len) == (row, 1));
    if is_single && has_fused() {
        let fast = on_cpu([q, k, v], |[q, k, v]| {
            cpu::forward_single(q, k, v, tokens, segments, heads)
        })?;
        if let Some(output) = fast {
            return Ok(Attended {
                output: output?,
                log_sums: Vec::new(),
            });
        }
    }
    let fast = on_cpu([q, k, v], |[q, k, v]| {
        cpu::forward(q, k, v, tokens, segments, heads)
    })?;
    if let Some(attended) = fast {
        let (output, log_sums) = attended?;
        return Ok(Attended { output, log_sums });
    }
    Ok(Attended {
        output: plain::forward(q, k, v, segments, heads, masks)?,
        log_sums: Vec::new(),
    })
}

/// Gradients with respect to q, k and v for `upstream` `[tokens, heads * dim]`. Probabilities are recomputed.
///
/// With `P` the probabilities: `dV = P^T dO`, `dS = P * (dO V^T - rowsum(dO * O))`, `dQ = scale dS K`,
/// `dK = scale dS^T Q`. With a bound on scores, `dS` is multiplied by the bound's slope `1 - tanh^2`. Gradients of keys
/// and values are summed over the query heads of a group.
pub(crate) fn backward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    attended: &Attended,
    upstream: &Tensor,
    segments: &[Segment],
    heads: Heads,
    masks: &Masks,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tokens, keys) = (q.dims2()?.0, k.dims2()?.0);
    if !attended.log_sums.is_empty() {
        let tensors = [q, k, v, &attended.output, upstream];
        let fast = on_cpu(tensors, |[q, k, v, output, upstream]| {
            let inputs = cpu::Backward {
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
    let output = &attended.output;
    plain::backward((q, k, v), output, upstream, segments, heads, masks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parts::testing::{assert_close, composed, largest_difference, matrix};
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

    /// Any length, or one of two, so that some segments have equal lengths.
    fn length() -> impl Strategy<Value = (usize, usize)> {
        prop_oneof![(1usize..90, 0usize..5), Just((33, 0)), Just((5, 2))]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Loops, plain composition and candle's automatic differentiation agree on ragged, windowed, grouped shapes.
        #[test]
        fn fast_equals_plain_and_autograd(
            lengths in prop::collection::vec(length(), 1..6),
            groups in 1usize..4,
            key_value in 1usize..3,
            window in prop::option::of(1usize..70),
            scale in prop::option::of(0.1f32..1.0),
            softcap in prop::option::of(0.5f32..4.0),
        ) {
            let heads = Heads { query: key_value * groups, key_value, dim: 6, window, scale, softcap };
            let segments = segments(&lengths);
            let queries: usize = segments.iter().map(|s| s.query_len).sum();
            let keys: usize = segments.iter().map(|s| s.key_len).sum();
            let q = candle_core::Var::from_tensor(&matrix(queries, heads.query * 6, 0.1)).expect("var");
            let k = candle_core::Var::from_tensor(&matrix(keys, key_value * 6, 0.2)).expect("var");
            let v = candle_core::Var::from_tensor(&matrix(keys, key_value * 6, 0.3)).expect("var");
            let upstream = matrix(queries, heads.query * 6, 0.4);
            let masks = Masks::default();
            let reference = plain::forward(q.as_tensor(), k.as_tensor(), v.as_tensor(), &segments, heads, &masks).expect("plain");
            let grads = (&reference * &upstream).and_then(|p| p.sum_all()).and_then(|s| s.backward()).expect("autograd");
            let (q0, k0, v0) = (q.as_tensor().detach(), k.as_tensor().detach(), v.as_tensor().detach());
            let attended = forward(&q0, &k0, &v0, &segments, heads, &masks).expect("forward");
            prop_assert!(largest_difference(&attended.output, &reference) < 1e-5);
            let fast = backward((&q0, &k0, &v0), &attended, &upstream, &segments, heads, &masks).expect("backward");
            let expected = [&q, &k, &v].map(|var| grads.get(var.as_tensor()).expect("gradient"));
            for (fast, expected) in [fast.0, fast.1, fast.2].iter().zip(expected) {
                prop_assert!(largest_difference(fast, expected) < 2e-5);
            }
            for [q, k, v, upstream] in composed([&q0, &k0, &v0, &upstream]).expect("held") {
                let masks = Masks::default();
                let attended = forward(&q, &k, &v, &segments, heads, &masks).expect("forward");
                assert_close(&attended.output, &reference, 1e-5);
                let found = backward((&q, &k, &v), &attended, &upstream, &segments, heads, &masks).expect("backward");
                for (found, expected) in [found.0, found.1, found.2].iter().zip(expected) {
                    assert_close(found, expected, 2e-5);
                }
            }
        }
    }
}
