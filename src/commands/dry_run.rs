//! `train --dry-run`: shows the plan of a run.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;

use super::{print, print_json};
use crate::data::{Dataset, LengthSummary};
use crate::train::Prepared;

pub(super) fn run(prepared: &Prepared, as_json: bool) -> Result<()> {
    let plan = prepared.plan()?;
    if as_json {
        return print_json(&plan);
    }
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<11} {value}");
    };
    line("model", prepared.base.name.clone());
    line("method", method(prepared));
    line(
        "sites",
        format!("{} ({})", prepared.sites.len(), leaves(&prepared.sites)),
    );
    line(
        "trainable",
        format!("{} parameters", plan.trainable_parameters),
    );
    line("train", rows(&prepared.train));
    lengths(&mut line, &prepared.train);
    if let Some(valid) = &prepared.valid {
        line("valid", rows(valid));
    }
    let estimate = &plan.memory;
    line(
        "steps",
        format!(
            "{} ({} per epoch; the largest batch has {} tokens)",
            plan.total_steps, plan.steps_per_epoch, estimate.batch_tokens
        ),
    );
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    line(
        "memory",
        format!(
            "about {} at the peak: weights {}, adapter {}, activations {}, working {}, program {}{}",
            gb(estimate.peak),
            gb(estimate.weights),
            gb(estimate.adapter),
            gb(estimate.activations),
            gb(estimate.working),
            gb(estimate.process),
            plan.available_memory_bytes
                .map_or(String::new(), |bytes| format!("; {} available", gb(bytes))),
        ),
    );
    if !plan.advice.is_empty() {
        text.push_str("\nThis will not fit. In this order, each added to those before:\n");
        for change in &plan.advice {
            let flags: Vec<String> = change
                .set
                .iter()
                .map(|set| format!("--set {set}"))
                .collect();
            let _ = writeln!(
                text,
                "  {:<86} {}",
                flags.join(" "),
                gb(change.memory_estimate_bytes)
            );
        }
        let last = plan
            .advice
            .last()
            .map(|change| change.memory_estimate_bytes);
        if last > plan.available_memory_bytes {
            text.push_str("  Even then it will not fit. Take the base as a 4-bit GGUF file (Q4_K_M: a seventh of float32), a smaller base, or more memory.\n");
        }
        text.push('\n');
    }
    text.push_str("nothing was written");
    print(&text)
}

fn method(prepared: &Prepared) -> String {
    let lora = &prepared.adapter_config;
    let scaling = if lora.use_rslora {
        "alpha / sqrt(r)"
    } else {
        "alpha / r"
    };
    let method = prepared.method.summary();
    if prepared.method.kind().unread.contains(&"lora.r") {
        return method;
    }
    format!(
        "{method}, r {}, alpha {}, scaling {scaling}",
        lora.r, lora.lora_alpha
    )
}

fn rows(data: &Dataset) -> String {
    let stats = data.stats();
    let mut text = format!("{} examples of {} rows", stats.n_examples, stats.n_rows);
    for (n, what) in [
        (stats.n_dropped, "dropped for their length"),
        (stats.n_truncated, "truncated"),
        (stats.n_without_end, "without an end token"),
    ] {
        if n > 0 {
            let _ = write!(text, ", {n} {what}");
        }
    }
    format!("{text} ({})", data.format().name())
}

fn lengths(line: &mut impl FnMut(&str, String), data: &Dataset) {
    let stats = data.stats();
    let summary = |lengths: &LengthSummary| {
        format!(
            "{} to {} per example, median {}, 95 % up to {}; {} in all",
            lengths.min, lengths.max, lengths.median, lengths.p95, lengths.total
        )
    };
    line("  tokens", summary(&stats.tokens));
    line("  trained", summary(&stats.trained_tokens));
}

/// The projections in the order of a block, each with its number of sites.
fn leaves(sites: &[String]) -> String {
    let mut order: Vec<&str> = Vec::new();
    let mut counts = BTreeMap::<&str, usize>::new();
    for site in sites {
        let leaf = site.rsplit('.').next().unwrap_or(site);
        if !order.contains(&leaf) {
            order.push(leaf);
        }
        *counts.entry(leaf).or_default() += 1;
    }
    order
        .iter()
        .map(|leaf| format!("{leaf} x {}", counts[leaf]))
        .collect::<Vec<_>>()
        .join(", ")
}
