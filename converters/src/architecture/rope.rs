//! Rotary frequencies and how they are rescaled.

use std::borrow::Cow;
use std::f64::consts::PI;

use serde_json::{Value, json};

/// A rotary embedding: how the rotated entries of a head depend on the position.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// How the frequencies are rescaled.
    pub kind: RopeKind,
    /// The base of the frequencies.
    pub theta: f64,
    /// Number of rotated entries of a head, which are its first; even.
    pub dim: usize,
    /// `max_position_embeddings` of the model.
    pub max_position_embeddings: usize,
    /// How queries are scaled with their position, if they are.
    pub query_scaling: Option<QueryScaling>,
    /// The rescaled frequencies for a short sequence, `[dim / 2]`, radians per position; see [`Self::frequencies`].
    pub inverse_frequencies: Vec<f32>,
}

/// A rescaling of rotary frequencies, which extends the context beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    /// None.
    Default,
    /// All frequencies are divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the sequence, once it is longer than `max_position_embeddings`.
    Dynamic {
        /// The factor of the growth.
        factor: f64,
    },
    /// YaRN's.
    Yarn(YarnScaling),
    /// Each frequency is divided by its own factor; the factors differ for a sequence longer than the original length.
    LongRope(LongRopeScaling),
    /// Llama 3's.
    Llama3(Llama3Scaling),
}

/// YaRN's `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnScaling {
    /// Divisor of the frequencies with long wavelengths.
    pub factor: f64,
    /// Positions of the original training.
    pub original_max_position_embeddings: usize,
    /// Wavelengths with more turns than this in the original length are kept.
    pub beta_fast: f64,
    /// Wavelengths with fewer turns than this are divided by the whole factor.
    pub beta_slow: f64,
    /// Whether the bounds of the ramp between both are rounded to whole numbers.
    pub truncate: bool,
    /// Factor on cosines and sines, if the configuration gives it.
    pub attention_factor: Option<f64>,
    /// `mscale` and `mscale_all_dim`, from which the factor is computed otherwise.
    pub mscales: Option<(f64, f64)>,
}

/// LongRoPE's `rope_scaling`.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeScaling {
    /// Divisor of each frequency, `[dim / 2]`.
    pub short_factor: Vec<f64>,
    /// Divisor of each frequency in a sequence longer than the original length.
    pub long_factor: Vec<f64>,
    /// The factor that extends the context, if the configuration gives it; otherwise the lengths determine it.
    pub factor: Option<f64>,
    /// Positions of the original training.
    pub original_max_position_embeddings: usize,
    /// Factor on cosines and sines, if the configuration gives it.
    pub attention_factor: Option<f64>,
}

/// A factor `1 + beta ln(1 + floor(position / original))` on queries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// `llama_4_scaling_beta`.
    pub beta: f64,
    /// Positions of the original training.
    pub original_max_position_embeddings: usize,
}

impl QueryScaling {
    /// The factor at a position.
    pub fn at(&self, position: u32) -> f32 {
        let turns = (f64::from(position) / self.original_max_position_embeddings as f64).floor();
        1.0 + self.beta as f32 * (1.0 + turns as f32).ln()
    }
}

impl RopeKind {
    /// Returns the scaling in the form of `rope_scaling` of a config.json; null if there is none.
    pub fn scaling_json(&self) -> Value {
        let mut fields = match self {
            Self::Default => return Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
            Self::Yarn(scaling) => json!({
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": (!scaling.truncate).then_some(false),
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscales.map(|both| both.0),
                "mscale_all_dim": scaling.mscales.map(|both| both.1),
            }),
            Self::LongRope(scaling) => json!({
                "rope_type": "longrope",
                "short_factor": scaling.short_factor,
                "long_factor": scaling.long_factor,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "attention_factor": scaling.attention_factor,
            }),
            Self::Llama3(scaling) => json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }),
        };
        if let Some(fields) = fields.as_object_mut() {
            fields.retain(|_, value| !value.is_null());
        }
        fields
    }

    /// transformers' name of the rescaling.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Linear { .. } => "linear",
            Self::Dynamic { .. } => "dynamic",
            Self::Yarn(_) => "yarn",
            Self::LongRope(_) => "longrope",
            Self::Llama3(_) => "llama3",
        }
    }
}

impl YarnScaling {
    /// Returns the factor on cosines and sines. Without a given one, it is
    /// `m(factor, mscale) / m(factor, mscale_all_dim)` if both are given, else `m(factor, 1)`, with
    /// `m(s, w) = 1 + w ln(s) / 10` for s above 1 and otherwise 1.
    fn attention_factor(&self) -> f64 {
        let m = |weight: f64| match self.factor <= 1.0 {
            true => 1.0,
            false => 0.1 * weight * self.factor.ln() + 1.0,
        };
        let inferred = || match self.mscales {
            Some((one, all)) => m(one) / m(all),
            None => m(1.0),
        };
        self.attention_factor.unwrap_or_else(inferred)
    }

    /// Returns the frequencies `theta^(-2i / dim)`: unchanged for short wavelengths, divided by the factor for long
    /// ones, with a ramp between them.
    fn frequencies(&self, theta: f64, dim: usize) -> Vec<f32> {
        let original = self.original_max_position_embeddings as f64;
        // The position in the head whose wavelength makes so many turns in the original length.
        let place =
            |turns: f64| dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (place(self.beta_fast), place(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..dim / 2)
            .map(|i| {
                let power = power(theta, i, dim);
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let kept = 1.0 - ramp;
                1.0 / (self.factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
            })
            .collect()
    }
}

impl LongRopeScaling {
    fn attention_factor(&self, max_position_embeddings: usize) -> f64 {
        let inferred = || self.inferred_attention_factor(max_position_embeddings);
        self.attention_factor.unwrap_or_else(inferred)
    }

    /// Returns the factor on cosines and sines if the configuration gives none: `sqrt(1 + ln(factor) / ln(original))`,
    /// or 1 for a factor of at most 1.
    pub(crate) fn inferred_attention_factor(&self, max_position_embeddings: usize) -> f64 {
        let original = self.original_max_position_embeddings as f64;
        let factor = self
            .factor
            .unwrap_or(max_position_embeddings as f64 / original);
        match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / original.ln()).sqrt(),
        }
    }

    fn frequencies(&self, theta: f64, dim: usize, is_long: bool) -> Vec<f32> {
        let factors = match is_long {
            true => &self.long_factor,
            false => &self.short_factor,
        };
        let factors = factors.iter().enumerate();
        factors
            .map(|(i, factor)| 1.0 / (*factor as f32 * power(theta, i, dim)))
            .collect()
    }
}

/// Llama 3's `rope_scaling`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the frequencies with long wavelengths.
    pub factor: f64,
    /// Wavelengths above the original length divided by this are long.
    pub low_freq_factor: f64,
    /// Wavelengths below the original length divided by this are short.
    pub high_freq_factor: f64,
    /// Positions of the original training.
    pub original_max_position_embeddings: usize,
}

impl Llama3Scaling {
    /// Returns the rescaled frequency: divided by `factor` for a long wavelength, unchanged for a short one, and
    /// between them multiplied by `(1 - s) / factor + s` with `s = (original / wavelength - low) / (high - low)`, as in
    /// Llama 3.1's release.
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

    /// Returns the divisor of each of the `head_dim / 2` rotary frequencies.
    pub fn factors(&self, head_dim: usize, theta: f64) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|idx| theta.powf(-2.0 * idx as f64 / head_dim as f64))
            .map(|frequency| frequency / self.rescaled(frequency))
            .collect()
    }
}

/// `theta^(2i / dim)` in f32, as transformers computes the power.
fn power(theta: f64, i: usize, dim: usize) -> f32 {
    (theta as f32).powf((2 * i) as f32 / dim as f32)
}

impl Rope {
    /// Creates a rotation of the first `dim` entries of each head, in a model for `max_position_embeddings` positions.
    pub fn new(kind: RopeKind, theta: f64, dim: usize, max_position_embeddings: usize) -> Self {
        let mut rope = Self {
            kind,
            theta,
            dim,
            max_position_embeddings,
            query_scaling: None,
            inverse_frequencies: Vec::new(),
        };
        rope.inverse_frequencies = rope.computed(0);
        rope
    }

    /// Returns the rescaled frequencies for a sequence of `length` tokens, `[dim / 2]`, radians per position.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match self.threshold().is_some_and(|threshold| length > threshold) {
            true => Cow::Owned(self.computed(length)),
            false => Cow::Borrowed(&self.inverse_frequencies),
        }
    }

    /// The length beyond which the frequencies change, if there is one.
    pub fn threshold(&self) -> Option<usize> {
        match &self.kind {
            RopeKind::Dynamic { .. } => Some(self.max_position_embeddings),
            RopeKind::LongRope(scaling) => Some(scaling.original_max_position_embeddings),
            _ => None,
        }
    }

    /// Factor on cosines and sines.
    pub fn attention_factor(&self) -> f32 {
        match &self.kind {
            RopeKind::Yarn(scaling) => scaling.attention_factor() as f32,
            RopeKind::LongRope(scaling) => {
                scaling.attention_factor(self.max_position_embeddings) as f32
            }
            _ => 1.0,
        }
    }

    /// Returns the rescaled `theta^(-2i / dim)`, computed in the precision of transformers.
    fn computed(&self, length: usize) -> Vec<f32> {
        let (theta, dim) = (self.theta, self.dim);
        let plain = || (0..dim / 2).map(|i| 1.0 / power(theta, i, dim));
        match &self.kind {
            RopeKind::Default => plain().collect(),
            RopeKind::Linear { factor } => plain().map(|f| f / *factor as f32).collect(),
            RopeKind::Dynamic { factor } => {
                let trained = self.max_position_embeddings as f32;
                let growth = *factor as f32 * length as f32 / trained - (*factor - 1.0) as f32;
                let exponent = dim as f64 / (dim as f64 - 2.0);
                let grown = match length > self.max_position_embeddings {
                    true => theta as f32 * growth.powf(exponent as f32),
                    false => theta as f32,
                };
                let base = f64::from(grown);
                (0..dim / 2).map(|i| 1.0 / power(base, i, dim)).collect()
            }
            RopeKind::Yarn(scaling) => scaling.frequencies(theta, dim),
            RopeKind::LongRope(scaling) => {
                let is_long = length > scaling.original_max_position_embeddings;
                scaling.frequencies(theta, dim, is_long)
            }
            RopeKind::Llama3(scaling) => plain()
                .map(|f| scaling.rescaled(f64::from(f)) as f32)
                .collect(),
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
