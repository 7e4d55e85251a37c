//! Gated activations, `act(gate) * up`.

use candle_core::Tensor;
use monteclora_adapters::linalg::on_cpu;
use monteclora_converters::architecture::Activation;

use super::build_rows;
use monteclora_adapters::Result;

/// A gated activation. Its inputs gate and up are `[tokens, n]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    /// `act(gate) * up`.
    pub(crate) forward: fn(&Tensor, &Tensor) -> Result<Tensor>,
    /// The gradients of gate and up, from gate, up and the gradient of the output.
    pub(crate) backward: fn(&Tensor, &Tensor, &Tensor) -> Result<Backward>,
}

impl Gate {
    /// The gate with this activation, if it is supported.
    pub(crate) fn of(activation: Activation) -> Option<Self> {
        match activation {
            Activation::Silu => Some(Self::by::<Silu>()),
            Activation::GeluTanh => Some(Self::by::<GeluTanh>()),
            _ => None,
        }
    }

    fn by<F: NonLinearity>() -> Self {
        Self {
            forward: forward::<F>,
            backward: backward::<F>,
        }
    }
}

/// Results of the backward pass of a gated activation, each `[tokens, n]`.
#[derive(Debug, Clone)]
pub(crate) struct Backward {
    /// `act(gate) * up`. The backward pass computes it anyway, so the forward pass need not keep it.
    pub(crate) activated: Tensor,
    /// Gradient with respect to the gate.
    pub(crate) grad_gate: Tensor,
    /// Gradient with respect to up.
    pub(crate) grad_up: Tensor,
}

/// A non-linearity, for one number and as a composition of candle's operations.
trait NonLinearity {
    fn value(x: f32) -> f32;

    /// The value, and the slope as two factors.
    fn value_and_slope(x: f32) -> (f32, [f32; 2]);

    fn plain(x: &Tensor) -> Result<Tensor>;

    fn plain_with_slope(x: &Tensor) -> Result<(Tensor, [Tensor; 2])>;
}

/// `x / (1 + exp(-x))`; with `s = sigmoid(x)` its slope is `s (1 + x (1 - s))`.
struct Silu;

impl NonLinearity for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, [f32; 2]) {
        let s = sigmoid(x);
        (x * s, [s, 1.0 + x * (1.0 - s)])
    }

    fn plain(x: &Tensor) -> Result<Tensor> {
        Ok(x.silu()?)
    }

    fn plain_with_slope(x: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
        let s = (x.neg()?.exp()? + 1.0)?.recip()?;
        let slope = ((x * (1.0 - &s)?)? + 1.0)?;
        Ok(((x * &s)?, [s, slope]))
    }
}

/// `x / 2 (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
struct GeluTanh;

/// `sqrt(2 / pi)`.
const ROOT: f32 = 0.797_884_6;
/// The coefficient of `x^3`.
const CUBE: f32 = 0.044_715;

impl NonLinearity for GeluTanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        0.5 * x * (1.0 + tanh(ROOT * (x + CUBE * x * x * x)))
    }

    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, [f32; 2]) {
        let t = tanh(ROOT * (x + CUBE * x * x * x));
        let inner = ROOT * (1.0 + 3.0 * CUBE * x * x);
        let slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
        (0.5 * x * (1.0 + t), [slope, 1.0])
    }

    fn plain(x: &Tensor) -> Result<Tensor> {
        Ok(x.gelu()?)
    }

    fn plain_with_slope(x: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
        let square = x.sqr()?;
        let inner = ((&square * f64::from(CUBE))? + 1.0)?;
        let t = ((x * inner)? * f64::from(ROOT))?.tanh()?;
        let rest =
            ((1.0 - t.sqr()?)? * (((square * f64::from(3.0 * CUBE))? + 1.0)? * f64::from(ROOT))?)?;
        let half = ((&t + 1.0)? * 0.5)?;
        let slope = (&half + ((x * rest)? * 0.5)?)?;
        Ok(((x * half)?, [slope, x.ones_like()?]))
    }
}

/// `act(gate) * up`.
fn forward<F: NonLinearity>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (rows, columns) = gate.dims2()?;
    let fast = on_cpu([gate, up], |[gate, up]| {
        build_rows(
            rows,
            columns,
            #[inline(always)]
            |row, [out]| {
                let range = row * columns..(row + 1) * columns;
                for ((out, g), u) in out.iter_mut().zip(&gate[range.clone()]).zip(&up[range]) {
                    out.write(F::value(*g) * u);
                }
            },
        )
    })?;
    match fast {
        Some(built) => {
            let [y] = built?;
            Ok(y)
        }
        None => Ok((F::plain(gate)? * up)?),
    }
}

/// Gradients with respect to gate and up: `(g up act'(gate), g act(gate))`.
fn backward<F: NonLinearity>(gate: &Tensor, up: &Tensor, upstream: &Tensor) -> Result<Backward> {
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
                    let (value, [one, other]) = F::value_and_slope(*g);
                    y.write(value * u);
                    grad_gate.write(d * u * one * other);
                    grad_up.write(d * value);
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
    let (value, [one, other]) = F::plain_with_slope(gate)?;
    Ok(Backward {
        activated: (&value * up)?,
        grad_gate: (((upstream * up)? * one)? * other)?,
        grad_up: (upstream * value)?,
    })
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh(x)` with an error below 3 ulp. Near 0 it uses a polynomial, since `1 - 2 / (e^2x + 1)` cancels there. Both are
/// always computed, so that loops vectorise.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut p = -5.704_988_7e-3;
    for coefficient in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = p * square + coefficient;
    }
    let near = x + x * square * p;
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { near } else { far }
}

/// `e^x` by range reduction to `2^n e^r`, `|r| <= ln(2)/2`, and a polynomial of degree 6. The error is below 2 ulp. It
/// has no branches, so loops vectorise, which they do not with the library's `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 as a sum of two parts. The first has so few bits that its product with n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Outside these bounds the result stays at about 1.2e-38 or 2.2e38, so that n fits into the exponent.
    let x = x.clamp(-87.3, 88.3);
    // Adding 1.5 * 2^23 rounds to the nearest integer n and leaves it in the low bits of the sum. On baseline x86-64
    // `round` is a library call, and a saturating cast to an integer is not a vector instruction.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    // After the clamp n is in [-126, 127], so n + 127 is the exponent of 2^n. The shift drops the bits above it.
    p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, composed, matrix};
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
    fn hyperbolic_tangent_is_accurate() {
        for i in -20_000..20_000 {
            let x = i as f32 * 1e-3;
            let (ours, exact) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!(
                (ours - exact).abs() <= 4e-7 * exact.abs(),
                "{x}: {ours} {exact}"
            );
        }
        assert_eq!([tanh(1e9), tanh(-1e9), tanh(0.0)], [1.0, -1.0, 0.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn gates_equal_the_plain_ones_and_their_gradients() -> Result<()> {
        equals_the_plain_one::<Silu>()?;
        equals_the_plain_one::<GeluTanh>()
    }

    fn equals_the_plain_one<F: NonLinearity>() -> Result<()> {
        for (rows, columns) in [(1, 1), (7, 33), (129, 200)] {
            let (gate, up) = (
                (matrix(rows, columns, 0.1) * 6.0)?,
                matrix(rows, columns, 0.5),
            );
            let upstream = matrix(rows, columns, 0.9);
            let (gate_var, up_var) = (Var::from_tensor(&gate)?, Var::from_tensor(&up)?);
            let plain = (F::plain(gate_var.as_tensor())? * up_var.as_tensor())?;
            let grads = (&plain * &upstream)?.sum_all()?.backward()?;
            let by_gate = grads.get(gate_var.as_tensor()).expect("gate");
            let by_up = grads.get(up_var.as_tensor()).expect("up");
            let held = [gate.clone(), up.clone(), upstream.clone()];
            let composed = composed([&gate, &up, &upstream])?;
            for [gate, up, upstream] in std::iter::once(held).chain(composed) {
                assert_close(&forward::<F>(&gate, &up)?, &plain, 1e-5);
                let found = backward::<F>(&gate, &up, &upstream)?;
                assert_close(&found.activated, &plain, 1e-5);
                assert_close(&found.grad_gate, by_gate, 1e-4);
                assert_close(&found.grad_up, by_up, 1e-4);
            }
        }
        Ok(())
    }
}
