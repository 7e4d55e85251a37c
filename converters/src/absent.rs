//! Where no adapter can be read: what lies there instead, and the path or the file that is missing.

use std::fs;
use std::path::{Path, PathBuf};

use crate::beside::{checkpoint_number, module_of};
use crate::error::Error;
use crate::foreign::FileKind;
use crate::formats::gguf_lora::is_gguf;
use crate::formats::mlx;
use crate::formats::peft::read::{CONFIG_FILE, WEIGHTS_FILE};
use crate::problem::Problem;
use crate::source::Source;
use crate::tensors::gguf::GgufFile;
use crate::tensors::safetensors_file::SafetensorsFile;

/// Most paths that are pointed at.
const SHOWN: usize = 20;
/// Beginnings of names that tools for image models give to LoRA tensors.
const IMAGE_NAMES: [&str; 8] = [
    "lora_unet_",
    "lora_te",
    "lora_transformer_",
    "lora_prior_",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "diffusion_model.",
];
const HUSK: &str = "gather the weights before saving: zero.Init leaves none in one process; with DeepSpeed ZeRO-3 set \
     stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint";

/// Why no adapter can be read from `source`, which has no `adapter_config.json`.
pub(crate) fn without_config(source: &Source) -> Error {
    if let Some(path) = &source.named {
        return without_config_of(path, &source.dir);
    }
    let dir = &source.dir;
    let config = dir.join(CONFIG_FILE);
    let missing = |message: String| Error::not_found(&config, message);
    for name in [WEIGHTS_FILE, mlx::WEIGHTS_FILE] {
        if dir.join(name).is_file() {
            return without_config_of(&dir.join(name), dir);
        }
    }
    let mut adapters = adapters_in(dir);
    if adapters.is_empty() {
        let inner = entries(dir, Path::is_dir);
        adapters = inner.iter().flat_map(|dir| adapters_in(dir)).collect();
    }
    if !adapters.is_empty() {
        let message = format!(
            "there is no adapter in this directory itself; give one of those in it: {}",
            listed(&adapters)
        );
        return Error::not_found(dir, message);
    }
    let files = entries(dir, |path| path.is_file());
    let weights: Vec<PathBuf> = files
        .into_iter()
        .filter(|path| {
            is_gguf(path)
                || path
                    .extension()
                    .is_some_and(|ending| ending == "safetensors")
        })
        .collect();
    if dir.join("config.json").is_file() {
        let message = "holds a model, not an adapter: give it with -m";
        return Error::not_found(dir, message);
    }
    match weights.as_slice() {
        [] => missing(
            "missing; an adapter's directory holds this file and adapter_model.safetensors (PEFT) or adapters.safetensors (mlx-lm)"
                .to_owned(),
        ),
        [one] if !is_gguf(one) => without_config_of(one, dir),
        [one] => match GgufFile::open(one) {
            Err(error) => error,
            Ok(_) => Error::not_found(dir, "holds a GGUF file that is no LoRA: a model is given with -m"),
        },
        several => missing(format!(
            "missing; there are files of weights: give the one that is meant by its name: {}",
            listed(several)
        )),
    }
}

/// Why the file at `path` cannot be read without the `adapter_config.json` of `dir`: by its tensors.
fn without_config_of(path: &Path, dir: &Path) -> Error {
    let config = dir.join(CONFIG_FILE);
    let kind = FileKind::read(path).unwrap_or(FileKind::Unknown);
    let file = match SafetensorsFile::open(path) {
        Ok(file) => file,
        Err(error) if kind == FileKind::Safetensors || error.code() != "malformed" => return error,
        Err(_) => {
            let message = "not an adapter: neither a safetensors nor a GGUF file";
            return Error::malformed(path, message);
        }
    };
    if let Some(problem) = foreign_adapter(path, &file) {
        return problem.into();
    }
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(rank) = mlx_rank(&file) {
        let message = format!(
            "missing, and {file_name} holds mlx-lm's tensors without rank and scale; write the file with {{\"fine_tune_type\": \"lora\", \
             \"lora_parameters\": {{\"rank\": {rank}, \"scale\": SCALE, \"dropout\": 0.0}}}}, where SCALE is that of the training \
             (mlx-lm's default is 20.0)"
        );
        return Error::not_found(&config, message);
    }
    if file.names().any(|name| module_of(name).is_some()) {
        let message = format!(
            "missing; {file_name} holds the tensors of a LoRA, and r, lora_alpha and target_modules stand in this file: fetch or save it too"
        );
        return Error::not_found(&config, message);
    }
    let names: Vec<&str> = file.names().take(3).collect();
    let message = format!(
        "holds no adapter: its tensors are {}, ...",
        names.join(", ")
    );
    let fix = "give an adapter; a model is given with -m";
    Problem::new("no-adapter", quoted(path), message, fix).into()
}

/// Why no weights are found beside the `adapter_config.json` in `dir`.
pub(crate) fn without_weights(dir: &Path, wanted: &str) -> Error {
    let path = dir.join(wanted);
    let files = entries(dir, |path| path.is_file());
    let holds_lora = |path: &&PathBuf| {
        path.extension()
            .is_some_and(|ending| ending == "safetensors")
            && SafetensorsFile::open(path)
                .is_ok_and(|file| file.names().any(|name| module_of(name).is_some()))
    };
    let others: Vec<PathBuf> = files.iter().filter(holds_lora).cloned().collect();
    if !others.is_empty() {
        let message = format!(
            "missing; if it is another file that is meant, give it by its name: {}",
            listed(&others)
        );
        return Error::not_found(&path, message);
    }
    let has_numpy = files.iter().find(|path| {
        let ending = path.extension().is_some_and(|ending| ending == "npz");
        ending && FileKind::read(path).is_ok_and(|kind| kind == FileKind::Numpy)
    });
    if let Some(numpy) = has_numpy {
        let name = numpy.file_name().unwrap_or_default().to_string_lossy();
        let message = format!(
            "missing; {name} is what mlx-lm wrote before 2024: in Python, mlx.core.save_safetensors(\"{wanted}\", dict(mlx.core.load(\"{name}\")))"
        );
        return Error::not_found(&path, message);
    }
    Error::not_found(
        &path,
        "an adapter's directory must hold this file beside adapter_config.json",
    )
}

/// What keeps `file` from being an adapter of a language model at all: no tensor, or those of an image model.
pub(crate) fn foreign_adapter(path: &Path, file: &SafetensorsFile) -> Option<Problem> {
    let mut names = file.names();
    let husk = |message| Some(Problem::new("no-tensors", quoted(path), message, HUSK));
    if file.names().next().is_none() {
        return husk("holds no tensor, as DeepSpeed ZeRO-3 leaves a file that one process wrote");
    }
    let is_hollow = |name| file.info(name).is_some_and(|(_, shape)| shape.contains(&0));
    if file.names().all(is_hollow) {
        return husk("holds tensors without elements, as DeepSpeed ZeRO-3 leaves them");
    }
    let is_image = |name: &str| {
        let marks = IMAGE_NAMES.iter().any(|mark| name.starts_with(mark));
        marks
            || name.contains("transformer_blocks.")
            || name.ends_with(".lora_down.weight")
            || name.ends_with(".lora_up.weight")
    };
    let name = names.find(|name| is_image(name))?;
    let message = format!(
        "the LoRA of an image model, as kohya-ss' scripts and diffusers write it ({name}); adapters of language models are read here"
    );
    let fix = "use it with the tool for image models that it was made for";
    Some(Problem::new("image-lora", quoted(path), message, fix))
}

/// The rank of a file of mlx-lm: A is `[in, r]` there.
fn mlx_rank(file: &SafetensorsFile) -> Option<usize> {
    let name = file.names().find(|name| name.ends_with(".lora_a"))?;
    let (_, shape) = file.info(name)?;
    shape.last().copied()
}

/// The GGUF LoRA of `dir`, if it is the one adapter there.
pub(crate) fn gguf_in(dir: &Path) -> Option<PathBuf> {
    if dir.join(CONFIG_FILE).exists() {
        return None;
    }
    let is_lora = |path: &Path| {
        path.is_file()
            && is_gguf(path)
            && GgufFile::open(path).is_ok_and(|file| file.text("general.type") == Some("adapter"))
    };
    let mut found = entries(dir, is_lora).into_iter();
    match (found.next(), found.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

/// Directories in `dir` that hold an adapter: best, the checkpoints from the newest on, others.
fn adapters_in(dir: &Path) -> Vec<PathBuf> {
    let holds_adapter = |path: &Path| path.join(CONFIG_FILE).is_file() || gguf_in(path).is_some();
    let mut found = entries(dir, holds_adapter);
    found.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = checkpoint_number(&name);
        (
            name != "best",
            number.is_none(),
            std::cmp::Reverse(number),
            name.into_owned(),
        )
    });
    found
}

fn entries(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| wanted(path))
        .collect();
    paths.sort();
    paths
}

/// The first paths, and how many more there are.
fn listed(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(SHOWN).map(|path| quoted(path)).collect();
    match paths.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        n => format!("{} and {n} more", shown.join(", ")),
    }
}

fn quoted(path: &Path) -> String {
    format!("`{}`", path.display())
}
