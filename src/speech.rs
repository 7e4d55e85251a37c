//! Generates answers token by token, greedily or by sampling, with the probability of each token.

use anyhow::Result;
use monteclora_converters::Problem;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::data::Tokenizer;
use crate::model::{ActiveAdapter, Decoder, Generation};

/// Settings of the generation of an answer.
#[derive(Debug, Clone)]
pub struct Speech {
    /// Largest number of tokens.
    pub max_new_tokens: usize,
    /// Tokens that end an answer; not part of it.
    pub stop_tokens: Vec<u32>,
    /// Tokens are drawn from `softmax(logits / temperature)`; 0 takes the most likely one.
    pub temperature: f64,
    /// Seed of the sampling.
    pub seed: u64,
}

/// An answer with the log-probabilities of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Spoken {
    /// The answer. Its log-probability is that of the model at temperature 1, for any sampling temperature.
    pub generation: Generation,
    /// Log-probability of each token, and of the end token if the answer reached one.
    pub log_probabilities: Vec<f64>,
}

impl Speech {
    /// Answers `prompt`, which must not be empty. Calls `on_text` with new text, in whole characters, and `goes_on`
    /// before each token; the answer stops if that returns false.
    ///
    /// # Errors
    /// Returns an error if the decoder or the tokenizer fails, or if logits are not finite.
    pub fn answer(
        &self,
        (decoder, adapter): (&Decoder, &ActiveAdapter),
        tokenizer: &Tokenizer,
        prompt: &[u32],
        goes_on: &dyn Fn() -> bool,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Spoken> {
        let mut text = decoder.continuation(prompt, adapter);
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut said = Spoken {
            generation: Generation {
                tokens: Vec::new(),
                end: None,
                log_probability: 0.0,
            },
            log_probabilities: Vec::new(),
        };
        let mut shown = String::new();
        while said.generation.tokens.len() < self.max_new_tokens && goes_on() {
            let logits: Vec<f32> = text.logits()?.flatten_all()?.to_vec1()?;
            let (token, log_p) = self.choose(&logits, &mut random)?;
            said.log_probabilities.push(log_p);
            said.generation.log_probability += log_p;
            if self.stop_tokens.contains(&token) {
                said.generation.end = Some(token);
                break;
            }
            said.generation.tokens.push(token);
            let now = tokenizer.decode(&said.generation.tokens, true)?;
            // The last character may be incomplete, and may still change the text before it.
            if let Some(more) = now.strip_prefix(&shown)
                && !more.is_empty()
                && !now.ends_with('\u{fffd}')
            {
                on_text(more);
                shown = now;
            }
            text.push(token)?;
        }
        let whole = tokenizer.decode(&said.generation.tokens, true)?;
        match whole.strip_prefix(&shown) {
            Some(rest) if !rest.is_empty() => on_text(rest),
            _ => {}
        }
        Ok(said)
    }

    /// Chooses the next token, and returns it with its log-probability.
    fn choose(&self, logits: &[f32], random: &mut impl RngCore) -> Result<(u32, f64)> {
        let best = (0u32..)
            .zip(logits)
            .reduce(|best, next| match next.1 > best.1 {
                true => next,
                false => best,
            });
        let Some((best, highest)) = best.filter(|(_, logit)| logit.is_finite()) else {
            let message = "the logits of a token are not finite: the model cannot go on";
            return Err(Problem::sentence("numbers", message).exit(5).into());
        };
        let highest = f64::from(*highest);
        let sum_at = |temperature: f64| -> f64 {
            let weights = logits
                .iter()
                .map(|l| ((f64::from(*l) - highest) / temperature).exp());
            weights.filter(|weight| weight.is_finite()).sum()
        };
        let token = match self.temperature > 0.0 {
            false => best,
            true => {
                let share = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                let mut left = share * sum_at(self.temperature);
                let drawn = (0u32..).zip(logits).find(|(_, logit)| {
                    left -= ((f64::from(**logit) - highest) / self.temperature).exp();
                    left < 0.0
                });
                drawn.map_or(best, |(token, _)| token)
            }
        };
        let log_p = f64::from(logits[token as usize]) - highest - sum_at(1.0).ln();
        Ok((token, log_p))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speech(temperature: f64) -> Speech {
        Speech {
            max_new_tokens: 4,
            stop_tokens: Vec::new(),
            temperature,
            seed: 1,
        }
    }

    #[test]
    fn tokens_are_drawn_by_their_probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        for (temperature, expected) in [
            (1.0, [0.5, 0.3, 0.15, 0.05]),
            (0.5, [0.6849, 0.2466, 0.0616, 0.0068]),
        ] {
            let mut random = ChaCha8Rng::seed_from_u64(3);
            let mut counts = [0.0; 4];
            let n = 20_000;
            for _ in 0..n {
                let (token, log_p) = speech(temperature)
                    .choose(&logits, &mut random)
                    .expect("finite");
                assert!(
                    (log_p - f64::from(logits[token as usize])).abs() < 1e-6,
                    "the model's own, whatever the temperature"
                );
                counts[token as usize] += 1.0;
            }
            for (count, p) in counts.iter().zip(expected) {
                let sd = (f64::from(n) * p * (1.0 - p)).sqrt();
                assert!((count - f64::from(n) * p).abs() < 5.0 * sd, "{counts:?}");
            }
        }
    }

    #[test]
    fn without_a_temperature_the_most_likely_token_is_taken() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let (token, log_p) = speech(0.0)
            .choose(&[1.0, 3.0, 3.0, f32::NEG_INFINITY], &mut random)
            .expect("finite");
        assert_eq!(token, 1, "of equal ones the first");
        assert!((log_p - -(2.0 + (-2f64).exp()).ln()).abs() < 1e-6);
        assert!(speech(0.0).choose(&[f32::NAN], &mut random).is_err());
    }
}
