//! Counter-based noise: the only source of the methods' random numbers.
//!
//! Value `k` of a stream depends only on `(seed, site, step, purpose, k)`. Two ChaCha8 words at position `2k` give it
//! by the Box-Muller transform, with the logarithm and the cosine of `libm`, so it is the same on every machine, at any
//! thread count and in any order of evaluation. No value is ever rejected, so none shifts another.

use std::f64::consts::TAU;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

/// Values a parallel task generates at a time.
const CHUNK: usize = 4096;

/// What a stream of numbers is for; streams of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Entries of the Gaussian perturbation.
    Gaussian = 1,
    /// Degrees of freedom of the Wishart diagonal.
    Wishart = 2,
    /// Logits of the mixture weights.
    Mixture = 3,
    /// Initial value of A.
    InitialA = 4,
    /// Initial values of the variational parameters.
    InitialVariational = 5,
    /// Dropout on the adapter's input.
    Dropout = 6,
}

/// The key of the random numbers of one module at one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    seed: u64,
    site: u64,
    step: u64,
}

impl Key {
    /// The key of module `site` at optimiser step (or posterior draw) `step` under `seed`.
    pub fn new(seed: u64, site: &str, step: u64) -> Self {
        Self {
            seed,
            site: fnv1a(site.as_bytes()),
            step,
        }
    }

    fn stream(&self, purpose: Purpose) -> ChaCha8Rng {
        let mut bytes = [0u8; 32];
        for (slot, word) in
            bytes
                .chunks_exact_mut(8)
                .zip([self.seed, self.site, self.step, 0x4d43_4c52])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let mut rng = ChaCha8Rng::from_seed(bytes);
        rng.set_stream(purpose as u64);
        rng
    }

    /// Returns `count` values uniform in `[0, 1)`, two words per value.
    pub fn uniforms(&self, purpose: Purpose, count: usize) -> Vec<f64> {
        let mut rng = self.stream(purpose);
        (0..count)
            .map(|_| (rng.next_u64() >> 11) as f64 * (0.5f64).powi(53))
            .collect()
    }

    /// Values `first..first + count` of the uniform stream, in single precision (24 bits).
    pub fn uniforms_f32_from(&self, purpose: Purpose, first: usize, count: usize) -> Vec<f32> {
        let mut rng = self.stream(purpose);
        rng.set_word_pos(first as u128);
        (0..count)
            .map(|_| (rng.next_u32() >> 8) as f32 * (0.5f32).powi(24))
            .collect()
    }
}

/// Values that are compared together.
const BATCH: usize = 256;

impl Key {
    /// Writes 1 where a value of the uniform stream, in single precision, is at least `bound`, and 0 elsewhere, for values
    /// `0..out.len()`. They are those of [`Self::uniforms_f32_from`], generated in parallel chunks.
    pub fn uniforms_at_least(&self, purpose: Purpose, bound: f64, out: &mut [u8]) {
        // A value is a whole number of 24 bits times 2^-24. It is below the bound where this number is below the bound
        // times 2^24, which is exact, and so below the next whole number.
        let least = (bound * f64::from(1u32 << 24)).ceil() as u32;
        out.par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(chunk_idx, chunk)| {
                let mut rng = self.stream(purpose);
                rng.set_word_pos((chunk_idx * CHUNK) as u128);
                let mut bytes = [0u8; 4 * BATCH];
                for out in chunk.chunks_mut(BATCH) {
                    let bytes = &mut bytes[..4 * out.len()];
                    rng.fill_bytes(bytes);
                    let words = bytes.as_chunks::<4>().0;
                    for (out, word) in out.iter_mut().zip(words) {
                        *out = u8::from(u32::from_le_bytes(*word) >> 8 >= least);
                    }
                }
            });
    }
}

/// The source of the standard normal noise of one module at one step: its [`Key`], or a recording.
pub trait Noise {
    /// `count` standard normal values, values `0..count` of the stream for `purpose`.
    fn normals(&self, purpose: Purpose, count: usize) -> Vec<f64>;

    /// As [`Self::normals`], in single precision.
    fn normals_f32(&self, purpose: Purpose, count: usize) -> Vec<f32>;
}

impl Noise for Key {
    fn normals(&self, purpose: Purpose, count: usize) -> Vec<f64> {
        let mut rng = self.stream(purpose);
        (0..count).map(|_| normal(&mut rng)).collect()
    }

    /// Generated in parallel chunks.
    fn normals_f32(&self, purpose: Purpose, count: usize) -> Vec<f32> {
        let mut values = vec![0f32; count];
        values
            .par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(chunk_idx, chunk)| {
                let mut rng = self.stream(purpose);
                rng.set_word_pos((chunk_idx * CHUNK) as u128 * 2);
                for value in chunk {
                    *value = normal(&mut rng) as f32;
                }
            });
        values
    }
}

/// Box-Muller from two 32-bit words: `sqrt(-2 ln u) cos(2 pi v)`, u in (0, 1], v in [0, 1).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let scale = (0.5f64).powi(32);
    let u = (f64::from(rng.next_u32()) + 1.0) * scale;
    let v = f64::from(rng.next_u32()) * scale;
    (-2.0 * libm::log(u)).sqrt() * libm::cos(TAU * v)
}

/// The 64-bit FNV-1a hash, so that a module's stream depends on its name and not on its position in a list.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_do_not_depend_on_how_many_are_asked_for() {
        let key = Key::new(7, "model.layers.0.self_attn.q_proj", 3);
        let long = key.normals_f32(Purpose::Gaussian, 3 * CHUNK + 17);
        let short = key.normals_f32(Purpose::Gaussian, CHUNK + 5);
        assert_eq!(long[..short.len()], short[..]);
        let exact = key.normals(Purpose::Gaussian, 2 * CHUNK);
        for (single, double) in long.iter().zip(&exact) {
            assert_eq!(*single, *double as f32);
        }
    }

    /// Also at bounds that are values of the stream, and next to them.
    #[test]
    fn comparisons_are_those_of_the_values() {
        let key = Key::new(9, "model.layers.1.mlp.up_proj", 4);
        let values = key.uniforms_f32_from(Purpose::Dropout, 0, 2 * CHUNK + 77);
        let of_stream = [0, CHUNK + 3, 2 * CHUNK + 76].map(|at| f64::from(values[at]));
        let beside = of_stream.map(|value| value + 1e-12);
        for bound in [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0]
            .into_iter()
            .chain(of_stream)
            .chain(beside)
        {
            let mut found = vec![7u8; values.len()];
            key.uniforms_at_least(Purpose::Dropout, bound, &mut found);
            let pairs = values.iter().zip(&found);
            for (value, found) in pairs {
                assert_eq!(*found == 1, f64::from(*value) >= bound, "{value} {bound}");
            }
        }
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let base = Key::new(1, "a", 0).normals(Purpose::Gaussian, 4);
        assert_ne!(base, Key::new(2, "a", 0).normals(Purpose::Gaussian, 4));
        assert_ne!(base, Key::new(1, "b", 0).normals(Purpose::Gaussian, 4));
        assert_ne!(base, Key::new(1, "a", 1).normals(Purpose::Gaussian, 4));
        assert_ne!(base, Key::new(1, "a", 0).normals(Purpose::Mixture, 4));
    }

    /// A change of these values is a value-breaking change: the same seed would train another adapter.
    #[test]
    fn golden_values() {
        let values =
            Key::new(42, "model.layers.0.self_attn.q_proj", 0).normals(Purpose::Gaussian, 3);
        let golden = GOLDEN;
        for (value, expected) in values.iter().zip(golden) {
            assert!((value - expected).abs() < 1e-12, "{values:?}");
        }
    }
    const GOLDEN: [f64; 3] = [
        0.601_767_994_607_951,
        0.806_415_268_464_709,
        -0.641_901_073_853_261_3,
    ];

    /// Kolmogorov-Smirnov against the normal distribution at the 0.1 % level, one fixed seed: a correct generator fails one
    /// seed in a thousand, and this seed was not chosen.
    #[test]
    fn normals_are_normal() {
        use statrs::distribution::{ContinuousCDF, Normal};
        let n = 40_000;
        let mut values = Key::new(0, "ks", 0).normals(Purpose::Gaussian, n);
        values.sort_by(f64::total_cmp);
        let normal = Normal::standard();
        let distance = values
            .iter()
            .enumerate()
            .map(|(i, v)| {
                let cdf = normal.cdf(*v);
                (cdf - i as f64 / n as f64).max((i + 1) as f64 / n as f64 - cdf)
            })
            .fold(0.0, f64::max);
        assert!(distance < 1.95 / (n as f64).sqrt(), "{distance}");
    }
}
