//! `data stats`: shows the lengths of rows and their effect on max_seq_length and packing.

use anyhow::{Result, bail};
use monteclora_converters::Problems;
use serde_json::json;

use super::{Request, title};
use crate::cli::DataCheckArgs;
use crate::commands::{print, print_json};
use crate::data::{Bin, LengthSummary, Source, Survey, histogram, pack_efficiency};

/// Widest bar of a histogram, in characters.
const BAR: usize = 40;

pub(in crate::commands) fn run(args: &DataCheckArgs) -> Result<()> {
    let request = Request::new(&args.source)?;
    let (encoder, limit) = request.measuring_encoder()?;
    let mut files = Vec::new();
    for (path, split) in &request.sources {
        let source = Source::open(path, *split)?;
        let mut problems = Problems::default();
        let survey = Survey::take(&source, &request.schema, Some(&encoder), |problem| {
            problems.push(problem.into());
        })?;
        if !problems.is_empty() {
            bail!(problems);
        }
        let format = survey.format(&source)?;
        let lengths = survey.lengths();
        let trained = survey.trained_lengths();
        let n_overlong = lengths.iter().filter(|length| **length > limit).count();
        let kept: Vec<usize> = lengths
            .iter()
            .copied()
            .filter(|length| *length <= limit)
            .collect();
        let efficiency = pack_efficiency(&kept, limit);
        let stats = &survey.stats;
        if args.json {
            files.push(json!({
                "path": path,
                "split": split.name(),
                "sha256": source.sha256(),
                "format": format,
                "rows": stats.n_rows,
                "examples": stats.n_examples,
                "split_rows": stats.n_split_rows,
                "without_end": stats.n_without_end,
                "tokens": stats.tokens,
                "trained_tokens": stats.trained_tokens,
                "max_seq_length": limit,
                "overlong": n_overlong,
                "pack_efficiency": efficiency,
                "histogram": histogram(&lengths),
                "trained_histogram": histogram(&trained),
            }));
            continue;
        }
        let split_rows = match stats.n_split_rows {
            0 => String::new(),
            n => format!(" ({n} rows split into one a turn)"),
        };
        let share = 100.0 * stats.trained_tokens.total as f64 / stats.tokens.total.max(1) as f64;
        print(&format!(
            "{}\n  format      {}\n  rows        {}\n  examples    {}{split_rows}\n  sha256      {}\n\n{}\n{}\n{}\n\n\
             {}\n  {n_overlong} of {} examples are longer than max_seq_length {limit}\n  packing to {limit} tokens fills {:.1} % of the packs\n  {share:.1} % of the tokens are trained\n",
            title(path, *split),
            format.map_or("none", |format| format.name()),
            stats.n_rows,
            stats.n_examples,
            source.sha256(),
            "              min   median      90 %      95 %      99 %       max         total",
            summary("tokens", &stats.tokens),
            summary("trained", &stats.trained_tokens),
            bars(&histogram(&lengths)),
            stats.n_examples,
            100.0 * efficiency,
        ))?;
    }
    if args.json {
        print_json(&json!({ "files": files }))?;
    }
    Ok(())
}

fn summary(name: &str, lengths: &LengthSummary) -> String {
    format!(
        "  {name:<8} {:>7} {:>8} {:>9} {:>9} {:>9} {:>9} {:>13}",
        lengths.min,
        lengths.median,
        lengths.p90,
        lengths.p95,
        lengths.p99,
        lengths.max,
        lengths.total
    )
}

fn bars(bins: &[Bin]) -> String {
    let most = bins.iter().map(|bin| bin.n).max().unwrap_or(0).max(1);
    bins.iter()
        .map(|bin| {
            let bar = "#".repeat((bin.n * BAR).div_ceil(most));
            let range = format!("{}-{}", bin.from, bin.to);
            format!("  {range:>15} tokens {:>8} {bar}\n", bin.n)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_with_the_count() {
        let text = bars(&[
            Bin {
                from: 0,
                to: 9,
                n: 80,
            },
            Bin {
                from: 10,
                to: 19,
                n: 1,
            },
            Bin {
                from: 20,
                to: 29,
                n: 0,
            },
        ]);
        let widths: Vec<usize> = text.lines().map(|line| line.matches('#').count()).collect();
        assert_eq!(widths, [BAR, 1, 0]);
    }
}
