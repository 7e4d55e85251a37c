//! Rotary position embedding: it rotates pairs of entries of a head by an angle that grows with the position.

use candle_core::{Device, Tensor};
use monteclora_adapters::device::to_device;
use monteclora_adapters::linalg::on_cpu;
use monteclora_converters::architecture::{Pairs, Rope};

use super::attention::Segment;
use super::build_rows;
use monteclora_adapters::Result;

/// Cosines and sines of a batch's positions, each `[tokens, dim / 2]`, for the first `dim` entries of each head.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
    pairs: Pairs,
    head_dim: usize,
    /// Factors of the queries, `[tokens, 1]`, if they depend on the position.
    query_scales: Option<Tensor>,
}

impl Rotation {
    /// The rotation by the angles `position * frequency`, in f32 as in Hugging Face. If the frequencies depend on the
    /// length, the length is the number of the segment's keys, so that a sequence does not depend on its batch.
    pub(crate) fn new(
        rope: &Rope,
        (pairs, head_dim): (Pairs, usize),
        positions: &[u32],
        segments: &[Segment],
        device: &Device,
    ) -> Result<Self> {
        let mut angles = Vec::with_capacity(positions.len() * rope.dim / 2);
        let mut extend = |positions: &[u32], length: usize| {
            let frequencies = rope.frequencies(length);
            for position in positions {
                angles.extend(frequencies.iter().map(|f| *position as f32 * f));
            }
        };
        match rope.threshold() {
            None => extend(positions, 0),
            Some(_) => {
                for segment in segments {
                    let range = segment.query_start..segment.query_start + segment.query_len;
                    extend(&positions[range], segment.key_len);
                }
            }
        }
        let scaling = rope.query_scaling.map(|scaling| {
            let scales = positions.iter().map(|position| scaling.at(*position));
            to_device(scales.collect::<Vec<f32>>(), (positions.len(), 1), device)
        });
        let mut rotation = Self::of_angles(&angles, rope.dim / 2, rope.attention_factor(), device)?;
        rotation.pairs = pairs;
        rotation.head_dim = head_dim;
        rotation.query_scales = scaling.transpose()?;
        Ok(rotation)
    }

    /// The rotation of whole heads by these angles, with pairs across the two halves.
    fn of_angles(angles: &[f32], half: usize, factor: f32, device: &Device) -> Result<Self> {
        let shape = (angles.len() / half.max(1), half);
        let table = |f: fn(f32) -> f32| {
            to_device(
                angles.iter().map(|a| f(*a) * factor).collect(),
                shape,
                device,
            )
        };
        Ok(Self {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
            pairs: Pairs::Halves,
            head_dim: 2 * half,
            query_scales: None,
        })
    }

    /// The rotation of whole heads by these frequencies, with pairs across the two halves.
    #[cfg(test)]
    pub(crate) fn plain(positions: &[u32], frequencies: &[f32], device: &Device) -> Result<Self> {
        let turned = |p: &u32| -> Vec<f32> { frequencies.iter().map(|f| *p as f32 * f).collect() };
        let angles: Vec<f32> = positions.iter().flat_map(turned).collect();
        Self::of_angles(&angles, frequencies.len(), 1.0, device)
    }

    /// Rotates `x` `[tokens, heads * head_dim]`: `(a, b) -> (a cos - b sin, b cos + a sin)` for the pairs of each head.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.rotate(x, 1.0)
    }

    /// Gradient with respect to `x`: the rotation by the negative angle.
    pub(crate) fn backward(&self, upstream: &Tensor) -> Result<Tensor> {
        self.rotate(upstream, -1.0)
    }

    /// Multiplies queries, or their gradients, by the factors of their positions.
    pub(crate) fn scale_queries(&self, queries: Tensor) -> Result<Tensor> {
        match &self.query_scales {
            None => Ok(queries),
            Some(scales) => Ok(queries.broadcast_mul(&scales.to_dtype(queries.dtype())?)?),
        }
    }

    fn rotate(&self, x: &Tensor, sign: f32) -> Result<Tensor> {
        let (tokens, columns) = x.dims2()?;
        let half = self.cos.dims2()?.1;
        let head_dim = self.head_dim;
        let fast = on_cpu([x, &self.cos, &self.sin], |[x, cos, sin]| {
            build_rows(
                tokens,
                columns,
                #[inline(always)]
                |row, [out]| {
                    let range = row * half..(row + 1) * half;
                    let (cos, sin) = (&cos[range.clone()], &sin[range]);
                    let x = &x[row * columns..(row + 1) * columns];
                    let heads = out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim));
                    for (out, x) in heads {
                        let (x, rest) = x.split_at(2 * half);
                        let (out, out_rest) = out.split_at_mut(2 * half);
                        match self.pairs {
                            Pairs::Halves => {
                                let (first, second) = x.split_at(half);
                                let (out_first, out_second) = out.split_at_mut(half);
                                let halves = first.iter().zip(second).zip(cos.iter().zip(sin));
                                let slots = out_first.iter_mut().zip(out_second);
                                for ((one, two), ((a, b), (cos, sin))) in slots.zip(halves) {
                                    one.write(a * cos - sign * b * sin);
                                    two.write(b * cos + sign * a * sin);
                                }
                            }
                            Pairs::Neighbours => {
                                let pairs = x.chunks_exact(2).zip(cos.iter().zip(sin));
                                for (out, (pair, (cos, sin))) in out.chunks_exact_mut(2).zip(pairs)
                                {
                                    out[0].write(pair[0] * cos - sign * pair[1] * sin);
                                    out[1].write(pair[1] * cos + sign * pair[0] * sin);
                                }
                            }
                        }
                        for (out, x) in out_rest.iter_mut().zip(rest) {
                            out.write(*x);
                        }
                    }
                },
            )
        })?;
        if let Some(built) = fast {
            let [y] = built?;
            return Ok(y);
        }
        let heads = columns / head_dim;
        let x = x.reshape((tokens, heads, head_dim))?;
        let turning = x.narrow(2, 0, 2 * half)?.contiguous()?;
        // The shape that separates the pairs, and the dimension that contains the two entries of a pair.
        let (shape, between) = match self.pairs {
            Pairs::Halves => ((tokens, heads, 2, half), 2),
            Pairs::Neighbours => ((tokens, heads, half, 2), 3),
        };
        let turning = turning.reshape(shape)?;
        let (first, second) = (
            turning.narrow(between, 0, 1)?,
            turning.narrow(between, 1, 1)?,
        );
        let angles = match self.pairs {
            Pairs::Halves => (tokens, 1, 1, half),
            Pairs::Neighbours => (tokens, 1, half, 1),
        };
        let dtype = x.dtype();
        let cos = self.cos.reshape(angles)?.to_dtype(dtype)?;
        let sin = (self.sin.reshape(angles)? * f64::from(sign))?.to_dtype(dtype)?;
        let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        let turned = Tensor::cat(&[rotated_first, rotated_second], between)?;
        let turned = turned.reshape((tokens, heads, 2 * half))?;
        let whole = match head_dim - 2 * half {
            0 => turned,
            rest => Tensor::cat(&[turned, x.narrow(2, 2 * half, rest)?.contiguous()?], 2)?,
        };
        Ok(whole.reshape((tokens, columns))?)
    }
}

#[cfg(test)]
mod tests {
    use monteclora_converters::architecture::{LongRopeScaling, QueryScaling, RopeKind};

    use super::super::testing::{
        assert_close, composed, devices, largest_difference, matrix, matrix_on,
    };
    use super::*;

    /// Both ways to pair entries, for whole heads and for parts of heads.
    fn rotations(positions: &[u32], device: &Device) -> Result<Vec<Rotation>> {
        let rope = Rope::new(RopeKind::Default, 10.0, 4, 64);
        let mut all = Vec::new();
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            for head_dim in [4, 6] {
                let of = (pairs, head_dim);
                all.push(Rotation::new(&rope, of, positions, &[], device)?);
            }
        }
        Ok(all)
    }

    #[test]
    fn backward_undoes_forward() -> Result<()> {
        for device in devices() {
            for rotation in rotations(&[0, 1, 7, 300], device)? {
                let x = matrix_on(device, 4, 12, 0.2);
                let there = rotation.forward(&x)?;
                assert!(largest_difference(&there, &x) > 0.1);
                assert_close(&rotation.backward(&there)?, &x, 1e-5);
            }
        }
        Ok(())
    }

    #[test]
    fn fast_path_equals_the_plain_one() -> Result<()> {
        let x = matrix(2, 12, 0.4);
        for [held] in composed([&x])? {
            let own_loops = rotations(&[3, 9], &Device::Cpu)?;
            for (fast, plain) in own_loops.iter().zip(rotations(&[3, 9], held.device())?) {
                assert_close(&plain.forward(&held)?, &fast.forward(&x)?, 1e-6);
            }
        }
        Ok(())
    }

    /// Each sequence uses the frequencies for its own length.
    #[test]
    fn long_sequences_turn_by_their_own_frequencies() -> Result<()> {
        let kind = RopeKind::LongRope(LongRopeScaling {
            short_factor: vec![1.0, 2.0],
            long_factor: vec![3.0, 5.0],
            factor: None,
            original_max_position_embeddings: 3,
            attention_factor: Some(1.0),
        });
        let mut rope = Rope::new(kind, 100.0, 4, 12);
        rope.query_scaling = Some(QueryScaling {
            beta: 0.5,
            original_max_position_embeddings: 2,
        });
        let segment = |start, len| Segment {
            query_start: start,
            query_len: len,
            key_start: start,
            key_len: len,
        };
        let positions = [0, 1, 2, 0, 1, 2, 3];
        let segments = [segment(0, 3), segment(3, 4)];
        let of = (Pairs::Halves, 4);
        let rotation = Rotation::new(&rope, of, &positions, &segments, &Device::Cpu)?;
        let short = Rotation::plain(&positions[..3], &[1.0, 0.1 / 2.0], &Device::Cpu)?;
        let long = Rotation::plain(&positions[3..], &[1.0 / 3.0, 0.1 / 5.0], &Device::Cpu)?;
        let x = matrix(7, 8, 0.3);
        let apart = [
            short.forward(&x.narrow(0, 0, 3)?)?,
            long.forward(&x.narrow(0, 3, 4)?)?,
        ];
        let together = rotation.forward(&x)?;
        assert!(largest_difference(&together, &Tensor::cat(&apart, 0)?) < 1e-6);
        let scaled = rotation.scale_queries(x.clone())?;
        let at = |row: usize| -> Result<f32> {
            let ratio = (scaled.get(row)?.get(0)? / x.get(row)?.get(0)?)?;
            Ok(ratio.to_scalar::<f32>()?)
        };
        assert_eq!(at(1)?, 1.0);
        assert!((at(6)? - (1.0 + 0.5 * 2f32.ln())).abs() < 1e-6);
        Ok(())
    }
}
