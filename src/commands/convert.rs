//! `convert`: between adapter formats.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{
    Adapter, DType, Format, LoraOptions, ModelFiles, Problem, format_named, format_of,
};
use serde_json::{Map, Value};

use super::export::{Export, require_apart};
use crate::cli::{ConvertArgs, ConvertDtypeArg};
use crate::hub::{self, HubOptions};
use crate::output::require_empty;
use crate::provenance::require_effect;

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let output = &args.output;
    require_apart(&args.source, output)?;
    let to = format_named(&args.to).context("a format that the command line lists")?;
    match to.about().file_name {
        Some(name) => require_new_file(output, to.about().label, name, args.force)?,
        None => require_empty(output, args.force)?,
    }
    let adapter = read(args)?;
    require_effect(&adapter, &args.source, args.force)?;
    let options = LoraOptions {
        dtype: args.dtype.map(|dtype| match dtype {
            ConvertDtypeArg::F32 => DType::F32,
            ConvertDtypeArg::F16 => DType::F16,
            ConvertDtypeArg::Bf16 => DType::BF16,
        }),
        overwrite: args.force,
    };
    let base = base_config(args, to)?;
    let written = to.write(&adapter, output, &options, base.as_ref())?;
    Export::new(
        output,
        written.what,
        &adapter,
        &written.report,
        written.note,
    )
    .print(args.json)
}

fn read(args: &ConvertArgs) -> Result<Adapter> {
    let from = format_named(&args.from).unwrap_or_else(|| format_of(&args.source));
    if args.from != "auto" && from.about().file_name.is_none() && args.source.is_file() {
        return Err(Problem::usage(format!(
            "`{}` is a file; --from {} reads a directory",
            args.source.display(),
            args.from
        ))
        .into());
    }
    let base = base_config(args, from)?;
    Ok(from.read(&args.source, base.as_ref())?)
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

/// `config.json` of the base if the format asks for it; the base's weights are not needed.
fn base_config(args: &ConvertArgs, format: &dyn Format) -> Result<Option<Map<String, Value>>> {
    if !format.about().needs_base {
        return Ok(None);
    }
    let id = args.model_id.as_deref().ok_or_else(|| {
        Problem::usage(format!(
            "a {} needs its base's config.json (head counts, for the order of the rows of q and k); give the base with -m",
            format.about().label
        ))
    })?;
    let dir = hub::locate(id, &HubOptions::default())?.dir;
    Ok(Some(ModelFiles::read_config(dir)?))
}
