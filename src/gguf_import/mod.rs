//! A GGUF base model turned into a Hugging Face directory: weights, configuration, tokenizer and chat template.
//!
//! What GGUF does not say is decided here and reported in [`ImportReport::notes`]; what cannot be decided is refused by
//! name. The directory appears complete or not at all.

mod architecture;
mod bpe;
mod config;
mod output;
mod pre_tokenizer;
mod rope;
mod sentencepiece;
mod source;
mod tensors;
#[cfg(test)]
mod testing;
mod tokenizer;
mod weights;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use monteclora_converters::{Problem, Problems};
use serde::Serialize;

use source::Source;

/// Element type of the written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ImportDType {
    /// 32-bit floats: every value of the file exactly.
    #[default]
    F32,
    /// Half the size; each value is rounded to the nearest bfloat16.
    Bf16,
}

impl ImportDType {
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// How a model is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// Element type of the written weights.
    pub dtype: ImportDType,
    /// Whether a destination that is not empty is replaced.
    pub force: bool,
    /// Largest data size of one safetensors file, bytes; a tensor is never split. 5 GB as in Hugging Face's own writers.
    pub max_shard_bytes: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            dtype: ImportDType::default(),
            force: false,
            max_shard_bytes: 5_000_000_000,
        }
    }
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
    /// Element type written.
    pub dtype: ImportDType,
    /// Whether the output layer shares the embedding.
    pub tie_word_embeddings: bool,
    /// Names of the files written, sorted.
    pub files: Vec<String>,
    /// Decisions where the file left a choice, and what was not carried over.
    pub notes: Vec<String>,
}

/// Why a GGUF file was not imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The operating system refused.
    #[error("cannot {action} `{}`", .path.display())]
    Io {
        /// What was being done: "read", "write", ...
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The destination may not be replaced.
    #[error("`{}` exists and is not empty; choose another directory or pass --force", .path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// The file is not a well-formed GGUF file.
    #[error(transparent)]
    Gguf(#[from] monteclora_converters::Error),
    /// The model cannot be represented; every reason is listed.
    #[error(transparent)]
    Refused(Problems),
    /// A tensor whose values cannot be used.
    #[error("`{}`: {tensor}: {message}", .path.display())]
    Weight {
        /// The GGUF file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
}

impl ImportError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Imports the model in `file` into the new directory `out_dir`; `progress` is told the bytes written and their total.
///
/// Weights are dequantised to float32 (the products ggml computes), the query and key rows of the llama architecture
/// put back into Hugging Face's rotary order, and written a few megabytes at a time. Beside them: config.json,
/// generation_config.json, tokenizer.json, tokenizer_config.json and, if the file holds one, chat_template.jinja.
///
/// # Errors
/// [`ImportError::Refused`] with every reason for a model that cannot be represented, [`ImportError::Gguf`] for a file
/// that is not well formed, [`ImportError::Weight`] for a weight that is not finite, [`ImportError::Exists`] for a
/// destination that holds something, [`ImportError::Io`]. Nothing is left behind.
pub fn import_gguf(
    file: &Path,
    out_dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport, ImportError> {
    output::check_destination(out_dir, options.force)?;
    let source = Source::open(file)?;
    let mut findings = Findings::default();
    let architecture = architecture::read(&source, &mut findings);
    let vocabulary = tokenizer::read(&source, &mut findings);
    let (Some(architecture), Some(vocabulary)) = (architecture, vocabulary) else {
        return Err(findings.refuse(file));
    };
    let plan = tensors::plan(&source, &architecture, &mut findings);
    tokenizer::check(&vocabulary, architecture.vocab_size, &mut findings);
    if !findings.problems.is_empty() {
        return Err(findings.refuse(file));
    }

    let directory = output::Directory::create(out_dir)?;
    config::write(&directory, &architecture, &vocabulary, options.dtype)?;
    tokenizer::write(&directory, &vocabulary, architecture.context_length)?;
    weights::write(&directory, &source, &plan, options, progress)?;
    let files = directory.publish(options.force)?;
    Ok(ImportReport {
        model_type: architecture.family.model_type().to_owned(),
        n_parameters: plan.iter().map(tensors::Planned::n_elements).sum(),
        n_tensors: plan.len(),
        block_formats: source.block_formats(),
        dtype: options.dtype,
        tie_word_embeddings: architecture.tied,
        files,
        notes: findings.notes,
    })
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
        location: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problems
            .push(Problem::new(code, location, message, fix));
    }

    fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    fn refuse(self, file: &Path) -> ImportError {
        ImportError::Refused(Problems {
            heading: Some(format!("`{}` is refused", file.display())),
            list: self.problems,
        })
    }
}

#[cfg(test)]
mod tests;
