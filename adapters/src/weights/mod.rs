//! Frozen matrices, one file per way of holding them. Code that computes with a matrix knows only [`Weight`].

mod bf16;
mod blocks;
mod f32;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::{Arc, RwLockReadGuard};

use candle_core::{Device, Storage, Tensor, WithDType};
use monteclora_converters::BlockMatrix;
use rayon::prelude::*;

use crate::error::Result;

pub use self::bf16::{Bf16, KIND as BF16};
pub use self::blocks::{AUTO, AUTO_BF16, Blocks};
pub use self::f32::KIND as F32;

/// Every kind that can be selected by name, the widest first.
pub static KINDS: &[&Kind] = &[&F32, &BF16];

/// One way of holding a frozen matrix.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name, as `model.dtype` and `--dtype` take it.
    pub name: &'static str,
    /// Its description in the reference of run.toml.
    pub about: &'static str,
    /// Its description in a command's help.
    pub help: &'static str,
    /// Returns the bytes that a number of values take. The second argument is the matrix if the file has it in
    /// quantised blocks.
    pub bytes: fn(usize, Option<&BlockMatrix>) -> usize,
    /// Creates a weight from a file's tensor `[rows, columns]` on a device.
    pub hold: fn(&monteclora_converters::Tensor, &Device) -> Result<Arc<dyn Weight>>,
}

impl Kind {
    /// Finds the kind named `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        KINDS.iter().copied().find(|kind| kind.name == name)
    }
}

/// A frozen matrix `[rows, columns]` (`[out, in]` for a projection), which is never trained.
pub trait Weight: Debug + Send + Sync {
    /// Numbers of rows and columns.
    fn dims(&self) -> Result<(usize, usize)>;

    /// Number of bytes that its values take.
    fn bytes(&self) -> usize;

    /// How the CPU's products read its values.
    fn access(&self) -> Access<'_, f32>;

    /// Writes the given part as f32, row by row, into `out`, which has the size of the part. Any part is allowed.
    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

    /// How the CPU's products read its values as bf16: [`Access::Elsewhere`] unless the values are bf16. Otherwise,
    /// products in bf16 use the processor's own instruction.
    fn access_bf16(&self) -> Access<'_, half::bf16> {
        Access::Elsewhere
    }

    /// As [`Self::widen`] in bf16, if [`Self::access_bf16`] is [`Access::Pieces`].
    fn widen_bf16(&self, _rows: Range<usize>, _columns: Range<usize>, _out: &mut [half::bf16]) {}

    /// Number of values of a row that are decoded together. Parts that begin at its multiples cost least.
    fn block(&self) -> usize {
        1
    }

    /// The matrix as a candle tensor of any float type, for candle's own products.
    fn tensor(&self) -> Result<Tensor>;

    /// Returns the given rows, in this order, in f32 on the weight's device.
    fn gather(&self, rows: &[u32]) -> Result<Tensor> {
        let tensor = self.tensor()?;
        let index = Tensor::new(rows, tensor.device())?;
        Ok(tensor
            .index_select(&index, 0)?
            .to_dtype(candle_core::DType::F32)?)
    }
}

/// Sum of the squares of each row of `weight`, `[out]`, in double precision.
///
/// # Errors
/// Returns an error of candle for a weight on another device.
pub fn row_squares(weight: &dyn Weight) -> Result<Vec<f64>> {
    let (rows, columns) = weight.dims()?;
    if matches!(weight.access(), Access::Elsewhere) {
        let squares = weight.tensor()?.to_dtype(candle_core::DType::F32)?.sqr()?;
        let sums = squares.sum(1)?.to_vec1::<f32>()?;
        return Ok(sums.into_iter().map(f64::from).collect());
    }
    let mut sums = vec![0f64; rows];
    sums.par_chunks_mut(ROWS)
        .enumerate()
        .for_each(|(chunk, sums)| {
            let first = chunk * ROWS;
            let mut values = vec![0f32; sums.len() * columns];
            weight.widen(first..first + sums.len(), 0..columns, &mut values);
            for (sum, row) in sums.iter_mut().zip(values.chunks_exact(columns.max(1))) {
                *sum = row.iter().map(|value| f64::from(*value).powi(2)).sum();
            }
        });
    Ok(sums)
}

/// Rows that are widened together.
const ROWS: usize = 32;

/// How the CPU's products read the values of a weight as numbers of type `T`.
#[derive(Debug)]
pub enum Access<'a, T> {
    /// Directly from memory, in row-major order.
    Lent(Lent<'a, T>),
    /// Piece by piece through [`Weight::widen`] or [`Weight::widen_bf16`].
    Pieces,
    /// Not at all: the values are on another device or in another layout.
    Elsewhere,
}

/// Elements of a tensor, read without a copy.
#[derive(Debug)]
pub struct Lent<'a, T> {
    storage: RwLockReadGuard<'a, Storage>,
    range: Range<usize>,
    element: PhantomData<T>,
}

impl<T: WithDType> Deref for Lent<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => {
                T::cpu_storage_as_slice(storage).map_or(&[], |values| &values[self.range.clone()])
            }
            _ => &[],
        }
    }
}

/// Lends the elements of `tensor`. Returns `None` unless it is contiguous, of type `T` and on the CPU.
pub fn lend<T: WithDType>(tensor: &Tensor) -> Option<Lent<'_, T>> {
    if !matches!(tensor.device(), Device::Cpu) || tensor.dtype() != T::DTYPE {
        return None;
    }
    let (storage, layout) = tensor.storage_and_layout();
    let (from, to) = layout.contiguous_offsets()?;
    Some(Lent {
        storage,
        range: from..to,
        element: PhantomData,
    })
}
