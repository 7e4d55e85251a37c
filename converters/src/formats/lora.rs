//! The posterior mean as a plain LoRA: a PEFT directory in a form that mistral.rs, vLLM and PEFT all read in the same
//! way.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::peft::Peft;
use super::{About, Format, ReadOptions, Written};
use crate::adapter::{Adapter, Site};
use crate::beside::Carried;
use crate::config::{AdapterConfig, TargetModules};
use crate::error::{Error, Result};
use crate::formats::peft::read::read_source;
use crate::formats::peft::write;
use crate::source::Source;
use crate::targets::{OUTPUT_HEAD, ends_in};
use crate::tensors::derived::holds_scaled;
use crate::tensors::dtype::DType;
use crate::validate::runtime::Runtime;

/// A PEFT directory with one rank, one alpha and a list of modules.
#[derive(Debug)]
pub(crate) struct Lora;

impl Format for Lora {
    fn about(&self) -> &'static About {
        &About {
            name: "lora",
            aliases: &[],
            label: "plain LoRA",
            reads: None,
            writes: Some(
                "Plain LoRA that mistral.rs, vLLM and PEFT all accept: the posterior mean",
            ),
            file_name: None,
            needs_base: false,
            keeps_posterior: false,
            has_peft_settings: true,
            runtimes: &Runtime::OF_PEFT,
        }
    }

    /// Always false: `Peft` recognises the directory, and only its contents tell whether it is plain LoRA.
    fn sniff(&self, _path: &Path) -> bool {
        false
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        Peft.files(path)
    }

    /// Reads only the mean. Settings and tensors of a posterior are not read, even if they are incomplete.
    fn read(&self, path: &Path, options: &ReadOptions<'_>) -> Result<Adapter> {
        read_source(&Source::of(path)?, options, false)
    }

    fn write(
        &self,
        adapter: &Adapter,
        path: &Path,
        options: &LoraOptions,
        _base_config: Option<&Map<String, Value>>,
    ) -> Result<Written> {
        Ok(Written {
            what: "plain LoRA",
            report: adapter.write_lora(path, options)?,
            note: None,
        })
    }
}

/// Options for writing a plain LoRA.
#[derive(Debug, Clone, Default)]
pub struct LoraOptions {
    /// Element type of A and B; `None` keeps each tensor's own (F64 becomes F32).
    pub dtype: Option<DType>,
    /// Whether the two files may be replaced in a directory that is not empty.
    pub overwrite: bool,
    /// Files of the source's directory that are copied to a new directory with the adapter.
    pub carried: Carried,
}

/// How a written plain LoRA differs from its source.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct LoraReport {
    /// Rank of every module as written.
    pub r: usize,
    /// Alpha as written; the scaling is `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Modules whose scaling differed and was multiplied into B.
    pub baked: Vec<String>,
    /// Modules of lower rank that were padded with zeros.
    pub padded: Vec<String>,
    /// Modules whose element type changed.
    pub converted: Vec<String>,
    /// Whether a posterior was left out.
    pub dropped_posterior: bool,
    /// Settings that are no longer written because their effect is in the rank, in alpha, in B and in the list of
    /// modules.
    pub resolved_keys: Vec<&'static str>,
    /// Configuration keys and metadata without effect that were left out.
    pub dropped_keys: Vec<String>,
}

impl Adapter {
    /// Returns the posterior mean with one rank, one alpha and a list of targets.
    ///
    /// The rank is the largest; modules of lower rank get zero rows in A and zero columns in B, which does not change
    /// the update. Alpha is that of the scaling that most modules have, if this alpha is whole. If a module's scaling
    /// differs, the ratio is multiplied into B and rounded once; B then becomes F32 unless `dtype` is given or its own
    /// type holds the result. Everything else keeps its bytes.
    ///
    /// # Errors
    /// Returns an error if a factor has no float type or overflows in the new type.
    pub fn to_lora(&self, dtype: Option<DType>) -> Result<(Self, LoraReport)> {
        for site in &self.sites {
            site.require_low_rank()?;
        }
        let rank = self
            .sites
            .iter()
            .map(|site| site.rank)
            .max()
            .unwrap_or(self.config.r);
        let alpha = uniform_alpha(&self.sites, rank);
        let mut report = LoraReport {
            r: rank,
            lora_alpha: alpha,
            dropped_posterior: self.config.monteclora.is_some(),
            resolved_keys: self.config.resolved_keys(),
            dropped_keys: self.config.other.keys().cloned().collect(),
            ..LoraReport::default()
        };
        let names: Vec<&str> = self.sites.iter().map(|site| site.name.as_str()).collect();
        let without_effect = self.config.tables_without_effect(&names)?;
        report
            .resolved_keys
            .retain(|key| !without_effect.contains(key));
        let mut plain = self.collapse();
        plain.notes.clear();
        for site in &mut plain.sites {
            rewrite(site, rank, alpha, dtype, &mut report)?;
        }
        plain.config = AdapterConfig {
            r: rank,
            lora_alpha: alpha,
            target_modules: TargetModules::List(self.exported_targets()),
            inference_mode: true,
            base_model_name_or_path: plain.config.base_model_name_or_path,
            revision: plain.config.revision,
            lora_dropout: plain.config.lora_dropout,
            task_type: plain.config.task_type,
            ..AdapterConfig::default()
        };
        Ok((plain, report))
    }

    /// Writes [`Self::to_lora`] as a PEFT directory. The bytes depend on the adapter alone.
    ///
    /// # Errors
    /// As [`Self::to_lora`] and [`Self::write_peft`].
    pub fn write_lora(&self, dir: &Path, options: &LoraOptions) -> Result<LoraReport> {
        let (plain, report) = self.to_lora(options.dtype)?;
        write::write_dir(dir, options, &config_json(&plain.config), &plain)?;
        Ok(report)
    }

    /// Returns leaf names if no module without tensors here can match one of them, and full paths otherwise.
    ///
    /// Runtimes require tensors for every module that an entry matches, and the base model is not available here. Leaf
    /// names are safe only if the source names modules without restricting them, and every layer with tensors has every
    /// leaf.
    fn exported_targets(&self) -> Vec<String> {
        let full = || self.sites.iter().map(|site| site.name.clone()).collect();
        let config = &self.config;
        if config.layers_to_transform.is_some() || config.exclude_modules.is_some() {
            return full();
        }
        let leaf = |site: &Site| site.name.rsplit('.').next().unwrap_or_default().to_owned();
        let leaves: BTreeSet<String> = self.sites.iter().map(leaf).collect();
        let names_every_leaf = match &config.target_modules {
            TargetModules::AllLinear => !leaves.contains(OUTPUT_HEAD),
            TargetModules::List(names) => leaves.iter().all(|leaf| names.contains(leaf)),
            TargetModules::Regex(_) => false,
        };
        if names_every_leaf && self.has_every_leaf_in_every_layer(&leaves) {
            leaves.into_iter().collect()
        } else {
            full()
        }
    }

    /// Whether the modules, except those outside numbered layers, are all layers from 0 times all leaves.
    fn has_every_leaf_in_every_layer(&self, leaves: &BTreeSet<String>) -> bool {
        let layer = |site: &Site| site.name.split('.').find_map(|part| part.parse().ok());
        let layers: BTreeSet<usize> = self.sites.iter().filter_map(layer).collect();
        let is_contiguous = layers.iter().enumerate().all(|(idx, layer)| idx == *layer);
        is_contiguous
            && leaves.iter().all(|leaf| {
                let numbered = self.sites.iter().filter(|site| ends_in(&site.name, leaf));
                let seen: BTreeSet<Option<usize>> = numbered.map(layer).collect();
                seen == BTreeSet::from([None]) || seen.len() == layers.len()
            })
    }
}

impl AdapterConfig {
    /// Keys in use that the exported form does not need.
    pub(crate) fn resolved_keys(&self) -> Vec<&'static str> {
        let is_list = matches!(self.target_modules, TargetModules::List(_));
        let in_use = [
            ("use_rslora", self.use_rslora),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("target_modules", !is_list),
            ("exclude_modules", self.exclude_modules.is_some()),
            ("layers_to_transform", self.layers_to_transform.is_some()),
            ("layers_pattern", self.layers_pattern.is_some()),
        ];
        let used = in_use.into_iter().filter(|(_, is_used)| *is_used);
        used.map(|(key, _)| key).collect()
    }

    /// Returns those of `keys` that are descriptive and set.
    pub(crate) fn described(&self, keys: &[&str]) -> Vec<String> {
        let set = [
            (
                "base_model_name_or_path",
                self.base_model_name_or_path.is_some(),
            ),
            ("revision", self.revision.is_some()),
            ("task_type", self.task_type.is_some()),
            ("lora_dropout", self.lora_dropout > 0.0),
        ];
        set.into_iter()
            .filter(|(key, is_set)| *is_set && keys.contains(key))
            .map(|(key, _)| key.to_owned())
            .collect()
    }
}

/// Returns the whole alpha at rank `rank` that keeps the scaling of the most modules, or else the one that makes the
/// scaling 1.
fn uniform_alpha(sites: &[Site], rank: usize) -> f64 {
    let rank = rank as f64;
    let mut best: Option<(usize, f64)> = None;
    for site in sites {
        let alpha = site.scaling * rank;
        let is_usable = alpha > 0.0 && alpha.fract() == 0.0 && alpha / rank == site.scaling;
        if !is_usable {
            continue;
        }
        let alike = sites.iter().filter(|other| other.scaling == site.scaling);
        let n_sites = alike.count();
        if best.is_none_or(|(n, other)| (n_sites, alpha) > (n, other)) {
            best = Some((n_sites, alpha));
        }
    }
    best.map_or(rank, |(_, alpha)| alpha)
}

/// Brings one module to the uniform rank, alpha and element type.
fn rewrite(
    site: &mut Site,
    rank: usize,
    alpha: f64,
    dtype: Option<DType>,
    report: &mut LoraReport,
) -> Result<()> {
    let scaling = alpha / rank as f64;
    let types = [site.lora_a.dtype(), site.lora_b.dtype()];
    if site.scaling != scaling {
        let factor = (site.scaling / scaling) as f32;
        let stored = types[1];
        let target = match dtype {
            Some(dtype) => dtype,
            None if stored != DType::F64 && holds_scaled(&site.lora_b, factor, stored) => stored,
            None => DType::F32,
        };
        site.lora_b = site.lora_b.scaled(factor, target)?;
        report.baked.push(site.name.clone());
    }
    if site.rank < rank {
        site.lora_a = site.lora_a.padded(rank, site.in_features())?;
        site.lora_b = site.lora_b.padded(site.out_features(), rank)?;
        report.padded.push(site.name.clone());
    }
    for tensor in [&mut site.lora_a, &mut site.lora_b] {
        let target = match (dtype, tensor.dtype()) {
            (Some(dtype), _) => dtype,
            (None, DType::F64) => DType::F32,
            (None, kept) => kept,
        };
        *tensor = tensor.to_dtype(target)?;
        // Values that come from a file and are not computed anew are already checked.
        if !tensor.is_mapped()
            && let Some(at) = tensor.first_non_finite()
        {
            let message = format!("element {at} does not fit {target}; export as F32");
            return Err(Error::tensor(&site.name, message));
        }
    }
    if types != [site.lora_a.dtype(), site.lora_b.dtype()] {
        report.converted.push(site.name.clone());
    }
    site.rank = rank;
    site.alpha = alpha;
    site.scaling = scaling;
    Ok(())
}

/// The keys that every consumer knows; PEFT versions without MonteCLoRA read them without a warning.
const KNOWN_EVERYWHERE: &str = "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode \
     init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern \
     revision target_modules task_type use_dora use_rslora";

fn config_json(config: &AdapterConfig) -> Value {
    let mut value = config.to_json();
    if let Some(keys) = value.as_object_mut() {
        keys.retain(|key, _| KNOWN_EVERYWHERE.split(' ').any(|known| known == key));
    }
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixtures;
    use crate::tensors::tensor::Tensor;

    fn worst_difference(left: &Adapter, right: &Adapter) -> f32 {
        let mut worst = 0f32;
        assert_eq!(left.sites.len(), right.sites.len());
        for (left, right) in left.sites.iter().zip(&right.sites) {
            assert_eq!(left.name, right.name);
            let (x, y) = (
                left.delta_f32().expect("float"),
                right.delta_f32().expect("float"),
            );
            let scale = x
                .iter()
                .fold(1e-3f32, |scale, value| scale.max(value.abs()));
            for (x, y) in x.iter().zip(&y) {
                worst = worst.max((x - y).abs() / scale);
            }
        }
        worst
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_update_is_kept_and_a_is_not_touched(seed in any::<u64>(), monteclora in any::<bool>()) {
            let dir = tempfile::tempdir().expect("temporary directory");
            let adapter = fixtures::small_adapter(seed, monteclora);
            let out = dir.path().join("out");
            let report = adapter.write_lora(&out, &LoraOptions::default()).expect("written");
            let read = Adapter::read_dir(&out).expect("our own output");
            // One rounding of B to f32 where a scale is baked in, and another order of the products.
            prop_assert!(worst_difference(&adapter, &read) <= 1e-6);
            prop_assert_eq!(read.format, "peft-lora");
            prop_assert_eq!(report.resolved_keys.contains(&"use_rslora"), adapter.config.use_rslora);
            for (before, after) in adapter.sites.iter().zip(&read.sites) {
                prop_assert_eq!((after.rank, after.alpha), (report.r, report.lora_alpha));
                prop_assert!(after.lora_a.bytes().starts_with(&before.lora_a.bytes()));
                if !report.baked.contains(&before.name) && !report.padded.contains(&before.name) {
                    prop_assert_eq!(&before.lora_b, &after.lora_b);
                    prop_assert_eq!(&before.lora_a, &after.lora_a);
                }
            }
            // Exporting an export changes nothing.
            let again = dir.path().join("again");
            read.write_lora(&again, &LoraOptions::default()).expect("written");
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                let bytes = |dir: &Path| std::fs::read(dir.join(file)).expect("readable");
                prop_assert_eq!(bytes(&out), bytes(&again));
            }
        }
    }

    #[test]
    fn fixtures_keep_their_updates() {
        for case in &fixtures::low_rank() {
            let dir = tempfile::tempdir().expect("temporary directory");
            let adapter = Adapter::read_dir(&case.dir)
                .expect("a good adapter")
                .collapse();
            let out = dir.path().join("out");
            adapter
                .write_lora(&out, &LoraOptions::default())
                .expect("written");
            let read = Adapter::read_dir(&out).expect("our own output");
            fixtures::assert_deltas(case, &read);
            let mut files: Vec<_> = std::fs::read_dir(&out)
                .expect("readable")
                .map(|entry| entry.expect("readable").file_name())
                .collect();
            files.sort();
            assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
        }
    }

    #[test]
    fn partial_layers_are_named_in_full_and_whole_ones_by_leaf() {
        let mut adapter = fixtures::small_adapter(5, false);
        assert_eq!(adapter.exported_targets(), ["k_proj", "q_proj"]);
        adapter.config.layers_to_transform = Some(vec![0, 1]);
        assert_eq!(adapter.exported_targets().len(), 4);
        adapter.config.layers_to_transform = None;
        adapter.sites.remove(0);
        assert_eq!(adapter.exported_targets().len(), 3);
    }

    #[test]
    fn whole_alphas_are_kept_and_broken_ones_baked() {
        let mut adapter = fixtures::small_adapter(6, false);
        for site in &mut adapter.sites {
            site.scaling = 4.0;
        }
        let rank = adapter
            .sites
            .iter()
            .map(|site| site.rank)
            .max()
            .expect("sites");
        let (_, report) = adapter.to_lora(None).expect("float");
        let expected = 4.0 * rank as f64;
        assert_eq!((report.lora_alpha, report.baked.len()), (expected, 0));
        adapter.sites[0].scaling = 0.3;
        let (plain, report) = adapter.to_lora(None).expect("float");
        assert_eq!(report.baked, [adapter.sites[0].name.clone()]);
        assert_eq!(plain.sites[0].lora_b.dtype(), DType::F32);
    }

    #[test]
    fn narrowing_that_overflows_is_an_error() {
        let mut adapter = fixtures::small_adapter(7, false);
        let site = &mut adapter.sites[0];
        let values = vec![1e6; site.lora_a.n_elements()];
        site.lora_a = Tensor::from_f32(site.lora_a.shape(), values).expect("sized");
        assert!(adapter.to_lora(Some(DType::F16)).is_err());
        assert!(adapter.to_lora(Some(DType::BF16)).is_ok());
    }
}
