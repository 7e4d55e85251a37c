//! Writes a PEFT directory, with the whole posterior if there is one.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value};

use crate::adapter::{Adapter, Site};
use crate::beyond::Beyond;
use crate::config::PeftType;
use crate::error::{Error, Result};
use crate::files;
use crate::formats::lora::LoraOptions;
use crate::formats::peft::config_write;
use crate::formats::peft::names::{Role, SAMPLER_FIELDS};
use crate::formats::peft::read::{CONFIG_FILE, PREFIX, WEIGHTS_FILE};
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_write::write_tensors;
use crate::tensors::shards::shard_number;
use crate::tensors::tensor::Tensor;

impl Adapter {
    /// Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT does, with MonteCLoRA's sampler if there is
    /// a posterior. PEFT's two buffers of sampler state are not parameters; the identity and 1/N are written for them,
    /// so that equal posteriors give equal files. F64 becomes F32.
    ///
    /// A new directory appears at once, complete. With `overwrite`, the two files are replaced in an existing
    /// directory, shards of the weights are removed, and all other files stay. An interruption may leave the directory
    /// without `adapter_config.json`, but never with a mixture of both adapters.
    ///
    /// # Errors
    /// Returns `exists` if `dir` is not empty and `overwrite` is false.
    pub fn write_peft(&self, dir: &Path, overwrite: bool) -> Result<()> {
        let options = LoraOptions {
            overwrite,
            ..LoraOptions::default()
        };
        write_dir(dir, &options, &self.peft_json(), self)
    }
}

impl Adapter {
    /// `adapter_config.json`, with AdaLoRA's `rank_pattern`, which says which singular values are kept.
    pub(crate) fn peft_json(&self) -> Value {
        let mut keys = self.config.to_json();
        if self.config.peft_type == PeftType::AdaLora {
            let sites = self.sites.iter();
            let kept = sites.filter_map(|site| Some((&site.name, &site.triplets.as_ref()?.kept)));
            let kept: Vec<_> = kept.collect();
            let flags = |(name, kept): (&String, &Vec<bool>)| {
                (format!("{name}.lora_E"), Value::from(kept.clone()))
            };
            keys["rank_pattern"] = match kept.iter().any(|(_, kept)| kept.contains(&false)) {
                true => kept.into_iter().map(flags).collect::<Map<_, _>>().into(),
                false => Value::Null,
            };
        }
        keys
    }

    /// Returns the adapter as it is written to files: F64 becomes F32.
    ///
    /// # Errors
    /// As [`Tensor::to_dtype`].
    pub fn exportable(&self) -> Result<Self> {
        let mut exported = self.clone();
        for site in &mut exported.sites {
            let posterior = site.posterior.iter_mut();
            let posterior = posterior.flat_map(|p| [&mut p.log_std, &mut p.log_concentration]);
            for tensor in [&mut site.lora_a, &mut site.lora_b]
                .into_iter()
                .chain(posterior)
            {
                *tensor = exportable(tensor)?;
            }
            site.beyond = site
                .beyond
                .as_ref()
                .map(|beyond| beyond.map(exportable))
                .transpose()?;
        }
        Ok(exported)
    }
}

/// Writes the two files, `config` and the tensors of `adapter`, and copies the files that `options` carries.
pub(crate) fn write_dir(
    dir: &Path,
    options: &LoraOptions,
    config: &Value,
    adapter: &Adapter,
) -> Result<()> {
    let mut metadata = adapter.metadata.clone();
    metadata.insert("format".into(), "pt".into());
    let text = config_write::to_text(config);
    let tensors = tensors(adapter)?;
    replace_files(
        dir,
        options,
        (CONFIG_FILE, &text),
        (WEIGHTS_FILE, &tensors),
        &metadata,
    )
}

/// Writes a configuration and a weight file, each `(name, content)`, and copies the carried files. A new directory
/// appears at once. In an existing directory, the configuration is removed before the weights are written, and written
/// after them.
pub(crate) fn replace_files(
    dir: &Path,
    options: &LoraOptions,
    (config_name, text): (&str, &str),
    (weights_name, tensors): (&str, &BTreeMap<String, Tensor>),
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let write_into = |dir: &Path| {
        let (weights_path, config_path) = (dir.join(weights_name), dir.join(config_name));
        let weights = files::prepare_file(&weights_path, |writer| {
            write_tensors(&weights_path, writer, tensors, metadata)
        })?;
        let config = files::prepare_file(&config_path, |writer| {
            writer
                .write_all(text.as_bytes())
                .map_err(Error::io("write", &config_path))
        })?;
        match fs::remove_file(&config_path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &config_path)(error));
            }
            _ => {}
        }
        remove_shards(dir, weights_name)?;
        options.carried.copy_into(dir)?;
        for (file, path) in [(weights, weights_path), (config, config_path)] {
            file.persist(&path)
                .map_err(|error| Error::io("write", &path)(error.error))?;
        }
        files::sync_dir(dir)
    };
    if options.overwrite && files::is_occupied(dir)? {
        write_into(dir)
    } else {
        files::write_new_dir(dir, write_into)
    }
}

/// Removes the shards of a previous adapter, which would be read instead of the single file.
fn remove_shards(dir: &Path, weights_name: &str) -> Result<()> {
    let stem = weights_name.strip_suffix(".safetensors");
    let index = format!("{weights_name}.index.json");
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        let name = entry.file_name();
        let shard = name.to_str().and_then(shard_number);
        if shard.is_some_and(|(set, _, _)| Some(set) == stem)
            || name.to_str() == Some(index.as_str())
        {
            fs::remove_file(entry.path()).map_err(Error::io("replace", &entry.path()))?;
        }
    }
    Ok(())
}

/// Returns every tensor by PEFT's name.
fn tensors(adapter: &Adapter) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for site in &adapter.sites {
        let path = format!("{PREFIX}{}", site.name);
        match &site.triplets {
            // PEFT's names have no `.weight` here.
            Some(triplets) if adapter.config.peft_type == PeftType::AdaLora => {
                tensors.insert(format!("{path}.lora_A"), exportable(&triplets.lora_a)?);
                tensors.insert(format!("{path}.lora_B"), exportable(&site.lora_b)?);
                tensors.insert(format!("{path}.lora_E"), exportable(&triplets.lora_e)?);
            }
            _ => {
                tensors.insert(format!("{path}.lora_A.weight"), exportable(&site.lora_a)?);
                tensors.insert(format!("{path}.lora_B.weight"), exportable(&site.lora_b)?);
            }
        }
        for (field, tensor) in site.beyond.iter().flat_map(Beyond::tensors) {
            let tensor = match tensor.dtype().is_float() {
                true => exportable(tensor)?,
                false => tensor.clone(),
            };
            tensors.insert(format!("{path}.{field}"), tensor);
        }
        for (field, tensor) in sampler(site)? {
            tensors.insert(format!("{path}.lora_monteclora_sampler.{field}"), tensor);
        }
    }
    Ok(tensors)
}

/// Converts F64 to F32, because no consumer of adapters accepts F64.
fn exportable(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F64 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

/// Returns the sampler's four tensors, or none for a plain LoRA.
fn sampler(site: &Site) -> Result<Vec<(&'static str, Tensor)>> {
    let Some(posterior) = &site.posterior else {
        return Ok(Vec::new());
    };
    let rank = posterior.log_std.n_elements();
    let n = posterior.log_concentration.n_elements();
    let mut written = Vec::new();
    for (field, role) in SAMPLER_FIELDS {
        let tensor = match role {
            Role::LogStd => exportable(&posterior.log_std)?,
            Role::LogConcentration => exportable(&posterior.log_concentration)?,
            Role::LastCovariance => {
                let diagonal =
                    (0..rank * rank).map(|at| if at % (rank + 1) == 0 { 1.0 } else { 0.0 });
                Tensor::from_f32(&[rank, rank], diagonal.collect())?
            }
            _ => Tensor::from_f32(&[n], vec![1.0 / n as f32; n])?,
        };
        written.push((field, tensor));
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixtures;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn read_inverts_write_and_equal_posteriors_give_equal_files(seed in any::<u64>(), monteclora in any::<bool>()) {
            let dir = tempfile::tempdir().expect("temporary directory");
            let adapter = fixtures::small_adapter(seed, monteclora);
            let (first, second) = (dir.path().join("a"), dir.path().join("b"));
            adapter.write_peft(&first, false).expect("written");
            let read = Adapter::read_dir(&first).expect("our own output");
            prop_assert_eq!(&read, &adapter);
            prop_assert_eq!(read.fingerprint(), adapter.fingerprint());
            read.write_peft(&second, false).expect("written");
            for file in [CONFIG_FILE, WEIGHTS_FILE] {
                let bytes = |dir: &Path| fs::read(dir.join(file)).expect("readable");
                prop_assert_eq!(bytes(&first), bytes(&second));
            }
        }
    }

    #[test]
    fn fixtures_survive_a_round_trip() {
        for case in &fixtures::usable() {
            let dir = tempfile::tempdir().expect("temporary directory");
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            let out = dir.path().join("out");
            adapter.write_peft(&out, false).expect("written");
            assert_eq!(
                Adapter::read_dir(&out).expect("our own output"),
                adapter,
                "{}",
                case.name
            );
        }
    }

    #[test]
    fn other_files_survive_overwriting_and_are_protected_without_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("run.json"), "{}").expect("writable");
        let adapter = fixtures::small_adapter(3, true);
        assert!(
            adapter
                .write_peft(dir.path(), false)
                .is_err_and(|error| error.code() == "exists")
        );
        adapter.write_peft(dir.path(), true).expect("written");
        // Shards would be read before the one file.
        let shard = "adapter_model-00001-of-00001.safetensors";
        fs::copy(dir.path().join(WEIGHTS_FILE), dir.path().join(shard)).expect("copied");
        let index = format!("{WEIGHTS_FILE}.index.json");
        fs::write(dir.path().join(index), "{\"weight_map\": {}}").expect("writable");
        // The files being replaced may be the ones the tensors are mapped from.
        adapter.write_peft(dir.path(), true).expect("written");
        let read = Adapter::read_dir(dir.path()).expect("our own output");
        read.write_peft(dir.path(), true).expect("written");
        assert_eq!(
            Adapter::read_dir(dir.path()).expect("our own output"),
            adapter
        );
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .expect("readable")
            .map(|entry| {
                entry
                    .expect("readable")
                    .file_name()
                    .into_string()
                    .expect("utf-8")
            })
            .collect();
        names.sort();
        assert_eq!(names, [CONFIG_FILE, WEIGHTS_FILE, "run.json"]);
    }

    #[test]
    fn f64_is_written_as_f32() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut adapter = fixtures::small_adapter(4, false);
        for site in &mut adapter.sites {
            site.lora_a = site.lora_a.to_dtype(DType::F64).expect("float");
        }
        let out = dir.path().join("out");
        adapter.write_peft(&out, false).expect("written");
        let read = Adapter::read_dir(&out).expect("our own output");
        assert!(
            read.sites
                .iter()
                .all(|site| site.lora_a.dtype() == DType::F32)
        );
    }
}
