//! `convert`: between adapter formats.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{
    Adapter, Beside, DType, Format, LoraOptions, ModelFiles, Problem, format_named, format_of,
    read_as,
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
    let from = format_named(&args.from).unwrap_or_else(|| format_of(&args.source));
    let adapter = read(args, from)?;
    require_effect(&adapter, &args.source, args.force)?;
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
    let base = base_config(args, to)?;
    let written = to.write(&adapter, output, &options, base.as_ref())?;
    Export::new(
        output,
        written.what,
        &adapter,
        &written.report,
        written.note,
        &beside,
    )
    .print(args.json)
}

fn read(args: &ConvertArgs, from: &dyn Format) -> Result<Adapter> {
    let base = base_config(args, from)?;
    Ok(read_as(from, &args.source, base.as_ref())?)
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
