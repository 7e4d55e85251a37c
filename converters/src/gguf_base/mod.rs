//! A GGUF base model turned into a Hugging Face directory: weights, configuration, tokenizer and chat template.
//!
//! What GGUF does not say is decided here and reported in [`ImportReport::notes`]; what cannot be decided is refused by
//! name. The directory appears complete or not at all. Tokenizers are the caller's: see [`Tools`].

mod bpe;
mod keys;
mod metadata;
mod model;
mod options;
mod pre_tokenizer;
pub(crate) mod reference;
mod rope;
mod sentencepiece;
mod source;
mod tokenizer;
mod weights;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::architecture::{ModelShape, TensorShape};
use crate::error::{Error, Result};
use crate::files::{is_occupied, replace_dir, write_new_dir, write_text};
use crate::problem::Problem;
use crate::tensors::dtype::DType;
use crate::tensors::gguf::GgufFile;

/// How a model is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// Element type of the written weights: F32 keeps every value of the file exactly, BF16 rounds to half the size.
    pub dtype: DType,
    /// Whether a destination that is not empty is replaced.
    pub force: bool,
    /// Largest data size of one safetensors file, bytes; a tensor is never split. 5 GB as in Hugging Face's own writers.
    pub max_shard_bytes: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            force: false,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// What this crate leaves to the caller's libraries; problems are told as text.
pub struct Tools<'a> {
    /// What is wrong with a tokenizer.json.
    pub check_tokenizer: &'a dyn Fn(&Value) -> Vec<String>,
}

/// What was imported, and what had to be decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ImportReport {
    /// `model_type` of the written config.json.
    pub model_type: String,
    /// Weights written; a tied output layer is counted once.
    pub n_parameters: u64,
    /// Tensors written.
    pub n_tensors: usize,
    /// How many of the file's tensors had which block format.
    pub block_formats: BTreeMap<String, usize>,
    /// Element type written: `f32` or `bf16`.
    pub dtype: String,
    /// Whether the output layer shares the embedding.
    pub tie_word_embeddings: bool,
    /// Names of the files written, sorted.
    pub files: Vec<String>,
    /// Decisions where the file left a choice, and what was not carried over.
    pub notes: Vec<String>,
}

/// Imports the model in `file` into the new directory `out_dir`; `progress` is told the bytes written and their total.
///
/// Weights are dequantised to float32 (the products ggml computes) and written a few megabytes at a time, as transformers has them:
/// query and key rows in its rotary order, experts one by one, norms without what llama.cpp adds. Beside them: config.json,
/// generation_config.json, tokenizer.json, tokenizer_config.json and, if the file holds them, chat_template.jinja and the named templates
/// in `additional_chat_templates`.
///
/// # Errors
/// A refusal with every reason for a model that cannot be represented; `malformed` for a file that is not well formed or a
/// weight that is not finite; `exists` for a destination that holds something. Nothing is left behind.
pub fn import_gguf(
    file: &Path,
    out_dir: &Path,
    options: &ImportOptions,
    tools: &Tools<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport> {
    import(
        file,
        out_dir,
        (options, options.force),
        tools,
        &mut |dir, base| weights::write(dir, base, options, progress),
    )
}

/// As [`import_gguf`] in float32, but the weights stay in `file`: the directory refers to it, and [`ModelFiles`](crate::ModelFiles)
/// decodes its blocks when they are asked for. `progress` is told the bytes that were looked through for values that are not finite.
///
/// # Errors
/// As [`import_gguf`].
pub fn refer_to_gguf(
    file: &Path,
    out_dir: &Path,
    tools: &Tools<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport> {
    let options = ImportOptions::default();
    import(file, out_dir, (&options, false), tools, &mut |dir, base| {
        weights::check(base, progress)?;
        reference::write(dir, &base.source)
    })
}

/// A file that holds a model.
pub(crate) struct GgufBase {
    pub(crate) source: GgufFile,
    pub(crate) shape: ModelShape,
    /// Its tensors in the order of their names.
    pub(crate) plan: Vec<TensorShape>,
}

/// Writes everything but the weights, which `write` adds.
fn import(
    file: &Path,
    out_dir: &Path,
    (options, force): (&ImportOptions, bool),
    tools: &Tools<'_>,
    write: &mut dyn FnMut(&Path, &GgufBase) -> Result<()>,
) -> Result<ImportReport> {
    if !force && is_occupied(out_dir)? {
        let fix = "choose another directory or pass --force";
        return Err(Error::exists(out_dir, fix));
    }
    let source = GgufFile::open(file)?;
    let mut findings = Findings::default();
    let config = model::read(&source, &mut findings);
    let vocabulary = tokenizer::read(&source, &mut findings);
    let (Some(mut config), Some(vocabulary)) = (config, vocabulary) else {
        return Err(Error::refused(file, findings.problems));
    };
    let shape =
        ModelShape::from_config(&config).map_err(|problems| Error::refused(file, problems))?;
    let plan = weights::plan(&source, &shape, &mut findings);
    tokenizer::check(&vocabulary, shape.vocab_size, tools, &mut findings);
    Error::refuse_any(file, findings.problems)?;

    let (torch_dtype, dtype) = match options.dtype {
        DType::BF16 => ("bfloat16", "bf16"),
        _ => ("float32", "f32"),
    };
    for (key, value) in [
        ("bos_token_id", json!(vocabulary.bos)),
        ("eos_token_id", json!(vocabulary.eos)),
        ("pad_token_id", json!(vocabulary.pad)),
        ("torch_dtype", json!(torch_dtype)),
    ] {
        config.insert(key.to_owned(), value);
    }
    let base = GgufBase {
        source,
        shape,
        plan,
    };
    let mut files = Vec::new();
    let fill = |dir: &Path| {
        write_json(dir, "config.json", &Value::Object(config))?;
        write_json(dir, "generation_config.json", &vocabulary.generation)?;
        tokenizer::write(dir, &vocabulary, base.shape.max_position_embeddings)?;
        write(dir, &base)?;
        files = names_in(dir)?;
        let templates = dir.join(tokenizer::TEMPLATES);
        if templates.is_dir() {
            files.retain(|name| name != tokenizer::TEMPLATES);
            let names = names_in(&templates)?.into_iter();
            files.extend(names.map(|name| format!("{}/{name}", tokenizer::TEMPLATES)));
        }
        Ok::<(), Error>(())
    };
    match force {
        true => replace_dir(out_dir, fill)?,
        false => write_new_dir(out_dir, fill)?,
    }
    Ok(ImportReport {
        model_type: base.shape.family.model_type.to_owned(),
        n_parameters: base.plan.iter().map(weights::n_elements).sum(),
        n_tensors: base.plan.len(),
        block_formats: base.source.block_formats(),
        dtype: dtype.to_owned(),
        tie_word_embeddings: base.shape.tie_word_embeddings,
        files,
        notes: findings.notes,
    })
}

/// Names of what lies in `dir`, sorted.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let name = entry.map_err(Error::io("read", dir))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<()> {
    write_text(&dir.join(name), &format!("{value:#}\n"))
}

/// What reading has come across so far.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<Problem>,
    notes: Vec<String>,
}

impl Findings {
    fn problem(
        &mut self,
        code: &'static str,
        at: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problems.push(Problem::new(code, at, message, fix));
    }

    /// Something wrong with the vocabulary under `key`.
    fn tokenizer(&mut self, key: &str, message: impl Into<String>) {
        self.problem("tokenizer", key, message, "");
    }

    fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}
