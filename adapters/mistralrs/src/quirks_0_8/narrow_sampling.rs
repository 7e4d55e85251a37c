//! Narrow sampling. mistral.rs 0.8.1 ignores a top-p of 0, a min-p of 1, and a min-p without a top-p below 1.

use crate::server::sampling::Sampling;

/// Replaces such top-p and min-p settings by equivalent ones that mistral.rs applies.
pub(crate) fn say_otherwise(sampling: &mut Sampling) {
    let (top_p, min_p) = (sampling.top_p, sampling.min_p);
    if top_p == Some(0.0) || min_p.is_some_and(|min_p| min_p >= 1.0) {
        (sampling.top_k, sampling.top_p, sampling.min_p) = (Some(1), None, None);
    } else if min_p.is_some_and(|min_p| min_p > 0.0) && top_p.is_none_or(|top_p| top_p >= 1.0) {
        sampling.top_p = Some(f64::from(1.0 - f32::EPSILON));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_would_be_passed_over_are_said_otherwise() {
        let almost_one = f64::from(1.0 - f32::EPSILON);
        // (top-k, top-p, min-p) as requested, then as passed to mistral.rs.
        for (asked, said) in [
            ((None, Some(0.0), Some(0.1)), (Some(1), None, None)),
            ((Some(5), None, Some(1.0)), (Some(1), None, None)),
            ((None, None, Some(0.1)), (None, Some(almost_one), Some(0.1))),
            (
                (None, Some(1.0), Some(0.1)),
                (None, Some(almost_one), Some(0.1)),
            ),
            ((None, Some(0.5), Some(0.1)), (None, Some(0.5), Some(0.1))),
            (
                (Some(3), Some(1.0), Some(0.0)),
                (Some(3), Some(1.0), Some(0.0)),
            ),
        ] {
            let mut sampling = Sampling::default();
            (sampling.top_k, sampling.top_p, sampling.min_p) = asked;
            say_otherwise(&mut sampling);
            assert_eq!((sampling.top_k, sampling.top_p, sampling.min_p), said);
        }
    }
}
