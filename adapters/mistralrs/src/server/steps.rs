//! A hook into every sampling step of one choice. It does what mistral.rs does not do, or does differently.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use candle_core::{Device, Tensor};
use mistralrs_core::CustomLogitsProcessor;
use parking_lot::Mutex;

use super::logprobs::TokenScore;
use super::metrics::Counted;
use super::seeded::SeededDraw;
use super::stop::StopWatch;
use super::vocabulary::Held;
use crate::quirks_0_8::split_models::samples_in_step;

/// Added to the logit of a token that must be sampled.
const CERTAIN: f32 = 1e6;

/// The steps of one choice of a request. They count tokens, enforce a grammar, add biases, apply penalties, draw
/// tokens, score the drawn tokens, and end an answer that nobody waits for.
///
/// To cancel a request, the next step makes the end-of-text token certain.
#[derive(Default)]
pub(crate) struct Steps {
    /// Lengths of the context at which a token was drawn.
    pub(super) lengths: Mutex<HashSet<usize>>,
    pub(super) first: OnceLock<Instant>,
    /// Counts the request among those without a token.
    pub(super) waiting: Mutex<Option<Counted>>,
    pub(super) cancelled: AtomicBool,
    pub(super) end_tokens: Vec<u32>,
    pub(super) rules: Arc<Rules>,
    pub(super) draw: Option<SeededDraw>,
    pub(super) grammar: Option<Held>,
    pub(super) stop: Option<StopWatch>,
    pub(super) n_prompt: OnceLock<usize>,
    /// Maximum number of tokens of the answer.
    pub(super) limit: Option<usize>,
    pub(super) scores: Option<Scores>,
}

/// Rules that change the logits of every step in the same way.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    /// Added to the logit of each of these tokens.
    pub(crate) bias: HashMap<u32, f32>,
    pub(crate) penalties: Penalties,
    /// Minimum number of tokens before the answer may end.
    pub(crate) min_tokens: usize,
    /// Whether the answer continues to its limit.
    pub(crate) ignore_eos: bool,
    /// Tokens that end the answer, in addition to the model's own.
    pub(crate) stop_tokens: Vec<u32>,
}

/// Penalties for tokens that occur in the prompt or the answer, counted as in mistral.rs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Penalties {
    /// Subtracted once per occurrence.
    pub(crate) frequency: f32,
    /// Subtracted once per token that occurs.
    pub(crate) presence: f32,
    /// Divides a positive logit and multiplies a negative one; no penalty unless it is above 0.
    pub(crate) repetition: f32,
}

/// The scores of the drawn tokens.
#[derive(Debug, Default)]
pub(crate) struct Scores {
    pub(crate) n_top: usize,
    pub(crate) recorded: Mutex<Vec<TokenScore>>,
}

impl Penalties {
    fn is_none(&self) -> bool {
        let Self {
            frequency,
            presence,
            repetition,
        } = *self;
        frequency == 0.0 && presence == 0.0 && (repetition == 1.0 || repetition <= 0.0)
    }

    /// Applies the penalties for the tokens of `context` to `logits`.
    fn apply(&self, context: &[u32], logits: &mut [f32]) {
        if self.is_none() {
            return;
        }
        let mut counts: HashMap<usize, f32> = HashMap::new();
        for token in context
            .iter()
            .filter_map(|token| usize::try_from(*token).ok())
        {
            *counts.entry(token).or_default() += 1.0;
        }
        for (token, count) in counts {
            let Some(logit) = logits.get_mut(token) else {
                continue;
            };
            *logit -= count * self.frequency + self.presence;
            if self.repetition > 0.0 {
                *logit = match *logit > 0.0 {
                    true => *logit / self.repetition,
                    false => *logit * self.repetition,
                };
            }
        }
    }
}

impl Rules {
    fn are_none(&self) -> bool {
        self.bias.is_empty() && self.penalties.is_none() && self.min_tokens == 0 && !self.ignore_eos
    }
}

impl Steps {
    /// The steps of an answer outside the server.
    pub(crate) fn for_answer(
        end_tokens: Vec<u32>,
        bias: HashMap<u32, f32>,
        stop: Option<StopWatch>,
        grammar: Option<Held>,
    ) -> Self {
        Self {
            end_tokens,
            rules: Arc::new(Rules {
                bias,
                ..Rules::default()
            }),
            stop,
            grammar,
            ..Self::default()
        }
    }

    /// Number of tokens sampled.
    pub(crate) fn count(&self) -> usize {
        self.lengths.lock().len()
    }

    pub(crate) fn first(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// Whether `token` ends the answer without being part of it.
    pub(crate) fn ends(&self, token: u32) -> bool {
        self.end_tokens.contains(&token) || self.rules.stop_tokens.contains(&token)
    }

    /// Ends the answer at its next step, unless other processes would continue with it.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(!samples_in_step(), Ordering::Relaxed);
    }

    /// Whether the answer was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn changes_nothing(&self) -> bool {
        self.rules.are_none()
            && self.draw.is_none()
            && self.grammar.is_none()
            && self.scores.is_none()
    }

    /// The logits from which the next token is drawn.
    fn next(
        &self,
        raw: Vec<f32>,
        answer: &[u32],
        context: &[u32],
    ) -> candle_core::Result<Vec<f32>> {
        let mut logits = raw.clone();
        self.rules.penalties.apply(context, &mut logits);
        for (token, bias) in &self.rules.bias {
            if let Some(logit) = at(&mut logits, *token) {
                *logit += bias;
            }
        }
        if let Some(grammar) = &self.grammar {
            let goes_on = grammar.mask(answer, &mut logits);
            if !goes_on.map_err(candle_core::Error::msg)? {
                certain(&mut logits, &self.end_tokens);
                return Ok(logits);
            }
        }
        let too_short = answer.len() < self.rules.min_tokens;
        if too_short || self.rules.ignore_eos {
            let stops: &[u32] = if too_short {
                &self.rules.stop_tokens
            } else {
                &[]
            };
            let mut without = logits.clone();
            for token in self.end_tokens.iter().chain(stops) {
                if let Some(logit) = at(&mut without, *token) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            // A grammar may allow nothing but the end.
            if without.iter().any(|logit| logit.is_finite()) {
                logits = without;
            }
        }
        if let Some(draw) = &self.draw
            && let Some(token) = draw.draw(&logits, context.len())
        {
            if let Some(scores) = &self.scores {
                let score = TokenScore::new(&raw, token, scores.n_top);
                scores.recorded.lock().push(score);
            }
            // mistral.rs does not know the stop tokens of the request, so its own end token replaces them.
            match self.rules.stop_tokens.contains(&token) {
                true => certain(&mut logits, &self.end_tokens),
                false => certain(&mut logits, &[token]),
            }
        }
        Ok(logits)
    }
}

fn at(logits: &mut [f32], token: u32) -> Option<&mut f32> {
    logits.get_mut(usize::try_from(token).ok()?)
}

/// Makes it certain that one of `tokens` is drawn.
fn certain(logits: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        if let Some(logit) = at(logits, *token) {
            *logit = if logit.is_finite() {
                *logit + CERTAIN
            } else {
                CERTAIN
            };
        }
    }
}

fn tensor(row: Vec<f32>) -> candle_core::Result<Tensor> {
    let n = row.len();
    Tensor::from_vec(row, n, &Device::Cpu)
}

impl CustomLogitsProcessor for Steps {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let n_prompt = *self.n_prompt.get_or_init(|| context.len());
        let answer = context.get(n_prompt..).unwrap_or_default();
        let is_stopped = |stop: &StopWatch| stop.reached(answer);
        if answer.len() >= self.rules.min_tokens && self.stop.as_ref().is_some_and(is_stopped) {
            self.cancel();
        }
        // An answer of one token is complete after the prompt's step, but the engine makes one more step; see
        // `late_step`.
        let is_over = self.limit.is_some_and(|limit| answer.len() >= limit);
        if is_over || self.cancelled.load(Ordering::Relaxed) {
            let mut row = logits.to_vec1()?;
            certain(&mut row, &self.end_tokens);
            return tensor(row);
        }
        self.lengths.lock().insert(context.len());
        self.first.get_or_init(|| {
            self.waiting.lock().take();
            Instant::now()
        });
        if self.changes_nothing() {
            return Ok(logits.clone());
        }
        tensor(self.next(logits.to_vec1()?, answer, context)?)
    }
}

#[cfg(test)]
mod tests {
    use mistralrs_core::Constraint;

    use super::super::seeded::tests::plain;
    use super::super::vocabulary::tests::two_ends;
    use super::*;

    fn row(steps: &Steps, logits: &[f32], context: &[u32]) -> Vec<f32> {
        let logits = Tensor::new(logits, &Device::Cpu).expect("a tensor");
        let row = steps.apply(&logits, context);
        row.and_then(|logits| logits.to_vec1()).expect("a row")
    }

    fn best(row: &[f32]) -> usize {
        (0..row.len())
            .max_by(|a, b| row[*a].total_cmp(&row[*b]))
            .expect("a token")
    }

    #[test]
    fn a_cancelled_request_ends_at_its_next_step() {
        let steps = Steps {
            end_tokens: vec![2],
            ..Steps::default()
        };
        let logits = [3f32, 1.0, -5.0];
        assert_eq!(best(&row(&steps, &logits, &[0])), 0);
        assert!(steps.first().is_some());
        steps.cancel();
        assert_eq!(best(&row(&steps, &logits, &[0])), 2);
        assert_eq!(steps.count(), 1, "two draws at one length are one token");
    }

    #[test]
    fn a_step_beyond_the_limit_is_none_of_the_answer() {
        let steps = Steps {
            end_tokens: vec![2],
            limit: Some(1),
            ..Steps::default()
        };
        let logits = [3f32, 1.0, -5.0];
        assert_eq!(best(&row(&steps, &logits, &[0])), 0);
        assert_eq!(best(&row(&steps, &logits, &[0, 0])), 2);
        assert_eq!(steps.count(), 1);
    }

    #[test]
    fn a_bias_changes_what_is_drawn_with_a_seed_and_without() {
        for draw in [None, Some(plain(5))] {
            let bias = HashMap::from([(0, -100.0), (2, 100.0), (999, 100.0)]);
            let steps = Steps {
                rules: Arc::new(Rules {
                    bias,
                    ..Rules::default()
                }),
                draw,
                ..Steps::default()
            };
            for length in 0..50 {
                let row = row(&steps, &[3.0, 1.0, 0.0], &vec![0; length]);
                assert!(row[2] > row[0] + 190.0 && row[2] > row[1] + 90.0, "{row:?}");
            }
            assert_eq!(steps.count(), 50);
        }
    }

    #[test]
    fn penalties_are_those_of_mistralrs() {
        let penalties = Penalties {
            frequency: 0.5,
            presence: 0.25,
            repetition: 2.0,
        };
        let mut logits = [3.0, 1.0, -1.0, 4.0];
        penalties.apply(&[0, 0, 2, 99], &mut logits);
        assert_eq!(
            logits,
            [(3.0 - 1.0 - 0.25) / 2.0, 1.0, (-1.0 - 0.75) * 2.0, 4.0]
        );
    }

    #[test]
    fn scores_are_of_the_models_own_distribution() {
        let steps = Steps {
            rules: Arc::new(Rules {
                bias: HashMap::from([(1, 50.0)]),
                penalties: Penalties {
                    presence: 2.0,
                    ..Penalties::default()
                },
                ..Rules::default()
            }),
            draw: Some(SeededDraw {
                temperature: 0.0,
                ..plain(0)
            }),
            scores: Some(Scores {
                n_top: 1,
                ..Scores::default()
            }),
            ..Steps::default()
        };
        assert_eq!(best(&row(&steps, &[2.0, 0.0, 0.0], &[0])), 1);
        let scores = steps.scores.as_ref().expect("asked for").recorded.lock();
        let total = (2f32.exp() + 2.0).ln();
        let logprob = scores[0].logprob.expect("a token");
        assert_eq!(
            (scores.len(), scores[0].token, scores[0].top[0].0),
            (1, 1, 0)
        );
        assert!((logprob + total).abs() < 1e-6, "{logprob}");
    }

    /// The answer of greedy decoding, up to an end token or 20 tokens.
    fn greedy(steps: &Steps, logits: &[f32]) -> Vec<u32> {
        let mut context = vec![7];
        while context.len() < 21 {
            let token = u32::try_from(best(&row(steps, logits, &context))).expect("a token");
            context.push(token);
            if steps.end_tokens.contains(&token) {
                break;
            }
        }
        context.split_off(1)
    }

    #[test]
    fn a_stop_token_ends_the_answer_in_the_place_of_the_models_own() {
        let steps = Steps {
            end_tokens: vec![2],
            rules: Arc::new(Rules {
                stop_tokens: vec![1],
                ..Rules::default()
            }),
            draw: Some(SeededDraw {
                temperature: 0.0,
                ..plain(0)
            }),
            ..Steps::default()
        };
        assert_eq!(best(&row(&steps, &[1.0, 0.0, -9.0], &[0])), 0);
        assert_eq!(best(&row(&steps, &[0.0, 1.0, -9.0], &[0, 0])), 2);
    }

    fn held(rules: Rules) -> Steps {
        let vocabulary = two_ends(&[1]);
        let regex = Constraint::Regex("a+".to_owned());
        let matcher = vocabulary
            .compile(&regex)
            .expect("sound")
            .expect("a grammar");
        Steps {
            end_tokens: vec![1],
            rules: Arc::new(rules),
            grammar: Some(Held::new(&matcher)),
            ..Steps::default()
        }
    }

    #[test]
    fn a_grammar_a_shortest_length_and_a_cancellation_work_together() {
        let a = u32::from('a') - u32::from('!') + 2;
        // The logits in descending order: the wrong end token, the right one, the matching token, all others.
        let mut logits = vec![0f32; 98];
        (logits[0], logits[1], logits[a as usize]) = (9.0, 8.0, 7.0);
        assert_eq!(greedy(&held(Rules::default()), &logits), [a, 1]);
        let longer = held(Rules {
            min_tokens: 3,
            ..Rules::default()
        });
        assert_eq!(greedy(&longer, &logits), [a, a, a, 1]);
        let endless = held(Rules {
            ignore_eos: true,
            ..Rules::default()
        });
        assert_eq!(greedy(&endless, &logits), [a; 20]);
        endless.cancel();
        assert_eq!(best(&row(&endless, &logits, &[7, a])), 1);
    }
}
