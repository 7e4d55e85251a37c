//! One safetensors file or its numbered shards, with or without an index, read as one set of tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::json;
use crate::model_files::instead;
use crate::problem::{Problem, listed};
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::tensor::Tensor;

/// Maximum number of shards of one set. Each is mapped, and a process can have only so many mappings.
const MAX_SHARDS: usize = 1 << 12;

/// The shard file of every tensor, as the index gives it.
type WeightMap = Map<String, Value>;

/// The tensors of `STEM.safetensors`, or of `STEM-0000N-of-0000M.safetensors`.
#[derive(Debug, Clone)]
pub(crate) struct ShardSet {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) shards: Vec<SafetensorsFile>,
    owner: BTreeMap<String, usize>,
    /// The names in their file of tensors that have another name here.
    stored: BTreeMap<String, String>,
}

impl ShardSet {
    /// Opens the set called `stem` in `dir`, reading headers only.
    pub(crate) fn open(dir: &Path, stem: &str) -> Result<Self> {
        let (names, index) = shard_names(dir, stem)?;
        let mut set = Self {
            paths: Vec::with_capacity(names.len()),
            shards: Vec::with_capacity(names.len()),
            owner: BTreeMap::new(),
            stored: BTreeMap::new(),
        };
        for (shard_idx, name) in names.iter().enumerate() {
            let path = dir.join(name);
            let shard = SafetensorsFile::open(&path)?;
            for tensor in shard.names() {
                if let Some(other) = set.owner.insert(tensor.to_owned(), shard_idx) {
                    let message = format!("tensor `{tensor}` is also stored in `{}`", names[other]);
                    return Err(Error::malformed(&path, message));
                }
            }
            set.paths.push(path);
            set.shards.push(shard);
        }
        if let Some(index) = index {
            check_index(dir, &index, &names, &set.owner)?;
        }
        Ok(set)
    }

    /// Opens a single file and ignores all files beside it.
    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        let shard = SafetensorsFile::open(path)?;
        Ok(Self {
            owner: shard.names().map(|name| (name.to_owned(), 0)).collect(),
            stored: BTreeMap::new(),
            paths: vec![path.to_path_buf()],
            shards: vec![shard],
        })
    }

    /// Renames the tensors: `name` returns the new name for a name in the file.
    ///
    /// # Errors
    /// Returns `malformed` if two tensors get the same name.
    pub(crate) fn renamed(mut self, name: impl Fn(&str) -> Cow<'_, str>) -> Result<Self> {
        let mut owner = BTreeMap::new();
        for (stored, shard) in self.owner {
            let here = name(&stored).into_owned();
            if owner.insert(here.clone(), shard).is_some() {
                let message = format!(
                    "tensor `{stored}` is also stored under another name: both are `{here}`"
                );
                return Err(Error::malformed(&self.paths[shard], message));
            }
            if here != stored {
                self.stored.insert(here, stored);
            }
        }
        self.owner = owner;
        Ok(self)
    }

    /// Returns the name in its file of the tensor called `name`.
    pub(crate) fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        self.stored.get(name).map_or(name, String::as_str)
    }

    /// Tensor names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.owner.keys().map(String::as_str)
    }

    /// The file that holds the tensor called `name`.
    pub(crate) fn path_of(&self, name: &str) -> Option<&Path> {
        Some(&self.paths[*self.owner.get(name)?])
    }

    pub(crate) fn get(&self, name: &str) -> Option<Tensor> {
        self.shards[*self.owner.get(name)?].get(self.stored(name))
    }

    pub(crate) fn info(&self, name: &str) -> Option<(DType, &[usize])> {
        self.shards[*self.owner.get(name)?].info(self.stored(name))
    }
}

/// Returns the weight files of `dir`, and the index if there is one.
fn shard_names(dir: &Path, stem: &str) -> Result<(Vec<String>, Option<WeightMap>)> {
    let single = format!("{stem}.safetensors");
    let index_name = format!("{single}.index.json");
    let index_path = dir.join(&index_name);
    if index_path.exists() {
        let mut index = json::read_object(&index_path)?;
        let Some(Value::Object(weight_map)) = index.remove("weight_map") else {
            let message = "`weight_map` is not an object";
            return Err(Error::malformed(&index_path, message));
        };
        let mut names = Vec::new();
        for (tensor, file) in &weight_map {
            let Some(file) = file.as_str().filter(|file| is_plain_file_name(file)) else {
                let message = format!(
                    "tensor `{tensor}`: {file} is not the name of a file in this directory"
                );
                return Err(Error::malformed(&index_path, message));
            };
            names.push(file.to_owned());
        }
        names.sort();
        names.dedup();
        if !names.contains(&single) && dir.join(&single).exists() {
            let message = format!(
                "holds both {single} and {index_name}, which names other files: transformers reads the first, other readers the second"
            );
            let at = format!("`{}`", dir.display());
            return Err(Problem::new(
                "two-sets",
                at,
                message,
                "remove the one that is out of date",
            )
            .into());
        }
        check_number(&index_path, names.len())?;
        let is_missing = |name: &&String| !dir.join(name).exists();
        let missing: Vec<&String> = names.iter().filter(is_missing).collect();
        if !missing.is_empty() {
            let (n, list) = (missing.len(), listed(&missing));
            let message = format!(
                "{n} shards listed in {index_name} are missing: {list}; fetch the model again"
            );
            return Err(Error::not_found(dir, message));
        }
        return Ok((names, Some(weight_map)));
    }
    if dir.join(&single).exists() {
        return Ok((vec![single], None));
    }
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let name = entry.map_err(Error::io("read", dir))?.file_name();
        let Some(name) = name.to_str() else { continue };
        match shard_number(name) {
            Some((set, number, total)) if set == stem => {
                found.insert(name.to_owned(), (number, total));
            }
            _ => {}
        }
    }
    check_number(dir, found.len())?;
    let Some((_, total)) = found.values().next().copied() else {
        if stem == "model" {
            return Err(instead::of_weights(dir, stem));
        }
        let message = format!("no {single} and no shards; only safetensors weights are read");
        return Err(Error::not_found(dir, message));
    };
    let expected = (1..=total).map(|idx| (idx, total));
    let is_complete = found.values().copied().eq(expected);
    let names: Vec<String> = found.into_keys().collect();
    if !is_complete {
        let message = format!("the shards are incomplete: found {}", listed(&names));
        return Err(Error::not_found(dir, message));
    }
    Ok((names, None))
}

fn check_number(path: &Path, n_shards: usize) -> Result<()> {
    if n_shards > MAX_SHARDS {
        let message = format!("{n_shards} shards; at most {MAX_SHARDS} are read");
        return Err(Error::malformed(path, message));
    }
    Ok(())
}

/// Returns stem, number and total of `STEM-0000N-of-0000M.safetensors`.
pub(crate) fn shard_number(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, total) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, number.parse().ok()?, total.parse().ok()?))
}

/// Whether `name` stays inside its directory.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(std::path::Component::Normal(_)), None)
    ) && !name.contains(['/', '\\', '\0'])
}

/// Checks that every tensor of the index is in the shard that the index names.
fn check_index(
    path: &Path,
    index: &WeightMap,
    names: &[String],
    owner: &BTreeMap<String, usize>,
) -> Result<()> {
    for (tensor, file) in index {
        if owner.get(tensor).map(|idx| names[*idx].as_str()) != file.as_str() {
            let message = format!("tensor `{tensor}` is not in the shard the index names, {file}");
            return Err(Error::malformed(path, message));
        }
    }
    Ok(())
}
