//! Bootstrap intervals: how much a score would vary on other rows of the same kind.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;

use super::measures::uniform;

/// Number of resamples.
const RESAMPLES: u64 = 1000;

/// The 95 % percentile bootstrap interval of `score` over `rows` (Efron and Tibshirani 1993, ch. 13).
///
/// Rows are drawn with replacement under fixed seeds, so different scores of the same rows use the same resamples and
/// can be compared. `None` for fewer than two rows, or if more than a tenth of the resamples have no score.
pub fn bootstrap<T: Clone + Sync>(
    rows: &[T],
    score: impl Fn(&[T]) -> Option<f64> + Sync,
) -> Option<[f64; 2]> {
    let resample = |seed: u64| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let n = rows.len() as f64;
        let drawn = rows
            .iter()
            .map(|_| rows[(uniform(&mut random) * n) as usize].clone());
        score(&drawn.collect::<Vec<T>>())
    };
    let mut scores: Vec<f64> = (0..RESAMPLES)
        .into_par_iter()
        .filter_map(resample)
        .collect();
    if rows.len() < 2 || scores.len() < (0.9 * RESAMPLES as f64) as usize {
        return None;
    }
    scores.sort_by(f64::total_cmp);
    let at = |share: f64| scores[(share * (scores.len() - 1) as f64).round() as usize];
    Some([at(0.025), at(0.975)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(values: &[f64]) -> Option<f64> {
        Some(values.iter().sum::<f64>() / values.len() as f64)
    }

    /// The interval of a mean is the normal one, within the noise of a thousand resamples.
    #[test]
    fn intervals_of_means_are_the_normal_ones() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let [low, high] = bootstrap(&values, mean).expect("rows");
        let half = 1.96 * 0.5 / 400f64.sqrt();
        assert!((low - 0.5 + half).abs() < 0.006, "{low}");
        assert!((high - 0.5 - half).abs() < 0.006, "{high}");
        assert_eq!(bootstrap(&values, mean), bootstrap(&values, mean));
    }

    #[test]
    fn scores_that_few_resamples_have_get_no_interval() {
        assert_eq!(bootstrap(&[1.0, 0.0], |_| None), None);
        assert_eq!(bootstrap(&[1.0], mean), None);
        assert_eq!(bootstrap(&[], mean), None);
    }
}
