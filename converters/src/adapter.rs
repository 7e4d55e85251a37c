//! An adapter: its configuration and, for every site, the factors and the posterior.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::formats::peft::config_read;
use crate::formats::peft::read as peft_read;
use crate::formats::{gguf_lora, mlx};
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;
use crate::{json, low_rank};

/// What an adapter was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// A PEFT directory with the whole MonteCLoRA posterior.
    PeftMonteclora,
    /// A PEFT directory with a plain LoRA.
    PeftLora,
    /// An mlx-lm adapter directory.
    Mlx,
    /// A GGUF LoRA of llama.cpp.
    GgufLora,
}

impl Format {
    /// The name used in reports, such as `peft-monteclora`.
    pub fn name(self) -> &'static str {
        match self {
            Self::PeftMonteclora => "peft-monteclora",
            Self::PeftLora => "peft-lora",
            Self::Mlx => "mlx",
            Self::GgufLora => "gguf-lora",
        }
    }
}

/// The variational parameters of one site beyond the mean.
#[derive(Debug, Clone, PartialEq)]
pub struct SitePosterior {
    /// Logarithm of the standard deviation of each rank's noise, `[r]`; PEFT's `std_prior`.
    pub log_std: Tensor,
    /// Logarithm of the Dirichlet concentration of each mixture weight, `[N]`; PEFT's `expert_weights_prior`.
    pub log_concentration: Tensor,
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
    /// What it was read from.
    pub format: Format,
    /// Free-form metadata of the weight file.
    pub metadata: BTreeMap<String, String>,
}

/// The directory that a path given by a user means: itself, or that of the file in it.
pub(crate) fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if path.is_file() => parent,
        _ => path,
    }
}

impl Adapter {
    /// Reads an adapter directory, PEFT's or mlx-lm's, or one of the two files in it. A GGUF LoRA needs the base's
    /// configuration too: see [`Self::read_for`].
    ///
    /// # Errors
    /// `not-found` if there is none; a refusal with everything that is not understood.
    ///
    /// ```
    /// use monteclora_converters::{Adapter, Format};
    /// # use monteclora_converters::{Tensor, write_safetensors};
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # std::fs::write(
    /// #     dir.path().join("adapter_config.json"),
    /// #     r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}"#,
    /// # ).expect("writable");
    /// # let site = "base_model.model.model.layers.0.self_attn.q_proj";
    /// # write_safetensors(dir.path().join("adapter_model.safetensors"), [
    /// #     (format!("{site}.lora_A.weight"), Tensor::from_f32(&[1, 2], vec![1.0, 2.0])?),
    /// #     (format!("{site}.lora_B.weight"), Tensor::from_f32(&[2, 1], vec![0.5, 0.0])?),
    /// # ], &Default::default())?;
    /// let adapter = Adapter::read(dir.path())?;
    /// assert_eq!(adapter.format, Format::PeftLora);
    /// let site = &adapter.sites[0];
    /// assert_eq!(site.name, "model.layers.0.self_attn.q_proj");
    /// assert_eq!(site.scaling, 2.0);
    /// assert_eq!(site.delta_f32()?, [1.0, 2.0, 0.0, 0.0]); // 2 * B A
    /// # Ok::<(), monteclora_converters::Error>(())
    /// ```
    pub fn read(path: &Path) -> Result<Self> {
        if gguf_lora::is_gguf(path) {
            return Err(Error::malformed(
                path,
                "a GGUF LoRA can only be used with the base model's configuration (the order of the rows of q and k \
                 depends on it); convert it to a directory first, with the base at hand",
            ));
        }
        let dir = dir_of(path);
        let config = dir.join(peft_read::CONFIG_FILE);
        if config.is_file() && mlx::is_mlx(&json::read_object(&config)?) {
            return Self::read_mlx(dir);
        }
        Self::read_dir(dir)
    }

    /// Reads an adapter of any format, a GGUF LoRA included, that was made for the base with this `config.json`.
    ///
    /// # Errors
    /// As [`Self::read`] and [`Self::read_gguf`].
    pub fn read_for(path: &Path, base_config: &Map<String, Value>) -> Result<Self> {
        if gguf_lora::is_gguf(path) {
            Self::read_gguf(path, base_config)
        } else {
            Self::read(path)
        }
    }

    /// Reads a PEFT directory: `adapter_config.json` and `adapter_model.safetensors` (or its shards).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_dir(dir: &Path) -> Result<Self> {
        peft_read::read_dir(dir, true)
    }

    /// Reads only the posterior mean of a PEFT directory, as plain LoRA: `monteclora_config` and the sampler's tensors
    /// are left unread even if they are incomplete.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_dir_as_lora(dir: &Path) -> Result<Self> {
        peft_read::read_dir(dir, false)
    }

    /// The posterior mean as a plain LoRA. No number changes: the sampler and `monteclora_config` are dropped.
    #[must_use]
    pub fn collapse(&self) -> Self {
        let mut mean = self.clone();
        mean.config.monteclora = None;
        mean.format = Format::PeftLora;
        for site in &mut mean.sites {
            site.posterior = None;
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
            for tensor in [&mut site.lora_a, &mut site.lora_b] {
                *tensor = tensor.to_dtype(dtype)?;
                if let Some(at) = tensor.first_non_finite() {
                    return Err(Error::tensor(
                        &site.name,
                        format!("element {at} does not fit {dtype}; choose F32"),
                    ));
                }
            }
        }
        Ok(converted)
    }

    /// Whether the configuration comes from the authors' own code (LCS2-IIITD/MonteCLoRA). It saves A and B only, so such
    /// an adapter is its mean: no posterior is stored, and its `sample_scaler`, applied twice there, has no meaning here.
    pub fn is_authors_dialect(&self) -> bool {
        let other = &self.config.other;
        let is_off = other.get("use_monteclora") == Some(&Value::Bool(false));
        !is_off
            && config_read::AUTHORS
                .iter()
                .any(|key| other.contains_key(*key))
    }

    /// Whether the adapter changes any weight: false if B A = 0 at every site.
    ///
    /// # Errors
    /// If a factor is not of a float type.
    pub fn has_effect(&self) -> Result<bool> {
        for site in &self.sites {
            if site.delta_norm()? > 0.0 {
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
        field(
            settings
                .map(|settings| format!("{settings:?}"))
                .unwrap_or_default()
                .as_bytes(),
        );
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
        }
        digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn updates_of_the_fixtures_are_reproduced() {
        for case in fixtures::cases() {
            if case.must_refuse {
                continue;
            }
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
