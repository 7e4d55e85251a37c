//! The formats in which adapters are kept: each a file behind one trait, and the list of them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::adapter::Adapter;
use crate::beside::Beside;
use crate::error::{Error, Result};
use crate::model_files::ModelFiles;
use crate::problem::Problem;
use crate::tensors::tensor::Tensor;
use crate::validate::runtime::Runtime;
use lora::{LoraOptions, LoraReport};

pub(crate) mod gguf_lora;
pub(crate) mod lora;
pub(crate) mod mlx;
pub(crate) mod peft;

/// One way to keep an adapter on disk.
///
/// A format is a file that implements this and a line in [`FORMATS`]; the command line, `inspect` and `validate` know
/// formats by that list alone.
pub trait Format: fmt::Debug + Sync {
    /// What there is to say about it.
    fn about(&self) -> &'static About;

    /// Whether what is at `path` is of this format, by content and name.
    fn sniff(&self, path: &Path) -> bool;

    /// The files that [`Self::read`] reads from `path`.
    ///
    /// # Errors
    /// If there is no such path.
    fn files(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// Reads the adapter at `path`. What lies beside is not looked at: see [`read_as`].
    ///
    /// # Errors
    /// A refusal with everything that is not understood; `not-found` if there is nothing.
    fn read(&self, path: &Path, options: &ReadOptions<'_>) -> Result<Adapter>;

    /// Reads what can be known without a base: names, shapes and norms are right, updates need not be.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn read_without_base(&self, path: &Path) -> Result<Adapter> {
        self.read(path, &ReadOptions::default())
    }

    /// Writes `adapter` to `path`.
    ///
    /// # Errors
    /// If the format cannot hold it, or `path` is not free.
    fn write(
        &self,
        _adapter: &Adapter,
        _path: &Path,
        _options: &LoraOptions,
        _base_config: Option<&Map<String, Value>>,
    ) -> Result<Written> {
        Err(Problem::usage(format!("a {} is only read", self.about().label)).into())
    }
}

/// Every format. Reading tries them in this order, and takes what none knows for the first.
pub const FORMATS: [&dyn Format; 4] = [&peft::Peft, &lora::Lora, &mlx::Mlx, &gguf_lora::GgufLora];

/// What an adapter is read with.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOptions<'a> {
    /// `config.json` of the base, without which a GGUF LoRA cannot be read.
    pub base_config: Option<&'a Map<String, Value>>,
    /// The base, with which whole weights that are stored with the adapter are compared: a copy of the base's is left out, and
    /// noted in [`Adapter::notes`]. Without it they are refused, since they may have been trained.
    pub base: Option<&'a ModelFiles>,
    /// Whether names that a wrapper (torch.compile, FSDP, ...) changed are read as those of the modules inside, and noted. They are
    /// refused otherwise, since no program finds modules of such names.
    pub unwrap: bool,
}

impl<'a> From<&'a ModelFiles> for ReadOptions<'a> {
    fn from(base: &'a ModelFiles) -> Self {
        Self {
            base_config: Some(base.config()),
            base: Some(base),
            unwrap: false,
        }
    }
}

/// What the command line, `inspect` and `validate` know of a format.
#[derive(Debug)]
pub struct About {
    /// Name on the command line. What an adapter was read from, [`Adapter::format`], begins with it.
    pub name: &'static str,
    /// Other names that the command line takes.
    pub aliases: &'static [&'static str],
    /// What it is called in a sentence, such as "mlx-lm directory".
    pub label: &'static str,
    /// What is read, in the words of the command line's help; `None` if it is not offered there.
    pub reads: Option<&'static str>,
    /// What is written, in the words of the command line's help; `None` for a format that is only read.
    pub writes: Option<&'static str>,
    /// The usual name of the file, for a format that is one file and no directory.
    pub file_name: Option<&'static str>,
    /// Whether the `config.json` of the base is needed to read and to write it.
    pub needs_base: bool,
    /// Whether what is written holds the whole posterior.
    pub keeps_posterior: bool,
    /// Whether it holds PEFT's settings, which a runtime may refuse or leave unread.
    pub has_peft_settings: bool,
    /// The runtimes that read it.
    pub runtimes: &'static [Runtime],
}

/// What writing an adapter came to.
#[derive(Debug)]
pub struct Written {
    /// What was written, such as "PEFT MonteCLoRA".
    pub what: &'static str,
    /// What changed against the source.
    pub report: LoraReport,
    /// What the format itself did to every site.
    pub note: Option<&'static str>,
}

/// The format of what is at `path`.
pub fn format_of(path: &Path) -> &'static dyn Format {
    // A file is what it is, whatever lies beside it.
    let files = FORMATS
        .into_iter()
        .filter(|format| format.about().file_name.is_some());
    let known = files.chain(FORMATS).find(|format| format.sniff(path));
    known.unwrap_or(FORMATS[0])
}

/// The format called `name` on the command line, or that of [`Adapter::format`].
pub fn format_named(name: &str) -> Option<&'static dyn Format> {
    let first = name.split('-').next();
    let is_called = |about: &About| first == Some(about.name) || about.aliases.contains(&name);
    let mut formats = FORMATS.into_iter();
    formats.find(|format| is_called(format.about()))
}

/// Reads the adapter at `path`, of any format, as far as it can be known without its base.
pub(crate) fn read_without_base(path: &Path) -> Result<Adapter> {
    let format = format_of(path);
    alone(path, format, format.read_without_base(path))
}

/// Reads the adapter at `path` as one of `format`.
///
/// # Errors
/// As [`Format::read`]; also for weights that lie beside the adapter's files and were trained with it.
pub fn read_as(format: &dyn Format, path: &Path, options: &ReadOptions<'_>) -> Result<Adapter> {
    alone(path, format, format.read(path, options))
}

/// What was `read` from `path`, if nothing lies beside it that would be lost; all problems come together.
fn alone(path: &Path, format: &dyn Format, read: Result<Adapter>) -> Result<Adapter> {
    let mut problems = match &read {
        Err(error) if error.problems().is_empty() => return read,
        Err(error) => error.problems().to_vec(),
        Ok(_) => Vec::new(),
    };
    problems.extend(Beside::of_format(path, format)?.problems);
    Error::refuse_any(path, problems)?;
    read
}

/// A and B of every module, in the order of their names, as a file gives them.
#[derive(Debug, Default)]
struct Pairs(BTreeMap<String, [Option<Tensor>; 2]>);

impl Pairs {
    /// The pairs that are complete; what is missing becomes a problem of the file called `file`.
    fn complete(
        self,
        file: &str,
        [fix_empty, fix]: [&str; 2],
        problems: &mut Vec<Problem>,
    ) -> Vec<(String, Tensor, Tensor)> {
        if self.0.is_empty() {
            let message = "holds no adapter tensor";
            problems.push(Problem::new("no-tensors", file, message, fix_empty));
        }
        let mut pairs = Vec::with_capacity(self.0.len());
        for (module, pair) in self.0 {
            match pair {
                [Some(a), Some(b)] => pairs.push((module, a, b)),
                _ => {
                    let message = "lora_a or lora_b missing";
                    problems.push(Problem::new("incomplete-site", module, message, fix));
                }
            }
        }
        pairs
    }
}

impl Adapter {
    /// Reads an adapter of any format, from its directory or a file in it. A GGUF LoRA needs the base's configuration
    /// too: see [`Self::read_for`].
    ///
    /// # Errors
    /// `not-found` if there is none; a refusal with everything that is not understood.
    ///
    /// ```
    /// use monteclora_converters::Adapter;
    /// # use monteclora_converters::{Tensor, write_safetensors};
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # std::fs::write(
    /// #     dir.path().join("adapter_config.json"),
    /// #     r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}"#,
    /// # ).expect("writable");
    /// # let site = "base_model.model.model.layers.0.self_attn.q_proj";
    /// # write_safetensors(dir.path().join("adapter_model.safetensors"), [
    /// #     (format!("{site}.lora_A.weight"), Tensor::from_f32(&[1, 2], vec![1.0, 2.0])?),
    /// #     (format!("{site}.lora_B.weight"), Tensor::from_f32(&[2, 1], vec![0.5, 0.0])?),
    /// # ], &Default::default())?;
    /// let adapter = Adapter::read(dir.path())?;
    /// assert_eq!(adapter.format, "peft-lora");
    /// let site = &adapter.sites[0];
    /// assert_eq!(site.name, "model.layers.0.self_attn.q_proj");
    /// assert_eq!(site.scaling, 2.0);
    /// assert_eq!(site.delta_f32()?, [1.0, 2.0, 0.0, 0.0]); // 2 * B A
    /// # Ok::<(), monteclora_converters::Error>(())
    /// ```
    pub fn read(path: &Path) -> Result<Self> {
        read_as(format_of(path), path, &ReadOptions::default())
    }

    /// Reads an adapter of any format, a GGUF LoRA included, that was made for the base with this `config.json`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_for(path: &Path, base_config: &Map<String, Value>) -> Result<Self> {
        let base_config = Some(base_config);
        let options = ReadOptions {
            base_config,
            ..ReadOptions::default()
        };
        read_as(format_of(path), path, &options)
    }

    /// Reads an adapter of any format for `base`, with which whole weights stored beside A and B are compared. Whether A and B fit
    /// is asked by [`Self::require_fit`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_on(path: &Path, base: &ModelFiles) -> Result<Self> {
        read_as(format_of(path), path, &ReadOptions::from(base))
    }
}
