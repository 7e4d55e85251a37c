//! Gated activations, `act(gate) * up`.

use candle_core::Tensor;
use monteclora_adapters::linalg::on_cpu;
use monteclora_converters::architecture::Activation;

use super::build_rows;
use monteclora_adapters::Result;

/// A gated activation of gate and up, both `[tokens, n]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    /// `act(gate) * up`.
    pub(crate) forward: fn(&Tensor, &Tensor) -> Result<Tensor>,
    /// Its gradients for that of its result.
    pub(crate) backward: fn(&Tensor, &Tensor, &Tensor) -> Result<Backward>,
}

impl Gate {
    /// The one with this activation, if it is computed.
    pub(crate) fn of(activation: Activation) -> Option<Self> {
        match activation {
            Activation::Silu => Some(Self {
                forward: silu,
                backward: silu_backward,
            }),
            _ => None,
        }
    }
}

/// `gate / (1 + exp(-gate)) * up`.
fn silu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (rows, columns) = gate.dims2()?;
    let fast = on_cpu([gate, up], |[gate, up]| {
        build_rows(
            rows,
            columns,
            #[inline(always)]
            |row, [out]| {
                let range = row * columns..(row + 1) * columns;
                for ((out, g), u) in out.iter_mut().zip(&gate[range.clone()]).zip(&up[range]) {
                    out.write(g * sigmoid(*g) * u);
                }
            },
        )
    })?;
    match fast {
        Some(built) => {
            let [y] = built?;
            Ok(y)
        }
        None => Ok((gate.silu()? * up)?),
    }
}

/// What the backward pass of a gated activation gives, each `[tokens, n]`.
#[derive(Debug, Clone)]
pub(crate) struct Backward {
    /// `silu(gate) * up` once more, which the pass comes by anyway: nobody has to keep it.
    pub(crate) activated: Tensor,
    /// Gradient with respect to the gate.
    pub(crate) grad_gate: Tensor,
    /// Gradient with respect to the other factor.
    pub(crate) grad_up: Tensor,
}

/// Gradients with respect to gate and up: with `s = sigmoid(gate)`, `(g up s (1 + gate (1 - s)), g gate s)`.
fn silu_backward(gate: &Tensor, up: &Tensor, upstream: &Tensor) -> Result<Backward> {
    let (rows, columns) = gate.dims2()?;
    let fast = on_cpu([gate, up, upstream], |[gate, up, upstream]| {
        build_rows(
            rows,
            columns,
            #[inline(always)]
            |row, [activated, grad_gate, grad_up]| {
                let range = row * columns..(row + 1) * columns;
                let inputs = gate[range.clone()]
                    .iter()
                    .zip(&up[range.clone()])
                    .zip(&upstream[range]);
                let outputs = activated.iter_mut().zip(grad_gate).zip(grad_up);
                for (((y, grad_gate), grad_up), ((g, u), d)) in outputs.zip(inputs) {
                    let s = sigmoid(*g);
                    let silu = g * s;
                    y.write(silu * u);
                    grad_gate.write(d * u * s * (1.0 + g * (1.0 - s)));
                    grad_up.write(d * silu);
                }
            },
        )
    })?;
    if let Some(built) = fast {
        let [activated, grad_gate, grad_up] = built?;
        return Ok(Backward {
            activated,
            grad_gate,
            grad_up,
        });
    }
    let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let silu = (gate * &s)?;
    let slope = ((gate * (1.0 - &s)?)? + 1.0)?;
    Ok(Backward {
        activated: (&silu * up)?,
        grad_gate: (((upstream * up)? * &s)? * slope)?,
        grad_up: (upstream * silu)?,
    })
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `e^x` by range reduction to `2^n e^r`, `|r| <= ln(2)/2`, and a polynomial of degree 6: below 2 ulp, and free of branches, so
/// that loops over it vectorise where the library's `expf` does not.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these the result is 0 or infinite to f32.
    let x = x.clamp(-87.3, 88.3);
    // Adding 1.5 * 2^23 rounds to the nearest integer n and leaves it in the low bits of the sum; `round` would be a library call
    // on baseline x86-64, and a cast to an integer, which saturates, is not a vector instruction.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    // n lies in [-126, 127] after the clamp, so n + 127 is the exponent of 2^n, and the shift drops the bits above it.
    p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{largest_difference, matrix};
    use super::*;
    use candle_core::Var;

    #[test]
    fn exponential_is_accurate() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 4e-7 * exact, "{x}: {ours} {exact}");
        }
        assert!(exp(-1e4) < 1e-37 && exp(-f32::INFINITY) < 1e-37);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn silu_equals_the_plain_one_and_its_gradient() -> Result<()> {
        for (rows, columns) in [(1, 1), (7, 33), (129, 200)] {
            let (gate, up) = (
                (matrix(rows, columns, 0.1) * 6.0)?,
                matrix(rows, columns, 0.5),
            );
            let upstream = matrix(rows, columns, 0.9);
            let (gate_var, up_var) = (Var::from_tensor(&gate)?, Var::from_tensor(&up)?);
            let plain = (gate_var.silu()? * up_var.as_tensor())?;
            assert!(largest_difference(&silu(&gate, &up)?, &plain) < 1e-5);
            let grads = (&plain * &upstream)?.sum_all()?.backward()?;
            let by_gate = grads.get(gate_var.as_tensor()).expect("gate");
            let by_up = grads.get(up_var.as_tensor()).expect("up");
            // A transposed view is not contiguous, so it takes the path for other devices.
            let strided = gate.t()?.contiguous()?.t()?;
            for gate in [&gate, &strided] {
                let found = silu_backward(gate, &up, &upstream)?;
                assert!(largest_difference(&found.activated, &plain) < 1e-5);
                assert!(largest_difference(&found.grad_gate, by_gate) < 1e-4);
                assert!(largest_difference(&found.grad_up, by_up) < 1e-4);
            }
        }
        Ok(())
    }
}
