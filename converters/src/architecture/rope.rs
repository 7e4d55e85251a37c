//! Rotary frequencies and how they are rescaled.

use std::f64::consts::PI;

use serde_json::{Value, json};

/// A rotary embedding in the rotate-half form.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// How its frequencies are rescaled.
    pub kind: RopeKind,
    /// The base of the frequencies.
    pub theta: f64,
    /// The rescaled frequencies, `[head_dim / 2]`, radians per position.
    pub inverse_frequencies: Vec<f32>,
}

/// A rescaling of rotary frequencies, for more positions than were trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeKind {
    /// None.
    Default,
    /// All divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3's.
    Llama3(Llama3Scaling),
}

impl RopeKind {
    /// The scaling as `rope_scaling` of a config.json has it; null where there is none.
    pub fn scaling_json(self) -> Value {
        match self {
            Self::Default => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Llama3(scaling) => json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }),
        }
    }
}

/// Llama 3's `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// By what long wavelengths' frequencies are divided.
    pub factor: f64,
    /// Wavelengths above the original length over this are long.
    pub low_freq_factor: f64,
    /// Wavelengths below the original length over this are short.
    pub high_freq_factor: f64,
    /// Positions the model was trained on first.
    pub original_max_position_embeddings: usize,
}

impl Llama3Scaling {
    /// The rescaled frequency: divided by `factor` for a long wavelength, kept for a short one, between them
    /// `((1 - s) / factor + s)` of it with `s = (original / wavelength - low) / (high - low)`, as in Llama 3.1's release.
    pub fn rescaled(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * PI / frequency;
        let original = self.original_max_position_embeddings as f64;
        if wavelength > original / self.low_freq_factor {
            frequency / self.factor
        } else if wavelength < original / self.high_freq_factor {
            frequency
        } else {
            let smooth = (original / wavelength - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }

    /// By what each of the `head_dim / 2` rotary frequencies is divided.
    pub fn factors(&self, head_dim: usize, theta: f64) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|idx| theta.powf(-2.0 * idx as f64 / head_dim as f64))
            .map(|frequency| frequency / self.rescaled(frequency))
            .collect()
    }
}

impl Rope {
    /// `theta^(-2i / head_dim)`, rescaled; in the precision in which transformers computes them.
    pub fn new(kind: RopeKind, theta: f64, head_dim: usize) -> Self {
        // transformers raises the base to an f32 exponent and inverts in f32.
        let plain = |i: usize| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
        let rescaled = |frequency: f32| match kind {
            RopeKind::Default => frequency,
            RopeKind::Linear { factor } => frequency / factor as f32,
            RopeKind::Llama3(scaling) => scaling.rescaled(f64::from(frequency)) as f32,
        };
        Self {
            kind,
            theta,
            inverse_frequencies: (0..head_dim / 2).map(|i| rescaled(plain(i))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaling(factor: f64) -> Llama3Scaling {
        Llama3Scaling {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    }

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        assert_eq!(scaling(8.0).rescaled(1.0), 1.0);
        assert_eq!(scaling(8.0).rescaled(1e-5), 1.25e-6);
        let between = scaling(8.0).rescaled(2e-3);
        assert!(between < 2e-3 && between > 2.5e-4);
    }

    #[test]
    fn factors_grow_from_one_to_the_full_factor() {
        let factors = scaling(32.0).factors(64, 500_000.0);
        assert_eq!(factors.first(), Some(&1.0));
        assert_eq!(factors.last(), Some(&32.0));
        assert!(factors.windows(2).all(|pair| pair[0] <= pair[1]));
        let between = |factor: &&f64| **factor > 1.0 && **factor < 32.0;
        assert!(factors.iter().filter(between).count() > 0);
    }
}
