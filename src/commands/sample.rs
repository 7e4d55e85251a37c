//! `sample`: posterior draws as plain LoRA.

use anyhow::Result;
use monteclora_converters::LoraOptions;

use super::{Usage, print, read_effective, require_empty};
use crate::cli::SampleArgs;

pub(super) fn run(args: &SampleArgs) -> Result<()> {
    if args.k == 0 || args.k > 10_000 {
        return Err(Usage(format!(
            "-k {}: give a number of draws from 1 to 10000",
            args.k
        ))
        .into());
    }
    let adapter = read_effective(&args.adapter, false)?;
    require_empty(&args.output, args.force)?;
    // The first draw tells whether there is a posterior, before anything is written.
    let mut draw = monteclora_adapters::sample(&adapter, args.seed, 0)?;
    let options = LoraOptions {
        dtype: None,
        overwrite: args.force,
    };
    for index in 0..args.k {
        if index > 0 {
            draw = monteclora_adapters::sample(&adapter, args.seed, index as u64)?;
        }
        draw.write_lora(&args.output.join(format!("draw-{index:04}")), &options)?;
    }
    print(&format!(
        "wrote {} draws of seed {} to {}",
        args.k,
        args.seed,
        args.output.display()
    ))
}
