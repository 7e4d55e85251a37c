//! Products of the two factors, in plain loops: rows of B A, and Frobenius norms without forming B A.

use rayon::prelude::*;

/// Overwrites `out` `[rows, in]` with `scaling * B A` for the given rows of B, accumulating in f32.
///
/// # Shapes
/// `b_rows` `[rows, r]`, `a` `[r, in]`, `out` `[rows, in]`
pub(crate) fn product_rows(out: &mut [f32], b_rows: &[f32], a: &[f32], rank: usize, scaling: f32) {
    if rank == 0 || a.is_empty() {
        out.fill(0.0);
        return;
    }
    let in_features = a.len() / rank;
    out.par_chunks_mut(in_features)
        .zip(b_rows.par_chunks(rank))
        .for_each(|(row, coefficients)| {
            row.fill(0.0);
            for (coefficient, a_row) in coefficients.iter().zip(a.chunks_exact(in_features)) {
                for (sum, value) in row.iter_mut().zip(a_row) {
                    *sum += coefficient * value;
                }
            }
            for sum in row {
                *sum *= scaling;
            }
        });
}

/// Frobenius norm, summed in f64.
pub(crate) fn frobenius(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    sum.sqrt()
}

/// `||B A||_F` from the r x r Gram matrices: `||B A||_F^2 = sum_kl (B^T B)_kl (A A^T)_kl`. The entries of B A are never
/// formed. Rounding can leave a small value where the terms cancel, never a negative one.
///
/// # Shapes
/// `b` `[out, r]`, `a` `[r, in]`
pub(crate) fn product_norm(b: &[f32], a: &[f32], rank: usize) -> f64 {
    if rank == 0 || a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let in_features = a.len() / rank;
    let mut gram_b = vec![0f64; rank * rank];
    for row in b.chunks_exact(rank) {
        for (k, left) in row.iter().enumerate() {
            for (l, right) in row.iter().enumerate().take(k + 1) {
                gram_b[k * rank + l] += f64::from(*left) * f64::from(*right);
            }
        }
    }
    let rows: Vec<&[f32]> = a.chunks_exact(in_features).collect();
    let sum: f64 = (0..rank)
        .into_par_iter()
        .map(|k| {
            let mut partial = 0.0;
            for l in 0..=k {
                let weight = if k == l { 1.0 } else { 2.0 };
                let from_b = gram_b[k * rank + l];
                if from_b != 0.0 {
                    let pairs = rows[k].iter().zip(rows[l]);
                    let from_a: f64 = pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                    partial += weight * from_b * from_a;
                }
            }
            partial
        })
        .sum();
    sum.max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matrices() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, usize)> {
        (1usize..5, 1usize..6, 1usize..4).prop_flat_map(|(n_out, n_in, rank)| {
            let values = |n: usize| prop::collection::vec(-2f32..2.0, n);
            (values(n_out * rank), values(rank * n_in), Just(rank))
        })
    }

    proptest! {
        #[test]
        fn norm_from_gram_matrices_is_the_norm_of_the_product((b, a, rank) in matrices()) {
            let mut product = vec![f32::NAN; b.len() / rank * (a.len() / rank)];
            product_rows(&mut product, &b, &a, rank, 1.0);
            let n_in = a.len() / rank;
            for (at, value) in product.iter().enumerate() {
                let (o, i) = (at / n_in, at % n_in);
                let plain: f32 = (0..rank).map(|k| b[o * rank + k] * a[k * n_in + i]).sum();
                prop_assert!((plain - value).abs() <= 1e-5);
            }
            prop_assert!((product_norm(&b, &a, rank) - frobenius(&product)).abs() <= 1e-4);
        }
    }

    #[test]
    fn factors_that_never_meet_have_no_product() {
        assert_eq!(product_norm(&[1.0, 0.0], &[0.0, 0.0, 3.0, 4.0], 2), 0.0);
    }
}
