//! `collapse`: the posterior mean as plain LoRA.

use anyhow::Result;
use monteclora_converters::LoraOptions;

use super::export::{Export, require_apart};

use crate::cli::CollapseArgs;
use crate::output::require_empty;
use crate::provenance::read_effective;

pub(super) fn run(args: &CollapseArgs) -> Result<()> {
    let adapter = read_effective(&args.adapter, args.force)?;
    require_apart(&args.adapter, &args.output)?;
    require_empty(&args.output, args.force)?;
    let options = LoraOptions {
        dtype: None,
        overwrite: args.force,
    };
    let report = adapter.write_lora(&args.output, &options)?;
    Export::new(&args.output, "plain LoRA", &adapter, &report, None).print(args.json)
}
