//! Greedy decoding of many prompts at once, with cached keys and values.

use candle_core::{DType, Tensor};
use monteclora_converters::architecture::RopeKind;

use super::adapter::ActiveAdapter;
use super::decoder::{Decoder, Sequences, on_pool};
use super::parts::attention::Segment;
use super::predictive::most_likely;
use monteclora_adapters::Result;

/// Rotated keys and values of one layer for the running sequences, concatenated.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache {
    keys_and_values: Option<(Tensor, Tensor)>,
    lengths: Vec<usize>,
}

impl LayerCache {
    /// Inserts the new rows of each sequence after its earlier ones, and returns all keys and values.
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

/// Limits of decoding.
#[derive(Debug, Clone)]
pub struct GenerationSettings {
    /// Largest number of tokens of an answer.
    pub max_new_tokens: usize,
    /// Tokens that end an answer. They are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Number of prompts that are decoded together.
    pub batch_size: usize,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Token ids without the stop token.
    pub tokens: Vec<u32>,
    /// The stop token that ended the answer. `None` if it reached the largest number of tokens.
    pub end: Option<u32>,
    /// Logarithm of the answer's probability: the product of the probabilities of its tokens and its stop token.
    pub log_probability: f64,
}

impl Generation {
    /// Whether another answer has the same tokens and the same end.
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.tokens == other.tokens && self.end == other.end
    }
}

impl Decoder {
    /// Greedy answers to `prompts`. After each batch `done` receives the number of finished prompts.
    ///
    /// # Errors
    /// Returns an error if a token is outside the vocabulary or the device fails.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        adapter: &ActiveAdapter,
        settings: &GenerationSettings,
        done: impl FnMut(usize),
    ) -> Result<Vec<Generation>> {
        let answers = self.generate_while(prompts, adapter, settings, &|| true, done)?;
        Ok(answers.unwrap_or_default())
    }

    /// [`Self::generate`] while `goes_on` returns true. It is called before each token. Once it returns false, the
    /// result is `None`.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_while(
        &self,
        prompts: &[Vec<u32>],
        adapter: &ActiveAdapter,
        settings: &GenerationSettings,
        goes_on: &(dyn Fn() -> bool + Sync),
        mut done: impl FnMut(usize),
    ) -> Result<Option<Vec<Generation>>> {
        let mut answers = Vec::with_capacity(prompts.len());
        for batch in prompts.chunks(settings.batch_size.max(1)) {
            match on_pool(|| self.generate_batch(batch, adapter, settings, goes_on))? {
                Some(batch) => answers.extend(batch),
                None => return Ok(None),
            }
            done(answers.len());
        }
        Ok(Some(answers))
    }

    fn generate_batch(
        &self,
        prompts: &[Vec<u32>],
        adapter: &ActiveAdapter,
        settings: &GenerationSettings,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Vec<Generation>>> {
        let mut answers: Vec<Generation> = prompts
            .iter()
            .map(|_| Generation {
                tokens: Vec::new(),
                end: None,
                log_probability: 0.0,
            })
            .collect();
        let mut running: Vec<usize> = (0..prompts.len()).collect();
        let mut texts = Continuation::of(self, prompts, adapter);
        while !running.is_empty() && settings.max_new_tokens > 0 {
            if !goes_on() {
                return Ok(None);
            }
            let best = most_likely(&texts.next_logits()?)?;
            let mut next = Vec::with_capacity(running.len());
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
                next.push(goes_on.then_some(token));
            }
            let mut keep = next.iter().map(Option::is_some);
            running.retain(|_| keep.next().unwrap_or(false));
            texts.extend(&next)?;
        }
        Ok(Some(answers))
    }

    /// Starts a text with `prompt`, which must not be empty. The caller continues it token by token.
    pub fn continuation<'a>(
        &'a self,
        prompt: &[u32],
        adapter: &'a ActiveAdapter,
    ) -> Continuation<'a> {
        Continuation::of(self, &[prompt.to_vec()], adapter)
    }

    /// The length beyond which LongRoPE uses other factors, which then apply to the whole text, as in transformers.
    /// `None` for dynamic scaling: its base grows with each token, and keys keep the rotation that they were computed
    /// with.
    fn rotation_threshold(&self) -> Option<usize> {
        let mut ropes = self.config.ropes.iter();
        ropes.find_map(|rope| match rope.kind {
            RopeKind::LongRope(_) => rope.threshold(),
            _ => None,
        })
    }
}

/// Several texts that grow token by token together. Keys and values of their tokens are cached.
#[derive(Debug)]
pub struct Continuation<'a> {
    decoder: &'a Decoder,
    adapter: &'a ActiveAdapter,
    caches: Vec<LayerCache>,
    /// All tokens of each text. The newest one may not have been computed yet.
    texts: Vec<Vec<u32>>,
    /// The tokens to compute next.
    sequences: Sequences,
    /// See [`Decoder::rotation_threshold`].
    threshold: Option<usize>,
}

impl<'a> Continuation<'a> {
    fn of(decoder: &'a Decoder, prompts: &[Vec<u32>], adapter: &'a ActiveAdapter) -> Self {
        Self {
            decoder,
            adapter,
            caches: vec![LayerCache::default(); decoder.blocks.len()],
            texts: prompts.to_vec(),
            sequences: Sequences::new(prompts),
            threshold: decoder.rotation_threshold(),
        }
    }

    /// Logits of the next token of each text, `[texts, vocab]`, in float32. Call this once before the first and after
    /// each [`Self::push`].
    ///
    /// # Errors
    /// Returns an error if a token is outside the vocabulary or the device fails.
    pub fn logits(&mut self) -> Result<Tensor> {
        Ok(on_pool(|| self.next_logits())?.to_dtype(DType::F32)?)
    }

    /// Appends `token` to the text of a [`Decoder::continuation`].
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.extend(&[Some(token)])
    }

    fn next_logits(&mut self) -> Result<Tensor> {
        let (decoder, adapter) = (self.decoder, self.adapter);
        let hidden = decoder.hidden(&self.sequences, adapter, Some(&mut self.caches))?;
        let last: Vec<u32> = self
            .sequences
            .segments
            .iter()
            .map(|s| (s.query_start + s.query_len - 1) as u32)
            .collect();
        let hidden = hidden.index_select(&Tensor::new(last, &decoder.device)?, 0)?;
        decoder.head_logits(&hidden, adapter)
    }

    /// Appends one token to each text that continues, and removes the texts whose token is `None`.
    fn extend(&mut self, next: &[Option<u32>]) -> Result<()> {
        let goes_on: Vec<bool> = next.iter().map(Option::is_some).collect();
        if goes_on.contains(&false) {
            for cache in &mut self.caches {
                cache.retain(&goes_on)?;
            }
            let mut goes_on = goes_on.into_iter();
            self.texts.retain(|_| goes_on.next().unwrap_or(false));
        }
        let begins = |text: &Vec<u32>| Some(text.len()) == self.threshold;
        let turns_otherwise = self.texts.iter().any(begins);
        for (text, token) in self.texts.iter_mut().zip(next.iter().flatten()) {
            text.push(*token);
        }
        if turns_otherwise {
            // Beyond the threshold all positions have another rotation, so the cached keys are no longer valid.
            self.caches.fill(LayerCache::default());
            self.sequences = Sequences::new(&self.texts);
        } else {
            self.sequences = last_tokens(&self.texts);
        }
        Ok(())
    }
}

/// Only the last token of each text as a query; its keys are all tokens.
fn last_tokens(texts: &[Vec<u32>]) -> Sequences {
    let mut sequences = Sequences::default();
    let mut key_start = 0;
    for (row, text) in texts.iter().enumerate() {
        let Some((last, earlier)) = text.split_last() else {
            continue;
        };
        sequences.tokens.push(*last);
        sequences.positions.push(earlier.len() as u32);
        sequences.segments.push(Segment {
            query_start: row,
            query_len: 1,
            key_start,
            key_len: text.len(),
        });
        key_start += text.len();
    }
    sequences
}
