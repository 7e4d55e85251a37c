//! Numbers that the host needs from tensors. To read one waits for the device, so those of many tensors are read
//! together.

use candle_core::Tensor;

use crate::device::to_host;
use crate::error::Result;
use crate::linalg::on_cpu;

/// Numbers on the host, or numbers that a device computes.
#[derive(Debug, Clone)]
pub enum Numbers {
    /// In double precision.
    Host(Vec<f64>),
    /// As a float32 tensor of any shape.
    Device(Tensor),
}

impl Numbers {
    /// Row by row inner products of two `[r, in]` matrices, `[r]`, summed in double precision on the CPU.
    pub fn row_dots(a: &Tensor, b: &Tensor) -> Result<Self> {
        let (_, columns) = a.dims2()?;
        let fast = on_cpu([a, b], |[a, b]| {
            let rows = a.chunks_exact(columns).zip(b.chunks_exact(columns));
            let products = |(a, b): (&[f32], &[f32])| {
                a.iter()
                    .zip(b)
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum()
            };
            rows.map(products).collect()
        })?;
        Ok(match fast {
            Some(sums) => Self::Host(sums),
            None => Self::Device((a * b)?.sum(1)?),
        })
    }

    /// The sum of the squares, summed in double precision on the CPU.
    pub fn squares(tensor: &Tensor) -> Result<Self> {
        let fast = on_cpu([tensor], |[values]| {
            values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
        })?;
        Ok(match fast {
            Some(sum) => Self::Host(vec![sum]),
            None => Self::Device(tensor.sqr()?.sum_all()?),
        })
    }

    /// A number that is finite if and only if every entry is.
    ///
    /// On a device it is the sum of all magnitudes, times a factor so small that a sum of finite values is finite. An
    /// infinite value or a NaN stays one under products and sums, also where a compiler assumes that there are none, as
    /// Metal's does; the result of a comparison would be another.
    pub fn finite(tensor: &Tensor) -> Result<Self> {
        let fast = on_cpu([tensor], |[values]| {
            let bad = values.iter().find(|v| !v.is_finite());
            bad.map_or(0.0, |v| f64::from(*v))
        })?;
        let factor = f64::from(f32::MIN_POSITIVE);
        Ok(match fast {
            Some(number) => Self::Host(vec![number]),
            None => Self::Device((tensor.abs()? * factor)?.sum_all()?),
        })
    }

    /// The largest magnitude of an entry.
    pub fn largest(tensor: &Tensor) -> Result<Self> {
        Ok(Self::Device(tensor.abs()?.flatten_all()?.max(0)?))
    }

    /// Reads these numbers alone.
    pub fn read(self) -> Result<Vec<f64>> {
        let mut groups = read_groups(vec![vec![self]])?;
        Ok(groups.pop().unwrap_or_default())
    }
}

/// Reads the numbers of every group, one after the other, with one copy from the device. All tensors are on one device.
///
/// # Errors
/// Returns an error of candle.
pub fn read_groups(groups: Vec<Vec<Numbers>>) -> Result<Vec<Vec<f64>>> {
    let all = groups.iter().flatten().filter_map(|numbers| match numbers {
        Numbers::Device(tensor) => Some(tensor.flatten_all()),
        Numbers::Host(_) => None,
    });
    let all = all.collect::<candle_core::Result<Vec<_>>>()?;
    let copied = match all.is_empty() {
        true => Vec::new(),
        false => to_host::<f32>(&Tensor::cat(&all, 0)?)?,
    };
    let mut copied = copied.into_iter().map(f64::from);
    let mut read = |numbers: Numbers| match numbers {
        Numbers::Host(values) => values,
        Numbers::Device(tensor) => copied.by_ref().take(tensor.elem_count()).collect(),
    };
    let groups = groups.into_iter();
    Ok(groups
        .map(|group| group.into_iter().flat_map(&mut read).collect())
        .collect())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn matrix(seed: f32) -> Result<Tensor> {
        let values = (0..15).map(|i| (i as f32 * 0.7 + seed).sin());
        Ok(Tensor::from_vec(
            values.collect::<Vec<_>>(),
            (3, 5),
            &Device::Cpu,
        )?)
    }

    /// A strided view takes the path for other devices. Groups are read together in any mixture.
    #[test]
    fn numbers_read_together_are_those_read_alone() -> Result<()> {
        let (a, b) = (matrix(0.1)?, matrix(0.6)?);
        let [strided_a, strided_b] = [&a, &b].map(|m| m.t()?.contiguous()?.t());
        let (strided_a, strided_b) = (strided_a?, strided_b?);
        let groups = vec![
            vec![
                Numbers::row_dots(&a, &b)?,
                Numbers::row_dots(&strided_a, &strided_b)?,
            ],
            vec![],
            vec![
                Numbers::Host(vec![7.0, 8.0]),
                Numbers::squares(&strided_a)?,
                Numbers::squares(&a)?,
                Numbers::largest(&b)?,
            ],
        ];
        let alone = groups.clone().into_iter().map(|group| {
            let numbers = group.into_iter().map(Numbers::read);
            Ok(numbers.collect::<Result<Vec<_>>>()?.concat())
        });
        let alone = alone.collect::<Result<Vec<_>>>()?;
        let together = read_groups(groups)?;
        assert_eq!(together, alone);
        let [dots, none, others] = &together[..] else {
            panic!("{together:?}");
        };
        assert_eq!((dots.len(), none.len(), others.len()), (6, 0, 5));
        for (fast, plain) in dots[..3].iter().zip(&dots[3..]) {
            assert!((fast - plain).abs() < 1e-5);
        }
        assert!((others[2] - others[3]).abs() < 1e-5);
        Ok(())
    }

    #[test]
    fn one_value_that_is_not_finite_is_found_on_every_path() -> Result<()> {
        for (value, expected) in [
            (0.0, true),
            (f32::MAX, true),
            (f32::MIN, true),
            (f32::NAN, false),
            (f32::INFINITY, false),
            (f32::NEG_INFINITY, false),
        ] {
            let mut values = vec![f32::MAX; 600];
            values[123] = value;
            let tensor = Tensor::from_vec(values, (30, 20), &Device::Cpu)?;
            let strided = tensor.t()?.contiguous()?.t()?;
            for tensor in [tensor, strided] {
                let found = Numbers::finite(&tensor)?.read()?;
                assert_eq!(found[0].is_finite(), expected, "{value}");
            }
        }
        Ok(())
    }
}
