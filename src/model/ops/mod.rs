//! Operations of the decoder, each a forward and a hand-written backward, on any device; f32 on the CPU has its own loops.

pub mod attention;
pub mod cross_entropy;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use std::mem::MaybeUninit;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Fewer elements than this are handled on the calling thread.
const PARALLEL_FROM: usize = 1 << 14;

/// Builds a `[rows, columns]` tensor on the CPU, row by row; `fill` must write every element of its row.
pub(crate) fn build_rows(
    rows: usize,
    columns: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync,
) -> candle_core::Result<Tensor> {
    let mut values: Vec<f32> = Vec::with_capacity(rows * columns);
    if rows * columns > 0 {
        let spare = &mut values.spare_capacity_mut()[..rows * columns];
        if rows * columns < PARALLEL_FROM {
            for (row, out) in spare.chunks_exact_mut(columns).enumerate() {
                fill(row, out);
            }
        } else {
            let rows_a_task = (PARALLEL_FROM / columns).max(1);
            spare
                .par_chunks_mut(columns * rows_a_task)
                .enumerate()
                .for_each(|(task, chunk)| {
                    for (i, out) in chunk.chunks_exact_mut(columns).enumerate() {
                        fill(task * rows_a_task + i, out);
                    }
                });
        }
    }
    // SAFETY: capacity was reserved for this length, and `fill` writes every element of each row (its contract; each caller
    // below zips the whole row).
    unsafe { values.set_len(rows * columns) };
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
}

#[cfg(test)]
pub(crate) mod testing {
    use candle_core::{DType, Device, Tensor};

    pub(crate) fn matrix(rows: usize, columns: usize, seed: f64) -> Tensor {
        let values = (0..rows * columns)
            .map(|i| ((i as f64 + 0.5) * 0.917 + seed).sin() as f32)
            .collect::<Vec<_>>();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("the shape fits")
    }

    pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b)
            .and_then(|d| d.abs())
            .and_then(|d| d.max_all())
            .and_then(|d| d.to_dtype(DType::F32))
            .and_then(|d| d.to_scalar())
            .expect("same shapes")
    }
}
