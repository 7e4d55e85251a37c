//! Root-mean-square normalisation with a frozen scale.

use candle_core::{D, Tensor};
use monteclora_adapters::linalg::on_cpu;
use monteclora_adapters::simd::dot;

use super::build_rows;
use monteclora_adapters::Result;

/// A norm over consecutive entries, as many as its weight has: the residual stream, a whole projection, or each head of
/// a projection.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Tensor,
    /// Added to the mean square.
    pub(crate) eps: f64,
}

impl Norm {
    fn runs(&self, x: &Tensor) -> Result<Tensor> {
        let width = self.weight.dims1()?;
        Ok(match x.dims2()? {
            (_, columns) if columns == width => x.clone(),
            (rows, columns) => x.reshape((rows * columns / width, width))?,
        })
    }

    /// The norm of `x` `[tokens, n]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = forward(&self.runs(x)?, &self.weight, self.eps)?;
        Ok(y.reshape(x.dims())?)
    }

    /// Gradient with respect to `x`, plus `residual`, the optional gradient of the path around the norm.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        upstream: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (runs, of_runs) = (self.runs(x)?, self.runs(upstream)?);
        let around = residual.map(|around| self.runs(around)).transpose()?;
        let grad = backward(&runs, &self.weight, self.eps, &of_runs, around.as_ref())?;
        Ok(grad.reshape(x.dims())?)
    }
}

/// `y = w * x / sqrt(mean(x^2) + eps)` over the last dimension; `x` `[rows, n]`, `w` `[n]`.
fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let fast = on_cpu([x, weight], |[x, w]| {
        build_rows(
            rows,
            columns,
            #[inline(always)]
            |row, [out]| {
                let x = &x[row * columns..(row + 1) * columns];
                let scale = inverse_rms(x, eps);
                for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                    out.write(x * scale * w);
                }
            },
        )
    })?;
    match fast {
        Some(built) => {
            let [y] = built?;
            Ok(y)
        }
        None => Ok(normalised(x, eps)?.0.broadcast_mul(weight)?),
    }
}

/// Gradient with respect to `x`: with `g' = g * w` and `z = x / rms`, `dx = (g' - z mean(g' z)) / rms`, plus
/// `residual`, the optional gradient of the path around the norm.
fn backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    upstream: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    // Without a residual, `upstream` is passed instead and not read.
    let around = residual.unwrap_or(upstream);
    let fast = on_cpu([x, weight, upstream, around], |[x, w, g, around]| {
        build_rows(
            rows,
            columns,
            #[inline(always)]
            |row, [out]| {
                let range = row * columns..(row + 1) * columns;
                let (x, g, around) = (&x[range.clone()], &g[range.clone()], &around[range]);
                let scale = inverse_rms(x, eps);
                let pull = dot([x, g, w]) * scale * scale * scale / columns as f32;
                let slots = out.iter_mut().zip(x).zip(g).zip(w);
                if residual.is_some() {
                    for ((((out, x), g), w), around) in slots.zip(around) {
                        out.write(around + (g * w * scale - x * pull));
                    }
                } else {
                    for (((out, x), g), w) in slots {
                        out.write(g * w * scale - x * pull);
                    }
                }
            },
        )
    })?;
    if let Some(built) = fast {
        let [grad] = built?;
        return Ok(grad);
    }
    let (z, scale) = normalised(x, eps)?;
    let weighted = upstream.broadcast_mul(weight)?;
    let mean = (&weighted * &z)?.mean_keepdim(D::Minus1)?;
    let grad = (weighted - z.broadcast_mul(&mean)?)?.broadcast_mul(&scale)?;
    Ok(match residual {
        Some(residual) => (residual + grad)?,
        None => grad,
    })
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let mean = f64::from(dot([x, x])) / x.len() as f64;
    (mean + eps).sqrt().recip() as f32
}

fn normalised(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&scale)?, scale))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, composed, largest_difference, matrix};
    use super::*;
    use candle_core::Var;

    #[test]
    fn fast_path_equals_the_plain_one_and_its_gradient() -> Result<()> {
        for (rows, columns) in [(1, 3), (5, 64), (301, 67)] {
            let x = matrix(rows, columns, 0.1);
            let weight = matrix(1, columns, 0.7).flatten_all()?;
            let upstream = matrix(rows, columns, 0.3);
            let var = Var::from_tensor(&x)?;
            let plain = normalised(var.as_tensor(), 1e-5)?
                .0
                .broadcast_mul(&weight)?;
            assert!(largest_difference(&forward(&x, &weight, 1e-5)?, &plain) < 1e-5);
            let grads = (&plain * &upstream)?.sum_all()?.backward()?;
            let expected = grads.get(var.as_tensor()).expect("x has a gradient");
            let fast = backward(&x, &weight, 1e-5, &upstream, None)?;
            assert!(largest_difference(&fast, expected) < 1e-4);
            let residual = matrix(rows, columns, 0.9);
            let onto = backward(&x, &weight, 1e-5, &upstream, Some(&residual))?;
            assert!(largest_difference(&onto, &(&residual + expected)?) < 1e-4);
            let fast = forward(&x, &weight, 1e-5)?;
            for [x, weight, upstream, residual] in composed([&x, &weight, &upstream, &residual])? {
                assert_close(&forward(&x, &weight, 1e-5)?, &fast, 1e-5);
                let found = backward(&x, &weight, 1e-5, &upstream, None)?;
                assert_close(&found, expected, 1e-4);
                let found = backward(&x, &weight, 1e-5, &upstream, Some(&residual))?;
                assert_close(&found, &onto, 1e-4);
            }
        }
        Ok(())
    }
}
