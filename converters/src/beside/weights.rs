//! Weight files beside an adapter, judged by the tensors in them: another checkpoint, a whole model, or weights that were trained with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::names::{CHECKPOINTS, MODELS, OTHER_ADAPTERS, UNKNOWN};
use crate::error::Result;
use crate::foreign::FileKind;
use crate::json;
use crate::module_path::front;
use crate::problem::Problem;
use crate::source::Source;
use crate::tensors::gguf::GgufFile;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::shards::shard_number;

/// Tensors that a message shows.
const SHOWN: usize = 3;
const COPIES: &str = "copies of the adapter in other formats";
/// What `parity --reference` reads.
const RECORDINGS: &str = "recorded outputs";
const EMPTY: &str = "files without a tensor";

/// What became of a weight file.
#[derive(Debug)]
pub(super) enum Found {
    LeftOut(&'static str),
    Problem(Problem),
}

/// What weight files are held against.
pub(super) struct Judge {
    /// Modules of the adapter that is read.
    modules: BTreeSet<String>,
    /// Whether its file was named, so that no other one was meant.
    is_named: bool,
}

impl Judge {
    /// Of the adapter in the files `read`, whose headers are looked at.
    pub(super) fn new(source: &Source, read: &[PathBuf]) -> Result<Self> {
        let mut modules = BTreeSet::new();
        for path in read {
            if FileKind::read(path).is_ok_and(|kind| kind == FileKind::Safetensors) {
                let file = SafetensorsFile::open(path)?;
                modules.extend(file.names().filter_map(module_of));
            }
        }
        Ok(Self {
            modules,
            is_named: source.named.is_some(),
        })
    }

    /// What each of `files` is; shards of one set are judged together.
    pub(super) fn sort(&self, dir: &Path, files: Vec<(String, PathBuf)>) -> Vec<(String, Found)> {
        let is_model_dir = json::read_object(&dir.join("config.json"))
            .is_ok_and(|keys| keys.contains_key("model_type"));
        let mut sets: BTreeMap<String, Vec<(String, PathBuf)>> = BTreeMap::new();
        for (name, path) in files {
            let stem = shard_number(&name).map_or(name.as_str(), |(stem, _, _)| stem);
            sets.entry(stem.to_owned()).or_default().push((name, path));
        }
        let mut found = Vec::new();
        for (_, set) in sets {
            let (first, path) = &set[0];
            let kind = FileKind::read(path).unwrap_or(FileKind::Unknown);
            let one = match kind {
                // A pipe is not opened, so it is of no kind.
                _ if !path.is_file() => Found::LeftOut(UNKNOWN),
                FileKind::Gguf => Found::LeftOut(gguf(path)),
                FileKind::Safetensors => self.safetensors(&set, is_model_dir),
                kind => unopened(first, path, &kind, is_model_dir),
            };
            let what = match &one {
                Found::LeftOut(what) => Some(*what),
                Found::Problem(_) => None,
            };
            found.push((first.clone(), one));
            let others = set[1..].iter();
            found
                .extend(others.filter_map(|(name, _)| Some((name.clone(), Found::LeftOut(what?)))));
        }
        found
    }

    /// By the headers of one set of safetensors files.
    fn safetensors(&self, set: &[(String, PathBuf)], is_model_dir: bool) -> Found {
        let mut tensors = BTreeMap::new();
        for (name, path) in set {
            match SafetensorsFile::open(path) {
                Ok(file) => {
                    tensors.extend(file.names().filter_map(|tensor| {
                        Some((tensor.to_owned(), file.info(tensor)?.1.to_vec()))
                    }))
                }
                Err(error) => {
                    let message = format!("lies beside the adapter and cannot be read: {error}");
                    let fix = "fetch it again, or move it out of the directory if it is not the adapter's";
                    return Found::Problem(Problem::new("trained-weights", name, message, fix));
                }
            }
        }
        if tensors.is_empty() {
            return Found::LeftOut(EMPTY);
        }
        let outputs = ["logits", "base_logits", "labels"];
        if tensors.contains_key("input_ids")
            && outputs.iter().any(|name| tensors.contains_key(*name))
        {
            return Found::LeftOut(RECORDINGS);
        }
        let modules: Option<BTreeSet<String>> =
            tensors.keys().map(|name| module_of(name)).collect();
        let name = &set[0].0;
        match modules {
            Some(modules) if modules == self.modules => return Found::LeftOut(CHECKPOINTS),
            Some(_) if self.is_named => return Found::LeftOut(OTHER_ADAPTERS),
            Some(modules) => {
                let new = modules.difference(&self.modules).next();
                let message = match new {
                    Some(module) => format!(
                        "holds LoRA tensors of modules that the adapter's file does not have, such as {module}"
                    ),
                    None => "holds LoRA tensors of some of the adapter's modules".to_owned(),
                };
                let fix = "give the file that is meant by its name, or move the other one out of the directory";
                return Found::Problem(Problem::new("trained-weights", name, message, fix));
            }
            None => {}
        }
        let is_whole = !self.modules.is_empty()
            && self
                .modules
                .iter()
                .map(|module| within_layers(module))
                .all(|module| {
                    let ends = [
                        format!("{module}.weight"),
                        format!("{module}.base_layer.weight"),
                    ];
                    tensors
                        .keys()
                        .any(|tensor| ends.iter().any(|end| tensor.ends_with(end.as_str())))
                });
        let is_model =
            is_model_dir && name.starts_with("model") && tensors.len() > self.modules.len();
        if is_whole || is_model {
            return Found::LeftOut(MODELS);
        }
        Found::Problem(trained(name, &tensors))
    }
}

/// A module's path from its layer on: what wraps a model, and so stands before, is another in another file.
fn within_layers(module: &str) -> &str {
    &module[front(module).len()..]
}

/// Weights that are neither LoRA's nor a model's.
fn trained(name: &str, tensors: &BTreeMap<String, Vec<usize>>) -> Problem {
    let shown: Vec<String> = tensors
        .iter()
        .take(SHOWN)
        .map(|(name, shape)| format!("{name} {shape:?}"))
        .collect();
    let more = match tensors.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let holds = |part: &str| tensors.keys().any(|name| name.contains(part));
    let what = match () {
        () if holds("v_head")
            || holds("value_head")
            || holds("score")
            || name.contains("value_head") =>
        {
            "a head that values answers"
        }
        () if holds("input_embeddings") || holds("embed_tokens") => "embeddings of new tokens",
        () if holds("lm_head") => "an output head",
        () if holds("projector") => "a projector of images",
        () => "weights",
    };
    let message = format!(
        "holds {what} beside the adapter, which B A cannot express and which would be lost: {}{more}",
        shown.join(", ")
    );
    Problem::new("trained-weights", name, message, LOST)
}

/// What to do about weights that are no part of what is read.
const LOST: &str = "merge them into the base with the tool that trained them, or train without them; to use the adapter without \
     them, move the file out of the directory";

/// Files that are not opened: what is known of them is their name and kind.
fn unopened(name: &str, path: &Path, kind: &FileKind, is_model_dir: bool) -> Found {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    if matches!(stem, "adapter_model" | "adapters") {
        return Found::LeftOut(COPIES);
    }
    // Where git fetched a part of a repository, names are all there is.
    let is_pointer = matches!(kind, FileKind::LfsPointer(_) | FileKind::AnnexPointer);
    if is_pointer && stem.ends_with("_adapters") {
        return Found::LeftOut(CHECKPOINTS);
    }
    if is_pointer && is_model_dir && name.starts_with("model") {
        return Found::LeftOut(MODELS);
    }
    const EXPORTS: [&str; 5] = [
        "model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.h5",
    ];
    if EXPORTS.contains(&name) {
        return Found::LeftOut(MODELS);
    }
    let is_gguf = path
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    if is_gguf {
        return Found::LeftOut(MODELS);
    }
    let kind = match kind {
        FileKind::Unknown => "a file of weights".to_owned(),
        kind => kind.to_string(),
    };
    let message = format!(
        "{kind} beside the adapter, which is not opened and may hold weights that were trained with it"
    );
    Found::Problem(Problem::new("trained-weights", name, message, LOST))
}

/// A GGUF file is complete in itself.
fn gguf(path: &Path) -> &'static str {
    match GgufFile::open(path) {
        Ok(file) if file.text("general.type") == Some("adapter") => COPIES,
        _ => MODELS,
    }
}

/// The module of a LoRA tensor, without what PEFT puts before it; none if it is another tensor.
pub(crate) fn module_of(name: &str) -> Option<String> {
    let at = name
        .find(".lora_")
        .filter(|at| !name[at + 1..].starts_with("lora_embedding"))?;
    let module = &name[..at];
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    (!module.is_empty()).then(|| module.to_owned())
}
