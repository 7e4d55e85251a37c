//! `convert`: between adapter formats.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{Adapter, AdapterConfig, DType, LoraOptions, LoraReport, ModelFiles};
use serde_json::{Map, Value};

use super::export::{Export, require_apart};
use super::{Usage, require_effect, require_empty};
use crate::cli::{ConvertArgs, ConvertDtypeArg, SourceFormatArg, TargetFormatArg};
use crate::hub::{self, HubOptions};

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let output = &args.output;
    require_apart(&args.source, output)?;
    if args.to == TargetFormatArg::Gguf {
        require_new_file(output, args.force)?;
    } else {
        require_empty(output, args.force)?;
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
    let (format, report, rearranged) = match args.to {
        TargetFormatArg::Peft => {
            let (report, note) = write_peft(&adapter, output, &options)?;
            let format = match adapter.config.monteclora {
                Some(_) => "PEFT MonteCLoRA",
                None => "PEFT LoRA",
            };
            (format, report, note)
        }
        TargetFormatArg::Lora => ("plain LoRA", adapter.write_lora(output, &options)?, None),
        TargetFormatArg::Mlx => (
            "mlx-lm adapter",
            adapter.write_mlx(output, &options)?,
            Some("A and B are transposed, as mlx-lm stores them"),
        ),
        TargetFormatArg::Gguf => (
            "GGUF LoRA",
            adapter.write_gguf(output, &base_config(args)?, options.dtype, args.force)?,
            Some("for Llama and Mistral the rows of B of q and k are in llama.cpp's order"),
        ),
    };
    Export::new(output, format, &adapter, &report, rearranged).print(args.json)
}

/// Writes every setting and the whole posterior as they are.
fn write_peft(
    adapter: &Adapter,
    output: &Path,
    options: &LoraOptions,
) -> Result<(LoraReport, Option<&'static str>)> {
    let written = match options.dtype {
        Some(dtype) => adapter.with_dtype(dtype)?,
        None => adapter.clone(),
    };
    written.write_peft(output, options.overwrite)?;
    let kept = AdapterConfig::from_json(&written.config.to_json().to_string(), output)?.other;
    let dropped = adapter
        .config
        .other
        .keys()
        .filter(|key| !kept.contains_key(*key));
    let converted = adapter
        .sites
        .iter()
        .zip(&written.sites)
        .filter(|(old, new)| {
            [(&old.lora_a, &new.lora_a), (&old.lora_b, &new.lora_b)]
                .iter()
                .any(|(old, new)| old.dtype() != new.dtype() || old.dtype() == DType::F64)
        });
    let report = LoraReport {
        r: adapter.config.r,
        lora_alpha: adapter.config.lora_alpha,
        converted: converted.map(|(site, _)| site.name.clone()).collect(),
        dropped_keys: dropped.cloned().collect(),
        ..LoraReport::default()
    };
    let note = adapter.config.monteclora.is_some().then_some(
        "the whole posterior is kept; the sampler's last random draw, which is no parameter, is written as I and 1/N",
    );
    Ok((report, note))
}

fn read(args: &ConvertArgs) -> Result<Adapter> {
    let source = &args.source;
    Ok(match args.from {
        SourceFormatArg::Gguf => Adapter::read_gguf(source, &base_config(args)?)?,
        SourceFormatArg::Mlx => Adapter::read_mlx(source)?,
        SourceFormatArg::Peft => Adapter::read_dir(source)?,
        SourceFormatArg::Auto if monteclora_converters::is_gguf(source) => {
            Adapter::read_gguf(source, &base_config(args)?)?
        }
        SourceFormatArg::Auto => Adapter::read(source)?,
    })
}

fn require_new_file(output: &Path, force: bool) -> Result<()> {
    if output.is_dir() {
        return Err(Usage(format!(
            "`{}` is a directory; a GGUF LoRA is one file, such as `{}`",
            output.display(),
            output.join("adapter.gguf").display()
        ))
        .into());
    }
    if output.exists() && !force {
        return Err(Usage(format!(
            "`{}` exists; choose another file or pass --force",
            output.display()
        ))
        .into());
    }
    Ok(())
}

/// `config.json` of the base; its weights are not needed.
fn base_config(args: &ConvertArgs) -> Result<Map<String, Value>> {
    let id = args.model_id.as_deref().ok_or_else(|| {
        Usage("a GGUF LoRA needs its base's config.json (head counts, for the order of the rows of q and k); give the base with -m".to_owned())
    })?;
    let dir = hub::locate(id, &HubOptions::default())?.dir;
    Ok(ModelFiles::read_config(dir)?)
}
