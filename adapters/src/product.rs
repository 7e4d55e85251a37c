//! Sums of matrix products on any device.

#[cfg(target_arch = "x86_64")]
mod bf16;
mod few;
mod pieces;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Tensor};

use self::pieces::sum_in_pieces;
use crate::device::has_loops;
use crate::error::{Result, expect_shape};
use crate::weights::Weight;

/// candle's accelerated CPU backends replace `gemm`; with them, candle computes the product.
const OWN_GEMM: bool = !cfg!(any(feature = "mkl", feature = "accelerate"));

/// One factor of a product: a row-major matrix, taken as it is or transposed. A tensor is a [`Weight`], too.
#[derive(Debug)]
pub enum Factor<'a, M: ?Sized> {
    /// The matrix itself.
    Plain(&'a M),
    /// Its transpose.
    Transposed(&'a M),
}

impl<M: ?Sized> Copy for Factor<'_, M> {}

impl<M: ?Sized> Clone for Factor<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<'a, M: Weight + ?Sized> Factor<'a, M> {
    fn matrix(self) -> &'a M {
        match self {
            Self::Plain(matrix) | Self::Transposed(matrix) => matrix,
        }
    }

    fn is_transposed(self) -> bool {
        matches!(self, Self::Transposed(_))
    }

    fn dims(self) -> Result<(usize, usize)> {
        let (rows, columns) = self.matrix().dims()?;
        Ok(match self {
            Self::Plain(_) => (rows, columns),
            Self::Transposed(_) => (columns, rows),
        })
    }

    /// The factor as a tensor of `dtype`. A transposed matrix is converted before it is turned: to convert a view of
    /// columns reads memory out of order.
    fn view(self, dtype: DType) -> Result<Tensor> {
        let tensor = self.matrix().tensor()?.to_dtype(dtype)?;
        Ok(match self {
            Self::Plain(_) => tensor,
            Self::Transposed(_) => tensor.t()?,
        })
    }
}

/// Precision of a product's multiplications. The sums of a product are f32 in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// In f32; a weight of another type is widened.
    #[default]
    Single,
    /// A bfloat16 weight as it is, with the left factor rounded to nearest: relative error `2^-9` per factor. Up to twice
    /// as fast as f32 on AMD processors with AVX512-BF16 (`vdpbf16ps`, which takes denormals as zero) and on GPUs. Elsewhere,
    /// on Intel processors too, the left factor is rounded in the same way and multiplied in f32.
    ///
    /// On the CPU the result is f32 as well. On other devices candle's product has the type of its factors, so the finished
    /// sum of each product is rounded to bfloat16 once, by a relative `2^-9`, before it is widened: logits, projections and
    /// the gradients of inputs are that coarse there. What the product is added to is not rounded.
    Bf16,
}

/// Whether the CPU computes products in [`Precision::Bf16`] by an instruction that is faster than f32.
pub fn has_fast_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return bf16::Kernel::detect().is_some() && bf16::Kernel::is_fast();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// One term of [`sum_of_products`]: `scale * lhs rhs`.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// Left factor, f32.
    pub lhs: Factor<'a, Tensor>,
    /// Right factor, a weight of any kind or a tensor.
    pub rhs: Factor<'a, dyn Weight + 'a>,
    /// Factor of the whole term.
    pub scale: f64,
    /// Precision of the multiplication.
    pub precision: Precision,
}

impl<'a> Product<'a> {
    /// `lhs rhs` in f32.
    pub fn new(lhs: Factor<'a, Tensor>, rhs: Factor<'a, dyn Weight + 'a>) -> Self {
        Self {
            lhs,
            rhs,
            scale: 1.0,
            precision: Precision::Single,
        }
    }

    /// `scale * lhs rhs` in f32.
    pub fn scaled(lhs: Factor<'a, Tensor>, rhs: Factor<'a, dyn Weight + 'a>, scale: f64) -> Self {
        Self {
            scale,
            ..Self::new(lhs, rhs)
        }
    }

    /// Returns the same term in another precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    fn on_any_device(&self) -> Result<Tensor> {
        let matrix = self.lhs.matrix();
        let dtype = matrix.dtype();
        let (lhs_dtype, rhs_dtype) = match self.precision {
            Precision::Single => (dtype, dtype),
            // candle's CPU backend has no bf16 product of this shape on every machine, and would round the sums.
            Precision::Bf16 if matches!(matrix.device(), Device::Cpu) => (DType::BF16, dtype),
            Precision::Bf16 => (DType::BF16, DType::BF16),
        };
        let lhs = self.lhs.view(lhs_dtype)?.to_dtype(rhs_dtype)?;
        let term = lhs.matmul(&self.rhs.view(rhs_dtype)?)?.to_dtype(dtype)?;
        Ok(if self.scale == 1.0 {
            term
        } else {
            (term * self.scale)?
        })
    }
}

/// Computes `start + sum_i scale_i lhs_i rhs_i`. Every product must have the same shape `[m, n]`; `start`, if given, is
/// `[m, n]` or a row `[n]` that is added to all rows. Sums and result are f32, but
/// see [`Precision::Bf16`] for other devices than the CPU.
///
/// # Errors
/// Returns [`crate::Error::Shape`] if inner or outer sizes disagree, or an error of candle.
pub fn sum_of_products(start: Option<&Tensor>, products: &[Product<'_>]) -> Result<Tensor> {
    let mut shape = None;
    for Product { lhs, rhs, .. } in products {
        let ((m, k), (k_rhs, n)) = (lhs.dims()?, rhs.dims()?);
        expect_shape("inner size of a product", &[k], &[k_rhs])?;
        expect_shape(
            "size of a product",
            &[m, n],
            &shape.map_or([m, n], |(m, n)| [m, n]),
        )?;
        shape = Some((m, n));
    }
    let (m, n) = shape.unwrap_or((0, 0));
    if let Some(start) = start {
        let expected: &[usize] = if start.rank() == 1 { &[n] } else { &[m, n] };
        expect_shape("start of a sum of products", expected, start.dims())?;
    }
    let instruction = has_fast_bf16();
    let has_loops = |product: &Product<'_>| has_loops(product.lhs.matrix().device());
    if OWN_GEMM
        && products.iter().all(has_loops)
        && let Some(sum) = sum_in_pieces(start, products, (m, n), instruction)?
    {
        return Ok(sum);
    }
    let mut total = start.cloned();
    for product in products {
        let term = product.on_any_device()?;
        total = Some(match total {
            None => term,
            Some(sum) => term.broadcast_add(&sum)?,
        });
    }
    total.ok_or_else(|| candle_core::Error::Msg("a sum of no products".to_owned()).into())
}

/// `x w^T`: `[m, k]` by `[n, k]` gives `[m, n]`.
pub fn matmul_nt(x: &Tensor, w: &dyn Weight) -> Result<Tensor> {
    sum_of_products(
        None,
        &[Product::new(Factor::Plain(x), Factor::Transposed(w))],
    )
}

/// `a^T b`: `[k, m]` by `[k, n]` gives `[m, n]`.
pub fn matmul_tn(a: &Tensor, b: &dyn Weight) -> Result<Tensor> {
    sum_of_products(
        None,
        &[Product::new(Factor::Transposed(a), Factor::Plain(b))],
    )
}
