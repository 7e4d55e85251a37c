//! `sample`: writes posterior draws as plain LoRA adapters.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Beside, LoraOptions, Problem, files};
use serde_json::json;

use super::export::{beside_lines, count, require_apart};
use super::{print, print_json};
use crate::cli::SampleArgs;
use crate::output::require_empty;
use crate::provenance::read_effective;

pub(super) fn run(args: &SampleArgs) -> Result<()> {
    if args.k == 0 || args.k > 10_000 {
        bail!(Problem::usage(format!(
            "-k {}: give a number of draws from 1 to 10000",
            args.k
        )));
    }
    let output = &args.output;
    let adapter = read_effective(&args.adapter, args.force)?;
    require_apart(&args.adapter, output)?;
    require_empty(output, args.force)?;
    let beside = Beside::of(&args.adapter)?.nothing_carried("not copied to every draw");
    // The first draw fails if there is no posterior, before anything is written.
    let mut draw = monteclora_adapters::sample(&adapter, args.seed, 0)?;
    let context = || format!("cannot write `{}`", output.display());
    // The draws are written to a sibling directory, so that `output` has all draws or none.
    let sibling = files::dir_beside(output)?;
    let mut names = Vec::new();
    for index in 0..args.k {
        if index > 0 {
            draw = monteclora_adapters::sample(&adapter, args.seed, index as u64)?;
        }
        let name = PathBuf::from(format!("draw-{index:04}"));
        draw.write_lora(&sibling.path().join(&name), &LoraOptions::default())?;
        names.push(name);
    }
    std::fs::create_dir_all(output).with_context(context)?;
    for name in &names {
        let target = output.join(name);
        if target.is_dir() {
            std::fs::remove_dir_all(&target).with_context(context)?;
        }
        std::fs::rename(sibling.path().join(name), target).with_context(context)?;
    }
    if args.json {
        let draws: Vec<PathBuf> = names.iter().map(|name| output.join(name)).collect();
        return print_json(&json!({
            "output": output, "seed": args.seed, "n_sites": adapter.sites.len(), "draws": draws,
            "carried": beside.carried, "left_out": beside.left_out,
        }));
    }
    print(&format!(
        "wrote {}: {} of seed {}, each a plain LoRA ({} to {}){}",
        output.display(),
        count(args.k, "posterior draw"),
        args.seed,
        names[0].display(),
        names[args.k - 1].display(),
        beside_lines(&beside, "")
    ))
}
