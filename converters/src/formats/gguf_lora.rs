//! llama.cpp's GGUF LoRA: names, the row order of q and k, and the scale.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::iter;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::lora::LoraOptions;
use super::{About, Format, Pairs, ReadOptions, Written};
use crate::absent;
use crate::adapter::{Adapter, Site};
use crate::architecture::{self, BODY, FAMILIES, Family, HEAD, Role};
use crate::config::{AdapterConfig, TargetModules};
use crate::error::{Error, Result};
use crate::files::OVERWRITE;
use crate::formats::peft::read::non_finite;
use crate::module_path::layer_of;
use crate::problem::Problem;
use crate::tensors::gguf::GgufFile;
use crate::tensors::gguf_write::{Entry, dtype_of, write_gguf};
use crate::tensors::tensor::Tensor;
use crate::validate::runtime::Runtime;

const UNSUPPORTED: &str = "convert it with llama.cpp's own tools, or merge it into the base";

/// The fix for a file that is not a LoRA for this base.
const OTHER_BASE: &str = "give a LoRA made for this base";

/// Factors of the rotary embedding, which the base's configuration determines. Older versions of llama.cpp's converter
/// left them in adapters (llama.cpp#9114); llama.cpp does not load such a file.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// llama.cpp's adapter file.
#[derive(Debug)]
pub(crate) struct GgufLora;

impl Format for GgufLora {
    fn about(&self) -> &'static About {
        &About {
            name: "gguf",
            aliases: &["llamacpp", "llama.cpp", "llama-cpp"],
            label: "GGUF LoRA",
            reads: Some("GGUF LoRA file"),
            writes: Some("One GGUF file for llama.cpp: the posterior mean"),
            file_name: Some("adapter.gguf"),
            needs_base: true,
            keeps_posterior: false,
            has_peft_settings: false,
            runtimes: &[Runtime::LlamaCpp],
        }
    }

    fn sniff(&self, path: &Path) -> bool {
        is_gguf(path) || absent::gguf_in(path).is_some()
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        Ok(vec![file_of(path)])
    }

    /// The scaling is alpha divided by each module's own rank, or 1 if alpha is 0, as in llama.cpp.
    fn read(&self, path: &Path, options: &ReadOptions<'_>) -> Result<Adapter> {
        let path = &file_of(path);
        let file = GgufFile::open(path)?;
        let base = Base::from_config(required(options.base_config, path)?)?;
        read_file(path, &file, Some(&base))
    }

    /// The rows of q and k keep their stored order, which changes no norm.
    fn read_without_base(&self, path: &Path) -> Result<Adapter> {
        let path = &file_of(path);
        read_file(path, &GgufFile::open(path)?, None)
    }

    /// Writes the posterior mean. If llama.cpp stores the rows of q and k in another order (see
    /// [`crate::architecture::Gguf::interleaved`]), the rows of B are reordered in the same way.
    fn write(
        &self,
        adapter: &Adapter,
        path: &Path,
        options: &LoraOptions,
        base_config: Option<&Map<String, Value>>,
    ) -> Result<Written> {
        let base_config = required(base_config, path)?;
        if path.exists() && !options.overwrite {
            return Err(Error::exists(path, OVERWRITE));
        }
        let base = Base::from_config(base_config)?;
        let (plain, mut report) = adapter.to_lora(options.dtype)?;
        report.dropped_keys.extend(plain.config.described(&[
            "revision",
            "task_type",
            "lora_dropout",
        ]));
        let notes = plain.metadata.keys().filter(|key| *key != "format");
        report
            .dropped_keys
            .extend(notes.map(|key| format!("metadata {key}")));
        let mut problems = Vec::new();
        let mut tensors = Vec::new();
        let is_tied = architecture::ties_embeddings(base_config) == Some(true);
        for site in &plain.sites {
            let mut refuse = |code, message| {
                problems.push(Problem::new(code, &site.name, message, UNSUPPORTED));
            };
            if site.name == HEAD.name && is_tied {
                let message =
                    "is tied to the embedding in this base, and llama.cpp has no such tensor then";
                refuse("lm-head", message);
                continue;
            }
            if is_of_mixture(base.family, &site.name) {
                refuse("experts", ON_EXPERTS);
                continue;
            }
            let Some(name) = to_gguf_name(&base, &site.name) else {
                refuse("no-gguf-name", "has no name in llama.cpp");
                continue;
            };
            let lora_b = base.reorder(&site.name, &site.lora_b, true)?;
            tensors.push((format!("{name}.weight.lora_a"), site.lora_a.clone()));
            tensors.push((format!("{name}.weight.lora_b"), lora_b));
        }
        Error::refuse_any(path, problems)?;
        let mut metadata = vec![
            (
                "general.architecture",
                Entry::Text(base.family.gguf.architecture.into()),
            ),
            ("general.type", Entry::Text("adapter".into())),
            ("adapter.type", Entry::Text("lora".into())),
            ("adapter.lora.alpha", Entry::F32(report.lora_alpha as f32)),
            ("general.quantization_version", Entry::U32(2)),
        ];
        if let Some(name) =
            (plain.config.base_model_name_or_path.as_ref()).filter(|name| !name.is_empty())
        {
            metadata.push((N_BASES, Entry::U32(1)));
            metadata.push((BASE_NAME, Entry::Text(name.clone())));
            if is_hub_id(name) {
                metadata.push((BASE_URL, Entry::Text(format!("{HUB}{name}"))));
            }
        }
        write_gguf(path, &metadata, &tensors)?;
        Ok(Written {
            what: "GGUF LoRA",
            report,
            note: base
                .interleaved
                .map(|_| "the rows of B of q and k are in llama.cpp's order"),
        })
    }
}

/// Names of the models that an adapter is for, as gguf-py writes them.
const N_BASES: &str = "general.base_model.count";
const BASE_NAME: &str = "general.base_model.0.name";
const BASE_URL: &str = "general.base_model.0.repo_url";
/// What stands before the name of a repository in its address.
const HUB: &str = "https://huggingface.co/";

/// Whether `name` reads as a repository of the Hub, `ORG/NAME`, and not as a path that is there.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(known)
    };
    let parts = name.split_once('/');
    parts.is_some_and(|(org, name)| part(org) && part(name)) && !Path::new(name).exists()
}

/// The base model that the metadata of a GGUF adapter name: a repository of the Hub, else the model's name.
pub fn base_named_in(file: &GgufFile) -> Option<&str> {
    let repository = file.text(BASE_URL).and_then(|url| url.strip_prefix(HUB));
    repository
        .filter(|name| !name.is_empty())
        .or_else(|| file.text(BASE_NAME))
}

fn required<'a>(
    base_config: Option<&'a Map<String, Value>>,
    path: &Path,
) -> Result<&'a Map<String, Value>> {
    base_config.ok_or_else(|| {
        Error::malformed(
            path,
            "a GGUF LoRA can only be used with the base model's configuration (the order of the rows of q and k \
             depends on it); convert it to a directory first, with the base at hand",
        )
    })
}

/// Returns the tensors of the file at `path` that are not read because they are not part of the update.
pub(crate) fn unread(path: &Path) -> Vec<String> {
    let path = file_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match GgufFile::open(&path) {
        Ok(file) if file.tensor(ROPE_FREQS).is_some() => vec![format!("{name}: {ROPE_FREQS}")],
        _ => Vec::new(),
    }
}

/// The properties of a base model that GGUF depends on.
struct Base {
    family: &'static Family,
    /// Path of the decoder without its head.
    body: &'static str,
    /// Numbers of query heads and of key and value heads, if llama.cpp stores their rows in another order.
    interleaved: Option<(usize, usize)>,
}

/// Whether `path` is a GGUF file, or is meant to be one: by its first bytes or its name.
pub fn is_gguf(path: &Path) -> bool {
    let mut extension = path.extension().into_iter();
    if extension.any(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return !path.is_dir();
    }
    let mut magic = [0; 4];
    let read = |mut file: File| file.read_exact(&mut magic);
    path.is_file() && File::open(path).and_then(read).is_ok() && magic == *b"GGUF"
}

/// Returns the file that `path` refers to: `path` itself, or the one GGUF LoRA in this directory.
fn file_of(path: &Path) -> PathBuf {
    let inside = path.is_dir().then(|| absent::gguf_in(path)).flatten();
    inside.unwrap_or_else(|| path.to_path_buf())
}

impl Base {
    /// Reads the base's `config.json`.
    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let wrong = |problem: Problem| problem.exit(2);
        let family = architecture::family(config).map_err(wrong)?;
        let heads = family.gguf.interleaved.then(|| architecture::heads(config));
        Ok(Self {
            family,
            body: architecture::body(config),
            interleaved: heads.transpose().map_err(wrong)?,
        })
    }

    /// Returns B with its rows in llama.cpp's order, or back in Hugging Face's order.
    fn reorder(&self, module: &str, b: &Tensor, to_gguf: bool) -> Result<Tensor> {
        let roles = in_block(module, self.body)
            .and_then(|(_, leaf)| self.family.projection(leaf))
            .map(|projection| projection.parts);
        let n_heads = match (self.interleaved, roles) {
            (Some((query, _)), Some([Role::Query])) => query,
            (Some((_, key)), Some([Role::Key])) => key,
            _ => return Ok(b.clone()),
        };
        let n_rows = b.shape().first().copied().unwrap_or(0);
        let halves = n_heads.checked_mul(2);
        if n_rows == 0 || halves.is_none_or(|halves| n_rows % halves != 0) {
            let message = format!("{n_rows} rows cannot be split over {n_heads} heads in halves");
            return Err(Error::tensor(module, message));
        }
        // Hugging Face keeps the halves of a rotated pair apart, llama.cpp side by side.
        b.head_rows(n_rows / n_heads, to_gguf)
    }
}

/// Returns the number of a block of the decoder at `body`, and the rest of the path.
fn in_block<'a>(module: &'a str, body: &str) -> Option<(usize, &'a str)> {
    let (front, layer, leaf) = layer_of(module)?;
    (front.strip_suffix(".layers.")? == body).then_some((layer, leaf))
}

/// Returns the number of a block from llama.cpp's name, and the rest of the name.
fn in_llama_cpp(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// llama.cpp's name of a module.
fn to_gguf_name(base: &Base, module: &str) -> Option<String> {
    if module == HEAD.name {
        return Some(HEAD.gguf_name.to_owned());
    }
    let (layer, leaf) = in_block(module, base.body)?;
    let projection = base.family.projection(leaf)?;
    Some(format!("blk.{layer}.{}", projection.gguf_name))
}

/// The problem with an adapter on a mixture of experts.
const ON_EXPERTS: &str = "is part of a mixture of experts, which carries no adapter here";

/// Whether a module is the router or an expert of the family's mixture, by its Hugging Face or llama.cpp name.
fn is_of_mixture(family: &Family, module: &str) -> bool {
    let (Some((_, inner)), Some(experts)) = (in_llama_cpp(module), family.experts) else {
        return family.is_in_mixture(module);
    };
    let mut stacks = experts.projections.iter();
    inner == experts.gguf_router || stacks.any(|(_, gguf_name)| inner == *gguf_name)
}

/// Returns Hugging Face's name of a module in the decoder at `body`, from the first of `families` that has the module.
fn from_gguf_name(families: &[&Family], body: &str, name: &str) -> Option<String> {
    if name == HEAD.gguf_name {
        return Some(HEAD.name.to_owned());
    }
    let (layer, short) = in_llama_cpp(name)?;
    let mut known = families.iter();
    let projection = known.find_map(|family| family.projection(short))?;
    Some(format!("{body}.layers.{layer}.{}", projection.name))
}

/// Reads every module of `file`. Without a base, the rows of B keep their stored order.
fn read_file(path: &Path, file: &GgufFile, base: Option<&Base>) -> Result<Adapter> {
    let mut problems = Vec::new();
    let mut notes = Vec::new();
    let alpha = check_metadata(file, base, &mut problems, &mut notes);
    let families = families(file, base);
    let body = base.map_or(BODY, |base| base.body);
    let mut pairs = Pairs::default();
    for name in file.names().filter(|name| *name != ROPE_FREQS) {
        match read_part(file, name, &families, body) {
            Ok((module, idx, tensor)) => {
                pairs.0.entry(module).or_default()[idx] = Some(tensor);
            }
            Err(problem) => problems.push(problem),
        }
    }
    let mut sites = Vec::new();
    let (shown, again) = (path.display().to_string(), "make the file again");
    for (module, lora_a, b) in pairs.complete(&shown, [UNSUPPORTED, again], &mut problems) {
        let rank = match (lora_a.shape(), b.shape()) {
            ([r_a, n_in], [n_out, r_b]) if r_a == r_b && r_a * n_in * n_out > 0 => *r_a,
            _ => {
                let message = format!(
                    "expected lora_a [r, in] and lora_b [out, r], found {lora_a:?} and {b:?}"
                );
                problems.push(Problem::new("shape", module, message, again));
                continue;
            }
        };
        let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
        sites.push(Site {
            rank,
            alpha,
            scaling: alpha / rank as f64,
            lora_a,
            lora_b: match base {
                Some(base) => base.reorder(&module, &b, false)?,
                None => b,
            },
            posterior: None,
            beyond: None,
            triplets: None,
            name: module,
        });
    }
    problems.extend(non_finite(&sites));
    Error::refuse_any(path, problems)?;
    Ok(Adapter {
        config: AdapterConfig {
            base_model_name_or_path: base_named_in(file).map(str::to_owned),
            ..config_of(&sites)
        },
        sites,
        format: "gguf-lora",
        metadata: BTreeMap::new(),
        notes,
    })
}

/// Returns the families that may name the file's tensors: the base's, or without a base all, those of the file's
/// architecture first.
fn families(file: &GgufFile, base: Option<&Base>) -> Vec<&'static Family> {
    if let Some(base) = base {
        return vec![base.family];
    }
    let architecture = file.text("general.architecture");
    let mut families = FAMILIES.to_vec();
    families.sort_by_key(|family| !architecture.is_some_and(|name| family.gguf.has_name(name)));
    families
}

/// Checks kind and architecture, and returns alpha.
fn check_metadata(
    file: &GgufFile,
    base: Option<&Base>,
    problems: &mut Vec<Problem>,
    notes: &mut Vec<String>,
) -> f64 {
    let mut refuse = |code, key: &str, message: &str, fix| {
        problems.push(Problem::new(code, key, message, fix));
    };
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let found = file.text(key);
        if found != Some(expected) {
            let message = format!("expected {expected}, found {}", found.unwrap_or("nothing"));
            refuse("gguf-metadata", key, &message, OTHER_BASE);
        }
    }
    const ARCHITECTURE: &str = "general.architecture";
    let found = file.text(ARCHITECTURE);
    if let Some(gguf) = base.map(|base| &base.family.gguf)
        && !found.is_some_and(|found| gguf.has_name(found))
    {
        let names = iter::once(gguf.architecture).chain(gguf.also.iter().copied());
        let names = names.collect::<Vec<_>>().join(" or ");
        let message = format!("expected {names}, found {}", found.unwrap_or("nothing"));
        refuse("gguf-metadata", ARCHITECTURE, &message, OTHER_BASE);
    }
    let metadata = file.metadata();
    let is_alora = |key: &&String| key.starts_with("adapter.alora");
    for key in metadata.keys().filter(is_alora) {
        let message = "activated LoRA: the update depends on the tokens";
        refuse("alora", key, message, UNSUPPORTED);
    }
    const ALPHA: &str = "adapter.lora.alpha";
    const DESCRIBES: [&str; 3] = ["adapter.type", ALPHA, "adapter.lora.task_name"];
    for key in metadata.keys() {
        if key.starts_with("general.") || DESCRIBES.contains(&&**key) || is_alora(&key) {
            continue;
        }
        if key == "adapter.lora.prompt_prefix" {
            let prefix = file.text(key).unwrap_or_default();
            notes.push(format!("{key}: prompts are to begin with {prefix:?}, which nothing adds here; it is left out"));
        } else if key.starts_with("adapter.") {
            refuse(
                "gguf-metadata",
                key,
                "not understood: it may change what the adapter computes",
                UNSUPPORTED,
            );
        } else {
            notes.push(format!("{key}: not of an adapter, and left out"));
        }
    }
    let alpha = metadata.get(ALPHA).and_then(|value| value.as_f64());
    alpha.filter(|alpha| alpha.is_finite()).unwrap_or_else(|| {
        refuse(
            "gguf-metadata",
            ALPHA,
            "missing or not a number",
            UNSUPPORTED,
        );
        1.0
    })
}

/// Returns the module, the index (0 for A, 1 for B) and the values of one tensor.
fn read_part(
    file: &GgufFile,
    name: &str,
    families: &[&Family],
    body: &str,
) -> Result<(String, usize, Tensor), Problem> {
    let refuse = |code, message: String| Problem::new(code, name, message, UNSUPPORTED);
    let mut places = [(".weight.lora_a", 0), (".weight.lora_b", 1)].into_iter();
    let on_experts = |stem: &str| families.iter().any(|family| is_of_mixture(family, stem));
    if places
        .clone()
        .any(|(suffix, _)| name.strip_suffix(suffix).is_some_and(on_experts))
    {
        return Err(refuse("experts", ON_EXPERTS.to_owned()));
    }
    let module = places.find_map(|(suffix, idx)| {
        let module = name.strip_suffix(suffix)?;
        Some((from_gguf_name(families, body, module)?, idx))
    });
    let (Some((module, idx)), Some(tensor)) = (module, file.tensor(name)) else {
        return Err(refuse("unknown-tensor", "not understood".into()));
    };
    let dtype = dtype_of(tensor.ggml_type).ok_or_else(|| {
        let message = format!("ggml type {} is quantised or unknown", tensor.ggml_type);
        refuse("dtype", message)
    })?;
    // A file may omit trailing dimensions.
    let mut shape = tensor.dims();
    while shape.len() < 2 {
        shape.insert(0, 1);
    }
    let tensor = file
        .mapped(name, dtype, &shape)
        .ok_or_else(|| refuse("shape", format!("{shape:?} is not the shape of its data")))?;
    Ok((module, idx, tensor))
}

/// Returns a configuration that describes the modules.
fn config_of(sites: &[Site]) -> AdapterConfig {
    let mut config = AdapterConfig {
        target_modules: TargetModules::List(sites.iter().map(|site| site.name.clone()).collect()),
        task_type: Some("CAUSAL_LM".into()),
        inference_mode: true,
        ..AdapterConfig::default()
    };
    config.describe_ranks(sites);
    config
}

#[cfg(test)]
mod tests;
