//! A tensor as bytes: element type, shape and data that is mapped from a file or owned.

use std::fmt;
use std::sync::Arc;

use memmap2::Mmap;

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Where the bytes live.
#[derive(Clone)]
enum Data {
    Mapped {
        map: Arc<Mmap>,
        start: usize,
        len: usize,
    },
    Owned(Arc<Vec<u8>>),
}

/// A tensor: row-major little-endian elements, not interpreted. Cloning copies no data.
///
/// ```
/// use monteclora_converters::{DType, Tensor};
/// let tensor = Tensor::from_f32(&[2, 2], vec![1.0, 2.0, 3.0, 4.0])?;
/// assert_eq!((tensor.dtype(), tensor.shape()), (DType::F32, &[2, 2][..]));
/// assert_eq!(tensor.to_f32()?, [1.0, 2.0, 3.0, 4.0]);
/// # Ok::<(), monteclora_converters::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Arc<[usize]>,
    data: Data,
}

/// Number of elements of `shape`, or `None` on overflow.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |product, dim| product.checked_mul(*dim))
}

impl Tensor {
    /// A tensor over owned little-endian bytes.
    ///
    /// # Errors
    /// If the number of bytes is not that of `shape` in `dtype`.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Result<Self> {
        let expected = element_count(shape).and_then(|n| n.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(Error::tensor(
                format!("{dtype} tensor of shape {shape:?}"),
                format!("got {} bytes of data", bytes.len()),
            ));
        }
        Ok(Self {
            dtype,
            shape: shape.into(),
            data: Data::Owned(Arc::new(bytes)),
        })
    }

    /// An F32 tensor.
    ///
    /// # Errors
    /// If the number of values is not that of `shape`.
    pub fn from_f32(shape: &[usize], values: Vec<f32>) -> Result<Self> {
        Self::from_f32_as(shape, &values, DType::F32)
    }

    /// A tensor of the given float type, values rounded to nearest.
    ///
    /// # Errors
    /// If the number of values is not that of `shape`, or `dtype` is not F64, F32, F16 or BF16.
    pub fn from_f32_as(shape: &[usize], values: &[f32], dtype: DType) -> Result<Self> {
        let bytes = dtype.encode(values).ok_or_else(|| {
            Error::tensor("tensor", format!("cannot hold real numbers as {dtype}"))
        })?;
        Self::from_bytes(dtype, shape, bytes)
    }

    /// A view of mapped bytes; the caller has checked that the range holds `shape` in `dtype`.
    pub(crate) fn from_map(
        dtype: DType,
        shape: Arc<[usize]>,
        map: Arc<Mmap>,
        start: usize,
        len: usize,
    ) -> Self {
        Self {
            dtype,
            shape,
            data: Data::Mapped { map, start, len },
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian elements in row-major order.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Mapped { map, start, len } => &map[*start..*start + *len],
            Data::Owned(bytes) => bytes,
        }
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values as `f32`; F64 is rounded.
    ///
    /// # Errors
    /// If the type is not F64, F32, F16 or BF16.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.dtype.decode(self.bytes()).ok_or_else(|| {
            Error::tensor(
                "tensor",
                format!("{} cannot be read as real numbers", self.dtype),
            )
        })
    }

    /// The same values in another float type; no copy when it is the same type.
    ///
    /// # Errors
    /// If either type is not F64, F32, F16 or BF16.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        Self::from_f32_as(&self.shape, &self.to_f32()?, dtype)
    }

    /// Index of the first NaN or infinite element, if any.
    pub(crate) fn first_non_finite(&self) -> Option<usize> {
        self.dtype.first_non_finite(self.bytes())
    }
}

impl PartialEq for Tensor {
    /// Same type, shape and bytes.
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_number_of_values_is_refused() {
        assert!(Tensor::from_f32(&[2, 3], vec![0.0; 5]).is_err());
        assert!(Tensor::from_bytes(DType::F32, &[usize::MAX, 2], Vec::new()).is_err());
    }

    #[test]
    fn conversion_rounds_once_and_same_type_is_the_identity() {
        let tensor = Tensor::from_f32(&[2], vec![1.0, 1.0 + 1.0 / 512.0]).expect("two values");
        assert_eq!(tensor.to_dtype(DType::F32).expect("float"), tensor);
        let rounded = tensor.to_dtype(DType::BF16).expect("float");
        assert_eq!(rounded.to_f32().expect("float"), [1.0, 1.0]);
    }
}
