//! The parts of a decoder, one file per part. Each has a forward and a hand-written backward pass for any device, and
//! its own loops for float32 on the CPU.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod embedding;
pub(crate) mod experts;
pub(crate) mod feed_forward;
#[cfg(test)]
pub(crate) mod gradient_tests;
pub(crate) mod head;
pub(crate) mod norm;
pub(crate) mod projections;
pub(crate) mod rotary;
#[cfg(test)]
pub(crate) mod testing;

use std::fmt::Debug;
use std::mem::MaybeUninit;

use candle_core::{Device, Tensor};
use monteclora_adapters::simd::vectorised;
use rayon::prelude::*;

use self::attention::{Masks, Segment};
use self::rotary::Rotation;
use super::adapter::{ActiveAdapter, AdapterGradients};
use super::dropout::Dropout;
use super::generate::LayerCache;
use monteclora_adapters::Result;

/// The inputs that all blocks of one pass share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) rotations: &'a [Rotation],
    pub(crate) segments: &'a [Segment],
    /// The rows whose keys and values the segments read. `None` for all rows.
    pub(crate) keys: Option<&'a Tensor>,
    pub(crate) masks: &'a Masks,
    pub(crate) adapter: &'a ActiveAdapter,
    pub(crate) dropout: Option<&'a Dropout>,
}

/// The computation of a sublayer, between its norms.
pub(crate) trait Part: Debug {
    /// Activations that the backward pass reads.
    type Kept: Debug;

    /// Computes the part at `x` `[tokens, hidden]`, and adds `residual` if it is given.
    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Self::Kept)>;

    /// Adds the gradients of the part's updates to `gradients`, and returns the gradient of `x` if `wanted`. `input`
    /// recomputes `x`.
    fn backward(
        &self,
        input: &dyn Fn() -> Result<Tensor>,
        kept: &Self::Kept,
        upstream: Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>>;
}

/// Converts a list of tensors to an array. It is an error if their number is not `N`.
fn parts<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    let found = tensors.len();
    tensors
        .try_into()
        .map_err(|_| candle_core::Error::Msg(format!("{found} parts instead of {N}")).into())
}

/// Number of elements that one parallel task writes.
const TASK: usize = 1 << 14;

/// Builds `N` tensors `[rows, columns]` on the CPU, row by row. `fill` must write every element of its row in each
/// tensor.
///
/// The loops are compiled for the processor's widest vectors only if `fill` is inlined: mark it `#[inline(always)]`.
pub(crate) fn build_rows<const N: usize>(
    rows: usize,
    columns: usize,
    fill: impl Fn(usize, [&mut [MaybeUninit<f32>]; N]) + Sync,
) -> candle_core::Result<[Tensor; N]> {
    let len = rows * columns;
    let mut buffers: [Vec<f32>; N] = std::array::from_fn(|_| Vec::with_capacity(len));
    if len > 0 {
        let rows_a_task = (TASK / columns).max(1);
        let mut parts = buffers
            .each_mut()
            .map(|b| b.spare_capacity_mut()[..len].chunks_mut(rows_a_task * columns));
        let tasks: Vec<[&mut [MaybeUninit<f32>]; N]> = (0..rows.div_ceil(rows_a_task))
            .map(|_| {
                parts.each_mut().map(|p| {
                    p.next()
                        .expect("every buffer has as many parts as there are tasks")
                })
            })
            .collect();
        tasks
            .into_par_iter()
            .enumerate()
            .for_each(|(task, mut parts)| {
                vectorised(
                    #[inline(always)]
                    || {
                        let first = task * rows_a_task;
                        for row in 0..rows_a_task.min(rows - first) {
                            let out = parts
                                .each_mut()
                                .map(|p| &mut p[row * columns..(row + 1) * columns]);
                            fill(first + row, out);
                        }
                    },
                );
            });
    }
    let mut tensors = Vec::with_capacity(N);
    for mut buffer in buffers {
        // SAFETY: capacity was reserved for this length, and `fill` writes every element of each row (its contract;
        // each caller zips the whole row).
        unsafe { buffer.set_len(len) };
        tensors.push(Tensor::from_vec(buffer, (rows, columns), &Device::Cpu)?);
    }
    tensors
        .try_into()
        .map_err(|_| candle_core::Error::Msg("as many tensors as buffers".to_owned()))
}
