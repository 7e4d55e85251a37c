//! Compares the numbers of two tensors, whatever their element types, one block at a time.

use rayon::prelude::*;

use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// Number of elements that are compared at a time.
const BLOCK: usize = 1 << 20;

/// Whether two tensors of the same shape hold the same numbers.
pub(crate) fn are_equal(left: &Tensor, right: &Tensor) -> bool {
    if left.dtype() == right.dtype() {
        return left.bytes() == right.bytes();
    }
    n_in_blocks(left, right, |left, right| {
        let (left, right) = (left.values(), right.values());
        usize::from(left.is_none() || left != right)
    }) == 0
}

/// Returns the number of elements of `stored` that differ from those of `other`, a tensor of the same shape, rounded to
/// the element type of `stored`.
pub(crate) fn n_different(stored: &Tensor, other: &Tensor) -> usize {
    let dtype = stored.dtype();
    if !dtype.is_float() || !other.dtype().is_float() {
        let is_same = dtype == other.dtype() && stored.bytes() == other.bytes();
        return if is_same { 0 } else { stored.n_elements() };
    }
    n_in_blocks(stored, other, |stored, other| {
        if stored.dtype == other.dtype && stored.bytes == other.bytes {
            return 0;
        }
        // Values of a finer type are rounded, as when a model is loaded in the type of `stored`.
        let rounded = dtype.encode(&other.values().unwrap_or_default());
        let (found, expected) = (stored.values(), dtype.decode(&rounded.unwrap_or_default()));
        let pairs = found.unwrap_or_default().into_iter();
        let pairs = pairs.zip(expected.unwrap_or_default());
        pairs.filter(|(found, expected)| found != expected).count()
    })
}

/// Consecutive elements of a tensor.
struct Block<'a> {
    dtype: DType,
    bytes: &'a [u8],
}

impl Block<'_> {
    fn values(&self) -> Option<Vec<f32>> {
        self.dtype.decode(self.bytes)
    }
}

/// Returns the sum of `count` over all blocks of two tensors of the same shape.
fn n_in_blocks(
    left: &Tensor,
    right: &Tensor,
    count: impl Fn(Block<'_>, Block<'_>) -> usize + Sync,
) -> usize {
    let (left_type, right_type) = (left.dtype(), right.dtype());
    let (left, right) = (left.bytes(), right.bytes());
    let left = left.par_chunks(BLOCK * left_type.size());
    let right = right.par_chunks(BLOCK * right_type.size());
    let of = |dtype, bytes| Block { dtype, bytes };
    left.zip(right)
        .map(|(left, right)| count(of(left_type, left), of(right_type, right)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_in_another_type_are_copies() {
        let base = Tensor::from_f32(&[2, 2], vec![1.0, 0.1, -2.5, 1e-3]).expect("sized");
        let stored = base.to_dtype(DType::BF16).expect("float");
        assert_eq!(n_different(&stored, &base), 0);
        let widened = stored.to_dtype(DType::F32).expect("float");
        assert_eq!(n_different(&widened, &stored), 0);
        let other = Tensor::from_f32(&[2, 2], vec![1.0, 0.2, -2.5, 2e-3]).expect("sized");
        assert_eq!(n_different(&other, &base), 2);
        // A rounded value is not the same number.
        assert!(are_equal(&widened, &stored) && are_equal(&base, &base));
        assert!(!are_equal(&stored, &base) && !are_equal(&other, &base));
    }
}
