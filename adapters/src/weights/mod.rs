//! Frozen matrices, a file per kind of how they are held. Whoever computes with one knows only [`Weight`].

mod bf16;
mod blocks;
mod f32;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::{Arc, RwLockReadGuard};

use candle_core::{Device, Storage, Tensor, WithDType};
use monteclora_converters::BlockMatrix;

use crate::error::Result;

pub use self::bf16::{Bf16, KIND as BF16};
pub use self::blocks::{AUTO, AUTO_BF16, Blocks};
pub use self::f32::KIND as F32;

/// Every kind that can be asked for by name, the widest first.
pub static KINDS: &[&Kind] = &[&F32, &BF16];

/// One way of holding a frozen matrix.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name, as `model.dtype` and `--dtype` take it.
    pub name: &'static str,
    /// What the reference of run.toml says of it.
    pub about: &'static str,
    /// What a command's help says of it.
    pub help: &'static str,
    /// Bytes that so many values take up, which the file may have in blocks.
    pub bytes: fn(usize, Option<&BlockMatrix>) -> usize,
    /// Makes a weight of a file's tensor `[rows, columns]` on a device.
    pub hold: fn(&monteclora_converters::Tensor, &Device) -> Result<Arc<dyn Weight>>,
}

impl Kind {
    /// The kind called `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        KINDS.iter().copied().find(|kind| kind.name == name)
    }
}

/// A frozen matrix `[rows, columns]` (of a projection `[out, in]`), never a variable.
pub trait Weight: Debug + Send + Sync {
    /// Numbers of rows and columns.
    fn dims(&self) -> Result<(usize, usize)>;

    /// Bytes that its values take up.
    fn bytes(&self) -> usize;

    /// How the CPU's products come by its values.
    fn access(&self) -> Access<'_, f32>;

    /// Writes the given part as f32, one row after the other, into `out`, which has its size. Any part may be asked for.
    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

    /// How they come by its values as bf16, if these are bf16: products that are asked for in it then use the processor's own
    /// instruction.
    fn access_bf16(&self) -> Access<'_, half::bf16> {
        Access::Elsewhere
    }

    /// As [`Self::widen`] in bf16, where [`Self::access_bf16`] says so.
    fn widen_bf16(&self, _rows: Range<usize>, _columns: Range<usize>, _out: &mut [half::bf16]) {}

    /// Values of a row that are decoded together, so that parts which begin at multiples of it cost least.
    fn block(&self) -> usize {
        1
    }

    /// The matrix as candle's tensor of any float type, for devices' own products.
    fn tensor(&self) -> Result<Tensor>;

    /// The given rows, one after the other, in f32 on the weight's device.
    fn gather(&self, rows: &[u32]) -> Result<Tensor> {
        let tensor = self.tensor()?;
        let index = Tensor::new(rows, tensor.device())?;
        Ok(tensor
            .index_select(&index, 0)?
            .to_dtype(candle_core::DType::F32)?)
    }
}

/// How the CPU's products come by the values of a weight as numbers of type `T`.
#[derive(Debug)]
pub enum Access<'a, T> {
    /// As they lie, in row-major order.
    Lent(Lent<'a, T>),
    /// Piece by piece through [`Weight::widen`] or [`Weight::widen_bf16`].
    Pieces,
    /// Not at all: they are on another device, or laid out otherwise.
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

/// The elements of a contiguous `tensor` of `T` on the CPU; none of any other.
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
