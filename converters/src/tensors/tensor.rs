//! A tensor as bytes: element type, shape, and data that is mapped from a file, owned, or derived or decoded when it is
//! read.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::tensors::blocks::BlockMatrix;
use crate::tensors::derived::Derivation;
use crate::tensors::dtype::DType;

/// Where the bytes are.
#[derive(Clone)]
enum Data {
    Mapped {
        map: Arc<Mmap>,
        start: usize,
        len: usize,
    },
    Owned(Arc<Vec<u8>>),
    Derived {
        source: Arc<Tensor>,
        derivation: Derivation,
    },
    /// A matrix in blocks, whose values are F32.
    Blocks(BlockMatrix),
}

/// A tensor of row-major little-endian elements, which are not interpreted. Cloning copies no data. A conversion is
/// carried out each time the bytes are read, so that reading, converting and writing take one tensor at a time.
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

fn unfit(message: String) -> Error {
    Error::tensor("tensor", message)
}

impl Tensor {
    /// A tensor over owned little-endian bytes.
    ///
    /// # Errors
    /// Returns an error if the number of bytes does not match `shape` and `dtype`.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Result<Self> {
        let expected = element_count(shape).and_then(|n| n.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            let message = format!("got {} bytes of data", bytes.len());
            return Err(Error::tensor(
                format!("{dtype} tensor of shape {shape:?}"),
                message,
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
    /// Returns an error if the number of values does not match `shape`.
    pub fn from_f32(shape: &[usize], values: Vec<f32>) -> Result<Self> {
        Self::from_f32_as(shape, &values, DType::F32)
    }

    /// A tensor of the given float type, values rounded to nearest.
    ///
    /// # Errors
    /// Returns an error if the number of values does not match `shape`, or `dtype` is not F64, F32, F16 or BF16.
    pub fn from_f32_as(shape: &[usize], values: &[f32], dtype: DType) -> Result<Self> {
        let wrong = || unfit(format!("cannot hold real numbers as {dtype}"));
        Self::from_bytes(dtype, shape, dtype.encode(values).ok_or_else(wrong)?)
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

    /// Creates a tensor of a matrix in blocks, whose values are decoded when they are read.
    pub(crate) fn from_blocks(blocks: BlockMatrix) -> Self {
        let (rows, columns) = blocks.dims();
        Self {
            dtype: DType::F32,
            shape: [rows, columns].into(),
            data: Data::Blocks(blocks),
        }
    }

    /// The blocks that store the values, if any. The element type is then that of the decoded values.
    pub fn blocks(&self) -> Option<&BlockMatrix> {
        match &self.data {
            Data::Blocks(blocks) => Some(blocks),
            _ => None,
        }
    }

    /// Number of bytes that the stored values take.
    pub fn stored_bytes(&self) -> usize {
        self.blocks()
            .map_or_else(|| self.n_bytes(), BlockMatrix::n_bytes)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian elements in row-major order, borrowed unless they have to be computed.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match &self.data {
            Data::Mapped { map, start, len } => Cow::Borrowed(&map[*start..*start + *len]),
            Data::Owned(bytes) => Cow::Borrowed(bytes),
            Data::Derived { source, derivation } => {
                Cow::Owned(derivation.bytes(source, self.dtype, &self.shape))
            }
            Data::Blocks(blocks) => {
                Cow::Owned(self.dtype.encode(&blocks.values()).unwrap_or_default())
            }
        }
    }

    /// Number of bytes.
    pub(crate) fn n_bytes(&self) -> usize {
        self.n_elements() * self.dtype.size()
    }

    /// Whether the elements come from a file that was checked when it was read.
    pub(crate) fn is_mapped(&self) -> bool {
        match &self.data {
            Data::Mapped { .. } => true,
            Data::Owned(_) | Data::Blocks(_) => false,
            Data::Derived { source, derivation } => derivation.only_moves() && source.is_mapped(),
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
        if let Data::Blocks(blocks) = &self.data {
            return Ok(blocks.values());
        }
        let wrong = || unfit(format!("{} cannot be read as real numbers", self.dtype));
        self.dtype.decode(&self.bytes()).ok_or_else(wrong)
    }

    /// Returns the value at `index` in row-major order as `f32`; `None` outside the tensor or if the type is not a
    /// float type.
    pub(crate) fn value(&self, index: usize) -> Option<f32> {
        if let Data::Blocks(blocks) = &self.data {
            return blocks.value(index);
        }
        let (bytes, size) = (self.bytes(), self.dtype.size());
        let at = index.checked_mul(size)?;
        let bytes = bytes.get(at..at.checked_add(size)?)?;
        self.dtype.decode(bytes)?.pop()
    }

    /// Returns the same values in another float type, converted when they are read.
    ///
    /// # Errors
    /// If either type is not F64, F32, F16 or BF16.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        self.scaled(1.0, dtype)
    }

    /// Returns every value times `factor`, computed in f32, as `dtype`.
    pub(crate) fn scaled(&self, factor: f32, dtype: DType) -> Result<Self> {
        if !self.dtype.is_float() || !dtype.is_float() {
            return Err(unfit(format!("{} cannot become {dtype}", self.dtype)));
        }
        Ok(self.derived(Derivation::Scaled { factor }, dtype, &self.shape))
    }

    /// A matrix with rows and columns exchanged.
    pub(crate) fn transposed(&self) -> Result<Self> {
        let [n_rows, n_columns] = self.dims2()?;
        match &self.data {
            Data::Derived {
                source,
                derivation: Derivation::Transposed,
            } => Ok(Self::clone(source)),
            _ => Ok(self.derived(Derivation::Transposed, self.dtype, &[n_columns, n_rows])),
        }
    }

    /// A matrix enlarged with zeros to the right and below.
    pub(crate) fn padded(&self, n_rows: usize, n_columns: usize) -> Result<Self> {
        let shape = [n_rows, n_columns];
        let [old_rows, old_columns] = self.dims2()?;
        let fits =
            element_count(&shape).is_some_and(|n| n.checked_mul(self.dtype.size()).is_some());
        if old_rows > n_rows || old_columns > n_columns || !fits {
            let old = &self.shape;
            return Err(unfit(format!(
                "shape {old:?} cannot be enlarged to {shape:?}"
            )));
        }
        Ok(self.derived(Derivation::Padded, self.dtype, &shape))
    }

    /// A matrix with the rows of every `head` reordered between Hugging Face's order and llama.cpp's (`pairs`).
    pub(crate) fn head_rows(&self, head: usize, pairs: bool) -> Result<Self> {
        let [n_rows, _] = self.dims2()?;
        if head == 0 || !head.is_multiple_of(2) || !n_rows.is_multiple_of(head) {
            return Err(unfit(format!(
                "{n_rows} rows are not heads of {head} in halves"
            )));
        }
        let derivation = Derivation::HeadRows { head, pairs };
        Ok(self.derived(derivation, self.dtype, &self.shape))
    }

    fn dims2(&self) -> Result<[usize; 2]> {
        <[usize; 2]>::try_from(&*self.shape)
            .map_err(|_| unfit(format!("shape {:?} is no matrix", self.shape)))
    }

    fn derived(&self, derivation: Derivation, dtype: DType, shape: &[usize]) -> Self {
        Self {
            dtype,
            shape: shape.into(),
            data: Data::Derived {
                source: Arc::new(self.clone()),
                derivation,
            },
        }
    }

    /// Index of the first NaN or infinite element in stored order, if any.
    pub(crate) fn first_non_finite(&self) -> Option<usize> {
        match &self.data {
            Data::Derived { source, derivation } if derivation.only_moves() => {
                source.first_non_finite()
            }
            Data::Blocks(blocks) => blocks.first_non_finite(),
            _ => self.dtype.first_non_finite(&self.bytes()),
        }
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
