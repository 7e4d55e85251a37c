//! `collapse`: the posterior mean as plain LoRA.

use anyhow::Result;
use monteclora_converters::LoraOptions;

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
    let mut text = format!(
        "wrote {} ({} sites, r {}, lora_alpha {})",
        args.output.display(),
        adapter.sites.len(),
        report.r,
        report.lora_alpha
    );
    let lists = [
        ("scale multiplied into B", &report.baked),
        ("padded to the largest rank", &report.padded),
        ("element type changed", &report.converted),
        (
            "configuration keys without effect left out",
            &report.dropped_keys,
        ),
    ];
    for (what, names) in lists {
        if !names.is_empty() {
            text.push_str(&format!("\n  {what}: {}", names.len()));
        }
    }
    text.push_str(match report.dropped_posterior {
        true => "\n  dropped: the posterior's spread; A and B are its mean",
        false => "\n  the adapter was plain LoRA already",
    });
    print(&text)
}
