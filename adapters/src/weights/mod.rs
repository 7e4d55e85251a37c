//! Frozen matrices, a file per kind of how they are held. Whoever computes with one knows only [`Weight`].

mod bf16;
mod f32;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::{Arc, RwLockReadGuard};

use candle_core::{Device, Storage, Tensor, WithDType};

use crate::error::Result;

pub use self::bf16::{Bf16, KIND as BF16};
pub use self::f32::KIND as F32;

/// Every kind, the widest first.
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
    /// Bytes that a matrix of so many rows and columns takes up.
    pub bytes: fn(usize, usize) -> usize,
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
    fn access(&self) -> Access<'_>;

    /// Writes the given part as f32, one row after the other, into `out`, which has its size. Any part may be asked for.
    fn widen(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

    /// All values as bf16 in row-major order, where they lie so in the host's memory: products that are asked for in bf16 then
    /// use the processor's own instruction.
    fn lend_bf16(&self) -> Option<Lent<'_, half::bf16>> {
        None
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

/// How the CPU's products come by the values of a weight.
#[derive(Debug)]
pub enum Access<'a> {
    /// As they lie, in row-major order.
    Lent(Lent<'a, f32>),
    /// Piece by piece through [`Weight::widen`].
    Widened,
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
