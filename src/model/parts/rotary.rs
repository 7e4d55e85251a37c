//! Rotary position embedding in the rotate-half form of Hugging Face checkpoints.

use candle_core::{Device, Tensor};
use monteclora_adapters::linalg::on_cpu;

use super::build_rows;
use monteclora_adapters::Result;

/// Cosines and sines of a batch's positions, each `[tokens, head_dim / 2]`.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// Angles `position * inverse_frequency`, in f32 as Hugging Face computes them.
    pub(crate) fn new(
        positions: &[u32],
        inverse_frequencies: &[f32],
        device: &Device,
    ) -> Result<Self> {
        let shape = (positions.len(), inverse_frequencies.len());
        let angles = positions
            .iter()
            .flat_map(|p| inverse_frequencies.iter().map(move |f| *p as f32 * f))
            .collect::<Vec<f32>>();
        let table = |f: fn(f32) -> f32| {
            Tensor::from_vec(angles.iter().map(|a| f(*a)).collect(), shape, device)
        };
        Ok(Self {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
        })
    }

    /// Rotates `x` `[tokens, heads * head_dim]`: `(a, b) -> (a cos - b sin, b cos + a sin)` for the halves of each head.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.rotate(x, 1.0)
    }

    /// Gradient with respect to `x`: the rotation by the negative angle.
    pub(crate) fn backward(&self, upstream: &Tensor) -> Result<Tensor> {
        self.rotate(upstream, -1.0)
    }

    fn rotate(&self, x: &Tensor, sign: f32) -> Result<Tensor> {
        let (tokens, columns) = x.dims2()?;
        let half = self.cos.dims2()?.1;
        let fast = on_cpu([x, &self.cos, &self.sin], |[x, cos, sin]| {
            build_rows(
                tokens,
                columns,
                #[inline(always)]
                |row, [out]| {
                    let range = row * half..(row + 1) * half;
                    let (cos, sin) = (&cos[range.clone()], &sin[range]);
                    let x = &x[row * columns..(row + 1) * columns];
                    for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                        let (first, second) = x.split_at(half);
                        let (out_first, out_second) = out.split_at_mut(half);
                        let halves = first.iter().zip(second).zip(cos.iter().zip(sin));
                        let slots = out_first.iter_mut().zip(out_second);
                        for ((one, two), ((a, b), (cos, sin))) in slots.zip(halves) {
                            one.write(a * cos - sign * b * sin);
                            two.write(b * cos + sign * a * sin);
                        }
                    }
                },
            )
        })?;
        if let Some(built) = fast {
            let [y] = built?;
            return Ok(y);
        }
        let heads = columns / (2 * half);
        let x = x.reshape((tokens, heads, 2, half))?;
        let first = x.narrow(2, 0, 1)?;
        let second = x.narrow(2, 1, 1)?;
        let dtype = x.dtype();
        let cos = self.cos.reshape((tokens, 1, 1, half))?.to_dtype(dtype)?;
        let sin = (self.sin.reshape((tokens, 1, 1, half))? * f64::from(sign))?.to_dtype(dtype)?;
        let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[rotated_first, rotated_second], 2)?.reshape((tokens, columns))?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{largest_difference, matrix};
    use super::*;

    #[test]
    fn backward_undoes_forward() -> Result<()> {
        let rotation = Rotation::new(&[0, 1, 7, 300], &[1.0, 0.1, 0.01], &Device::Cpu)?;
        let x = matrix(4, 12, 0.2);
        let there = rotation.forward(&x)?;
        assert!(largest_difference(&there, &x) > 0.1);
        assert!(largest_difference(&rotation.backward(&there)?, &x) < 1e-5);
        Ok(())
    }

    #[test]
    fn fast_path_equals_the_plain_one() -> Result<()> {
        let rotation = Rotation::new(&[3, 9], &[1.0, 0.3], &Device::Cpu)?;
        let x = matrix(8, 2, 0.4);
        // A transposed view is not contiguous, so it takes the plain path.
        let strided = x.t()?;
        let fast = rotation.forward(&strided.contiguous()?)?;
        assert!(largest_difference(&fast, &rotation.forward(&strided)?) < 1e-6);
        Ok(())
    }
}
