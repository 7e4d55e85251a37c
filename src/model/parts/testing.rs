//! Inputs of the parts' tests, the devices they run on, and comparisons.

#[path = "../../../tests/it/fixtures/devices.rs"]
mod on;

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::Result;

pub(crate) use on::devices;

pub(crate) fn matrix(rows: usize, columns: usize, seed: f64) -> Tensor {
    let values = (0..rows * columns)
        .map(|i| ((i as f64 + 0.5) * 0.917 + seed).sin() as f32)
        .collect::<Vec<_>>();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("the shape fits")
}

/// [`matrix`] on `device`.
pub(crate) fn matrix_on(device: &Device, rows: usize, columns: usize, seed: f64) -> Tensor {
    let matrix = matrix(rows, columns, seed);
    matrix.to_device(device).expect("the device has the memory")
}

/// `tensors` in the forms for which the parts compose candle's operations instead of running their own loops: matrices as
/// transposed views, which are not contiguous, and all on the accelerator, if there is one.
pub(crate) fn composed<const N: usize>(tensors: [&Tensor; N]) -> Result<Vec<[Tensor; N]>> {
    let held = |device: &Device, tensor: &Tensor| match (device, tensor.rank()) {
        (Device::Cpu, 2) => tensor.t()?.contiguous()?.t(),
        _ => tensor.to_device(device),
    };
    let mut all = Vec::new();
    for device in devices() {
        let held = tensors.iter().map(|tensor| held(device, tensor));
        let held: Vec<Tensor> = held.collect::<candle_core::Result<_>>()?;
        all.push(held.try_into().expect("as many as before"));
    }
    Ok(all)
}

/// Largest difference of two tensors, which may be on different devices.
pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let a = a.to_device(&Device::Cpu);
    a.and_then(|a| a - b.to_device(&Device::Cpu)?)
        .and_then(|d| d.abs())
        .and_then(|d| d.max_all())
        .and_then(|d| d.to_dtype(DType::F32))
        .and_then(|d| d.to_scalar())
        .expect("same shapes")
}

/// Checks that `found` differs from `expected` by less than `on_cpu`, or on an accelerator by less than 1e-4 of the largest
/// expected entry.
#[track_caller]
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, on_cpu: f32) {
    let largest = largest_difference(expected, &expected.zeros_like().expect("zeros"));
    let allowed = match found.device() {
        Device::Cpu => on_cpu,
        _ => 1e-4 * largest,
    };
    let difference = largest_difference(found, expected);
    assert!(
        difference < allowed,
        "{:?}: differs by {difference}, allowed {allowed}, largest {largest}",
        found.device().location()
    );
}

/// The first thing to try on an accelerator.
#[test]
fn one_operation() -> Result<()> {
    let expected = matrix(5, 7, 0.1).matmul(&matrix(7, 3, 0.2))?;
    for device in devices() {
        let found = matrix_on(device, 5, 7, 0.1).matmul(&matrix_on(device, 7, 3, 0.2))?;
        assert_close(&found, &expected, 1e-6);
    }
    Ok(())
}
