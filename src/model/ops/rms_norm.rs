//! Root-mean-square normalisation with a frozen scale.

use candle_core::{D, Tensor};
use monteclora_adapters::linalg::on_cpu;

use super::build_rows;
use crate::model::Result;

/// `y = w * x / sqrt(mean(x^2) + eps)` over the last dimension; `x` `[rows, n]`, `w` `[n]`.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let fast = on_cpu([x, weight], |[x, w]| {
        build_rows(rows, columns, |row, out| {
            let x = &x[row * columns..(row + 1) * columns];
            let scale = inverse_rms(x, eps);
            for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                out.write(x * scale * w);
            }
        })
    })?;
    match fast {
        Some(y) => Ok(y?),
        None => Ok(normalised(x, eps)?.0.broadcast_mul(weight)?),
    }
}

/// Gradient with respect to `x`: with `g' = g * w` and `z = x / rms`, `dx = (g' - z mean(g' z)) / rms`.
pub fn backward(x: &Tensor, weight: &Tensor, eps: f64, upstream: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let fast = on_cpu([x, weight, upstream], |[x, w, g]| {
        build_rows(rows, columns, |row, out| {
            let range = row * columns..(row + 1) * columns;
            let (x, g) = (&x[range.clone()], &g[range]);
            let scale = inverse_rms(x, eps);
            let dot: f32 = x.iter().zip(g).zip(w).map(|((x, g), w)| x * g * w).sum();
            let pull = dot * scale * scale * scale / columns as f32;
            for (((out, x), g), w) in out.iter_mut().zip(x).zip(g).zip(w) {
                out.write(g * w * scale - x * pull);
            }
        })
    })?;
    if let Some(grad) = fast {
        return Ok(grad?);
    }
    let (z, scale) = normalised(x, eps)?;
    let weighted = upstream.broadcast_mul(weight)?;
    let mean = (&weighted * &z)?.mean_keepdim(D::Minus1)?;
    Ok((weighted - z.broadcast_mul(&mean)?)?.broadcast_mul(&scale)?)
}

fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    // Eight partial sums let the compiler vectorise what a single ordered sum forbids.
    let mut partial = [0f32; 8];
    let chunks = x.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for chunk in chunks {
        for (sum, v) in partial.iter_mut().zip(chunk) {
            *sum += v * v;
        }
    }
    let mean = f64::from(partial.iter().sum::<f32>() + rest) / x.len() as f64;
    (mean + eps).sqrt().recip() as f32
}

fn normalised(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok((x.broadcast_mul(&scale)?, scale))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{largest_difference, matrix};
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
            assert!(largest_difference(&backward(&x, &weight, 1e-5, &upstream)?, expected) < 1e-4);
        }
        Ok(())
    }
}
