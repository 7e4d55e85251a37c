//! Greedy decoding of many prompts at once, each with its own cache.

use candle_core::Tensor;
use monteclora_converters::architecture::RopeKind;

use super::adapter::ActiveAdapter;
use super::decoder::{Decoder, Sequences, on_pool};
use super::parts::attention::Segment;
use super::predictive::most_likely;
use monteclora_adapters::Result;

/// Rotated keys and values of one layer for the sequences that are still running, one after the other.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache {
    keys_and_values: Option<(Tensor, Tensor)>,
    lengths: Vec<usize>,
}

impl LayerCache {
    /// Appends the new rows of each sequence behind its earlier ones and returns all keys and values.
    pub(crate) fn extend(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        segments: &[Segment],
    ) -> Result<(Tensor, Tensor)> {
        let joined = match &self.keys_and_values {
            None => (k.clone(), v.clone()),
            Some((old_k, old_v)) => (
                self.interleave(old_k, k, segments)?,
                self.interleave(old_v, v, segments)?,
            ),
        };
        self.lengths = segments.iter().map(|s| s.key_len).collect();
        self.keys_and_values = Some(joined.clone());
        Ok(joined)
    }

    fn interleave(&self, old: &Tensor, new: &Tensor, segments: &[Segment]) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(2 * segments.len());
        let mut start = 0;
        for (segment, length) in segments.iter().zip(&self.lengths) {
            parts.push(old.narrow(0, start, *length)?);
            parts.push(new.narrow(0, segment.query_start, segment.query_len)?);
            start += length;
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn retain(&mut self, running: &[bool]) -> Result<()> {
        if let Some((k, v)) = &self.keys_and_values {
            let mut start = 0;
            let (mut ks, mut vs) = (Vec::new(), Vec::new());
            for (length, keep) in self.lengths.iter().zip(running) {
                if *keep {
                    ks.push(k.narrow(0, start, *length)?);
                    vs.push(v.narrow(0, start, *length)?);
                }
                start += length;
            }
            self.keys_and_values = match ks.is_empty() {
                true => None,
                false => Some((Tensor::cat(&ks, 0)?, Tensor::cat(&vs, 0)?)),
            };
        }
        let mut keep = running.iter();
        self.lengths
            .retain(|_| keep.next().copied().unwrap_or(false));
        Ok(())
    }
}

/// When decoding ends.
#[derive(Debug, Clone)]
pub struct GenerationSettings {
    /// Most tokens an answer may have.
    pub max_new_tokens: usize,
    /// Tokens that end an answer; not part of it.
    pub stop_tokens: Vec<u32>,
    /// Prompts decoded together.
    pub batch_size: usize,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Token ids without the stop token.
    pub tokens: Vec<u32>,
    /// The stop token that ended it; none where it is as long as it may be.
    pub end: Option<u32>,
    /// Logarithm of its probability: the product of those of its tokens and of its end.
    pub log_probability: f64,
}

impl Generation {
    /// Whether another answer is the same text.
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.end == other.end
    }
}

impl Decoder {
    /// Greedy answers to `prompts`; `done` is called with the number of finished prompts after each batch.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        adapter: &ActiveAdapter,
        settings: &GenerationSettings,
        mut done: impl FnMut(usize),
    ) -> Result<Vec<Generation>> {
        let mut answers = Vec::with_capacity(prompts.len());
        for batch in prompts.chunks(settings.batch_size.max(1)) {
            answers.extend(on_pool(|| self.generate_batch(batch, adapter, settings))?);
            done(answers.len());
        }
        Ok(answers)
    }

    fn generate_batch(
        &self,
        prompts: &[Vec<u32>],
        adapter: &ActiveAdapter,
        settings: &GenerationSettings,
    ) -> Result<Vec<Generation>> {
        let mut answers: Vec<Generation> = prompts
            .iter()
            .map(|_| Generation {
                tokens: Vec::new(),
                end: None,
                log_probability: 0.0,
            })
            .collect();
        let mut caches = vec![LayerCache::default(); self.blocks.len()];
        let mut running: Vec<usize> = (0..prompts.len()).collect();
        let mut lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let mut sequences = Sequences::new(prompts);
        let threshold = self.rotation_threshold();
        while !running.is_empty() && settings.max_new_tokens > 0 {
            let hidden = self.hidden(&sequences, adapter, Some(&mut caches))?;
            let last: Vec<u32> = sequences
                .segments
                .iter()
                .map(|s| (s.query_start + s.query_len - 1) as u32)
                .collect();
            let hidden = hidden.index_select(&Tensor::new(last, &self.device)?, 0)?;
            let best = most_likely(&self.head_logits(&hidden, adapter)?)?;
            let mut keep = Vec::with_capacity(running.len());
            let mut next = Vec::new();
            for (sequence, (token, log_p)) in running.iter().zip(best) {
                let answer = &mut answers[*sequence];
                answer.log_probability += log_p;
                if settings.stop_tokens.contains(&token) {
                    answer.end = Some(token);
                } else {
                    answer.tokens.push(token);
                }
                let has_room = answer.tokens.len() < settings.max_new_tokens;
                let goes_on = answer.end.is_none() && has_room;
                keep.push(goes_on);
                if goes_on {
                    next.push((*sequence, token));
                }
            }
            if keep.contains(&false) {
                for cache in &mut caches {
                    cache.retain(&keep)?;
                }
            }
            running = next.iter().map(|(sequence, _)| *sequence).collect();
            let begins = |(sequence, _): &(usize, u32)| Some(lengths[*sequence]) == threshold;
            if next.iter().any(begins) {
                // From here on all of its positions turn otherwise, those in the cache, too.
                caches.fill(LayerCache::default());
                let texts = running.iter().map(|sequence| {
                    lengths[*sequence] += 1;
                    [prompts[*sequence].as_slice(), &answers[*sequence].tokens].concat()
                });
                sequences = Sequences::new(&texts.collect::<Vec<_>>());
            } else {
                sequences = step(&next, &mut lengths);
            }
        }
        Ok(answers)
    }

    /// The length beyond which LongRoPE has other factors, which transformers computes the whole text with. The base of dynamic
    /// scaling grows with each token; there keys keep the rotation that they were made with.
    fn rotation_threshold(&self) -> Option<usize> {
        let mut ropes = self.config.ropes.iter();
        ropes.find_map(|rope| match rope.kind {
            RopeKind::LongRope(_) => rope.threshold(),
            _ => None,
        })
    }
}

/// One new token for each running sequence, behind `lengths` earlier ones.
fn step(next: &[(usize, u32)], lengths: &mut [usize]) -> Sequences {
    let mut key_start = 0;
    let mut sequences = Sequences {
        tokens: Vec::with_capacity(next.len()),
        positions: Vec::with_capacity(next.len()),
        segments: Vec::with_capacity(next.len()),
    };
    for (row, (sequence, token)) in next.iter().enumerate() {
        sequences.tokens.push(*token);
        sequences.positions.push(lengths[*sequence] as u32);
        lengths[*sequence] += 1;
        let key_len = lengths[*sequence];
        sequences.segments.push(Segment {
            query_start: row,
            query_len: 1,
            key_start,
            key_len,
        });
        key_start += key_len;
    }
    sequences
}
