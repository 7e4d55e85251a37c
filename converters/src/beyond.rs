//! What changes a weight besides B A: DoRA's magnitude, SSF's scale and shift, single entries.

use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// A change of a weight that no `B A` expresses. Such an adapter can be used and merged, but not written as a plain LoRA.
#[derive(Debug, Clone, PartialEq)]
pub enum Beyond {
    /// DoRA: row i becomes `m_i (W + s B A)_i / ||(W + s B A)_i||`. The magnitude m is `[out]`.
    Magnitude(Tensor),
    /// SSF: row i becomes `gamma_i W_i`, and the bias b becomes `gamma b + beta`.
    Scale {
        /// `gamma`, `[out]`.
        scale: Tensor,
        /// `beta`, `[out]`.
        shift: Option<Tensor>,
    },
    /// Single entries of the weight, counted row by row, and what is added to them.
    Sparse {
        /// Places, increasing, int64 `[k]`.
        indices: Tensor,
        /// Values, `[k]`.
        values: Tensor,
    },
}

impl Beyond {
    /// What it is called in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Magnitude(_) => "DoRA",
            Self::Scale { .. } => "SSF",
            Self::Sparse { .. } => "an update of single entries",
        }
    }

    /// Its tensors with the names that a file gives them, below the module.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Magnitude(magnitude) => vec![("lora_magnitude_vector", magnitude)],
            Self::Scale { scale, shift } => {
                let shift = shift.iter().map(|shift| ("ssf_shift", shift));
                std::iter::once(("ssf_scale", scale)).chain(shift).collect()
            }
            Self::Sparse { indices, values } => {
                vec![("sparse_indices", indices), ("sparse_values", values)]
            }
        }
    }

    /// The same with float tensors as `dtype`.
    pub(crate) fn map(&self, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Magnitude(magnitude) => Self::Magnitude(change(magnitude)?),
            Self::Scale { scale, shift } => Self::Scale {
                scale: change(scale)?,
                shift: shift.as_ref().map(change).transpose()?,
            },
            Self::Sparse { indices, values } => Self::Sparse {
                indices: indices.clone(),
                values: change(values)?,
            },
        })
    }

    /// Whether it surely changes nothing: DoRA's magnitude says that only together with the weight.
    ///
    /// # Errors
    /// Returns an error if a tensor has no float type.
    pub(crate) fn is_neutral(&self) -> Result<bool> {
        Ok(match self {
            Self::Magnitude(_) => false,
            Self::Scale { scale, shift } => {
                let shift = shift.as_ref().map(Tensor::to_f32).transpose()?;
                scale.to_f32()?.iter().all(|value| *value == 1.0)
                    && shift.is_none_or(|shift| shift.iter().all(|value| *value == 0.0))
            }
            Self::Sparse { values, .. } => values.to_f32()?.iter().all(|value| *value == 0.0),
        })
    }

    /// The refusal of whoever needs a plain LoRA at `module`.
    pub fn refusal(&self, module: &str) -> Problem {
        let message = format!("{} changes the weight in a way that is no B A", self.name());
        Problem::new("merge-only", module, message, MERGE)
    }
}

/// What to do with an adapter that cannot be a plain LoRA.
const MERGE: &str = "merge it into its base: monteclora merge -m BASE -a ADAPTER -o DIR";

/// The change of a weight, ready to be applied to blocks of its rows.
#[derive(Debug)]
pub(crate) enum Applied {
    None,
    Magnitude(Vec<f32>),
    Scale(Vec<f32>),
    Sparse(Vec<(u64, f32)>),
}

impl Applied {
    /// Of the module `name` with a weight `[out, in]`.
    pub(crate) fn of(beyond: Option<&Beyond>, name: &str) -> Result<Self> {
        Ok(match beyond {
            None => Self::None,
            Some(Beyond::Magnitude(magnitude)) => Self::Magnitude(magnitude.to_f32()?),
            Some(Beyond::Scale { scale, .. }) => Self::Scale(scale.to_f32()?),
            Some(Beyond::Sparse { indices, values }) => {
                let places = places(indices, name)?;
                Self::Sparse(places.into_iter().zip(values.to_f32()?).collect())
            }
        })
    }

    /// The changed rows `first..` of the weight, whose stored values are `old` and whose sum with B A is `sum`, both
    /// `[rows, in]`; written into `sum`.
    pub(crate) fn apply(&self, first: usize, n_in: usize, sum: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Magnitude(magnitude) => {
                for (row, m) in sum.chunks_mut(n_in).zip(&magnitude[first..]) {
                    let square: f64 = row.iter().map(|value| f64::from(*value).powi(2)).sum();
                    // A row of zeros has no direction.
                    let ratio = match square > 0.0 {
                        true => (f64::from(*m) / square.sqrt()) as f32,
                        false => 0.0,
                    };
                    row.iter_mut().for_each(|value| *value *= ratio);
                }
            }
            Self::Scale(scale) => {
                for (row, gamma) in sum.chunks_mut(n_in).zip(&scale[first..]) {
                    row.iter_mut().for_each(|value| *value *= gamma);
                }
            }
            Self::Sparse(entries) => {
                let from = (first * n_in) as u64;
                let to = from + sum.len() as u64;
                let begin = entries.partition_point(|(place, _)| *place < from);
                for (place, value) in &entries[begin..] {
                    if *place >= to {
                        break;
                    }
                    sum[(place - from) as usize] += value;
                }
            }
        }
    }
}

/// The places of [`Beyond::Sparse`].
///
/// # Errors
/// Returns an error unless they are int64 and increase.
pub fn places(indices: &Tensor, module: &str) -> Result<Vec<u64>> {
    let wrong = |message: &str| Error::tensor(module, format!("sparse_indices: {message}"));
    if indices.dtype() != DType::I64 {
        return Err(wrong("expected int64"));
    }
    let bytes = indices.bytes();
    let places = bytes.as_chunks::<8>().0.iter();
    let places = places.map(|bytes| u64::try_from(i64::from_le_bytes(*bytes)));
    let places: Vec<u64> = places
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| wrong("a place is negative"))?;
    match places.is_sorted_by(|a, b| a < b) {
        true => Ok(places),
        false => Err(wrong("places do not increase")),
    }
}
