//! Rotary frequency scaling: what the file says, and Llama 3's parameters recovered from its frequency factors.

use std::f64::consts::PI;

use super::Findings;
use super::source::Source;

/// Llama 3's `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Llama3Scaling {
    pub(super) factor: f64,
    pub(super) low_freq_factor: f64,
    pub(super) high_freq_factor: f64,
    pub(super) original_max_position_embeddings: usize,
}

impl Llama3Scaling {
    /// By what each of the `head_dim / 2` rotary frequencies is divided.
    ///
    /// `1` for wavelengths below `original / high_freq_factor`, `factor` above `original / low_freq_factor`, between them
    /// `1 / ((1 - s) / factor + s)` with `s = (original / wavelength - low) / (high - low)`, as in Llama 3.1's release.
    pub(super) fn factors(&self, head_dim: usize, rope_theta: f64) -> Vec<f64> {
        let original = self.original_max_position_embeddings as f64;
        (0..head_dim / 2)
            .map(|idx| {
                let wavelength = 2.0 * PI * rope_theta.powf(2.0 * idx as f64 / head_dim as f64);
                if wavelength < original / self.high_freq_factor {
                    1.0
                } else if wavelength > original / self.low_freq_factor {
                    self.factor
                } else {
                    let smooth = (original / wavelength - self.low_freq_factor)
                        / (self.high_freq_factor - self.low_freq_factor);
                    1.0 / ((1.0 - smooth) / self.factor + smooth)
                }
            })
            .collect()
    }
}

/// Reads the scaling of a model, `None` if it has none.
///
/// llama.cpp stores Llama 3's scaling as the factors alone. Every published model has low 1, high 4 and an original
/// length of 8192; the factor is the last entry. That guess is accepted only if it reproduces all entries.
pub(super) fn read(
    source: &Source,
    prefix: &str,
    head_dim: usize,
    rope_theta: f64,
    findings: &mut Findings,
) -> Option<Llama3Scaling> {
    let key = format!("{prefix}.rope.scaling.type");
    match source.text(&key) {
        None | Some("none") => {}
        Some(kind) => {
            let message = format!("rotary scaling `{kind}` is not supported");
            findings.problem("rope_scaling", key, message, "");
        }
    }
    let tensor = source.tensor("rope_freqs.weight")?;
    let factors = match tensor.floats() {
        Some(factors) if factors.len() == head_dim / 2 => factors,
        _ => {
            let message = format!("expected {} float32 frequency factors", head_dim / 2);
            findings.problem("rope_scaling", "rope_freqs.weight", message, "");
            return None;
        }
    };
    if factors.iter().all(|factor| *factor == 1.0) {
        return None;
    }
    let scaling = Llama3Scaling {
        factor: f64::from(factors.last().copied().unwrap_or(1.0)),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let agrees = scaling
        .factors(head_dim, rope_theta)
        .iter()
        .zip(&factors)
        .all(|(expected, found)| (expected - f64::from(*found)).abs() <= 1e-4 * expected);
    if !agrees {
        let message =
            "the frequency factors are not Llama 3's (low 1, high 4, original length 8192)";
        findings.problem("rope_scaling", "rope_freqs.weight", message, "");
        return None;
    }
    findings.note(format!(
        "rope_freqs.weight is Llama 3's scaling with factor {}: written as rope_scaling",
        scaling.factor
    ));
    Some(scaling)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_grow_from_one_to_the_full_factor() {
        let scaling = Llama3Scaling {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let factors = scaling.factors(64, 500_000.0);
        assert_eq!(factors.first(), Some(&1.0));
        assert_eq!(factors.last(), Some(&32.0));
        assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]));
        let between = factors
            .iter()
            .filter(|factor| **factor > 1.0 && **factor < 32.0);
        assert!(between.count() > 0);
    }
}
