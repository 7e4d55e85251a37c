//! Merging the posterior mean into a base model: an overlay of the touched tensors, or a whole model directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use crate::adapter::{Adapter, Site};
use crate::beside::{Carried, TEMPLATES_DIR, entries};
use crate::beyond::{Applied, Beyond};
use crate::error::{Error, Result};
use crate::files;
use crate::formats::peft::config_write::to_text;
use crate::formats::peft::read::CONFIG_FILE as ADAPTER_CONFIG;
use crate::json;
use crate::low_rank::product_rows;
use crate::model_files::{HEAD, ModelFiles};
use crate::problem::{Problem, shell_word};
use crate::targets::OUTPUT_HEAD;
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_write::{Slot, stream};
use crate::tensors::tensor::Tensor;
use crate::trained_base::{MERGE_RECORD, merged_adapters};

/// Weights are merged in blocks of rows of about this many elements, so memory does not grow with the matrix.
const BLOCK_ELEMENTS: usize = 1 << 20;

/// What an overlay holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OverlayReport {
    /// The file.
    pub path: PathBuf,
    /// Number of merged tensors.
    pub n_tensors: usize,
    /// Size of the file.
    pub n_bytes: u64,
}

/// What a merge did to the numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// Number of merged tensors.
    pub n_merged: usize,
    /// Number of other tensors.
    pub n_copied: usize,
    /// Largest difference between a weight as stored and the merge in float32.
    pub max_abs_error: f64,
    /// Norm of those differences over the norm of the update.
    pub relative_error: f64,
    /// Share of the entries with an update that are stored as if there had been none, 0 to 1.
    pub update_lost: f64,
    /// Files of the base that those of the adapter replaced.
    pub replaced: Vec<String>,
    /// What else lies in the base's directory and was not copied: weights in other formats, directories.
    pub not_copied: Vec<String>,
    /// Whether the output head, which is the embedding in the base, has become a weight of its own: it is adapted, the embedding is not.
    pub untied: bool,
}

/// Sums over merged entries, for the report.
#[derive(Debug, Clone, Copy, Default)]
struct Rounding {
    max_abs_error: f64,
    error_squared: f64,
    update_squared: f64,
    n_updated: u64,
    n_lost: u64,
}

impl Rounding {
    fn add(self, other: Self) -> Self {
        Self {
            max_abs_error: self.max_abs_error.max(other.max_abs_error),
            error_squared: self.error_squared + other.error_squared,
            update_squared: self.update_squared + other.update_squared,
            n_updated: self.n_updated + other.n_updated,
            n_lost: self.n_lost + other.n_lost,
        }
    }
}

/// Writes `W + scaling * B A` in F32 for every adapted module as one safetensors file, under the base's names.
///
/// The base's other tensors are not in the file: a loader that lets later files win reads base, then overlay. Where
/// [`Adapter::unties`] the base, `lm_head.weight` is in the file, and `tie_word_embeddings` has to become false. Memory is
/// one block of rows; the adapter is checked against the base first.
///
/// # Errors
/// `quantised-base` for a quantised base, a refusal if the adapter does not fit, `tensor` if a merged weight is not finite.
pub fn write_overlay(base: &ModelFiles, adapter: &Adapter, out: &Path) -> Result<OverlayReport> {
    check(base, adapter)?;
    let (sites, biases) = (weights_of(adapter), biases_of(adapter, base));
    let slot = |name: &String, shape: Vec<usize>| Slot {
        name: base.on_disk(name).into_owned(),
        dtype: DType::F32,
        shape,
    };
    let weights = sites
        .iter()
        .map(|(name, site)| slot(name, vec![site.out_features(), site.in_features()]));
    let shifted = biases
        .iter()
        .map(|(name, site)| slot(name, vec![site.out_features()]));
    let slots = weights.chain(shifted).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    files::write_file(out, |writer| {
        stream(out, writer, slots, &metadata, |slot, sink| {
            let name = base.in_memory(&slot.name);
            let weight = base_tensor(base, &name)?;
            match sites.get(name.as_ref()) {
                Some(site) => merge_into(sink, out, &weight, site, DType::F32).map(|_| ()),
                None => match biases.get(name.as_ref()) {
                    Some(site) => shift_into(sink, out, &weight, site, DType::F32),
                    None => Ok(()),
                },
            }
        })
    })?;
    Ok(OverlayReport {
        path: out.to_path_buf(),
        n_tensors: sites.len() + biases.len(),
        n_bytes: fs::metadata(out).map_err(Error::io("read", out))?.len(),
    })
}

/// Writes a whole model directory with the adapter merged: shard by shard under the base's file names, arithmetic in
/// F32, stored as `dtype` (`None` keeps each tensor's own type); tokenizer, configuration and other files are copied, those
/// that the adapter has `carried` in place of the base's. Where [`Adapter::unties`] the base, the head becomes a tensor of its
/// own in the last file, and config.json says so.
///
/// # Errors
/// As [`write_overlay`]; `exists` if `out_dir` is not empty; `vocabulary` if a carried tokenizer has more tokens than the base
/// has embeddings.
pub fn merge_dir(
    base: &ModelFiles,
    adapter: &Adapter,
    out_dir: &Path,
    dtype: Option<DType>,
    carried: &Carried,
) -> Result<MergeReport> {
    check(base, adapter)?;
    if let Some(problem) = carried.beyond(base) {
        return Err(problem.into());
    }
    if let Some(dtype) = dtype.filter(|dtype| !dtype.is_float() || *dtype == DType::F64) {
        let message = format!("a model cannot be stored as {dtype}; choose F32, BF16 or F16");
        return Err(Error::setting("dtype", message));
    }
    let (sites, biases) = (weights_of(adapter), biases_of(adapter, base));
    let is_untied = adapter.unties(base);
    let mut rounding = Rounding::default();
    let mut n_copied = 0;
    let (mut replaced, mut not_copied) = (Vec::new(), Vec::new());
    files::write_new_dir(out_dir, |inside| {
        let mut n_bytes = 0u64;
        let mut weight_map = BTreeMap::new();
        let mut head = is_untied.then(|| head_slot(base, dtype)).flatten();
        let n_files = base.files().len();
        for (idx, (path, shard)) in base.files().iter().zip(base.shards()).enumerate() {
            let Some(file_name) = path.file_name() else {
                continue;
            };
            let out = inside.join(file_name);
            let mut slots = Vec::new();
            for name in shard.names() {
                let Some((stored, shape)) = shard.info(name) else {
                    continue;
                };
                let target = dtype.filter(|_| stored.is_float()).unwrap_or(stored);
                n_bytes += (shape.iter().product::<usize>() * target.size()) as u64;
                weight_map.insert(name.to_owned(), file_name.to_string_lossy().into_owned());
                slots.push(Slot {
                    name: name.to_owned(),
                    dtype: target,
                    shape: shape.to_vec(),
                });
            }
            if let Some(slot) = head.take_if(|_| idx + 1 == n_files) {
                n_bytes += (slot.shape.iter().product::<usize>() * slot.dtype.size()) as u64;
                weight_map.insert(slot.name.clone(), file_name.to_string_lossy().into_owned());
                slots.push(slot);
            }
            files::write_file(&out, |writer| {
                stream(&out, writer, slots, shard.metadata(), |slot, sink| {
                    let name = base.in_memory(&slot.name);
                    let weight = base_tensor(base, &name)?;
                    match sites.get(name.as_ref()) {
                        Some(site) => {
                            let block = merge_into(sink, &out, &weight, site, slot.dtype)?;
                            rounding = rounding.add(block);
                            Ok(())
                        }
                        None => match biases.get(name.as_ref()) {
                            Some(site) => shift_into(sink, &out, &weight, site, slot.dtype),
                            None => {
                                n_copied += 1;
                                copy_into(sink, &out, &slot.name, &weight, slot.dtype)
                            }
                        },
                    }
                })
            })?;
        }
        if base.files().len() > 1 {
            let index = json!({"metadata": {"total_size": n_bytes}, "weight_map": weight_map});
            let path = inside.join("model.safetensors.index.json");
            files::write_text(&path, &to_text(&index))?;
        }
        (replaced, not_copied) = copy_other_files(base, inside, dtype, is_untied, carried)?;
        carried.copy_into(inside)?;
        keep_template(base, inside, carried)?;
        let mut merged = merged_adapters(base.dir());
        merged.push(adapter.collapse().fingerprint());
        files::write_text(
            &inside.join(MERGE_RECORD),
            &to_text(&json!({ "adapters": merged })),
        )
    })?;
    let update_lost = rounding.n_lost as f64 / rounding.n_updated.max(1) as f64;
    let update_norm = rounding.update_squared.sqrt();
    Ok(MergeReport {
        n_merged: sites.len(),
        n_copied,
        max_abs_error: rounding.max_abs_error,
        relative_error: if update_norm > 0.0 {
            rounding.error_squared.sqrt() / update_norm
        } else {
            0.0
        },
        update_lost,
        replaced,
        not_copied,
        untied: is_untied,
    })
}

impl Adapter {
    /// Whether merging into `base` makes the output head a weight of its own: it is adapted, and is the embedding in the base.
    pub fn unties(&self, base: &ModelFiles) -> bool {
        base.ties_embeddings() && self.sites.iter().any(|site| site.name == OUTPUT_HEAD)
    }
}

/// Where the head is stored that a tied base has no tensor for.
fn head_slot(base: &ModelFiles, dtype: Option<DType>) -> Option<Slot> {
    let (stored, shape) = match base.info(HEAD) {
        Some(_) => return None,
        None => base.info(&base.embedding())?,
    };
    Some(Slot {
        name: base.on_disk(HEAD).into_owned(),
        dtype: dtype.unwrap_or(stored),
        shape: shape.to_vec(),
    })
}

/// Sites by the name of the weight they change.
fn weights_of(adapter: &Adapter) -> BTreeMap<String, &Site> {
    let sites = adapter.sites.iter();
    sites
        .map(|site| (format!("{}.weight", site.name), site))
        .collect()
}

/// Sites by the name of the bias they change.
fn biases_of<'a>(adapter: &'a Adapter, base: &ModelFiles) -> BTreeMap<String, &'a Site> {
    let scales = |site: &&Site| matches!(site.beyond, Some(Beyond::Scale { .. }));
    let named = adapter.sites.iter().filter(scales);
    named
        .map(|site| (format!("{}.bias", site.name), site))
        .filter(|(name, _)| base.info(name).is_some())
        .collect()
}

fn base_tensor(base: &ModelFiles, name: &str) -> Result<Tensor> {
    base.weight(name)
        .ok_or_else(|| Error::tensor(name, "not in the base"))
}

/// What to do with a base into which nothing can be merged.
fn instead_of_merging(base: &ModelFiles) -> String {
    match (base.gguf(), base.blocks()) {
        (Some(file), _) => {
            let file = shell_word(&file.display().to_string());
            format!(
                "import it with `monteclora import-gguf {file} -o DIR` and merge into DIR, or write the adapter for llama.cpp with \
                 `monteclora convert ADAPTER --to gguf -m {file} -o adapter.gguf`"
            )
        }
        (None, Some(_)) => "write the adapter for mlx-lm with `monteclora convert ADAPTER --to mlx -o DIR` and use it as it is or merge it with mlx_lm.fuse, or use the full-precision model".to_owned(),
        (None, None) => "use the full-precision model".to_owned(),
    }
}

fn check(base: &ModelFiles, adapter: &Adapter) -> Result<()> {
    if let Some(method) = base.quantization() {
        return Err(Error::quantised(
            base.place(),
            &method,
            &instead_of_merging(base),
        ));
    }
    adapter.require_fit(base)?;
    for site in &adapter.sites {
        if let Some(Beyond::Scale { shift: Some(_), .. }) = &site.beyond
            && base.info(&format!("{}.bias", site.name)).is_none()
        {
            let message = "has a shift, and the base has no bias here that it can be merged into";
            let fix = "train with lora.ssf.shift = \"auto\" or \"never\"";
            return Err(Problem::new("no-bias", &site.name, message, fix).into());
        }
    }
    Ok(())
}

/// The bias `gamma b + beta` of a module that SSF scales, as `dtype`.
fn shift_into(
    sink: &mut dyn Write,
    path: &Path,
    bias: &Tensor,
    site: &Site,
    dtype: DType,
) -> Result<()> {
    let Some(Beyond::Scale { scale, shift }) = &site.beyond else {
        return copy_into(sink, path, &site.name, bias, dtype);
    };
    let shift = shift.as_ref().map(Tensor::to_f32).transpose()?;
    let scaled = bias.to_f32()?.into_iter().zip(scale.to_f32()?);
    let mut values: Vec<f32> = scaled.map(|(bias, gamma)| gamma * bias).collect();
    for (value, beta) in values.iter_mut().zip(shift.into_iter().flatten()) {
        *value += beta;
    }
    let not_real = || Error::tensor(&site.name, format!("a bias cannot be stored as {dtype}"));
    let stored = dtype.encode(&values).ok_or_else(not_real)?;
    if dtype.first_non_finite(&stored).is_some() {
        let message = format!("a merged bias is NaN, infinite or does not fit {dtype}");
        return Err(Error::tensor(&site.name, message));
    }
    sink.write_all(&stored).map_err(Error::io("write", path))
}

/// Writes the changed weight, `W + scaling * B A` unless more changes it, as `dtype`, a block of rows at a time.
fn merge_into(
    sink: &mut dyn Write,
    path: &Path,
    weight: &Tensor,
    site: &Site,
    dtype: DType,
) -> Result<Rounding> {
    let (a, b) = (site.lora_a.to_f32()?, site.lora_b.to_f32()?);
    let applied = Applied::of(site.beyond.as_ref(), &site.name)?;
    let n_in = site.in_features().max(1);
    let rows = (BLOCK_ELEMENTS / n_in).max(1);
    let weight_bytes = weight.bytes();
    let weight_blocks = weight_bytes.chunks(rows * n_in * weight.dtype().size());
    let mut total = Rounding::default();
    let mut delta = Vec::new();
    let not_real = || {
        let message = format!("the base's weight is {}", weight.dtype());
        Error::tensor(&site.name, message)
    };
    for (idx, weight_block) in weight_blocks.enumerate() {
        let first = idx * rows;
        let old = weight.dtype().decode(weight_block).ok_or_else(not_real)?;
        delta.resize(old.len(), 0.0);
        let n_rows = old.len() / n_in;
        let b_block = &b[first * site.rank..(first + n_rows) * site.rank];
        product_rows(&mut delta, b_block, &a, site.rank, site.scaling_f32());
        let pairs = old.iter().zip(&delta);
        let mut merged: Vec<f32> = pairs.map(|(old, delta)| old + delta).collect();
        if site.beyond.is_some() {
            applied.apply(first, n_in, &mut merged);
            for ((delta, new), old) in delta.iter_mut().zip(&merged).zip(&old) {
                *delta = new - old;
            }
        }
        let stored = dtype.encode(&merged).ok_or_else(not_real)?;
        if dtype.first_non_finite(&stored).is_some() {
            let message = format!("a merged weight is NaN, infinite or does not fit {dtype}");
            return Err(Error::tensor(&site.name, message));
        }
        if dtype != DType::F32 || weight.dtype() == DType::F64 {
            let read_back = dtype.decode(&stored).ok_or_else(not_real)?;
            total = total.add(rounding(&old, &delta, &merged, &read_back));
        } else {
            total = total.add(rounding(&old, &delta, &merged, &merged));
        }
        sink.write_all(&stored).map_err(Error::io("write", path))?;
    }
    Ok(total)
}

/// What storing did to one block.
fn rounding(old: &[f32], delta: &[f32], merged: &[f32], stored: &[f32]) -> Rounding {
    (0..old.len())
        .into_par_iter()
        .with_min_len(1 << 14)
        .map(|at| {
            let error = f64::from(stored[at]) - f64::from(merged[at]);
            let is_updated = delta[at] != 0.0;
            Rounding {
                max_abs_error: error.abs(),
                error_squared: error * error,
                update_squared: f64::from(delta[at]).powi(2),
                n_updated: u64::from(is_updated),
                n_lost: u64::from(is_updated && stored[at] == old[at]),
            }
        })
        .reduce(Rounding::default, Rounding::add)
}

/// Writes a tensor that is not adapted, converted in blocks if its type changes.
fn copy_into(
    sink: &mut dyn Write,
    path: &Path,
    name: &str,
    tensor: &Tensor,
    dtype: DType,
) -> Result<()> {
    if tensor.dtype() == dtype {
        let written = sink.write_all(&tensor.bytes());
        return written.map_err(Error::io("write", path));
    }
    let old = tensor.dtype();
    let not_real = || Error::tensor(name, format!("{old} cannot be stored as {dtype}"));
    for block in tensor.bytes().chunks(BLOCK_ELEMENTS * old.size()) {
        let values = old.decode(block).ok_or_else(not_real)?;
        let stored = dtype.encode(&values).ok_or_else(not_real)?;
        if old.first_non_finite(block).is_none() && dtype.first_non_finite(&stored).is_some() {
            let message = format!("a weight does not fit {dtype}; choose BF16 or F32");
            return Err(Error::tensor(name, message));
        }
        sink.write_all(&stored).map_err(Error::io("write", path))?;
    }
    Ok(())
}

/// Copies everything beside the weights that nothing of `carried` replaces; `config.json` gets the new type, and says whether the
/// head is the embedding. Gives the names of what was replaced, and of what was not copied.
fn copy_other_files(
    base: &ModelFiles,
    out: &Path,
    dtype: Option<DType>,
    is_untied: bool,
    carried: &Carried,
) -> Result<(Vec<String>, Vec<String>)> {
    const WEIGHTS: &str = "safetensors bin pt pth gguf h5 msgpack onnx ckpt";
    let written = base.files().iter().filter_map(|path| path.file_name());
    let written: BTreeSet<_> = written.collect();
    let (mut replaced, mut not_copied) = (Vec::new(), Vec::new());
    for (name, path) in entries(base.dir())? {
        let Some(file_name) = path.file_name() else {
            continue;
        };
        if carried.replaces(&name) {
            replaced.push(name);
            continue;
        }
        if path.is_dir() {
            match name == TEMPLATES_DIR {
                true => copy_templates(&path, &out.join(TEMPLATES_DIR))?,
                false => not_copied.push(format!("{name}/")),
            }
            continue;
        }
        if name == ADAPTER_CONFIG {
            // An adapter beside the base is none of the merged model, which transformers would look for the weights of.
            not_copied.push(name);
            continue;
        }
        let extension = path.extension().and_then(|extension| extension.to_str());
        let is_weights = extension.is_some_and(|found| WEIGHTS.split(' ').any(|w| w == found));
        let is_made =
            written.contains(file_name) || name == "config.json" && (dtype.is_some() || is_untied);
        if !is_weights && !is_made && !name.ends_with(".index.json") {
            fs::copy(&path, out.join(file_name)).map_err(Error::io("copy", &path))?;
        } else if !is_made && is_weights {
            not_copied.push(name);
        }
    }
    not_copied.retain(|name| !name.starts_with('.'));
    let mut config = base.config().clone();
    if is_untied {
        config.insert("tie_word_embeddings".into(), false.into());
        // It does not count there, but should not say otherwise.
        if let Some(Value::Object(inside)) = config.get_mut("text_config")
            && inside.contains_key("tie_word_embeddings")
        {
            inside.insert("tie_word_embeddings".into(), false.into());
        }
    }
    if let Some(dtype) = dtype {
        let name = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        // transformers 5 writes `dtype`, earlier versions `torch_dtype`.
        let is_new = config.contains_key("dtype");
        let key = if is_new { "dtype" } else { "torch_dtype" };
        config.insert(key.into(), name.into());
    }
    if dtype.is_some() || is_untied {
        files::write_text(&out.join("config.json"), &to_text(&Value::Object(config)))?;
    }
    Ok((replaced, not_copied))
}

/// Writes the base's chat template to a file of its own if it stood in a `tokenizer_config.json` that was replaced by one without.
fn keep_template(base: &ModelFiles, out: &Path, carried: &Carried) -> Result<()> {
    const CONFIG: &str = "tokenizer_config.json";
    let (file, path) = (out.join("chat_template.jinja"), base.dir().join(CONFIG));
    if carried.has_template() || !carried.replaces(CONFIG) || file.exists() || !path.exists() {
        return Ok(());
    }
    match json::read_object(&path)?.get("chat_template") {
        Some(Value::String(template)) => files::write_text(&file, template),
        _ => Ok(()),
    }
}

/// Copies the named chat templates of a base.
fn copy_templates(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for (name, path) in entries(from)? {
        if path.is_file() {
            fs::copy(&path, to.join(name)).map_err(Error::io("copy", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
    use crate::tensors::safetensors_file::SafetensorsFile;

    #[test]
    fn overlay_and_merged_directory_hold_base_plus_update() {
        for case in &fixtures::usable() {
            let dir = tempfile::tempdir().expect("temporary directory");
            let base = ModelFiles::open(&case.model_dir).expect("a model");
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            let path = dir.path().join("overlay.safetensors");
            let report = write_overlay(&base, &adapter, &path).expect("it fits");
            let overlay = SafetensorsFile::open(&path).expect("our own output");
            assert_eq!(report.n_tensors, adapter.sites.len());
            let out = dir.path().join("merged");
            let merge =
                merge_dir(&base, &adapter, &out, None, &Carried::default()).expect("it fits");
            assert_eq!(merge.n_merged + merge.n_copied, base.names().count());
            assert_eq!(merge.max_abs_error, 0.0);
            let merged = ModelFiles::open(&out).expect("our own output");
            for name in base.names() {
                let on_disk = base.on_disk(name);
                let old = base.get(name).expect("listed");
                let new = merged.get(name).expect("every tensor is there");
                let Some(site) = adapter
                    .sites
                    .iter()
                    .find(|site| format!("{}.weight", site.name) == name)
                else {
                    assert_eq!(old, new, "{name}");
                    assert!(overlay.get(&on_disk).is_none());
                    continue;
                };
                assert_eq!(overlay.get(&on_disk).expect("merged"), new);
                let delta = site.delta_on(&old).expect("float");
                let (old, new) = (old.to_f32().expect("float"), new.to_f32().expect("float"));
                for ((old, new), delta) in old.iter().zip(&new).zip(delta) {
                    // What is beyond B A is a difference here, and rounded once more.
                    let rounding = if site.beyond.is_some() { 1e-7 } else { 0.0 };
                    assert!(
                        (*new - (old + delta)).abs() <= rounding,
                        "{new} {old} {delta}"
                    );
                }
            }
            assert!(out.join("config.json").exists());
        }
    }

    #[test]
    fn storing_narrower_is_reported() {
        let case = fixtures::named("monteclora");
        let dir = tempfile::tempdir().expect("temporary directory");
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        let out = dir.path().join("merged");
        let report = merge_dir(
            &base,
            &adapter,
            &out,
            Some(DType::BF16),
            &Carried::default(),
        )
        .expect("it fits");
        assert!(
            report.max_abs_error > 0.0
                && report.relative_error > 0.0
                && report.relative_error < 0.1
        );
        let merged = ModelFiles::open(&out).expect("our own output");
        assert!(merged.names().all(|name| {
            merged
                .info(name)
                .is_some_and(|(dtype, _)| dtype == DType::BF16)
        }));
        assert_eq!(merged.config()["dtype"], "bfloat16");
        assert!(
            merge_dir(&base, &adapter, &out, None, &Carried::default())
                .is_err_and(|error| error.code() == "exists")
        );
    }

    #[test]
    fn misfits_and_quantised_bases_are_refused_before_anything_is_written() {
        let case = fixtures::named("monteclora");
        let dir = tempfile::tempdir().expect("temporary directory");
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let out = dir.path().join("overlay.safetensors");
        let misfit = write_overlay(&base, &fixtures::small_adapter(9, false), &out);
        assert!(
            misfit
                .expect_err("other sizes")
                .to_string()
                .starts_with("the adapter does not fit the base")
        );
        let quantised = dir.path().join("quantised");
        fs::create_dir(&quantised).expect("writable");
        fs::copy(&base.files()[0], quantised.join("model.safetensors")).expect("writable");
        fs::write(
            quantised.join("config.json"),
            r#"{"quantization_config": {"quant_method": "awq"}}"#,
        )
        .expect("writable");
        let base = ModelFiles::open(&quantised).expect("headers are fine");
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        let refused = write_overlay(&base, &adapter, &out);
        assert_eq!(refused.expect_err("quantised").code(), "quantised-base");
        assert!(!out.exists());
    }
}
