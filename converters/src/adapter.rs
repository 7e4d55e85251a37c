//! An adapter: its configuration and, for every site, the factors and the posterior.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::beyond::{Applied, Beyond};
use crate::config::{AdapterConfig, PeftType};
use crate::error::{Error, Result};
use crate::low_rank;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// The variational parameters of one site beyond the mean.
#[derive(Debug, Clone, PartialEq)]
pub struct SitePosterior {
    /// Logarithm of the standard deviation of each rank's noise, `[r]`; PEFT's `std_prior`.
    pub log_std: Tensor,
    /// Logarithm of the Dirichlet concentration of each mixture weight, `[N]`; PEFT's `expert_weights_prior`.
    pub log_concentration: Tensor,
}

/// AdaLoRA's factors of a site, whose product `lora_a` is: `lora_a = lora_e * A` row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Triplets {
    /// Q, the rows that are kept, `[r, in]`.
    pub lora_a: Tensor,
    /// The singular values that are kept, `[r, 1]`.
    pub lora_e: Tensor,
    /// Which of the initial values are kept; PEFT's `rank_pattern`.
    pub kept: Vec<bool>,
}

impl Triplets {
    /// `lora_e * A`, in float32.
    ///
    /// # Errors
    /// Returns an error if a tensor has no float type.
    pub fn product(&self) -> Result<Tensor> {
        let (mut a, e) = (self.lora_a.to_f32()?, self.lora_e.to_f32()?);
        let n_in = self.lora_a.shape().get(1).copied().unwrap_or(1).max(1);
        for (row, e) in a.chunks_mut(n_in).zip(e) {
            row.iter_mut().for_each(|value| *value *= e);
        }
        Tensor::from_f32(self.lora_a.shape(), a)
    }
}

/// One adapted linear module: the update of its weight is `scaling * B A`.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Path of the module, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Rank r.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Factor on B A.
    pub scaling: f64,
    /// A, `[r, in]`; with a posterior, its mean.
    pub lora_a: Tensor,
    /// B, `[out, r]`.
    pub lora_b: Tensor,
    /// The posterior of A, for MonteCLoRA.
    pub posterior: Option<SitePosterior>,
    /// What changes the weight besides B A. Rank 0 if there is no B A at all.
    pub beyond: Option<Beyond>,
    /// AdaLoRA's factors, for adapters of that method.
    pub triplets: Option<Triplets>,
}

impl Site {
    /// Length of the module's input.
    pub fn in_features(&self) -> usize {
        self.lora_a.shape().get(1).copied().unwrap_or(0)
    }

    /// Length of the module's output.
    pub fn out_features(&self) -> usize {
        self.lora_b.shape().first().copied().unwrap_or(0)
    }

    /// Whether the update is `scaling * B A` and no more.
    ///
    /// # Errors
    /// Returns `merge-only` with the remedy if it is not.
    pub fn require_low_rank(&self) -> Result<()> {
        match &self.beyond {
            Some(beyond) => Err(beyond.refusal(&self.name).into()),
            None => Ok(()),
        }
    }

    /// Gives a module of rank 0 a row and a column of zeros: no plain LoRA has rank 0.
    fn pad_to_one(&mut self) {
        let (n_in, n_out) = (self.in_features(), self.out_features());
        let zeros = |shape: [usize; 2]| Tensor::from_f32(&shape, vec![0.0; shape[0] * shape[1]]);
        if let (Ok(a), Ok(b)) = (zeros([1, n_in]), zeros([n_out, 1])) {
            (self.lora_a, self.lora_b, self.rank) = (a, b, 1);
            self.alpha = self.scaling;
        }
    }

    /// The change of `weight` `[out, in]`, the base's: that of B A and of everything beyond it.
    ///
    /// # Errors
    /// Returns an error if a tensor has no float type.
    pub fn delta_on(&self, weight: &Tensor) -> Result<Vec<f32>> {
        let mut delta = self.delta_f32()?;
        let Some(beyond) = &self.beyond else {
            return Ok(delta);
        };
        let old = weight.to_f32()?;
        for (delta, old) in delta.iter_mut().zip(&old) {
            *delta += old;
        }
        let applied = Applied::of(Some(beyond), &self.name)?;
        applied.apply(0, self.in_features().max(1), &mut delta);
        for (delta, old) in delta.iter_mut().zip(&old) {
            *delta -= old;
        }
        Ok(delta)
    }

    /// The update of the weight at the posterior mean, `scaling * B A`, `[out, in]` row-major, accumulated in f32.
    ///
    /// # Errors
    /// If A or B is not of a float type.
    pub fn delta_f32(&self) -> Result<Vec<f32>> {
        let mut delta = vec![0.0; self.out_features() * self.in_features()];
        let (a, b) = (self.lora_a.to_f32()?, self.lora_b.to_f32()?);
        low_rank::product_rows(&mut delta, &b, &a, self.rank, self.scaling_f32());
        Ok(delta)
    }

    /// The elements of [`Self::delta_f32`] at `places`, without the others; 0 outside.
    pub(crate) fn delta_at(&self, places: impl Iterator<Item = usize>) -> Result<Vec<f64>> {
        let (a, b) = (self.lora_a.to_f32()?, self.lora_b.to_f32()?);
        let (n_in, rank) = (self.in_features().max(1), self.rank);
        let element = |place: usize| {
            let (row, column) = (place / n_in, place % n_in);
            let term = |k: usize| {
                let (a, b) = (a.get(k * n_in + column)?, b.get(row * rank + k)?);
                Some(f64::from(*a) * f64::from(*b))
            };
            self.scaling * (0..rank).filter_map(term).sum::<f64>()
        };
        Ok(places.map(element).collect())
    }

    pub(crate) fn scaling_f32(&self) -> f32 {
        self.scaling as f32
    }

    /// Frobenius norms of A and of B.
    ///
    /// # Errors
    /// If A or B is not of a float type.
    pub fn factor_norms(&self) -> Result<(f64, f64)> {
        let (a, b) = (self.lora_a.to_f32()?, self.lora_b.to_f32()?);
        Ok((low_rank::frobenius(&a), low_rank::frobenius(&b)))
    }

    /// Frobenius norm of the update, `|scaling| ||B A||_F`, without forming B A.
    ///
    /// # Errors
    /// If A or B is not of a float type.
    pub fn delta_norm(&self) -> Result<f64> {
        let (a, b) = (self.lora_a.to_f32()?, self.lora_b.to_f32()?);
        Ok(self.scaling.abs() * low_rank::product_norm(&b, &a, self.rank))
    }
}

/// An adapter in memory; tensors stay mapped.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Configuration.
    pub config: AdapterConfig,
    /// Adapted modules, sorted by name.
    pub sites: Vec<Site>,
    /// What it was read from: the name of the format, and what of it, such as `peft-lora`.
    pub format: &'static str,
    /// Free-form metadata of the weight file.
    pub metadata: BTreeMap<String, String>,
    /// What reading left out of the adapter or understood otherwise than it is written, a sentence each.
    pub notes: Vec<String>,
}

impl Adapter {
    /// The posterior mean as a plain LoRA. No number changes: the sampler and `monteclora_config` are dropped.
    #[must_use]
    pub fn collapse(&self) -> Self {
        let mut mean = self.clone();
        mean.config.monteclora = None;
        if mean.config.peft_type == PeftType::AdaLora {
            mean.config.peft_type = PeftType::Lora;
            mean.config.adalora = None;
            for site in mean.sites.iter_mut().filter(|site| site.rank == 0) {
                site.pad_to_one();
            }
            mean.config.describe_ranks(&mean.sites);
        }
        mean.format = mean.config.peft_format();
        for site in &mut mean.sites {
            site.posterior = None;
            site.triplets = None;
        }
        mean
    }

    /// The same adapter with A and B as `dtype`, rounded to nearest; the posterior keeps its own type.
    ///
    /// # Errors
    /// If `dtype` or a factor is not of a float type, or a value overflows in it.
    pub fn with_dtype(&self, dtype: DType) -> Result<Self> {
        let mut converted = self.clone();
        for site in &mut converted.sites {
            let name = &site.name;
            let rounded = |tensor: &Tensor| {
                let tensor = tensor.to_dtype(dtype)?;
                match tensor.first_non_finite() {
                    None => Ok(tensor),
                    Some(at) => {
                        let message = format!("element {at} does not fit {dtype}; choose F32");
                        Err(Error::tensor(name, message))
                    }
                }
            };
            for tensor in [&mut site.lora_a, &mut site.lora_b] {
                *tensor = rounded(tensor)?;
            }
            if let Some(triplets) = &mut site.triplets {
                triplets.lora_a = rounded(&triplets.lora_a)?;
                triplets.lora_e = rounded(&triplets.lora_e)?;
                site.lora_a = triplets.product()?;
            }
            site.beyond = site
                .beyond
                .as_ref()
                .map(|beyond| beyond.map(&rounded))
                .transpose()?;
        }
        Ok(converted)
    }

    /// Whether the adapter changes any weight: false if B A = 0 at every site.
    ///
    /// # Errors
    /// If a factor is not of a float type.
    pub fn has_effect(&self) -> Result<bool> {
        for site in &self.sites {
            let neutral = site.beyond.as_ref().map(Beyond::is_neutral).transpose()?;
            if site.delta_norm()? > 0.0 || neutral == Some(false) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// SHA-256, in hex, over what the adapter computes: for every site name, scaling, factors and posterior, and
    /// MonteCLoRA's settings. How the configuration words it, and the metadata, do not count.
    pub fn fingerprint(&self) -> String {
        let mut digest = Sha256::new();
        let mut field = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        let settings = self.config.monteclora.as_ref();
        let settings = settings.map(|settings| format!("{settings:?}"));
        field(settings.unwrap_or_default().as_bytes());
        for site in &self.sites {
            field(site.name.as_bytes());
            field(&site.scaling.to_bits().to_le_bytes());
            let posterior = site.posterior.as_ref();
            let posterior = posterior
                .into_iter()
                .flat_map(|p| [&p.log_std, &p.log_concentration]);
            for tensor in [&site.lora_a, &site.lora_b].into_iter().chain(posterior) {
                field(format!("{tensor:?}").as_bytes());
                field(&tensor.bytes());
            }
            for (name, tensor) in site.beyond.iter().flat_map(Beyond::tensors) {
                field(name.as_bytes());
                field(&tensor.bytes());
            }
        }
        let bytes = digest.finalize();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn updates_of_the_fixtures_are_reproduced() {
        for case in fixtures::usable() {
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            fixtures::assert_deltas(&case, &adapter);
            fixtures::assert_deltas(&case, &adapter.collapse());
            assert!(adapter.has_effect().expect("float"), "{}", case.name);
        }
    }

    #[test]
    fn the_fingerprint_sees_what_is_computed_and_nothing_else() {
        let adapter = fixtures::small_adapter(1, true);
        let print = adapter.fingerprint();
        assert_eq!(print.len(), 64);
        let mut same = adapter.clone();
        same.metadata.insert("note".into(), "x".into());
        same.config.inference_mode = !same.config.inference_mode;
        assert_eq!(same.fingerprint(), print);
        let mut other = adapter.clone();
        other.sites[0].scaling *= 2.0;
        assert_ne!(other.fingerprint(), print);
        assert_ne!(adapter.collapse().fingerprint(), print);
    }

    #[test]
    fn an_adapter_with_b_zero_has_no_effect() {
        let mut adapter = fixtures::small_adapter(2, false);
        assert!(adapter.has_effect().expect("float"));
        for site in &mut adapter.sites {
            let shape = site.lora_b.shape().to_vec();
            let zeros = vec![0.0; site.lora_b.n_elements()];
            site.lora_b = Tensor::from_f32(&shape, zeros).expect("sized");
        }
        assert!(!adapter.has_effect().expect("float"));
    }
}
