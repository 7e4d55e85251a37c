//! Seeded sampling: token t is a function of the logits, the seed and t.

/// Sampling below this temperature is greedy, as in mistral.rs.
pub(crate) const GREEDY: f64 = 1e-7;

/// The Gumbel-max trick with noise that is a function of (seed, position, token).
///
/// `argmax_i (l_i / T + g_i)`, g_i standard Gumbel, is a draw from softmax(l / T) over the tokens that are kept.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SeededDraw {
    pub(crate) seed: u64,
    /// 0 takes the most probable token; of equal ones, the last.
    pub(crate) temperature: f64,
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: Option<f64>,
    pub(crate) min_p: Option<f64>,
}

impl SeededDraw {
    /// The draw for the choice `idx` of the same request. The first choice has the request's seed, the others have
    /// seeds derived from it.
    pub(crate) fn for_choice(&self, idx: usize) -> Self {
        let mut draw = self.clone();
        if idx > 0 {
            draw.seed = mix(self.seed ^ mix(u64::try_from(idx).unwrap_or(u64::MAX)));
        }
        draw
    }

    /// The token at `position`; none if no logit is finite.
    pub(crate) fn draw(&self, logits: &[f32], position: usize) -> Option<u32> {
        if self.temperature < GREEDY {
            // Of equal logits the last is taken, as in mistral.rs.
            let finite = (0u32..).zip(logits).filter(|(_, logit)| logit.is_finite());
            return finite
                .max_by(|(_, a), (_, b)| a.total_cmp(b))
                .map(|(token, _)| token);
        }
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

    /// Number of scaled logits, largest first, that remain after top-k, top-p and min-p, in this order; at least 1.
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
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plain(seed: u64) -> SeededDraw {
        SeededDraw {
            seed,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
        }
    }

    #[test]
    fn of_equal_logits_the_last_is_taken_as_mistralrs_takes_it() {
        let mut greedy = plain(1);
        greedy.temperature = 0.0;
        assert_eq!(greedy.draw(&[1.0, 2.0, 2.0, f32::NAN], 0), Some(2));
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
        // Five standard deviations of a binomial: about one of 10^6 changes of the generator gives a false alarm.
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
