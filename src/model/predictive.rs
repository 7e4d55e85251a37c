//! The average of several adapters' predictions: the posterior predictive, where the adapters are draws.

use candle_core::{D, DType, Tensor};
use monteclora_converters::Problem;

use super::adapter::ActiveAdapter;
use super::decoder::{Decoder, Sequences, TaskLoss, split};
use super::parts::head::CHUNK;
use monteclora_adapters::Result;

/// Logits that exist at a time for one draw; a dozen tensors of this size are alive at most.
const LOGITS: usize = 1 << 23;

/// What the average of K distributions over the vocabulary says at each target.
#[derive(Debug)]
pub struct Predictive {
    /// `-ln (1/K sum_k p_k(label))` in nats, and whether the label is the most likely token of the average.
    pub loss: TaskLoss,
    /// `[adapter][target]`: `ln p_k(label)`.
    pub label_log_p: Vec<Vec<f64>>,
    /// Entropy of the average distribution, nats.
    pub predictive_entropy: Vec<f64>,
    /// Average of the K entropies, nats: what remains unsure if the weights were known. Never above the predictive entropy
    /// but for rounding; the difference is the mutual information of prediction and weights.
    pub expected_entropy: Vec<f64>,
}

impl Decoder {
    /// The average of the predictions of `adapters` at `targets`, pairs of a row of `sequences` and the token it should predict.
    ///
    /// Every adapter runs over the whole of `sequences` on its own: a draw of the weights stays the same from the first token to
    /// the last. Probabilities are averaged, not logits. In memory are one adapter's activations, `K x targets x hidden`
    /// numbers, and the logits of a few targets at a time.
    ///
    /// # Errors
    /// For none; those of [`Decoder::evaluate`].
    pub fn evaluate_average(
        &self,
        sequences: &Sequences,
        targets: &[(usize, u32)],
        adapters: &[ActiveAdapter],
    ) -> Result<Predictive> {
        if adapters.is_empty() {
            let message = "an average needs at least one adapter";
            return Err(Problem::sentence("no-adapters", message).into());
        }
        let (rows, labels) = split(targets);
        let rows = Tensor::new(rows, &self.device)?;
        let normed = adapters
            .iter()
            .map(|adapter| {
                let selected = self
                    .hidden(sequences, adapter, None)?
                    .index_select(&rows, 0)?;
                self.head.norm.forward(&selected)
            })
            .collect::<Result<Vec<Tensor>>>()?;
        let mut result = Predictive {
            loss: TaskLoss {
                nll: Vec::with_capacity(labels.len()),
                correct: Vec::with_capacity(labels.len()),
                gradients: None,
            },
            label_log_p: vec![Vec::with_capacity(labels.len()); adapters.len()],
            predictive_entropy: Vec::with_capacity(labels.len()),
            expected_entropy: Vec::with_capacity(labels.len()),
        };
        let chunk = (LOGITS / self.config.vocab_size).clamp(1, CHUNK);
        for start in (0..labels.len()).step_by(chunk) {
            let labels = &labels[start..labels.len().min(start + chunk)];
            let index = Tensor::new(labels, &self.device)?.unsqueeze(1)?;
            let mut average: Option<Tensor> = None;
            let mut entropies = Vec::with_capacity(adapters.len());
            for ((normed, adapter), of_labels) in
                normed.iter().zip(adapters).zip(&mut result.label_log_p)
            {
                let hidden = normed.narrow(0, start, labels.len())?.contiguous()?;
                let logits = self.head.logits(&hidden, adapter)?;
                let log_p = log_softmax(&logits.to_dtype(DType::F32)?)?;
                of_labels.extend(to_f64(&log_p.gather(&index, 1)?)?);
                let p = log_p.exp()?;
                entropies.push(entropy(&p, &log_p)?);
                average = Some(match average {
                    None => p,
                    Some(sum) => (sum + p)?,
                });
            }
            if let Some(sum) = average {
                let p = (sum / adapters.len() as f64)?;
                let best = p.argmax(D::Minus1)?.to_vec1::<u32>()?;
                let correct = best.iter().zip(labels).map(|(b, label)| b == label);
                result.loss.correct.extend(correct);
                // 0 ln 0 is 0; the logarithm itself is not.
                let log_p = p.maximum(f32::MIN_POSITIVE)?.log()?;
                result.predictive_entropy.extend(entropy(&p, &log_p)?);
            }
            for row in 0..labels.len() {
                let of_draws: Vec<f64> = result
                    .label_log_p
                    .iter()
                    .map(|draw| draw[start + row])
                    .collect();
                result.loss.nll.push(-log_mean_exp(&of_draws) as f32);
                let sum: f64 = entropies.iter().map(|draw| draw[row]).sum();
                result.expected_entropy.push(sum / adapters.len() as f64);
            }
        }
        Ok(result)
    }
}

/// `ln (1/n sum exp(v))`, shifted so that it neither overflows nor vanishes.
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
    let values = values.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_of_probabilities_far_below_one_are_exact() {
        let found = log_mean_exp(&[-1000.0, -1001.0]);
        let expected = -1000.0 + ((1.0 + (-1f64).exp()) / 2.0).ln();
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        assert_eq!(log_mean_exp(&[-3.5]), -3.5);
        assert_eq!(log_mean_exp(&[f64::NEG_INFINITY; 2]), f64::NEG_INFINITY);
        assert!(log_mean_exp(&[f64::NAN, -1.0]).is_nan());
    }
}
