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

/// Partial sums of [`dots_fused`].
pub(crate) const LANES: usize = 16;

/// Whether the processor multiplies and adds in one instruction. Without it [`dots_fused`] is right but slow.
pub fn has_fused() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    cfg!(target_arch = "aarch64")
}

/// `sum_i a[i] b[i]` over slices of one length, each product added without rounding in between, in sixteen partial
/// sums. The order depends only on the length. Needs fused instructions to be fast: call it inside [`vectorised`].
#[inline(always)]
pub fn dot_fused(a: &[f32], b: &[f32]) -> f32 {
    let [[sum]] = dots_fused([a], [b]);
    sum
}

/// [`dot_fused`] of each of `a` with each of `b`; each sum has the same bits as alone.
#[inline(always)]
pub fn dots_fused<const M: usize, const N: usize>(a: [&[f32]; M], b: [&[f32]; N]) -> [[f32; N]; M] {
    let len = a.iter().chain(&b).map(|x| x.len()).min().unwrap_or(0);
    let (a, b) = (a.map(|a| &a[..len]), b.map(|b| &b[..len]));
    let mut partial = [[[0f32; LANES]; N]; M];
    let (a_chunks, b_chunks) = (a.map(<[f32]>::as_chunks), b.map(<[f32]>::as_chunks));
    for idx in 0..len / LANES {
        add_products(
            &mut partial,
            a_chunks.map(|a| a.0[idx]),
            b_chunks.map(|b| b.0[idx]),
        );
    }
    if !len.is_multiple_of(LANES) {
        let (a, b) = (a_chunks.map(|a| padded(a.1)), b_chunks.map(|b| padded(b.1)));
        add_products(&mut partial, a, b);
    }
    partial.map(|of_row| of_row.map(total))
}

#[inline(always)]
fn add_products<const M: usize, const N: usize>(
    partial: &mut [[[f32; LANES]; N]; M],
    a: [[f32; LANES]; M],
    b: [[f32; LANES]; N],
) {
    for (a, partial) in a.iter().zip(partial) {
        for (b, partial) in b.iter().zip(partial) {
            for lane in 0..LANES {
                partial[lane] = a[lane].mul_add(b[lane], partial[lane]);
            }
        }
    }
}

#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    std::array::from_fn(|lane| rest.get(lane).copied().unwrap_or(0.0))
}

/// The sum of sixteen numbers, by halves.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
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

    #[test]
    fn fused_sums_are_exact_and_the_same_alone_and_together() {
        for len in [0, 1, 15, 16, 33, 576] {
            let row =
                |seed: f32| -> Vec<f32> { (0..len).map(|i| (i as f32 * seed).sin()).collect() };
            let (a, b) = ([row(0.7), row(0.3)], [row(1.3), row(1.9), row(0.1)]);
            let together = vectorised(
                #[inline(always)]
                || dots_fused([&a[0], &a[1]], [&b[0], &b[1], &b[2]]),
            );
            for (a, sums) in a.iter().zip(together) {
                for (b, sum) in b.iter().zip(sums) {
                    let exact: f64 = a
                        .iter()
                        .zip(b)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum();
                    assert!((f64::from(sum) - exact).abs() < 1e-5, "{len}");
                    assert_eq!(sum.to_bits(), dot_fused(a, b).to_bits(), "{len}");
                }
            }
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
