//! `convert`: converts between adapter formats.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{
    Adapter, Beside, DType, Format, LoraOptions, ModelFiles, Problem, Problems, ReadOptions,
    format_named, format_of, is_gguf, read_as,
};
use serde_json::{Map, Value};

use super::export::{Export, require_apart};
use super::named_base::named_by;
use crate::card;
use crate::cli::{ConvertArgs, ConvertDtypeArg};
use crate::hub::{self, HubOptions};
use crate::model::warn_of_base;
use crate::output::{is_read, require_empty};
use crate::provenance::{require_effect, warn_of_settings};

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let output = &args.output;
    require_apart(&args.source, output)?;
    let to = format_named(&args.to).context("a format that the command line lists")?;
    match to.about().file_name {
        Some(name) => {
            require_new_file(output, to.about().label, name, args.force)?;
            let base = args.model_id.as_deref().map(Path::new);
            let read: Vec<&Path> = std::iter::once(args.source.as_path()).chain(base).collect();
            require_not_read(output, &read)?;
        }
        None => require_empty(output, args.force)?,
    }
    let from = format_named(&args.from).unwrap_or_else(|| format_of(&args.source));
    let base = Base::of(args, from, to)?;
    let adapter = read(args, from, &base)?;
    require_effect(&adapter, &args.source, args.force)?;
    warn_of_settings(&args.source);
    let mut beside = Beside::of_format(&args.source, from)?;
    if to.about().file_name.is_some() {
        beside = beside.nothing_carried("no place for them in one file");
    } else if adapter.config.monteclora.is_some() && !to.about().keeps_posterior {
        beside = beside.nothing_measured();
    }
    let options = LoraOptions {
        dtype: args.dtype.map(|dtype| match dtype {
            ConvertDtypeArg::F32 => DType::F32,
            ConvertDtypeArg::F16 => DType::F16,
            ConvertDtypeArg::Bf16 => DType::BF16,
        }),
        overwrite: args.force,
        carried: beside.carried.clone(),
    };
    let written = to.write(&adapter, output, &options, base.config())?;
    let export = Export::new(
        output,
        written.what,
        &adapter,
        &written.report,
        written.note,
        &beside,
    );
    // Model cards are for PEFT's formats; those of mlx-lm and llama.cpp have none.
    if to.about().has_peft_settings {
        let exported = match to.about().keeps_posterior {
            true => adapter.config.clone(),
            false => adapter.collapse().config,
        };
        card::write_exported(output, &exported, &args.source)?;
    }
    export.print(args.json)
}

/// The base model, to check the adapter against. Some formats also need it for writing.
enum Base {
    None,
    /// The config.json of a directory without weights. It gives names and shapes if the model's family is known.
    Config(Map<String, Value>),
    Files(ModelFiles),
}

impl Base {
    fn of(args: &ConvertArgs, from: &dyn Format, to: &dyn Format) -> Result<Self> {
        let named = match [from, to].iter().any(|format| format.about().needs_base) {
            true if args.model_id.is_none() => named_by(&args.source).ok(),
            _ => args.model_id.clone(),
        };
        let Some(id) = named.as_deref() else {
            return match [from, to].iter().find(|format| format.about().needs_base) {
                None => Ok(Self::None),
                Some(format) => Err(Problem::usage(format!(
                    "a {} needs its base's config.json (head counts, for the order of the rows of q and k); give the base with -m",
                    format.about().label
                ))
                .into()),
            };
        };
        let found = hub::locate(id, &HubOptions::default());
        let dir = match args.model_id {
            Some(_) => found?,
            None => found.context(
                "the base that the adapter names cannot be opened; give the base with -m",
            )?,
        }
        .dir;
        match ModelFiles::open(&dir) {
            Ok(files) => {
                warn_of_base(&files)?;
                Ok(Self::Files(files))
            }
            // An index without its files means that the download of the model is incomplete.
            Err(error)
                if error.is_not_found() && !dir.join("model.safetensors.index.json").exists() =>
            {
                Ok(Self::Config(ModelFiles::read_config(dir)?))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn config(&self) -> Option<&Map<String, Value>> {
        match self {
            Self::None => None,
            Self::Config(config) => Some(config),
            Self::Files(files) => Some(files.config()),
        }
    }

    /// Returns an error if the adapter does not fit the base model.
    fn require_fit(&self, adapter: &Adapter) -> Result<()> {
        match self {
            Self::None => Ok(()),
            // `files` are checked: the tensors agree with config.json, including the number of heads.
            Self::Files(files) => Ok(adapter.require_fit(files)?),
            Self::Config(config) => match ModelShape::from_config(config) {
                Ok(shape) => Ok(adapter.require_modules(&shape.linear_modules())?),
                Err(problems) => {
                    let problems = Problems::from(problems);
                    tracing::warn!("names and shapes were not compared with the base: {problems}");
                    Ok(())
                }
            },
        }
    }
}

/// Reads the source, removes wrappers from its module names, and checks it against the base model if there is one.
fn read(args: &ConvertArgs, from: &dyn Format, base: &Base) -> Result<Adapter> {
    let options = ReadOptions {
        base_config: base.config(),
        base: match base {
            Base::Files(files) => Some(files),
            _ => None,
        },
        unwrap: true,
    };
    let adapter = read_as(from, &args.source, &options)?;
    base.require_fit(&adapter)?;
    Ok(adapter)
}

/// Refuses a file that is among what is read, even with --force. An earlier export in the source's directory may be replaced.
fn require_not_read(output: &Path, read: &[&Path]) -> Result<()> {
    let is_export = output.canonicalize().is_ok_and(|found| is_gguf(&found));
    let read = read.iter().filter(|path| !is_export || path.is_file());
    if is_read(output, &read.copied().collect::<Vec<_>>()) {
        bail!(Problem::usage(format!(
            "`{}` is among the files that are read; choose another name with -o",
            output.display()
        )));
    }
    Ok(())
}

fn require_new_file(output: &Path, label: &str, name: &str, force: bool) -> Result<()> {
    if output.is_dir() {
        bail!(Problem::usage(format!(
            "`{}` is a directory; a {label} is one file, such as `{}`",
            output.display(),
            output.join(name).display()
        )));
    }
    if output.exists() && !force {
        bail!(Problem::usage(format!(
            "`{}` exists; choose another file or pass --force",
            output.display()
        )));
    }
    Ok(())
}
