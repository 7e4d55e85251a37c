//! A hook into every sampling step of one choice: counts tokens, biases them, ends an answer nobody waits for, draws with a seed.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use candle_core::Tensor;
use mistralrs_core::CustomLogitsProcessor;
use tokenizers::Tokenizer;

use super::metrics::Counted;
use crate::distributed::samples_in_step;

/// Added to the logit of a token that must be sampled; one that a grammar forbids stays at minus infinity.
const CERTAIN: f32 = 1e6;

/// The steps of one choice of a request.
///
/// mistral.rs 0.8.1 does not tell when the last token adds no text, so tokens are counted here. Nor must the receiver of a
/// request be dropped to cancel it: the failed send fails the whole batch, and then stops the engine. A request is
/// cancelled by making the end-of-text token certain at its next step. `logit_bias` is read by 0.8.1 and never used.
pub(crate) struct Steps {
    /// Lengths at which a token was drawn: one that a grammar forbids is drawn again at the same length.
    lengths: Mutex<HashSet<usize>>,
    first: OnceLock<Instant>,
    /// Counts the request among those without a token.
    waiting: Mutex<Option<Counted>>,
    cancelled: AtomicBool,
    can_cancel: bool,
    end_tokens: Vec<u32>,
    /// Added to the logits of these tokens.
    bias: Arc<HashMap<u32, f32>>,
    seeded: Option<SeededDraw>,
    stop: Option<StopWatch>,
    /// Tokens of the prompt.
    n_prompt: OnceLock<usize>,
}

impl Steps {
    pub(crate) fn new(
        end_tokens: Vec<u32>,
        bias: Arc<HashMap<u32, f32>>,
        seeded: Option<SeededDraw>,
        stop: Option<StopWatch>,
        waiting: Option<Counted>,
    ) -> Self {
        Self {
            lengths: Mutex::default(),
            first: OnceLock::new(),
            waiting: Mutex::new(waiting),
            cancelled: AtomicBool::new(false),
            can_cancel: !samples_in_step(),
            end_tokens,
            bias,
            seeded,
            stop,
            n_prompt: OnceLock::new(),
        }
    }

    fn lengths(&self) -> MutexGuard<'_, HashSet<usize>> {
        self.lengths
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Tokens sampled.
    pub(crate) fn count(&self) -> usize {
        self.lengths().len()
    }

    /// When the first token was sampled.
    pub(crate) fn first(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// Ends the answer at its next step, unless other processes would go on with it.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(self.can_cancel, Ordering::Relaxed);
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
            return favour(logits, &self.end_tokens);
        }
        self.lengths().insert(context.len());
        self.first.get_or_init(|| {
            let mut waiting = self
                .waiting
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            waiting.take();
            Instant::now()
        });
        let logits = if self.bias.is_empty() {
            logits.clone()
        } else {
            biased(
                logits,
                self.bias.iter().map(|(token, bias)| (*token, *bias)),
            )?
        };
        match &self.seeded {
            Some(seeded) => {
                let token = seeded.draw(&logits.to_vec1()?, context.len());
                favour(&logits, token.as_slice())
            }
            None => Ok(logits),
        }
    }
}

/// Tells when an answer holds one of the texts that end it. What clients see is cut elsewhere, exactly; this ends the work.
pub(crate) struct StopWatch {
    texts: Vec<String>,
    /// Special tokens among the texts, which are no text of an answer.
    tokens: Vec<u32>,
    tokenizer: Arc<Tokenizer>,
    /// Tokens in which the longest text must show, each being a byte at least.
    width: usize,
}

impl StopWatch {
    /// A watch for `texts`, if there are any.
    pub(crate) fn new(texts: &[String], tokenizer: &Arc<Tokenizer>) -> Option<Self> {
        let longest = texts.iter().map(String::len).max()?;
        let is_special = |token: &u32| {
            let text = tokenizer.decode(&[*token], true);
            text.is_ok_and(|text| text.is_empty())
        };
        let tokens = texts.iter().filter_map(|text| tokenizer.token_to_id(text));
        Some(Self {
            texts: texts.to_vec(),
            tokens: tokens.filter(is_special).collect(),
            tokenizer: tokenizer.clone(),
            width: longest + 4,
        })
    }

    fn reached(&self, answer: &[u32]) -> bool {
        let Some(last) = answer.last() else {
            return false;
        };
        let tail = &answer[answer.len().saturating_sub(self.width)..];
        self.tokens.contains(last)
            || self
                .tokenizer
                .decode(tail, true)
                .is_ok_and(|text| self.texts.iter().any(|stop| text.contains(stop)))
    }
}

/// `logits` with `tokens` made certain.
fn favour(logits: &Tensor, tokens: &[u32]) -> candle_core::Result<Tensor> {
    biased(logits, tokens.iter().map(|token| (*token, CERTAIN)))
}

/// `logits` with something added to those of some tokens; what is not in the vocabulary is passed over.
fn biased(
    logits: &Tensor,
    additions: impl Iterator<Item = (u32, f32)>,
) -> candle_core::Result<Tensor> {
    let n = logits.elem_count();
    let mut bonus = vec![0f32; n];
    for (token, addition) in additions {
        if let Some(value) = usize::try_from(token).ok().and_then(|at| bonus.get_mut(at)) {
            *value = addition;
        }
    }
    let bonus = Tensor::from_vec(bonus, n, logits.device())?.to_dtype(logits.dtype())?;
    logits + bonus
}

/// Sampling that a request's `seed` fixes: the Gumbel-max trick with noise that is a function of (seed, position, token).
///
/// `argmax_i (l_i / T + g_i)`, g_i standard Gumbel, is a draw from softmax(l / T) over the tokens that are kept.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SeededDraw {
    pub(crate) seed: u64,
    /// Above 0.
    pub(crate) temperature: f64,
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: Option<f64>,
    pub(crate) min_p: Option<f64>,
}

impl SeededDraw {
    /// The draw for the choice `idx` of the same request: the first has the request's seed, the others seeds made of it.
    pub(crate) fn for_choice(&self, idx: usize) -> Self {
        let mut draw = self.clone();
        if idx > 0 {
            draw.seed = mix(self.seed ^ mix(u64::try_from(idx).unwrap_or(u64::MAX)));
        }
        draw
    }

    /// The token at `position`; none if no logit is finite.
    fn draw(&self, logits: &[f32], position: usize) -> Option<u32> {
        let mut order: Vec<(u32, f64)> = (0u32..)
            .zip(logits)
            .filter(|(_, logit)| logit.is_finite())
            .map(|(token, logit)| (token, f64::from(*logit) / self.temperature))
            .collect();
        order.sort_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
        let (_, highest) = *order.first()?;
        order.truncate(self.kept(&order, highest));
        let best = order.into_iter().max_by(|(a, x), (b, y)| {
            let x = x + self.gumbel(position, *a);
            let y = y + self.gumbel(position, *b);
            x.total_cmp(&y)
        });
        best.map(|(token, _)| token)
    }

    /// How many of the scaled logits, largest first, top-k, then top-p, then min-p leave; at least 1.
    fn kept(&self, order: &[(u32, f64)], highest: f64) -> usize {
        let most = self.top_k.map_or(order.len(), |k| k.clamp(1, order.len()));
        let weight = |value: f64| (value - highest).exp();
        let total: f64 = order.iter().map(|(_, value)| weight(*value)).sum();
        let mut kept = 0;
        let mut sum = 0.0;
        for (_, value) in &order[..most] {
            let share = weight(*value);
            let below_floor = self.min_p.is_some_and(|floor| share < floor);
            if kept > 0 && (below_floor || self.top_p.is_some_and(|p| sum / total >= p)) {
                break;
            }
            sum += share;
            kept += 1;
        }
        kept
    }

    fn gumbel(&self, position: usize, token: u32) -> f64 {
        let position = u64::try_from(position).unwrap_or(u64::MAX);
        let word = mix(mix(self.seed ^ mix(position)) ^ u64::from(token));
        // 53 random bits, shifted by half a step so that neither end of (0, 1) occurs.
        #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
        let uniform = ((word >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        -(-uniform.ln()).ln()
    }
}

/// SplitMix64's step and finaliser (Steele, Lea, Flood 2014).
fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn plain(seed: u64) -> SeededDraw {
        SeededDraw {
            seed,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
        }
    }

    #[test]
    fn draws_follow_the_distribution_and_repeat_with_the_seed() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let mut counts = [0usize; 4];
        let n = 20_000;
        for position in 0..n {
            let token = plain(1).draw(&logits, position).expect("finite");
            assert_eq!(plain(1).draw(&logits, position), Some(token));
            counts[token as usize] += 1;
        }
        // Five standard deviations of a binomial: a false alarm in about one of 10^6 changes of the generator.
        for (count, p) in counts.iter().zip([0.5, 0.3, 0.15, 0.05]) {
            let (expected, sd) = (f64::from(20_000) * p, (20_000.0 * p * (1.0 - p)).sqrt());
            assert!((*count as f64 - expected).abs() < 5.0 * sd, "{counts:?}");
        }
        let differs = (0..100).any(|at| plain(1).draw(&logits, at) != plain(2).draw(&logits, at));
        assert!(differs, "another seed must draw otherwise");
    }

    #[test]
    fn truncation_keeps_what_it_should_and_never_nothing() {
        let logits: Vec<f32> = [0.05f32, 0.5, 0.15, 0.3].iter().map(|p| p.ln()).collect();
        let support = |draw: &SeededDraw| {
            let mut found: Vec<u32> = (0..2000).filter_map(|at| draw.draw(&logits, at)).collect();
            found.sort_unstable();
            found.dedup();
            found
        };
        let with = |top_k, top_p, min_p| SeededDraw {
            top_k,
            top_p,
            min_p,
            ..plain(3)
        };
        assert_eq!(support(&with(None, None, None)), [0, 1, 2, 3]);
        assert_eq!(support(&with(Some(2), None, None)), [1, 3]);
        assert_eq!(support(&with(None, Some(0.6), None)), [1, 3]);
        assert_eq!(support(&with(None, Some(0.0), None)), [1]);
        assert_eq!(support(&with(None, None, Some(0.25))), [1, 2, 3]);
        let forbidden = [f32::NEG_INFINITY; 3];
        assert_eq!(plain(3).draw(&forbidden, 0), None);
    }

    #[test]
    fn a_cancelled_request_ends_unless_a_grammar_forbids_it() {
        let steps = Steps::new(vec![2], Arc::default(), None, None, None);
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
            let steps = Steps::new(vec![1], bias, seeded, None, None);
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

    #[test]
    fn choices_draw_from_seeds_of_their_own() {
        let logits = [0f32; 16];
        let draws = |idx: usize| -> Vec<_> {
            (0..20)
                .map(|at| plain(9).for_choice(idx).draw(&logits, at))
                .collect()
        };
        let plain: Vec<_> = (0..20).map(|at| plain(9).draw(&logits, at)).collect();
        assert_eq!(draws(0), plain);
        assert_ne!(draws(1), plain);
        assert_ne!(draws(1), draws(2));
    }
}
