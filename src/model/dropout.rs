//! Dropout on the adapters' inputs.

use candle_core::{DType, Tensor};
use monteclora_adapters::Result;
use monteclora_adapters::device::{has_loops, to_device};
use monteclora_adapters::noise::{Key, Purpose};
use monteclora_adapters::weights::lend;

use super::parts::attention::Segment;
use super::parts::build_rows;

/// Dropout on the adapters' inputs. The masks depend only on seed, step, module, row and position.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability that an input is dropped, in `[0, 1)`.
    pub probability: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Optimiser step.
    pub step: u64,
    /// Identity of each segment's row in the data. It makes the mask of a row independent of its batch.
    pub rows: Vec<u64>,
}

/// The mask of one module in one pass, a byte per input.
#[derive(Debug, Clone)]
pub(crate) struct Mask {
    /// 1 for an input that is kept and 0 for one that is dropped, `[tokens, in]`.
    kept: Tensor,
    /// Factor on the inputs that are kept, `1 / (1 - probability)`.
    scale: f32,
}

impl Dropout {
    /// The mask for an input `like`, `[tokens, in]`, on its device.
    pub(super) fn mask(&self, module: &str, segments: &[Segment], like: &Tensor) -> Result<Mask> {
        let (tokens, columns) = like.dims2()?;
        let mut kept = vec![0u8; tokens * columns];
        for (segment, row) in segments.iter().zip(&self.rows) {
            let seed = self.seed ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let key = Key::new(seed, module, self.step);
            let values = &mut kept[segment.query_start * columns..][..segment.query_len * columns];
            key.uniforms_at_least(Purpose::Dropout, self.probability, values);
        }
        Ok(Mask {
            kept: to_device(kept, (tokens, columns), like.device())?,
            scale: (1.0 / (1.0 - self.probability)) as f32,
        })
    }
}

impl Mask {
    /// The factor on every input, 0 or `1 / (1 - probability)`, `[tokens, in]`.
    pub(crate) fn factors(&self) -> Result<Tensor> {
        let (tokens, columns) = self.kept.dims2()?;
        let kept = lend::<u8>(&self.kept);
        if let Some(kept) = kept.filter(|_| has_loops(self.kept.device())) {
            let [factors] = build_rows(
                tokens,
                columns,
                #[inline(always)]
                |row, [out]| {
                    for (out, kept) in out.iter_mut().zip(&kept[row * columns..][..columns]) {
                        out.write(f32::from(*kept) * self.scale);
                    }
                },
            )?;
            return Ok(factors);
        }
        Ok((self.kept.to_dtype(DType::F32)? * f64::from(self.scale))?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn segment(start: usize, len: usize) -> Segment {
        Segment {
            query_start: start,
            query_len: len,
            key_start: start,
            key_len: len,
        }
    }

    /// A factor is 0 where the value of the row's uniform stream is below the probability.
    #[test]
    fn masks_follow_the_uniform_stream_of_their_row() -> Result<()> {
        let columns = 613;
        let segments = [segment(0, 19), segment(19, 1), segment(20, 8)];
        let like = Tensor::zeros((28, columns), DType::F32, &Device::Cpu)?;
        for probability in [0.0, 0.1, 1.0 / 3.0, 0.5, 0.95] {
            let dropout = Dropout {
                probability,
                seed: 11,
                step: 3,
                rows: vec![5, 0, 1 << 40],
            };
            let mask = dropout.mask("a.module", &segments, &like)?;
            let mut expected = Vec::new();
            for (segment, row) in segments.iter().zip(&dropout.rows) {
                let seed = dropout.seed ^ row.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let key = Key::new(seed, "a.module", dropout.step);
                let n_values = segment.query_len * columns;
                let uniforms = key.uniforms_f32_from(Purpose::Dropout, 0, n_values);
                let keep = (1.0 / (1.0 - probability)) as f32;
                let factor = |u: f32| {
                    if f64::from(u) < probability {
                        0.0
                    } else {
                        keep
                    }
                };
                expected.extend(uniforms.into_iter().map(factor));
            }
            assert_eq!(mask.factors()?.flatten_all()?.to_vec1::<f32>()?, expected);
            // A strided view takes the path for other devices.
            let strided = Mask {
                kept: mask.kept.t()?.contiguous()?.t()?,
                ..mask
            };
            let factors = strided.factors()?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(factors, expected);
        }
        Ok(())
    }
}
