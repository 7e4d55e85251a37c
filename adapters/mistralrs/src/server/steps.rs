//! A hook into every sampling step of one choice: counts tokens, biases them, ends an answer nobody waits for, draws with a seed.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use candle_core::Tensor;
use mistralrs_core::CustomLogitsProcessor;
use parking_lot::Mutex;

use super::metrics::Counted;
use super::seeded::SeededDraw;
use super::stop::StopWatch;
use crate::quirks_0_8::abandoned_requests::make_certain;
use crate::quirks_0_8::split_models::samples_in_step;
use crate::quirks_0_8::token_bias;

/// The steps of one choice of a request: mistral.rs does not tell of every token, nor does it bias them or draw with a seed.
///
/// A request is cancelled by making the end-of-text token certain at its next step.
#[derive(Default)]
pub(crate) struct Steps {
    /// Lengths at which a token was drawn: one that a grammar forbids is drawn again at the same length.
    pub(super) lengths: Mutex<HashSet<usize>>,
    pub(super) first: OnceLock<Instant>,
    /// Counts the request among those without a token.
    pub(super) waiting: Mutex<Option<Counted>>,
    pub(super) cancelled: AtomicBool,
    pub(super) end_tokens: Vec<u32>,
    pub(super) bias: Arc<HashMap<u32, f32>>,
    pub(super) seeded: Option<SeededDraw>,
    pub(super) stop: Option<StopWatch>,
    pub(super) n_prompt: OnceLock<usize>,
}

impl Steps {
    /// Those of an answer outside the server.
    pub(crate) fn for_answer(
        end_tokens: Vec<u32>,
        bias: HashMap<u32, f32>,
        stop: Option<StopWatch>,
    ) -> Self {
        Self {
            end_tokens,
            bias: Arc::new(bias),
            stop,
            ..Self::default()
        }
    }

    /// Tokens sampled.
    pub(crate) fn count(&self) -> usize {
        self.lengths.lock().len()
    }

    pub(crate) fn first(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// Ends the answer at its next step, unless other processes would go on with it.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(!samples_in_step(), Ordering::Relaxed);
    }
}

impl CustomLogitsProcessor for Steps {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let n_prompt = *self.n_prompt.get_or_init(|| context.len());
        let answer = context.get(n_prompt..).unwrap_or_default();
        if self.stop.as_ref().is_some_and(|stop| stop.reached(answer)) {
            self.cancel();
        }
        if self.cancelled.load(Ordering::Relaxed) {
            return make_certain(logits, &self.end_tokens);
        }
        self.lengths.lock().insert(context.len());
        self.first.get_or_init(|| {
            self.waiting.lock().take();
            Instant::now()
        });
        let logits = if self.bias.is_empty() {
            logits.clone()
        } else {
            let bias = self.bias.iter().map(|(token, bias)| (*token, *bias));
            token_bias::add(logits, bias)?
        };
        match &self.seeded {
            Some(seeded) => {
                let token = seeded.draw(&logits.to_vec1()?, context.len());
                make_certain(&logits, token.as_slice())
            }
            None => Ok(logits),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::seeded::tests::plain;
    use super::*;

    #[test]
    fn a_cancelled_request_ends_unless_a_grammar_forbids_it() {
        let steps = Steps {
            end_tokens: vec![2],
            ..Steps::default()
        };
        let logits = Tensor::new(&[3f32, 1.0, -5.0], &Device::Cpu).expect("a tensor");
        let best = |logits: &Tensor| {
            let row: Vec<f32> = steps
                .apply(logits, &[0])
                .and_then(|logits| logits.to_vec1())
                .expect("a row");
            (0..3).max_by(|a, b| row[*a].total_cmp(&row[*b]))
        };
        assert_eq!(best(&logits), Some(0));
        assert!(steps.first().is_some());
        steps.cancel();
        assert_eq!(best(&logits), Some(2));
        let masked = Tensor::new(&[3f32, 1.0, f32::NEG_INFINITY], &Device::Cpu).expect("a tensor");
        assert_eq!(best(&masked), Some(0));
        assert_eq!(steps.count(), 1, "three draws at one length are one token");
    }

    #[test]
    fn a_bias_changes_what_is_drawn_with_a_seed_and_without() {
        let logits = Tensor::new(&[3f32, 1.0, 0.0], &Device::Cpu).expect("a tensor");
        for seeded in [None, Some(plain(5))] {
            let bias = Arc::new(HashMap::from([(0, -100.0), (2, 100.0), (999, 100.0)]));
            let steps = Steps {
                bias,
                seeded,
                ..Steps::default()
            };
            for length in 0..50 {
                let row: Vec<f32> = steps
                    .apply(&logits, &vec![0; length])
                    .and_then(|logits| logits.to_vec1())
                    .expect("a row");
                assert!(row[2] > row[0] + 190.0 && row[2] > row[1] + 90.0, "{row:?}");
            }
            assert_eq!(steps.count(), 50);
        }
    }
}
