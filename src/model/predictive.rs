//! The average of several adapters' predictions. If the adapters are posterior draws, it is the posterior predictive.

use candle_core::{D, DType, Tensor};
use monteclora_adapters::Result;
use monteclora_adapters::device::{to_device, to_host};
use monteclora_adapters::linalg::{argmax_rows, on_cpu};
use monteclora_adapters::simd::{largest, vectorised};
use monteclora_converters::Problem;
use rayon::prelude::*;

use super::adapter::ActiveAdapter;
use super::decoder::{Decoder, Sequences, TaskLoss, on_pool};
use super::parts::activation::exp;
use super::parts::head::CHUNK;
use super::shared::SharedBatch;

/// Most logits of one draw that exist at the same time. At most a few tensors of this size exist.
const LOGITS: usize = 1 << 23;

/// Number of parallel partial sums. With them loops vectorise, and the result does not depend on the number of threads.
const LANES: usize = 16;

/// Losses of the average of K distributions over the vocabulary at each target, and of each distribution.
#[derive(Debug)]
pub struct Average {
    /// `-ln (1/K sum_k p_k(label))` in nats, and whether the label is the most likely token of the average.
    pub loss: TaskLoss,
    /// The same for each adapter alone.
    pub members: Vec<TaskLoss>,
}

/// [`Average`] with entropies.
#[derive(Debug)]
pub struct Predictive {
    /// The average and its members.
    pub average: Average,
    /// Entropy of the average distribution, nats.
    pub predictive_entropy: Vec<f64>,
    /// Average of the K entropies, nats: the uncertainty that would remain if the weights were known. Apart from
    /// rounding it is never above the predictive entropy. The difference is the mutual information of prediction and
    /// weights.
    pub expected_entropy: Vec<f64>,
}

impl Decoder {
    /// Calls `each` with the float32 logits of every position, in order. Only the logits of a few positions are in
    /// memory at a time.
    ///
    /// # Errors
    /// As [`Decoder::logits`].
    pub fn each_logits(
        &self,
        sequences: &Sequences,
        adapter: &ActiveAdapter,
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<()> {
        let hidden = on_pool(|| self.hidden(sequences, adapter, None))?;
        let n_rows = hidden.dims2()?.0;
        let chunk = (LOGITS / self.config.vocab_size).clamp(1, CHUNK);
        for start in (0..n_rows).step_by(chunk) {
            let part = hidden.narrow(0, start, chunk.min(n_rows - start))?;
            let logits = on_pool(|| self.head_logits(&part.contiguous()?, adapter))?;
            let values = to_host::<f32>(&logits.to_dtype(DType::F32)?)?;
            values
                .chunks_exact(self.config.vocab_size)
                .for_each(&mut *each);
        }
        Ok(())
    }
}

impl SharedBatch<'_> {
    /// Averages the predictions of `adapters` at the targets.
    ///
    /// Each adapter runs over all of the batch, so a draw keeps the same weights from the first token to the last.
    /// Probabilities are averaged, not logits. The memory holds one adapter's activations, `K x targets x hidden`
    /// numbers, and the logits of a few targets at a time.
    ///
    /// # Errors
    /// Returns an error if `adapters` is empty, or as [`Self::evaluate`].
    pub fn average(&self, adapters: &[ActiveAdapter]) -> Result<Average> {
        on_pool(|| Ok(self.averaged(adapters, false)?.average))
    }

    /// [`Self::average`] with the entropies of the average and of the adapters at each target.
    ///
    /// # Errors
    /// As [`Self::average`].
    pub fn predictive(&self, adapters: &[ActiveAdapter]) -> Result<Predictive> {
        on_pool(|| self.averaged(adapters, true))
    }

    fn averaged(&self, adapters: &[ActiveAdapter], with_entropy: bool) -> Result<Predictive> {
        if adapters.is_empty() {
            let message = "an average needs at least one adapter";
            return Err(Problem::sentence("no-adapters", message).into());
        }
        let (head, labels) = (&self.decoder.head, &self.labels);
        let normed = adapters
            .iter()
            .map(|adapter| head.norm.forward(&self.hidden(adapter)?))
            .collect::<Result<Vec<Tensor>>>()?;
        let losses = || TaskLoss {
            nll: Vec::with_capacity(labels.len()),
            correct: Vec::with_capacity(labels.len()),
            gradients: None,
        };
        let mut result = Predictive {
            average: Average {
                loss: losses(),
                members: adapters.iter().map(|_| losses()).collect(),
            },
            predictive_entropy: Vec::new(),
            expected_entropy: Vec::new(),
        };
        let chunk = (LOGITS / self.decoder.config.vocab_size).clamp(1, CHUNK);
        for start in (0..labels.len()).step_by(chunk) {
            let labels = &labels[start..labels.len().min(start + chunk)];
            let mut sum = Sum::None;
            let mut of_members = Vec::with_capacity(adapters.len());
            for (normed, adapter) in normed.iter().zip(adapters) {
                let hidden = normed.narrow(0, start, labels.len())?.contiguous()?;
                let logits = head.logits(&hidden, adapter)?;
                of_members.push(sum.add(&logits.to_dtype(DType::F32)?, labels)?);
            }
            let (correct, entropy) = sum.finish(labels, adapters.len(), with_entropy)?;
            let average = &mut result.average;
            average.loss.correct.extend(correct);
            for (member, found) in average.members.iter_mut().zip(&of_members) {
                member.nll.extend(found.iter().map(|f| -f.log_p as f32));
                member.correct.extend(found.iter().map(|f| f.correct));
            }
            for row in 0..labels.len() {
                let log_p: Vec<f64> = of_members.iter().map(|of| of[row].log_p).collect();
                average.loss.nll.push(-log_mean_exp(&log_p) as f32);
            }
            if with_entropy {
                result.predictive_entropy.extend(entropy);
                let expected = (0..labels.len()).map(|row| {
                    let sum: f64 = of_members.iter().map(|of| of[row].entropy).sum();
                    sum / adapters.len() as f64
                });
                result.expected_entropy.extend(expected);
            }
        }
        Ok(result)
    }
}

/// The most likely token of every row of `logits` and the logarithm of its probability. Of equally likely tokens, the
/// first.
pub(super) fn most_likely(logits: &Tensor) -> Result<Vec<(u32, f64)>> {
    let (rows, vocab) = logits.dims2()?;
    let logits = logits.to_dtype(DType::F32)?;
    let fast = on_cpu([&logits], |[logits]| {
        let rows = logits.par_chunks_exact(vocab);
        let best = rows.map(|row| {
            vectorised(
                #[inline(always)]
                || {
                    let most = largest(row);
                    let at = row.iter().position(|v| *v == most).unwrap_or(0);
                    (at as u32, -exponentials(row, most, |e, _| e).ln())
                },
            )
        });
        best.collect()
    })?;
    if let Some(best) = fast {
        return Ok(best);
    }
    let best = argmax_rows(&logits)?;
    let log_p = log_softmax(&logits)?.gather(&best.reshape((rows, 1))?, 1)?;
    Ok(to_host::<u32>(&best)?
        .into_iter()
        .zip(to_f64(&log_p)?)
        .collect())
}

/// `sum_v term(e^(v - most), v - most)` over a row.
#[inline(always)]
fn exponentials(row: &[f32], most: f32, term: impl Fn(f32, f32) -> f32) -> f64 {
    let mut sums = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks.chain([rest]) {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum += term(exp(v - most), v - most);
        }
    }
    sums.iter().map(|v| f64::from(*v)).sum()
}

/// One distribution at a target.
#[derive(Debug, Clone, Copy)]
struct Member {
    log_p: f64,
    correct: bool,
    entropy: f64,
}

/// The sum of distributions `[targets, vocab]`.
enum Sum {
    None,
    Host(Vec<f32>),
    Device(Tensor),
}

impl Sum {
    /// Adds the softmax of `logits` `[targets, vocab]`, and returns each row's values for its label.
    fn add(&mut self, logits: &Tensor, labels: &[u32]) -> Result<Vec<Member>> {
        let vocab = logits.dims2()?.1;
        let fast = on_cpu([logits], |[logits]| {
            if matches!(self, Self::None) {
                *self = Self::Host(vec![0.0; logits.len()]);
            }
            let Self::Host(sum) = self else {
                return Vec::new();
            };
            let rows = sum
                .par_chunks_exact_mut(vocab)
                .zip(logits.par_chunks_exact(vocab))
                .zip(labels);
            let members = rows.map(|((sum, row), label)| {
                vectorised(
                    #[inline(always)]
                    || add_row(sum, row, *label as usize),
                )
            });
            members.collect()
        })?;
        if let Some(members) = fast {
            return Ok(members);
        }
        let index = to_device(labels.to_vec(), (labels.len(), 1), logits.device())?;
        let log_p = log_softmax(logits)?;
        let p = log_p.exp()?;
        let best = to_host::<u32>(&argmax_rows(logits)?)?;
        let of_labels = to_f64(&log_p.gather(&index, 1)?)?;
        let entropies = entropy(&p, &log_p)?;
        *self = Self::Device(match &*self {
            Self::Device(sum) => (sum + p)?,
            _ => p,
        });
        let members = of_labels.into_iter().zip(entropies).zip(best).zip(labels);
        let members = members.map(|(((log_p, entropy), best), label)| Member {
            log_p,
            correct: best == *label,
            entropy,
        });
        Ok(members.collect())
    }

    /// Whether each label is the most likely token of the average of `n` distributions, and the entropy of the average
    /// if `with_entropy` is set.
    fn finish(self, labels: &[u32], n: usize, with_entropy: bool) -> Result<(Vec<bool>, Vec<f64>)> {
        match self {
            Self::None => Ok((Vec::new(), Vec::new())),
            Self::Host(sum) => {
                let vocab = sum.len() / labels.len().max(1);
                let rows = sum.par_chunks_exact(vocab).zip(labels).map(|(row, label)| {
                    let (label, most) = (*label as usize, largest(row));
                    // Of equal values the first counts, as in an argmax.
                    let correct = row[label] == most && !row[..label].contains(&most);
                    let entropy = match with_entropy {
                        true => entropy_of_row(row, n as f64),
                        false => 0.0,
                    };
                    (correct, entropy)
                });
                Ok(rows.unzip())
            }
            Self::Device(sum) => {
                let p = (sum / n as f64)?;
                let best = to_host::<u32>(&argmax_rows(&p)?)?;
                let correct = best.iter().zip(labels).map(|(b, label)| b == label);
                // 0 ln 0 is 0, but ln 0 alone is not finite.
                let log_p = p.maximum(f32::MIN_POSITIVE)?.log()?;
                Ok((correct.collect(), entropy(&p, &log_p)?))
            }
        }
    }
}

/// Adds the softmax of a row of logits to `sum`, and returns the values for `label`.
#[inline(always)]
fn add_row(sum: &mut [f32], row: &[f32], label: usize) -> Member {
    let most = largest(row);
    let total = exponentials(row, most, |e, _| e);
    let weighted = exponentials(row, most, |e, below| e * below);
    let log_sum = total.ln();
    let shift = most + log_sum as f32;
    for (sum, v) in sum.iter_mut().zip(row) {
        *sum += exp(v - shift);
    }
    Member {
        log_p: f64::from(row[label]) - f64::from(most) - log_sum,
        correct: row[label] == most && !row[..label].contains(&most),
        entropy: log_sum - weighted / total,
    }
}

/// `-sum p ln p` for `p = row / n`.
fn entropy_of_row(row: &[f32], n: f64) -> f64 {
    let positive = row.iter().map(|v| f64::from(*v) / n).filter(|p| *p > 0.0);
    -positive.map(|p| p * p.ln()).sum::<f64>()
}

/// `ln (1/n sum exp(v))`, shifted so that it neither overflows nor underflows.
pub(crate) fn log_mean_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() {
        return largest;
    }
    let sum: f64 = values.iter().map(|v| (v - largest).exp()).sum();
    largest + (sum / values.len() as f64).ln()
}

fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?)
}

/// `-sum p ln p` of each row.
fn entropy(p: &Tensor, log_p: &Tensor) -> Result<Vec<f64>> {
    to_f64(&(p * log_p)?.sum(D::Minus1)?.neg()?)
}

fn to_f64(values: &Tensor) -> Result<Vec<f64>> {
    Ok(to_host::<f32>(values)?.into_iter().map(f64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parts::testing::{composed, devices};
    use candle_core::Device;

    #[test]
    fn means_of_probabilities_far_below_one_are_exact() {
        let found = log_mean_exp(&[-1000.0, -1001.0]);
        let expected = -1000.0 + ((1.0 + (-1f64).exp()) / 2.0).ln();
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        assert_eq!(log_mean_exp(&[-3.5]), -3.5);
        assert_eq!(log_mean_exp(&[f64::NEG_INFINITY; 2]), f64::NEG_INFINITY);
        assert!(log_mean_exp(&[f64::NAN, -1.0]).is_nan());
    }

    /// Of equally likely tokens every path takes the first.
    #[test]
    fn ties_go_to_the_first_token() -> Result<()> {
        let rows = [[1f32, 4.0, 4.0, 0.0], [2.0; 4], [-3.0, -1.0, -2.0, -1.0]];
        let logits = Tensor::new(&rows, &Device::Cpu)?;
        let strided = logits.t()?.contiguous()?.t()?;
        for logits in [&logits, &strided] {
            let best: Vec<u32> = most_likely(logits)?.into_iter().map(|(at, _)| at).collect();
            assert_eq!(best, [1, 0, 1]);
            for (labels, expected) in [([1, 0, 1], true), ([2, 3, 3], false)] {
                let mut sum = Sum::None;
                let members = sum.add(logits, &labels)?;
                assert!(members.iter().all(|member| member.correct == expected));
                assert_eq!(sum.finish(&labels, 1, false)?.0, [expected; 3]);
            }
        }
        Ok(())
    }

    /// The loop over rows agrees with candle's operations, which other devices use.
    #[test]
    fn both_ways_to_average_agree() -> Result<()> {
        (0..devices().len()).try_for_each(both_ways_to_average_agree_in)
    }

    /// With the logits as [`composed`] holds them in its form number `form`.
    fn both_ways_to_average_agree_in(form: usize) -> Result<()> {
        let (targets, vocab) = (5usize, 83usize);
        let logits = |seed: usize| {
            let values = (0..targets * vocab).map(|i| ((i * 7 + seed) as f32 * 0.37).sin() * 6.0);
            Tensor::from_vec(values.collect::<Vec<_>>(), (targets, vocab), &Device::Cpu)
        };
        let labels = [0u32, 82, 40, 7, 7];
        let (mut host, mut device) = (Sum::None, Sum::None);
        for seed in [1, 2, 3] {
            let logits = logits(seed)?;
            let [held] = &composed([&logits])?[form];
            let fast = host.add(&logits, &labels)?;
            let plain = device.add(held, &labels)?;
            for (fast, plain) in fast.iter().zip(&plain) {
                assert!((fast.log_p - plain.log_p).abs() < 1e-5);
                assert!((fast.entropy - plain.entropy).abs() < 1e-5);
                assert_eq!(fast.correct, plain.correct);
            }
        }
        assert!(matches!((&host, &device), (Sum::Host(_), Sum::Device(_))));
        let (fast, plain) = (
            host.finish(&labels, 3, true)?,
            device.finish(&labels, 3, true)?,
        );
        assert_eq!(fast.0, plain.0);
        for (fast, plain) in fast.1.iter().zip(&plain.1) {
            assert!((fast - plain).abs() < 1e-5, "{fast} {plain}");
        }
        Ok(())
    }
}
