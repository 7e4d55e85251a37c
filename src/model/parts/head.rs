//! The last norm, the output head, and the cross entropy of labelled positions. Value and gradient are computed in one
//! pass over chunks.

use std::sync::Mutex;

use candle_core::{CpuStorage, D, DType, InplaceOp1, Layout, Tensor};
use monteclora_adapters::device::{has_loops, to_device};
use monteclora_adapters::linalg::argmax_rows;
use monteclora_adapters::numbers::{Numbers, read_groups};
use monteclora_adapters::simd::{largest, vectorised};
use monteclora_adapters::{FrozenLinear, Update, input_gradient};
use rayon::prelude::*;

use super::activation::{exp, tanh};
use super::norm::Norm;
use crate::model::adapter::{ActiveAdapter, ModuleId, sum_of_factors};
use monteclora_adapters::Result;

/// Number of labelled positions whose logits exist at the same time.
pub(crate) const CHUNK: usize = 256;

/// The last norm and the projection to the vocabulary.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) id: ModuleId,
    pub(crate) norm: Norm,
    pub(crate) linear: FrozenLinear,
    /// The bound on logits, `cap * tanh(logit / cap)`, if there is one.
    pub(crate) cap: Option<f32>,
}

impl Head {
    /// Logits of `hidden` `[tokens, hidden]`, already normalised with [`Self::norm`].
    pub(crate) fn logits(&self, hidden: &Tensor, adapter: &ActiveAdapter) -> Result<Tensor> {
        let update = adapter.get(self.id);
        let logits = self.linear.forward(hidden, update, None, None)?.0;
        match self.cap.map(f64::from) {
            None => Ok(logits),
            Some(cap) => Ok(((logits / cap)?.tanh()? * cap)?),
        }
    }

    /// Losses of `hidden` `[labels, hidden]`, not yet normalised, against `targets` `[labels]`. With `scale` also the
    /// gradient.
    pub(crate) fn losses(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        adapter: &ActiveAdapter,
        scale: Option<f64>,
    ) -> Result<CrossEntropy> {
        let (normed, update) = (self.norm.forward(hidden)?, adapter.get(self.id));
        let mut losses = evaluate(&self.linear, update, self.cap, &normed, targets, scale)?;
        if let Some(grad) = losses.grad_hidden {
            losses.grad_hidden = Some(self.norm.backward(hidden, &grad, None)?);
        }
        Ok(losses)
    }
}

/// Losses of a batch's labelled positions and, with `scale`, the gradient of `scale` times their sum.
#[derive(Debug, Clone)]
pub(crate) struct CrossEntropy {
    /// Negative log-likelihood of each label, nats.
    pub(crate) nll: Vec<f32>,
    /// Whether the label was the most likely token.
    pub(crate) correct: Vec<bool>,
    /// Gradient with respect to the head's input, `[labels, hidden]`.
    pub(crate) grad_hidden: Option<Tensor>,
    /// Gradients with respect to the factors of the head's update. Empty without an update.
    pub(crate) grad_factors: Vec<Tensor>,
}

/// Losses of `hidden` (normalised) against `targets` `[labels]`. With `scale` also the gradient.
pub(super) fn evaluate(
    head: &FrozenLinear,
    update: Option<&dyn Update>,
    cap: Option<f32>,
    hidden: &Tensor,
    targets: &[u32],
    scale: Option<f64>,
) -> Result<CrossEntropy> {
    let labels = targets.len();
    let mut result = CrossEntropy {
        nll: Vec::new(),
        correct: Vec::new(),
        grad_hidden: None,
        grad_factors: Vec::new(),
    };
    let mut grads = Vec::new();
    let (mut nlls, mut corrects) = (Vec::new(), Vec::new());
    for start in (0..labels).step_by(CHUNK) {
        let targets = &targets[start..labels.min(start + CHUNK)];
        let chunk = hidden.narrow(0, start, targets.len())?.contiguous()?;
        let (logits, saved) = head.forward(&chunk, update, None, None)?;
        let ([nll, correct], grad_logits) = softmax_loss(logits, cap, targets, scale)?;
        nlls.push(nll);
        corrects.push(correct);
        if let Some(grad_logits) = grad_logits {
            let branch = head.backward(&grad_logits, &saved, update, None)?;
            let of_factors = branch.gradients(&chunk, &saved)?;
            grads.push(input_gradient(&[branch])?);
            result.grad_factors = sum_of_factors(result.grad_factors, of_factors)?;
        }
    }
    if let [nlls, corrects] = read_groups(vec![nlls, corrects])?.as_slice() {
        result.nll = nlls.iter().map(|nll| *nll as f32).collect();
        result.correct = corrects.iter().map(|number| *number == 1.0).collect();
    }
    if !grads.is_empty() {
        result.grad_hidden = Some(Tensor::cat(&grads, 0)?);
    }
    Ok(result)
}

/// For each label its loss, and 1 if it is the most likely token, 0 if not; and the gradient of the logits.
type Losses = ([Numbers; 2], Option<Tensor>);

/// Losses of one chunk of logits `[labels, vocab]` bounded by `cap`, and the gradient: `scale * (softmax - onehot)`
/// times the bound's slope. On the CPU the gradient overwrites the logits.
fn softmax_loss(
    logits: Tensor,
    cap: Option<f32>,
    targets: &[u32],
    scale: Option<f64>,
) -> Result<Losses> {
    let rows = logits.dims2()?.0;
    if has_loops(logits.device()) && logits.dtype() == DType::F32 && logits.is_contiguous() {
        let pass = InPlace {
            targets,
            scale: scale.map(|scale| scale as f32),
            cap,
            losses: Mutex::new(Vec::new()),
        };
        logits.inplace_op1(&pass)?;
        let losses = pass.losses.into_inner().unwrap_or_default();
        let pairs = losses.into_iter();
        let (nll, correct) = pairs
            .map(|(nll, correct)| (f64::from(nll), f64::from(u8::from(correct))))
            .unzip();
        let numbers = [Numbers::Host(nll), Numbers::Host(correct)];
        return Ok((numbers, scale.is_some().then_some(logits)));
    }
    let dtype = logits.dtype();
    let mut logits = logits.to_dtype(DType::F32)?;
    let mut slope = None;
    if let Some(cap) = cap.map(f64::from) {
        let bent = (logits / cap)?.tanh()?;
        slope = Some((1.0 - bent.sqr()?)?);
        logits = (bent * cap)?;
    }
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let log_p = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let index = to_device(targets.to_vec(), (rows, 1), logits.device())?;
    let nll = log_p.gather(&index, 1)?.neg()?;
    let best = argmax_rows(&logits)?.unsqueeze(1)?;
    let correct = best.eq(&index)?.to_dtype(DType::F32)?;
    let grad = scale
        .map(|scale| {
            let minus_one = Tensor::full(-1f32, (rows, 1), logits.device())?;
            let grad = (log_p.exp()?.scatter_add(&index, &minus_one, 1)? * scale)?;
            match &slope {
                Some(slope) => (grad * slope)?.to_dtype(dtype),
                None => grad.to_dtype(dtype),
            }
        })
        .transpose()?;
    Ok(([Numbers::Device(nll), Numbers::Device(correct)], grad))
}

/// Computes the loss of each row, and with `scale` overwrites the logits with their gradient.
struct InPlace<'a> {
    targets: &'a [u32],
    scale: Option<f32>,
    cap: Option<f32>,
    losses: Mutex<Vec<(f32, bool)>>,
}

impl InPlace<'_> {
    #[inline(always)]
    fn row(&self, row: &mut [f32], target: usize) -> (f32, bool) {
        if let Some(cap) = self.cap {
            for v in row.iter_mut() {
                *v = cap * tanh(*v / cap);
            }
        }
        let largest = largest(row);
        // With a fixed number of partial sums the loop vectorises, and the result does not depend on the number of
        // threads.
        let mut partial = [0f32; 16];
        let chunks = row.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().map(|v| exp(v - largest)).sum();
        for chunk in chunks {
            for (sum, v) in partial.iter_mut().zip(chunk) {
                *sum += exp(v - largest);
            }
        }
        let log_sum = largest + (partial.iter().sum::<f32>() + rest).ln();
        let nll = log_sum - row[target];
        // Of equal logits the first counts, as in an argmax.
        let correct = row[target] == largest && !row[..target].contains(&largest);
        if let Some(scale) = self.scale {
            let mut onehot = scale * (exp(row[target] - log_sum) - 1.0);
            match self.cap {
                None => {
                    for v in row.iter_mut() {
                        *v = scale * exp(*v - log_sum);
                    }
                }
                Some(cap) => {
                    let slope = |v: f32| 1.0 - (v / cap) * (v / cap);
                    onehot *= slope(row[target]);
                    for v in row.iter_mut() {
                        *v = scale * exp(*v - log_sum) * slope(*v);
                    }
                }
            }
            row[target] = onehot;
        }
        (nll, correct)
    }
}

impl InplaceOp1 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "softmax-loss"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let vocab = layout.shape().dims2()?.1;
        let (CpuStorage::F32(values), Some((from, to))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("logits are f32 and contiguous on this path");
        };
        let losses = values[from..to]
            .par_chunks_exact_mut(vocab)
            .zip(self.targets)
            .map(|(row, target)| {
                vectorised(
                    #[inline(always)]
                    || self.row(row, *target as usize),
                )
            })
            .collect();
        if let Ok(mut slot) = self.losses.lock() {
            *slot = losses;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, composed, largest_difference, matrix};
    use super::*;
    use candle_core::{Device, Var};

    /// Loss and correctness of each label, and the gradient.
    fn losses(
        logits: Tensor,
        cap: Option<f32>,
        targets: &[u32],
        scale: Option<f64>,
    ) -> Result<(Vec<f64>, Vec<f64>, Option<Tensor>)> {
        let ([nll, correct], grad) = softmax_loss(logits, cap, targets, scale)?;
        Ok((nll.read()?, correct.read()?, grad))
    }

    #[test]
    fn equals_candle_on_uneven_chunks() -> Result<()> {
        let (labels, hidden, vocab) = (CHUNK * 2 + 5, 7, 37);
        let head = FrozenLinear::new(std::sync::Arc::new(matrix(vocab, hidden, 0.3)), None)?;
        let x = Var::from_tensor(&matrix(labels, hidden, 0.8))?;
        let targets: Vec<u32> = (0..labels as u32).map(|i| (i * 5) % vocab as u32).collect();
        let logits = (x.matmul(&head.weight().tensor()?.t()?)? * 1.0)?;
        let loss = candle_nn::loss::cross_entropy(
            &logits,
            &Tensor::new(targets.as_slice(), &Device::Cpu)?,
        )?;
        let grads = loss.backward()?;
        let result = evaluate(
            &head,
            None,
            None,
            &x.as_tensor().detach(),
            &targets,
            Some(1.0 / labels as f64),
        )?;
        let mean = result.nll.iter().map(|v| f64::from(*v)).sum::<f64>() / labels as f64;
        assert!((mean - f64::from(loss.to_scalar::<f32>()?)).abs() < 1e-5);
        let expected = grads.get(x.as_tensor()).expect("gradient");
        assert!(largest_difference(&result.grad_hidden.expect("asked for"), expected) < 1e-6);
        let best = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        for ((best, target), correct) in best.iter().zip(&targets).zip(&result.correct) {
            assert_eq!(best == target, *correct);
        }
        Ok(())
    }

    #[test]
    fn plain_path_equals_the_fast_one() -> Result<()> {
        let logits = matrix(4, 11, 0.5);
        let targets = [0, 10, 3, 7];
        for cap in [None, Some(0.7)] {
            // The loops overwrite the logits.
            let (fast_nll, fast_correct, fast_grad) =
                losses(logits.copy()?, cap, &targets, Some(0.5))?;
            for [logits] in composed([&logits])? {
                let (nll, correct, grad) = losses(logits, cap, &targets, Some(0.5))?;
                assert!(nll.iter().zip(&fast_nll).all(|(a, b)| (a - b).abs() < 1e-6));
                assert_eq!(correct, fast_correct);
                let [grad, fast] = [&grad, &fast_grad].map(|g| g.as_ref().expect("asked for"));
                assert_close(grad, fast, 1e-6);
            }
        }
        Ok(())
    }

    /// Of equal logits the first counts on every path.
    #[test]
    fn ties_go_to_the_first_token() -> Result<()> {
        let logits = Tensor::new(
            &[[0f32, 5.0, 5.0], [1.0; 3], [-2.0, -1.0, -1.0]],
            &Device::Cpu,
        )?;
        for (targets, expected) in [([1, 0, 1], true), ([2, 2, 2], false)] {
            let strided = logits.t()?.contiguous()?.t()?;
            let (_, plain, _) = losses(strided, None, &targets, None)?;
            let (_, fast, _) = losses(logits.copy()?, None, &targets, None)?;
            assert_eq!(plain, [f64::from(u8::from(expected)); 3]);
            assert_eq!(fast, plain);
        }
        Ok(())
    }
}
