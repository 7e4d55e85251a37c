//! `collapse`: the posterior mean as plain LoRA.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{Adapter, LoraOptions, LoraReport};

use super::{print, read_effective, require_empty};
use crate::cli::CollapseArgs;

pub(super) fn run(args: &CollapseArgs) -> Result<()> {
    let adapter = read_effective(&args.adapter, args.force)?;
    require_empty(&args.output, args.force)?;
    let options = LoraOptions {
        dtype: None,
        overwrite: args.force,
    };
    let report = adapter.write_lora(&args.output, &options)?;
    print(&describe(&args.output, &adapter, &report))
}

/// What was written, baked in, and left out.
pub(super) fn describe(output: &Path, adapter: &Adapter, report: &LoraReport) -> String {
    let mut text = format!(
        "wrote {}: {} sites, r {}, lora_alpha {}",
        output.display(),
        adapter.sites.len(),
        report.r,
        report.lora_alpha
    );
    let lists = [
        ("scale multiplied into B", &report.baked),
        ("padded with zeros to the largest rank", &report.padded),
        ("element type changed", &report.converted),
        (
            "configuration keys without effect left out",
            &report.dropped_keys,
        ),
    ];
    for (what, names) in lists {
        if !names.is_empty() {
            let shown = names
                .iter()
                .take(5)
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ");
            let more = if names.len() > 5 { ", ..." } else { "" };
            text.push_str(&format!("\n  {what}: {} ({shown}{more})", names.len()));
        }
    }
    if report.dropped_posterior {
        text.push_str("\n  left out: the posterior's spread; A and B are its mean");
    }
    text
}
