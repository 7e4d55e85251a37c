//! `convert`: between adapter formats.

use std::path::Path;

use anyhow::{Context, Result};
use monteclora_converters::{Adapter, DType, LoraOptions};
use serde_json::{Map, Value};

use super::collapse::describe;
use super::{Usage, print, require_effect, require_empty};
use crate::cli::{ConvertArgs, ConvertDtypeArg, SourceFormatArg, TargetFormatArg};
use crate::hub::{self, HubOptions};

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
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
    let output = &args.output;
    if args.to != TargetFormatArg::Gguf {
        require_empty(output, args.force)?;
    }
    let report = match args.to {
        TargetFormatArg::Peft => {
            if options.dtype.is_some() {
                return Err(Usage("--dtype: `--to peft` keeps every tensor as it is; use `--to lora` to change the type".to_owned()).into());
            }
            adapter.write_peft(output, args.force)?;
            return print(&format!(
                "wrote {}: {} sites, {}",
                output.display(),
                adapter.sites.len(),
                if adapter.config.monteclora.is_some() {
                    "the whole posterior kept"
                } else {
                    "plain LoRA"
                }
            ));
        }
        TargetFormatArg::Lora => adapter.write_lora(output, &options)?,
        TargetFormatArg::Mlx => adapter.write_mlx(output, &options)?,
        TargetFormatArg::Gguf => {
            adapter.write_gguf(output, &base_config(args)?, options.dtype, args.force)?
        }
    };
    print(&describe(output, &adapter, &report))
}

fn read(args: &ConvertArgs) -> Result<Adapter> {
    let source = &args.source;
    let is_gguf = args.from == SourceFormatArg::Gguf
        || (args.from == SourceFormatArg::Auto
            && source
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("gguf")));
    Ok(if is_gguf {
        Adapter::read_gguf(source, &base_config(args)?)?
    } else {
        match args.from {
            SourceFormatArg::Mlx => Adapter::read_mlx(source)?,
            SourceFormatArg::Peft => Adapter::read_dir(source)?,
            _ => Adapter::read(source)?,
        }
    })
}

/// `config.json` of the base; its weights are not needed.
fn base_config(args: &ConvertArgs) -> Result<Map<String, Value>> {
    let id = args.model_id.as_deref().ok_or_else(|| {
        Usage("a GGUF adapter needs its base's configuration (head counts for the q/k permutation); give the base with -m".to_owned())
    })?;
    let path = hub::locate(id, &HubOptions::default())?
        .dir
        .join("config.json");
    parse(&path)
}

fn parse(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|_| {
        Usage(format!(
            "`{}`: no config.json; give the base's directory with -m",
            path.display()
        ))
    })?;
    serde_json::from_str(&text)
        .with_context(|| format!("`{}` is not a JSON object", path.display()))
}
