//! Compares every hand-written gradient with central differences of its forward pass, on shapes that are no multiples
//! of vector or block sizes, on every device.

use candle_core::{DType, Device, Tensor};
use monteclora_adapters::FrozenLinear;
use monteclora_converters::architecture::Activation;

use super::activation::Gate;
use super::attention::Masks;
use super::attention::kernel::{self as attention, Heads, Segment};
use super::head;
use super::norm::Norm;
use super::rotary::Rotation;
use super::testing::{devices, matrix_on};
use monteclora_adapters::Result;

/// Step of the differences. With it, truncation and f32 rounding are both below the tolerance.
const STEP: f64 = 1e-2;

pub(crate) fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    // Summed on the CPU, since not every device has double precision.
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let product = (wide(a)? * wide(b)?)?;
    Ok(product.sum_all()?.to_scalar::<f64>()?)
}

/// Compares `gradients` with the differences of `value` along the gradient itself and along another direction, for one
/// input at a time. The tolerance is relative to the product of the norms, which is the derivative along the gradient; it
/// leaves room for the rounding of float32 differences, which depends on the processor's vector width (5e-4 on some).
pub(crate) fn check(
    inputs: &[Tensor],
    gradients: &[Tensor],
    value: impl Fn(&[Tensor]) -> Result<f64>,
) -> Result<()> {
    for (index, gradient) in gradients.iter().enumerate() {
        let (rows, columns) = gradient.dims2()?;
        let norm = dot(gradient, gradient)?.sqrt();
        let along = (gradient * (((rows * columns) as f64).sqrt() / norm))?;
        let device = gradient.device();
        for direction in [along, matrix_on(device, rows, columns, 7.3)] {
            let shifted = |step: f64| -> Result<f64> {
                let mut inputs = inputs.to_vec();
                inputs[index] = (&inputs[index] + (&direction * step)?)?;
                value(&inputs)
            };
            let numeric = (shifted(STEP)? - shifted(-STEP)?) / (2.0 * STEP);
            let exact = dot(gradient, &direction)?;
            let scale = norm * dot(&direction, &direction)?.sqrt();
            assert!(
                (numeric - exact).abs() < 1e-3 * scale,
                "input {index}: {numeric} by differences, {exact} by the backward pass, scale {scale}"
            );
        }
    }
    Ok(())
}

#[test]
fn rms_norm_gradient() -> Result<()> {
    for device in devices() {
        let weight = matrix_on(device, 1, 37, 0.7).flatten_all()?;
        let [x, upstream] = [0.1, 0.3].map(|seed| matrix_on(device, 21, 37, seed));
        let norm = Norm { weight, eps: 1e-5 };
        let gradient = norm.backward(&x, &upstream, None)?;
        check(&[x], &[gradient], |inputs| {
            dot(&norm.forward(&inputs[0])?, &upstream)
        })?;
    }
    Ok(())
}

#[test]
fn rotation_gradient() -> Result<()> {
    for device in devices() {
        let rotation = Rotation::plain(&[0, 3, 11, 12, 40], &[1.0, 0.21, 0.04], device)?;
        let [x, upstream] = [0.1, 0.3].map(|seed| matrix_on(device, 5, 18, seed));
        let gradient = rotation.backward(&upstream)?;
        check(&[x], &[gradient], |inputs| {
            dot(&rotation.forward(&inputs[0])?, &upstream)
        })?;
    }
    Ok(())
}

#[test]
fn gated_activation_gradient() -> Result<()> {
    for device in devices() {
        let [gate, up, upstream] = [0.1, 0.5, 0.9].map(|seed| matrix_on(device, 19, 53, seed));
        let gate = (gate * 4.0)?;
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gated = Gate::of(activation).expect("computed");
            let found = (gated.backward)(&gate, &up, &upstream)?;
            let inputs = [gate.clone(), up.clone()];
            check(&inputs, &[found.grad_gate, found.grad_up], |inputs| {
                dot(&(gated.forward)(&inputs[0], &inputs[1])?, &upstream)
            })?;
        }
    }
    Ok(())
}

#[test]
fn attention_gradient() -> Result<()> {
    for (window, scale, softcap) in [
        (None, None, None),
        (Some(5), None, None),
        (Some(5), Some(0.5), Some(1.5)),
    ] {
        let heads = Heads {
            query: 6,
            key_value: 2,
            dim: 10,
            window,
            scale,
            softcap,
        };
        for device in devices() {
            attention_gradient_of(heads, device)?;
        }
    }
    Ok(())
}

fn attention_gradient_of(heads: Heads, device: &Device) -> Result<()> {
    let segment = |query_start, query_len, key_start, key_len| Segment {
        query_start,
        query_len,
        key_start,
        key_len,
    };
    let segments = [segment(0, 67, 0, 67), segment(67, 3, 67, 9)];
    let [q, upstream] = [0.1, 0.4].map(|seed| matrix_on(device, 70, 60, seed));
    let [k, v] = [0.2, 0.3].map(|seed| matrix_on(device, 76, 20, seed));
    let masks = &Masks::default();
    let attended = attention::forward(&q, &k, &v, &segments, heads, masks)?;
    let (dq, dk, dv) =
        attention::backward((&q, &k, &v), &attended, &upstream, &segments, heads, masks)?;
    check(&[q, k, v], &[dq, dk, dv], |inputs| {
        let [q, k, v] = [0, 1, 2].map(|i| &inputs[i]);
        dot(
            &attention::forward(q, k, v, &segments, heads, masks)?.output,
            &upstream,
        )
    })
}

#[test]
fn cross_entropy_gradient() -> Result<()> {
    let labels = head::CHUNK + 3;
    let targets: Vec<u32> = (0..labels as u32).map(|i| (i * 5) % 29).collect();
    let caps = [None, Some(8.0)];
    for (device, cap) in devices().iter().flat_map(|d| caps.map(|cap| (d, cap))) {
        let weight = matrix_on(device, 29, 11, 0.3);
        let linear = FrozenLinear::new(std::sync::Arc::new(weight), None)?;
        let hidden = matrix_on(device, labels, 11, 0.8);
        let found = head::evaluate(&linear, None, cap, &hidden, &targets, Some(0.25))?;
        let gradient = found.grad_hidden.expect("a scale was given");
        check(std::slice::from_ref(&hidden), &[gradient], |inputs| {
            let loss = head::evaluate(&linear, None, cap, &inputs[0], &targets, None)?;
            Ok(0.25 * loss.nll.iter().map(|v| f64::from(*v)).sum::<f64>())
        })?;
    }
    Ok(())
}
