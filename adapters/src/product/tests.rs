//! Sums of products against candle, and against themselves at other thread counts.

use super::*;
use crate::weights::{Access, Bf16};

fn matrix(rows: usize, columns: usize, seed: f32) -> Tensor {
    let values = (0..rows * columns)
        .map(|i| ((i as f32 + seed) * 0.37).sin())
        .collect::<Vec<_>>();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("shape fits")
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

#[test]
fn products_equal_candle() -> Result<()> {
    for (m, n, k) in [
        (1, 1, 1),
        (3, 5, 7),
        (33, 65, 129),
        (130, 70, 90),
        (70, 331, 45),
    ] {
        let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
        assert!(largest_difference(&matmul_nt(&x, &w)?, &x.matmul(&w.t()?)?)? < 1e-4);
        let v = matrix(k, n, 3.0);
        let plain = Product::new(Factor::Plain(&x), Factor::Plain(&v));
        assert!(largest_difference(&sum_of_products(None, &[plain])?, &x.matmul(&v)?)? < 1e-4);
        let (a, b) = (matrix(k, m, 4.0), matrix(k, n, 5.0));
        let expected = a.t()?.contiguous()?.matmul(&b)?;
        assert!(largest_difference(&matmul_tn(&a, &b)?, &expected)? < 1e-4);
    }
    Ok(())
}

/// Several products onto a matrix or a row, against candle, with and without bf16, and on a view that takes the plain path.
#[test]
fn sums_equal_candle() -> Result<()> {
    for (m, n, k) in [(5, 7, 3), (67, 413, 2100), (40, 200, 33)] {
        let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
        let (h, b) = (matrix(m, 4, 3.0), matrix(4, n, 4.0));
        let (w16, v16) = (Bf16::new(&w)?, Bf16::new(&w.t()?.contiguous()?)?);
        let rounded = w16.tensor()?.to_dtype(DType::F32)?;
        for start in [matrix(m, n, 5.0), matrix(1, n, 6.0).flatten_all()?] {
            let low_rank = (h.matmul(&b)? * 0.5)?.broadcast_add(&start)?;
            let second = Product::scaled(Factor::Plain(&h), Factor::Plain(&b), 0.5);
            let single = Product::new(Factor::Plain(&x), Factor::Transposed(&w));
            let found = sum_of_products(Some(&start), &[single, second])?;
            assert!(largest_difference(&found, &(x.matmul(&w.t()?)? + &low_rank)?)? < 2e-3);
            let expected = (x.matmul(&rounded.t()?)? + &low_rank)?;
            let transposed = Product::new(Factor::Plain(&x), Factor::Transposed(&w16));
            let found = sum_of_products(Some(&start), &[transposed, second])?;
            assert!(largest_difference(&found, &expected)? < 2e-3);
            let plain = Product::new(Factor::Plain(&x), Factor::Plain(&v16));
            let found = sum_of_products(Some(&start), &[plain, second])?;
            assert!(largest_difference(&found, &expected)? < 2e-3);
            let strided = matrix(k, m, 1.0).t()?;
            let composed = sum_of_products(
                Some(&start),
                &[
                    Product::new(Factor::Plain(&strided), Factor::Plain(&v16)),
                    second,
                ],
            )?;
            let expected = (strided.matmul(&rounded.t()?)? + &low_rank)?;
            assert!(largest_difference(&composed, &expected)? < 2e-3);
            // A weight that is turned is widened first. The numbers are those of the weight that is stored turned.
            for precision in [Precision::Single, Precision::Bf16] {
                let of = |rhs| {
                    let base = Product::new(Factor::Plain(&strided), rhs).with_precision(precision);
                    sum_of_products(Some(&start), &[base, second])
                };
                let turned = of(Factor::Transposed(&w16 as &dyn Weight))?;
                let as_stored = of(Factor::Plain(&v16))?;
                let bound = match precision {
                    Precision::Single => 2e-3,
                    Precision::Bf16 => 2e-3 * k as f32,
                };
                assert!(largest_difference(&turned, &as_stored)? < 2e-3);
                assert!(largest_difference(&turned, &expected)? < bound);
            }
        }
    }
    Ok(())
}

/// bf16 products by the processor's instruction and by rounding and widening, against candle on rounded factors.
#[test]
fn bf16_products_equal_rounded_factors() -> Result<()> {
    for (m, n, k) in [
        (1, 1, 1),
        (5, 7, 3),
        (8, 48, 32),
        (67, 413, 2101),
        (40, 200, 33),
        (9, 97, 1026),
    ] {
        let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
        let v = w.t()?.contiguous()?;
        let (w16, v16) = (Bf16::new(&w)?, Bf16::new(&v)?);
        let start = matrix(m, n, 5.0);
        // Sums of k terms below one.
        let bound = 1e-6 * (k as f32).max(100.0);
        let (h, b) = (matrix(m, 4, 3.0), matrix(4, n, 4.0));
        let low_rank = Product::new(Factor::Plain(&h), Factor::Plain(&b));
        let wide = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let product = (wide(&x)?.matmul(&wide(&v)?)? * 0.5)?;
        let expected = ((product + &start)? + h.matmul(&b)?)?;
        for rhs in [Factor::Transposed(&w16 as &dyn Weight), Factor::Plain(&v16)] {
            let base = Product::scaled(Factor::Plain(&x), rhs, 0.5).with_precision(Precision::Bf16);
            let products = [base, low_rank];
            for kernel in [false, true] {
                let sum = sum_in_pieces(Some(&start), &products, (m, n), kernel)?
                    .expect("contiguous matrices in memory");
                let difference = largest_difference(&sum, &expected)?;
                assert!(difference < bound, "{m} {n} {k}: {difference}");
            }
            let transposed = x.t()?.contiguous()?;
            let base = Product::scaled(Factor::Transposed(&transposed), rhs, 0.5)
                .with_precision(Precision::Bf16);
            let sum = sum_of_products(Some(&start), &[base, low_rank])?;
            assert!(largest_difference(&sum, &expected)? < bound);
        }
    }
    Ok(())
}

/// The positions of the cuts change no bit.
#[test]
fn same_bytes_at_any_thread_count() -> Result<()> {
    for (m, n, k) in [
        (1, 576, 700),
        (3, 484, 600),
        (131, 576, 700),
        (64, 484, 1500),
        (37, 1540, 96),
        (200, 100, 640),
    ] {
        let (x, w) = (matrix(m, k, 1.0), matrix(n, k, 2.0));
        let v16 = Bf16::new(&matrix(k, n, 3.0))?;
        let mut all = Vec::new();
        for threads in [1, 2, 3, 5, 16] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool of threads");
            let bits = pool.install(|| -> Result<Vec<u32>> {
                let sum = sum_of_products(
                    None,
                    &[
                        Product::new(Factor::Plain(&x), Factor::Transposed(&w)),
                        Product::scaled(Factor::Plain(&x), Factor::Plain(&v16), 0.5),
                    ],
                )?;
                let narrow = Product::new(Factor::Plain(&x), Factor::Plain(&v16))
                    .with_precision(Precision::Bf16);
                let rounded = sum_of_products(Some(&sum), &[narrow])?;
                let single = matmul_nt(&x, &w)?;
                let values = Tensor::cat(&[sum, single, rounded], 0)?.flatten_all()?;
                Ok(values
                    .to_vec1::<f32>()?
                    .iter()
                    .map(|v| v.to_bits())
                    .collect())
            })?;
            all.push(bits);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{m} {n} {k}");
    }
    Ok(())
}

/// A weight that gives its values only in pieces, with this block size.
#[derive(Debug)]
struct Pieces(Tensor, usize);

impl Weight for Pieces {
    fn dims(&self) -> Result<(usize, usize)> {
        Weight::dims(&self.0)
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn access(&self) -> Access<'_, f32> {
        Access::Pieces
    }

    fn access_bf16(&self) -> Access<'_, half::bf16> {
        match self.0.dtype() {
            DType::BF16 => Access::Pieces,
            _ => Access::Elsewhere,
        }
    }

    fn widen_bf16(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        out: &mut [half::bf16],
    ) {
        let mut wide = vec![0f32; out.len()];
        self.widen(rows, columns, &mut wide);
        for (out, value) in out.iter_mut().zip(wide) {
            *out = half::bf16::from_f32(value);
        }
    }

    fn block(&self) -> usize {
        self.1
    }

    fn widen(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        match self.0.dtype() {
            DType::BF16 => Bf16::new(&self.0)
                .expect("it is bf16")
                .widen(rows, columns, out),
            _ => self.0.widen(rows, columns, out),
        }
    }

    fn tensor(&self) -> Result<Tensor> {
        self.0.tensor()
    }
}

/// How a weight is held changes no bit: every kind is summed in one order.
#[test]
fn same_bytes_lent_and_in_pieces() -> Result<()> {
    for (n, block) in [
        (5, 1),
        (64, 32),
        (200, 1),
        (259, 1),
        (576, 32),
        (768, 256),
        (1100, 1),
        (2048, 256),
    ] {
        for k in [3, 300, 2048, 2049, 5000] {
            for m in [1, 2, 15, 16, 40] {
                let x = matrix(m, k, 1.0);
                let (w, v) = (matrix(n, k, 2.0), matrix(k, n, 3.0));
                let (w16, v16) = (Bf16::new(&w)?, Bf16::new(&v)?);
                let pieces =
                    |weight: &dyn Weight| Ok::<_, crate::Error>(Pieces(weight.tensor()?, block));
                let (wide_w, wide_v) = (pieces(&w)?, pieces(&v)?);
                let (short_w, short_v) = (pieces(&w16)?, pieces(&v16)?);
                let pairs: [([Factor<'_, dyn Weight>; 2], Precision); 4] = [
                    (
                        [Factor::Transposed(&w), Factor::Transposed(&wide_w)],
                        Precision::Single,
                    ),
                    (
                        [Factor::Plain(&v), Factor::Plain(&wide_v)],
                        Precision::Single,
                    ),
                    (
                        [Factor::Transposed(&w16), Factor::Transposed(&short_w)],
                        Precision::Bf16,
                    ),
                    (
                        [Factor::Plain(&v16), Factor::Plain(&short_v)],
                        Precision::Bf16,
                    ),
                ];
                for (factors, precision) in pairs {
                    // With the processor's own instruction, if it has one, and without it.
                    for instruction in [true, false] {
                        let [lent, held] = factors.map(|rhs| {
                            let product = Product::new(Factor::Plain(&x), rhs);
                            let product = [product.with_precision(precision)];
                            let sum = sum_in_pieces(None, &product, (m, n), instruction)?;
                            let sum = sum.expect("the factors are in memory").flatten_all()?;
                            let values = sum.to_vec1::<f32>()?;
                            Ok::<_, crate::Error>(
                                values.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
                            )
                        });
                        assert_eq!(lent?, held?, "{m} {n} {k} {precision:?} {instruction}");
                    }
                }
            }
        }
    }
    Ok(())
}
