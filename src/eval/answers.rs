//! The probability of a given answer, and the entropy at each of its tokens.

use anyhow::Result;

use super::Batching;
use crate::model::{ActiveAdapter, Decoder, Generation, Sequences, log_mean_exp};

/// The probability and the entropies of an answer under several adapters. Each adapter is one model for the whole
/// answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerCertainty {
    /// Logarithm of the answer's probability, averaged over the adapters: the product of the probabilities of its
    /// tokens and its end token.
    pub log_confidence: f64,
    /// Entropy of the adapters' average distribution over the next token, nats, averaged over the answer's tokens and
    /// its end token.
    pub predictive_entropy: f64,
    /// Average of the adapters' entropies over the next token, nats, averaged over the same tokens.
    pub expected_entropy: f64,
}

/// The certainty of `answers` to `prompts` under `adapters`, in order. Each batch needs one forward pass per adapter.
///
/// # Errors
/// As [`SharedBatch::predictive`](crate::model::SharedBatch::predictive).
pub fn certainties(
    decoder: &Decoder,
    prompts: &[Vec<u32>],
    answers: &[Generation],
    adapters: &[ActiveAdapter],
) -> Result<Vec<AnswerCertainty>> {
    let rows: Vec<(&[u32], &Generation)> = prompts.iter().map(Vec::as_slice).zip(answers).collect();
    let length = |(prompt, answer): &(&[u32], &Generation)| prompt.len() + answer.tokens.len();
    let lengths: Vec<usize> = rows.iter().map(length).collect();
    let mut found = Vec::with_capacity(rows.len());
    for batch in Batching::new(None).plan(&lengths) {
        let mut sequences = Sequences::default();
        let (mut targets, mut n_steps) = (Vec::new(), Vec::new());
        for (prompt, answer) in &rows[batch] {
            let segment = sequences.push(&[prompt, answer.tokens.as_slice()].concat());
            let first = sequences.segments[segment].query_start + prompt.len() - 1;
            let tokens: Vec<u32> = answer.tokens.iter().copied().chain(answer.end).collect();
            targets.extend((first..).zip(tokens.iter().copied()));
            n_steps.push(tokens.len());
        }
        let shared = decoder.shared(&sequences, &targets, adapters)?;
        let said = shared.predictive(adapters)?;
        let mut start = 0;
        for n in n_steps {
            let steps = start..start + n;
            let of_adapters: Vec<f64> = (said.average.members.iter())
                .map(|member| {
                    member.nll[steps.clone()]
                        .iter()
                        .map(|v| -f64::from(*v))
                        .sum()
                })
                .collect();
            let mean = |values: &[f64]| values.iter().sum::<f64>() / n.max(1) as f64;
            found.push(AnswerCertainty {
                log_confidence: log_mean_exp(&of_adapters),
                predictive_entropy: mean(&said.predictive_entropy[steps.clone()]),
                expected_entropy: mean(&said.expected_entropy[steps]),
            });
            start += n;
        }
    }
    Ok(found)
}
