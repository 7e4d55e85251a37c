//! What differs between the CPU and other devices: how work on tensors is given out, and the copies between host and
//! device, which are counted.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::error::Result;

/// Makes the CPU a stand-in for other devices: not empty, no loop of this project computes on tensors, and tensors are
/// worked on in order. It is slow, and it is for tests.
const WITHOUT_LOOPS: &str = "MONTECLORA_WITHOUT_LOOPS";

/// Whether this project's own loops compute on the tensors of `device`: on the CPU, unless the environment variable
/// `MONTECLORA_WITHOUT_LOOPS` makes it a stand-in for another device.
pub fn has_loops(device: &Device) -> bool {
    static OFF: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os(WITHOUT_LOOPS).is_some_and(|value| !value.is_empty()));
    device.is_cpu() && !*OFF
}

static READS: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Number of copies between the host and the tensors of any device, since the process began. On the CPU each stands for
/// what it would be elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Copies to the host. Each waits for all that the device was asked to do before.
    pub reads: u64,
    /// Copies to a device by [`to_device`].
    pub writes: u64,
}

/// The copies so far.
pub fn traffic() -> Traffic {
    Traffic {
        reads: READS.load(Ordering::Relaxed),
        writes: WRITES.load(Ordering::Relaxed),
    }
}

/// The values of `tensor`, row by row.
pub fn to_host<T: WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    READS.fetch_add(1, Ordering::Relaxed);
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// `values` as a tensor of this shape on `device`.
pub fn to_device<T: WithDType>(
    values: Vec<T>,
    shape: impl Into<Shape>,
    device: &Device,
) -> Result<Tensor> {
    WRITES.fetch_add(1, Ordering::Relaxed);
    Ok(Tensor::from_vec(values, shape.into(), device)?)
}

/// Calls `f` with every item and returns the results in the items' order. Items hold tensors of `device`.
///
/// On the CPU the items are worked on in parallel. On other devices they are worked on one after the other by the
/// calling thread: candle's Metal backend encodes the operations of several threads into several command buffers, and
/// commits them in any order, so that one thread's operation may read a tensor before another's has written it.
///
/// # Errors
/// Returns the error of an item, if there is one.
pub fn each<T: Send, R: Send>(
    device: &Device,
    items: impl IntoIterator<Item = T>,
    f: impl Fn(T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    each_of(has_loops(device), items, f)
}

fn each_of<T: Send, R: Send>(
    is_parallel: bool,
    items: impl IntoIterator<Item = T>,
    f: impl Fn(T) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    match is_parallel {
        true => {
            let items: Vec<T> = items.into_iter().collect();
            items.into_par_iter().map(f).collect()
        }
        false => items.into_iter().map(f).collect(),
    }
}

/// Sets whether float32 matrices are multiplied in TF32, for all products of the process from now on. Returns whether
/// this is so: only CUDA can, and a request for another device changes nothing.
pub fn set_tf32(is_on: bool, device: &Device) -> bool {
    if device.is_cuda() {
        candle_core::cuda::set_gemm_reduced_precision_f32(is_on);
    }
    is_on && device.is_cuda()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn the_cpu_has_no_tf32() {
        assert!(!set_tf32(true, &Device::Cpu));
        assert!(!set_tf32(false, &Device::Cpu));
    }

    #[test]
    fn results_keep_the_order_of_the_items() {
        for is_parallel in [true, false] {
            let squares = each_of(is_parallel, 0..1000usize, |i| Ok(i * i)).expect("no error");
            assert!(
                squares
                    .iter()
                    .enumerate()
                    .all(|(i, square)| *square == i * i)
            );
        }
    }

    /// Off the CPU one thread works, in order, and stops at the first error.
    #[test]
    fn other_devices_are_served_in_order_by_the_calling_thread() {
        let calls = Mutex::new(Vec::new());
        let caller = std::thread::current().id();
        let result = each_of(false, 0..100, |i| {
            assert_eq!(std::thread::current().id(), caller);
            calls.lock().expect("no panic").push(i);
            match i {
                40 => Err(candle_core::Error::Msg("stop".to_owned()).into()),
                _ => Ok(()),
            }
        });
        assert!(result.is_err());
        let calls = calls.into_inner().expect("no panic");
        assert_eq!(calls, (0..=40).collect::<Vec<_>>());
    }
}
