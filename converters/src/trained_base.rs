//! The base that an adapter was trained on: what training records of it, and whether another directory holds the same weights.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::adapter::Adapter;
use crate::beside::checkpoint_number;
use crate::error::{Error, Result};
use crate::model_files::ModelFiles;
use crate::problem::Problem;
use crate::tensors::tensor::Tensor;

/// Keys of config.json that say nothing about what a model computes.
const STORAGE_KEYS: [&str; 6] = [
    "_name_or_path",
    "dtype",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
];

/// Elements of each tensor that go into a fingerprint.
const FINGERPRINTED: usize = 16;

/// Matrices that a sample is taken of, at most.
const SAMPLED: usize = 32;
/// Elements of each of them.
const ELEMENTS: usize = 4;

/// Largest root mean square of the differences of two samples, relative to that of the elements, at which they are those of one model.
/// bfloat16, the coarsest element type that weights are cast to, rounds by at most 2^-8 of an element.
const SAME: f64 = 0.005;

/// Identity of a base's weights without reading all of them: SHA-256 over config.json and, for every tensor, its name, its shape and
/// some of its values as float32.
///
/// It is the same whatever files and blocks hold the values, so that a GGUF file and its float32 import have one. What says how
/// values are stored, and which program wrote them, is left out of config.json. The same weights rounded to another element type
/// have another fingerprint: see [`base_sample`].
pub fn base_fingerprint(files: &ModelFiles) -> String {
    let mut hasher = Sha256::new();
    let config: BTreeMap<_, _> = files.config().iter().collect();
    for (key, value) in config {
        if !STORAGE_KEYS.contains(&key.as_str()) {
            hasher.update(format!("{key}={value}\n"));
        }
    }
    for name in files.names() {
        let Some(tensor) = files.get(name) else {
            continue;
        };
        hasher.update(format!("{name} {:?}\n", tensor.shape()));
        for value in elements(&tensor, FINGERPRINTED) {
            hasher.update(value.to_le_bytes());
        }
    }
    format!("{:x}", hasher.finalize())
}

/// A few elements of a base's matrices, by which its weights are recognised whatever their element type and files; none if they are
/// not stored as floats.
pub fn base_sample(files: &ModelFiles) -> Vec<f32> {
    let chosen = sampled(files).into_iter();
    chosen
        .filter_map(|name| files.get(name))
        .flat_map(|tensor| elements(&tensor, ELEMENTS))
        .collect()
}

/// The matrices that a sample is taken of.
fn sampled(files: &ModelFiles) -> Vec<&str> {
    let is_matrix = |name: &&str| {
        let info = files.info(name);
        name.contains(".layers.") && info.is_some_and(|(_, shape)| shape.len() == 2)
    };
    let mut names: Vec<&str> = files.names().filter(is_matrix).collect();
    names.sort_unstable();
    let n = names.len().min(SAMPLED);
    (0..n).map(|idx| names[idx * names.len() / n]).collect()
}

/// Where in `tensor` so many elements are sampled, all over it.
fn places(tensor: &Tensor, number: usize) -> impl Iterator<Item = usize> + use<> {
    let n_elements = tensor.n_elements();
    (0..number).map(move |idx| (2 * idx + 1) * n_elements / (2 * number))
}

/// So many elements of `tensor`.
fn elements(tensor: &Tensor, number: usize) -> Vec<f32> {
    places(tensor, number)
        .filter_map(|place| tensor.value(place))
        .collect()
}

/// How far two samples are apart, relative to the first; none if they are not samples of models of one shape.
fn difference(expected: &[f32], found: &[f32]) -> Option<f64> {
    if expected.is_empty() || expected.len() != found.len() {
        return None;
    }
    let square = |x: f32| f64::from(x).powi(2);
    let norm: f64 = expected.iter().map(|x| square(*x)).sum();
    let apart: f64 = expected.iter().zip(found).map(|(x, y)| square(x - y)).sum();
    Some((apart / norm.max(f64::MIN_POSITIVE)).sqrt())
}

/// What training recorded beside an adapter: its run.json, what `fit` kept of that in fit.json, or for a checkpoint the run.json above
/// it; none where there is no record.
///
/// # Errors
/// A file of that name that is no record.
pub fn training_record(adapter: &Path) -> Result<Option<Value>> {
    let dir = if adapter.is_file() {
        adapter.parent().unwrap_or(adapter)
    } else {
        adapter
    };
    if let Some(record) = record_at(&dir.join("run.json"))? {
        return Ok(Some(record));
    }
    if let Some(mut fit) = record_at(&dir.join("fit.json"))? {
        let training = fit.get_mut("training").map(Value::take);
        if let Some(training) = training.filter(Value::is_object) {
            return Ok(Some(training));
        }
    }
    let name = dir.file_name().and_then(|name| name.to_str());
    let is_checkpoint = name.is_some_and(|n| checkpoint_number(n).is_some() || n == "best");
    match dir.parent().filter(|_| is_checkpoint) {
        Some(above) => record_at(&above.join("run.json")),
        None => Ok(None),
    }
}

/// A record, which is an object; none where there is no file.
fn record_at(path: &Path) -> Result<Option<Value>> {
    let refuse = |what: String| {
        let at = format!("`{}`", path.display());
        let fix = "bring the file back as training wrote it, or remove it";
        Err(Problem::new("record", at, what, fix).into())
    };
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => return refuse("not a regular file".to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(record) if record.is_object() => Ok(Some(record)),
        Ok(_) => refuse("no record of a training run: expected an object".to_owned()),
        Err(error) => refuse(format!("no record of a training run: {error}")),
    }
}

/// Warnings about `adapter`, which was read from `path`, on `base`: that the base holds the adapter already, by the record of the
/// merge or by its weights, or that the adapter was trained on another base, by its run.json. An adapter without a record, such as a
/// collapsed one, and a base without one cannot be told and pass.
///
/// Bases are compared by [`base_fingerprint`]; where that differs, the weights by [`base_sample`], which older records lack.
///
/// # Errors
/// An adapter's values cannot be read.
pub fn base_warnings(path: &Path, adapter: &Adapter, base: &ModelFiles) -> Result<Vec<Problem>> {
    let record = training_record(path)?.unwrap_or_default();
    let trained = &record["base"];
    let sample: Vec<f32> = serde_json::from_value(trained["sample"].clone()).unwrap_or_default();
    let found_sample = match sample.is_empty() {
        true => Vec::new(),
        false => base_sample(base),
    };
    if is_merged(adapter, base) || holds(adapter, &sample, &found_sample, base)? {
        return Ok(vec![Problem::new(
            "merged-base",
            base.place().display().to_string(),
            "the adapter is merged into this base already, so that it would count twice",
            "give the base without it, or leave the adapter out",
        )]);
    }
    let Some(expected) = trained["fingerprint"].as_str() else {
        return Ok(Vec::new());
    };
    let found = base_fingerprint(base);
    if found == expected {
        return Ok(Vec::new());
    }
    let what = match sample.is_empty() {
        true => {
            "another one, and the record does not say by how much its weights differ".to_owned()
        }
        false => match difference(&sample, &found_sample) {
            Some(apart) if apart <= SAME => return Ok(Vec::new()),
            Some(apart) => format!("its weights differ by about {:.1} %", apart * 100.0),
            None => "its matrices are others".to_owned(),
        },
    };
    let short = |hash: &str| hash.chars().take(12).collect::<String>();
    let revision = trained["revision"]
        .as_str()
        .map_or(String::new(), |revision| format!(" at {revision}"));
    Ok(vec![Problem::new(
        "other-base",
        base.place().display().to_string(),
        format!(
            "the adapter was trained on `{}`{revision} with fingerprint {}, this base has {}: {what}",
            trained["model_id"].as_str().unwrap_or("another base"),
            short(expected),
            short(&found)
        ),
        "give the base it was trained on, or compare both with `monteclora eval`",
    )])
}

/// Whether the record of merges into `base` has the adapter's mean.
fn is_merged(adapter: &Adapter, base: &ModelFiles) -> bool {
    let merged = merged_adapters(base.dir());
    !merged.is_empty() && merged.contains(&adapter.collapse().fingerprint())
}

/// Whether `base`, of which `found` is a sample, is the model of `sample` with the adapter's update in its weights.
fn holds(adapter: &Adapter, sample: &[f32], found: &[f32], base: &ModelFiles) -> Result<bool> {
    if sample.is_empty() || sample.len() != found.len() {
        return Ok(false);
    }
    let mut updates = Vec::with_capacity(found.len());
    for name in sampled(base) {
        let Some(tensor) = base.get(name) else {
            continue;
        };
        let module = name.strip_suffix(".weight");
        let mut sites = adapter.sites.iter();
        match sites.find(|site| Some(site.name.as_str()) == module) {
            Some(site) => updates.extend(site.delta_at(places(&tensor, ELEMENTS))?),
            None => updates.extend(places(&tensor, ELEMENTS).map(|_| 0.0)),
        }
    }
    if found.len() != updates.len() {
        return Ok(false);
    }
    let square: f64 = updates.iter().map(|update| update.powi(2)).sum();
    let difference = sample
        .iter()
        .zip(found)
        .map(|(x, y)| f64::from(*y) - f64::from(*x));
    // Where rounding is larger than the update, the update still shows in its own direction.
    let along: f64 = difference
        .zip(&updates)
        .map(|(apart, update)| apart * update)
        .sum();
    let with_update: Vec<f32> = sample
        .iter()
        .zip(&updates)
        .map(|(x, update)| x + *update as f32)
        .collect();
    let is_near = self::difference(&with_update, found).is_some_and(|apart| apart <= SAME);
    Ok(square > 0.0 && is_near && (0.75..=1.25).contains(&(along / square)))
}

/// Name of the record that a merge leaves in the model's directory.
pub(crate) const MERGE_RECORD: &str = "merged_adapters.json";

/// Fingerprints of the posterior means that were merged into the model in `dir`, as far as it is recorded.
pub(crate) fn merged_adapters(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(MERGE_RECORD)).unwrap_or_default();
    serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|record| serde_json::from_value(record["adapters"].clone()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::tensors::dtype::DType;
    use crate::tensors::safetensors_write::write_safetensors;

    /// Copies the base `from` to `to`, its tensors as `change` makes them, in as many files as it has layers or so.
    fn copy(from: &ModelFiles, to: &Path, change: impl Fn(&str, Tensor) -> Tensor) -> ModelFiles {
        std::fs::create_dir_all(to).expect("created");
        let mut config = from.config().clone();
        config.insert("transformers_version".to_owned(), "another".into());
        let config = serde_json::to_string_pretty(&config).expect("text");
        std::fs::write(to.join("config.json"), config).expect("written");
        let names: Vec<&str> = from.names().collect();
        let shards: Vec<_> = names.chunks(5).collect();
        for (idx, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", idx + 1, shards.len());
            let tensors = shard.iter().map(|name| {
                let tensor = from.get(name).expect("it is there");
                ((*name).to_owned(), change(name, tensor))
            });
            write_safetensors(to.join(name), tensors, &Default::default()).expect("written");
        }
        ModelFiles::open(to).expect("opens")
    }

    fn base() -> ModelFiles {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let dir = dir.join("../tests/data/fixtures/models/tiny-llama");
        ModelFiles::open(dir).expect("opens")
    }

    #[test]
    fn the_base_of_the_run_is_recognised_in_other_files_and_types() {
        let dir = tempfile::tempdir().expect("a directory");
        let base = base();
        let plain =
            Adapter::read_dir(&crate::fixtures::named("plain-lora").dir).expect("an adapter");
        let out = dir.path().join("out");
        let checkpoint = out.join("checkpoint-5");
        std::fs::create_dir_all(&checkpoint).expect("created");
        let record = |fingerprint: &str, sample: Option<&[f32]>| {
            let record = serde_json::json!({"base": {
                "model_id": "org/base", "revision": "abc", "fingerprint": fingerprint, "sample": sample,
            }});
            std::fs::write(out.join("run.json"), record.to_string()).expect("written");
        };
        let warning = |adapter: &Path, base: &ModelFiles| {
            let warnings = base_warnings(adapter, &plain, base).expect("reads");
            assert!(warnings.len() <= 1, "{warnings:?}");
            warnings.first().map(ToString::to_string)
        };
        assert_eq!(warning(&out, &base), None, "no record");
        let sample = base_sample(&base);
        let fingerprint = base_fingerprint(&base);
        assert!(sample.len() > 32 && sample.iter().any(|x| *x != 0.0));
        record(&fingerprint, None);
        assert_eq!(warning(&out, &base), None, "the very base");

        let to = |name: &str| dir.path().join(name);
        let same = copy(&base, &to("same"), |_, tensor| tensor);
        let cast = |dtype| move |_: &str, tensor: Tensor| tensor.to_dtype(dtype).expect("floats");
        let half = copy(&base, &to("f16"), cast(DType::F16));
        let brain = copy(&base, &to("bf16"), cast(DType::BF16));
        let tuned = copy(&base, &to("tuned"), |_, tensor| {
            let values = tensor.to_f32().expect("floats");
            let changed = values.iter().enumerate();
            let changed = changed.map(|(idx, x)| x * if idx % 2 == 0 { 1.02 } else { 0.98 });
            Tensor::from_f32(tensor.shape(), changed.collect()).expect("a tensor")
        });
        record(&fingerprint, Some(&sample));
        assert_eq!(base_fingerprint(&same), fingerprint);
        for other in [&half, &brain] {
            assert_ne!(base_fingerprint(other), fingerprint);
        }
        for other in [&same, &half, &brain] {
            assert_eq!(warning(&out, other), None, "{:?}", other.dir());
        }
        let text = warning(&out, &tuned).expect("other weights");
        assert!(text.contains("differ by about 2.0 %"), "{text}");

        // A record without a sample cannot tell, and says so.
        record("0123456789abcdef", None);
        for adapter in [&out, &checkpoint] {
            let text = warning(adapter, &same).expect("another base");
            let named = "`org/base` at abc with fingerprint 0123456789ab";
            assert!(
                text.contains(named) && text.contains("does not say"),
                "{text}"
            );
        }
        record("0123456789abcdef", Some(&sample[1..]));
        let text = warning(&out, &same).expect("other shapes");
        assert!(text.contains("its matrices are others"), "{text}");
    }

    #[test]
    fn a_base_that_holds_the_adapter_is_recognised_by_its_record_and_by_its_weights() {
        let scratch = tempfile::tempdir().expect("a directory");
        let base = base();
        let case = crate::fixtures::named("plain-lora");
        let adapter = Adapter::read_dir(&case.dir).expect("an adapter");
        let out = scratch.path().join("out");
        std::fs::create_dir_all(&out).expect("created");
        let codes = |base: &ModelFiles| -> Vec<&str> {
            let warnings = base_warnings(&out, &adapter, base).expect("reads");
            warnings.iter().map(|warning| warning.code).collect()
        };
        let merged = scratch.path().join("merged");
        crate::merge_dir(
            &base,
            &adapter,
            &merged,
            Some(DType::BF16),
            &Default::default(),
        )
        .expect("it fits");
        let open = |dir: &Path| ModelFiles::open(dir).expect("a model");
        assert_eq!(codes(&open(&merged)), ["merged-base"]);
        // Another adapter on top; the first is still in it.
        let other = crate::fixtures::named("all-linear");
        let other = Adapter::read_dir(&other.dir).expect("an adapter");
        let twice = scratch.path().join("twice");
        crate::merge_dir(&open(&merged), &other, &twice, None, &Default::default())
            .expect("it fits");
        assert_eq!(codes(&open(&twice)), ["merged-base"]);
        // What another program merged shows in the weights, compared with those that training recorded.
        std::fs::remove_file(merged.join(MERGE_RECORD)).expect("there");
        assert_eq!(codes(&open(&merged)), [""; 0]);
        let record = serde_json::json!({"base": {
            "fingerprint": base_fingerprint(&base), "sample": base_sample(&base),
        }});
        std::fs::write(out.join("run.json"), record.to_string()).expect("written");
        assert_eq!(codes(&open(&merged)), ["merged-base"]);
        assert_eq!(codes(&base), [""; 0]);
        std::fs::remove_file(twice.join(MERGE_RECORD)).expect("there");
        assert_eq!(codes(&open(&twice)), ["other-base"]);
    }
}
