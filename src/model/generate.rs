//! Greedy decoding of many prompts at once, with cached keys and values.

use candle_core::{DType, Tensor};
use monteclora_converters::architecture::RopeKind;

use super::adapter::ActiveAdapter;
use super::decoder::{Decoder, Sequences, on_pool};
use super::parts::attention::Segment;
use super::predictive::most_likely;
use monteclora_adapters::Result;
use monteclora_adapters::device::to_device;

/// Rotated keys and values of one layer for the running texts. Each text has a range of rows with room to grow.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache {
    keys_and_values: Option<(Tensor, Tensor)>,
}

impl LayerCache {
    /// Writes the new rows of each text after its earlier ones, and returns all rows, those of unused room included.
    pub(crate) fn extend(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        segments: &[Segment],
    ) -> Result<(Tensor, Tensor)> {
        let Some((keys, values)) = &self.keys_and_values else {
            // At first all rows are new and none has room, so these tensors, which the pass also holds, are never written.
            self.keys_and_values = Some((k.clone(), v.clone()));
            return Ok((k.clone(), v.clone()));
        };
        for (new, all) in [(k, keys), (v, values)] {
            for segment in segments {
                let rows = new.narrow(0, segment.query_start, segment.query_len)?;
                let at = segment.key_start + segment.key_len - segment.query_len;
                all.slice_set(&rows.contiguous()?, 0, at)?;
            }
        }
        Ok((keys.clone(), values.clone()))
    }

    /// Moves the rows of each text to another range; `total` is the number of rows of all ranges.
    fn move_rows(&mut self, moves: &[Move], total: usize) -> Result<()> {
        if let Some((k, v)) = &mut self.keys_and_values {
            for all in [k, v] {
                let moved = Tensor::zeros((total, all.dims2()?.1), all.dtype(), all.device())?;
                for Move { from, to, len } in moves {
                    moved.slice_set(&all.narrow(0, *from, *len)?, 0, *to)?;
                }
                *all = moved;
            }
        }
        Ok(())
    }
}

/// The rows of a text that move within the caches.
#[derive(Debug, Clone, Copy)]
struct Move {
    from: usize,
    to: usize,
    len: usize,
}

/// The range of a text's rows in the caches.
#[derive(Debug, Clone, Copy)]
struct Room {
    start: usize,
    rows: usize,
}

/// Rows of room for a text of `n_tokens`: half as many again, so that few tokens move all rows.
fn room_for(n_tokens: usize) -> usize {
    n_tokens + (n_tokens / 2).max(32)
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
    /// Where the keys and values of each text are.
    rooms: Vec<Room>,
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
            rooms: without_room(prompts),
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
        let last = to_device(last, self.sequences.segments.len(), &decoder.device)?;
        let hidden = hidden.index_select(&last, 0)?;
        decoder.head_logits(&hidden, adapter)
    }

    /// Appends one token to each text that continues, and removes the texts whose token is `None`.
    fn extend(&mut self, next: &[Option<u32>]) -> Result<()> {
        let goes_on: Vec<bool> = next.iter().map(Option::is_some).collect();
        retain(&mut self.texts, &goes_on);
        retain(&mut self.rooms, &goes_on);
        let begins = |text: &Vec<u32>| Some(text.len()) == self.threshold;
        let turns_otherwise = self.texts.iter().any(begins);
        for (text, token) in self.texts.iter_mut().zip(next.iter().flatten()) {
            text.push(*token);
        }
        if turns_otherwise {
            // Beyond the threshold all positions have another rotation, so the cached keys are no longer valid.
            self.caches.fill(LayerCache::default());
            self.sequences = Sequences::new(&self.texts);
            self.rooms = without_room(&self.texts);
        } else {
            self.make_room()?;
            self.sequences = last_tokens(&self.texts, &self.rooms);
        }
        Ok(())
    }

    /// Moves all rows once a text has no room for its newest token.
    fn make_room(&mut self) -> Result<()> {
        let mut texts = self.texts.iter().zip(&self.rooms);
        if texts.all(|(text, room)| text.len() <= room.rows) {
            return Ok(());
        }
        let mut total = 0;
        let mut moves = Vec::with_capacity(self.texts.len());
        for (text, room) in self.texts.iter().zip(&mut self.rooms) {
            moves.push(Move {
                from: room.start,
                to: total,
                len: text.len() - 1,
            });
            *room = Room {
                start: total,
                rows: room_for(text.len()),
            };
            total += room.rows;
        }
        let mut caches = self.caches.iter_mut();
        caches.try_for_each(|cache| cache.move_rows(&moves, total))
    }
}

/// Ranges without room to grow, one after the other.
fn without_room(texts: &[Vec<u32>]) -> Vec<Room> {
    let mut start = 0;
    let room = |text: &Vec<u32>| {
        let rows = text.len();
        start += rows;
        Room {
            start: start - rows,
            rows,
        }
    };
    texts.iter().map(room).collect()
}

fn retain<T>(values: &mut Vec<T>, keep: &[bool]) {
    let mut keep = keep.iter();
    values.retain(|_| keep.next().copied().unwrap_or(false));
}

/// Only the last token of each text as a query; its keys are all tokens.
fn last_tokens(texts: &[Vec<u32>], rooms: &[Room]) -> Sequences {
    let mut sequences = Sequences::default();
    for (row, (text, room)) in texts.iter().zip(rooms).enumerate() {
        let Some((last, earlier)) = text.split_last() else {
            continue;
        };
        sequences.tokens.push(*last);
        sequences.positions.push(earlier.len() as u32);
        sequences.segments.push(Segment {
            query_start: row,
            query_len: 1,
            key_start: room.start,
            key_len: text.len(),
        });
    }
    sequences
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use monteclora_adapters::weights::F32;

    /// Texts of different lengths grow beyond their room several times, and some end before others.
    #[test]
    fn texts_that_grow_together_are_what_they_are_alone()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}"#,
        )?;
        let decoder = Decoder::random(dir.path(), &Device::Cpu, &F32, 3)?;
        let prompts: Vec<Vec<u32>> = [3u32, 40, 11, 1]
            .map(|n| (0..n).map(|i| (i * i + n) % 61).collect())
            .to_vec();
        let adapter = ActiveAdapter::default();
        let run = |prompts: &[Vec<u32>], stop_tokens: &[u32]| {
            let settings = GenerationSettings {
                max_new_tokens: 150,
                stop_tokens: stop_tokens.to_vec(),
                batch_size: prompts.len(),
            };
            decoder.generate(prompts, &adapter, &settings, |_| {})
        };
        let endless = run(&prompts, &[])?;
        // A token that ends one of the texts early.
        let stop = endless[1].tokens[70];
        for stop_tokens in [vec![], vec![stop]] {
            let together = run(&prompts, &stop_tokens)?;
            for (prompt, found) in prompts.iter().zip(&together) {
                let alone = &run(std::slice::from_ref(prompt), &stop_tokens)?[0];
                assert!(found.says_the_same(alone), "{prompt:?}");
                assert!((found.log_probability - alone.log_probability).abs() < 1e-3);
            }
        }
        assert!(run(&prompts, &[stop])?[1].end.is_some());
        Ok(())
    }
}
