//! Reductions that vectorise, in an order that depends only on the length.

pub use monteclora_converters::simd::vectorised;

/// Computes `sum_i prod_f factors[f][i]` over slices of one length in sixteen partial sums: vectorised, and in an order
/// that depends only on the length.
#[inline(always)]
pub fn dot<const N: usize>(factors: [&[f32]; N]) -> f32 {
    const LANES: usize = 16;
    let len = factors.iter().map(|f| f.len()).min().unwrap_or(0);
    let mut partial = [0f32; LANES];
    let whole = len - len % LANES;
    for start in (0..whole).step_by(LANES) {
        let mut product = [1f32; LANES];
        for factor in &factors {
            for (p, v) in product.iter_mut().zip(&factor[start..start + LANES]) {
                *p *= v;
            }
        }
        for (sum, p) in partial.iter_mut().zip(product) {
            *sum += p;
        }
    }
    let rest: f32 = (whole..len)
        .map(|i| factors.iter().map(|f| f[i]).product::<f32>())
        .sum();
    partial.iter().sum::<f32>() + rest
}

/// Returns the largest value, or negative infinity if there is none. NaN values are ignored.
#[inline(always)]
pub fn largest(values: &[f32]) -> f32 {
    const LANES: usize = 16;
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        if b > a { b } else { a }
    }
    let mut partial = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (best, v) in partial.iter_mut().zip(chunk) {
            *best = larger(*best, *v);
        }
    }
    let best = partial.iter().copied().fold(f32::NEG_INFINITY, larger);
    rest.iter().copied().fold(best, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_equal_plain_loops() {
        for len in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 1.3).cos()).collect();
            let exact: f64 = a
                .iter()
                .zip(&b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum();
            let found = vectorised(
                #[inline(always)]
                || dot([&a, &b]),
            );
            assert!((f64::from(found) - exact).abs() < 1e-5, "{len}");
            let plain = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&a), plain, "{len}");
        }
    }

    /// The instruction set changes speed and not one bit.
    #[test]
    fn vectorised_equals_plain_to_the_bit() {
        let a: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.31).sin() * 3.0).collect();
        #[inline(always)]
        fn term(a: &[f32]) -> Vec<u32> {
            a.iter()
                .map(|v| (v * 1.1 + v * v - 0.3).to_bits())
                .chain([dot([a, a, a]).to_bits()])
                .collect()
        }
        let wide = vectorised(
            #[inline(always)]
            || term(&a),
        );
        assert_eq!(wide, term(&a));
    }
}
