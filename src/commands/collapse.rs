//! `collapse`: writes the posterior mean as a plain LoRA.

use anyhow::Result;
use monteclora_converters::{Beside, LoraOptions};

use super::export::{Export, require_apart};

use crate::card;
use crate::cli::CollapseArgs;
use crate::output::require_empty;
use crate::provenance::{read_effective, warn_of_settings};

pub(super) fn run(args: &CollapseArgs) -> Result<()> {
    let adapter = read_effective(&args.adapter, args.force)?;
    warn_of_settings(&args.adapter);
    require_apart(&args.adapter, &args.output)?;
    require_empty(&args.output, args.force)?;
    let mut beside = Beside::of(&args.adapter)?;
    if adapter.config.monteclora.is_some() {
        beside = beside.nothing_measured();
    }
    let options = LoraOptions {
        dtype: None,
        overwrite: args.force,
        carried: beside.carried.clone(),
    };
    let report = adapter.write_lora(&args.output, &options)?;
    let export = Export::new(&args.output, "plain LoRA", &adapter, &report, None, &beside);
    card::write_exported(&args.output, &adapter.collapse().config, &args.adapter)?;
    export.print(args.json)
}
