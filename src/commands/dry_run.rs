//! `train --dry-run`: what a run will do and what it will need, before it starts.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use monteclora_converters::LinearModule;
use serde::Serialize;
use serde_json::json;

use super::train::Prepared;
use super::{print, print_json};
use crate::data::{BatchOptions, Batches, Cursor, Dataset, LengthSummary};
use crate::model::Decoder;
use crate::system::available_memory_bytes;
use crate::train::memory::{MemoryEstimate, MemoryInputs};

/// Sequences and ranks are not advised below these.
const MIN_LENGTH: usize = 64;
const MIN_RANK: usize = 4;

/// A change that lowers the memory of a run, with what it would then take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Advice {
    /// The keys to set, as `--set` takes them.
    pub(super) set: Vec<String>,
    /// The estimate with this change and those before it.
    pub(super) memory_estimate_bytes: u64,
}

pub(super) fn run(prepared: &Prepared, as_json: bool) -> Result<()> {
    let sites = sites(prepared)?;
    let estimate = estimate(prepared, &sites);
    let available = available_memory_bytes();
    let advice = match available {
        Some(available) if estimate.peak > available => advice(prepared, &sites, available),
        _ => Vec::new(),
    };
    let posterior = prepared.adapter_config.monteclora.as_ref();
    let trainable: usize = sites
        .iter()
        .map(|(module, rank)| {
            let spread = posterior.map_or(0, |settings| rank + settings.num_samples);
            rank * (module.in_features + module.out_features) + spread
        })
        .sum();
    let settings = &prepared.settings;
    let batches = Batches::new(&prepared.train, batch_options(prepared), Cursor::default());
    let steps_an_epoch = batches
        .n_batches()
        .div_ceil(settings.gradient_accumulation_steps.max(1));
    let total_steps = settings.max_steps.unwrap_or_else(|| {
        batches.n_steps(
            settings.num_train_epochs,
            settings.gradient_accumulation_steps,
        )
    });
    if as_json {
        return print_json(&json!({
            "sites": prepared.sites,
            "trainable_parameters": trainable,
            "total_steps": total_steps,
            "steps_per_epoch": steps_an_epoch,
            "train": prepared.train.stats(),
            "valid": prepared.valid.as_ref().map(Dataset::stats),
            "memory_estimate_bytes": estimate.peak,
            "memory": estimate,
            "available_memory_bytes": available,
            "advice": advice,
        }));
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
    line("trainable", format!("{trainable} parameters"));
    line("train", rows(&prepared.train));
    lengths(&mut line, &prepared.train);
    if let Some(valid) = &prepared.valid {
        line("valid", rows(valid));
    }
    line(
        "steps",
        format!(
            "{total_steps} ({steps_an_epoch} an epoch; the largest batch has {} tokens)",
            estimate.batch_tokens
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
            available.map_or(String::new(), |bytes| format!("; {} available", gb(bytes))),
        ),
    );
    if !advice.is_empty() {
        text.push_str("\nThis will not fit. In this order, each added to those before:\n");
        for change in &advice {
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
        let last = advice
            .last()
            .map_or(0, |change| change.memory_estimate_bytes);
        if available.is_some_and(|available| last > available) {
            text.push_str("  Even then it will not fit; take a smaller base or more memory.\n");
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
    let method = match (&lora.monteclora, prepared.settings.adamw.train_a) {
        (Some(settings), _) => format!("monteclora, N {}", settings.num_samples),
        (None, true) => "lora".to_owned(),
        (None, false) => "lora-fa".to_owned(),
    };
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
            "{} to {} an example, median {}, 95 % up to {}; {} in all",
            lengths.min, lengths.max, lengths.median, lengths.p95, lengths.total
        )
    };
    line("  tokens", summary(&stats.tokens));
    line("  trained", summary(&stats.trained_tokens));
}

/// Projections with the number of sites of each, in the order of a block.
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

/// The adapted modules with their ranks.
pub(super) fn sites(prepared: &Prepared) -> Result<Vec<(LinearModule, usize)>> {
    Decoder::linear_modules(&prepared.model_config)
        .into_iter()
        .filter(|module| prepared.sites.contains(&module.name))
        .map(|module| {
            let rank = prepared.adapter_config.rank_for(&module.name)?;
            Ok((module, rank))
        })
        .collect()
}

fn batch_options(prepared: &Prepared) -> BatchOptions {
    BatchOptions {
        batch_size: prepared.settings.batch_size,
        pack_tokens: prepared.settings.pack_tokens,
        shuffle_seed: Some(prepared.settings.seed),
    }
}

/// What decides the memory of a run.
fn inputs<'a>(
    prepared: &'a Prepared,
    sites: &'a [(LinearModule, usize)],
    lengths: &'a [usize],
) -> MemoryInputs<'a> {
    let stats = prepared.train.stats();
    MemoryInputs {
        model: &prepared.model_config,
        base_values: prepared
            .files
            .names()
            .filter_map(|name| prepared.files.info(name))
            .map(|(_, shape)| shape.iter().product::<usize>() as u64)
            .sum(),
        value_bytes: prepared.weights.size_in_bytes() as u64,
        base_bytes: prepared
            .files
            .files()
            .iter()
            .filter_map(|path| std::fs::metadata(path).ok())
            .map(|metadata| metadata.len())
            .sum(),
        sites,
        posterior: prepared.adapter_config.monteclora.is_some(),
        lengths,
        trained_share: stats.trained_tokens.total as f64 / stats.tokens.total.max(1) as f64,
        batches: batch_options(prepared),
        dropout: prepared.settings.lora_dropout > 0.0,
        gradient_checkpointing: prepared.settings.gradient_checkpointing,
    }
}

/// The memory of a run.
pub(super) fn estimate(prepared: &Prepared, sites: &[(LinearModule, usize)]) -> MemoryEstimate {
    MemoryEstimate::of(&inputs(prepared, sites, &prepared.train.lengths()))
}

/// A run's batches, where they are not those of its configuration.
pub(super) struct Shape {
    pub(super) batch_size: usize,
    pub(super) pack_tokens: Option<usize>,
    /// Longer examples count as this long.
    pub(super) longest: usize,
    pub(super) gradient_checkpointing: bool,
}

/// The memory of a run with other batches.
pub(super) fn estimate_shape(
    prepared: &Prepared,
    sites: &[(LinearModule, usize)],
    shape: &Shape,
) -> MemoryEstimate {
    let mut lengths = prepared.train.lengths();
    for length in &mut lengths {
        *length = (*length).min(shape.longest);
    }
    MemoryEstimate::of(&MemoryInputs {
        batches: BatchOptions {
            batch_size: shape.batch_size,
            pack_tokens: shape.pack_tokens,
            ..batch_options(prepared)
        },
        gradient_checkpointing: shape.gradient_checkpointing,
        ..inputs(prepared, sites, &lengths)
    })
}

/// What to change until a run fits into `available` bytes: a smaller batch with as much more accumulation, checkpointing,
/// shorter sequences, a smaller rank. Each adds to those before, and what would not help is left out.
pub(super) fn advice(
    prepared: &Prepared,
    sites: &[(LinearModule, usize)],
    available: u64,
) -> Vec<Advice> {
    let settings = &prepared.settings;
    let (mut sites, mut lengths) = (sites.to_vec(), prepared.train.lengths());
    let mut batches = batch_options(prepared);
    let mut checkpointing = settings.gradient_checkpointing;
    let mut lowest = estimate(prepared, &sites).peak;
    let mut advice = Vec::new();
    for kind in 0..4 {
        let mut set = Vec::new();
        // Halved until it fits or can shrink no more.
        while lowest > available {
            match kind {
                0 if batches.batch_size > 1 => {
                    batches.batch_size /= 2;
                    let accumulation = (settings.batch_size * settings.gradient_accumulation_steps)
                        .div_ceil(batches.batch_size);
                    set = vec![
                        format!("train.per_device_train_batch_size={}", batches.batch_size),
                        format!("train.gradient_accumulation_steps={accumulation}"),
                    ];
                }
                1 if !checkpointing => {
                    checkpointing = true;
                    set = vec!["train.gradient_checkpointing=true".to_owned()];
                }
                2 => {
                    let longest = lengths.iter().copied().max().unwrap_or(0);
                    let limit = batches.pack_tokens.unwrap_or(longest) / 2;
                    if limit < MIN_LENGTH {
                        break;
                    }
                    for length in &mut lengths {
                        *length = (*length).min(limit);
                    }
                    batches.pack_tokens = batches.pack_tokens.map(|_| limit);
                    set = vec![format!("data.max_seq_length={limit}")];
                    if longest > limit {
                        set.push("data.overlong=truncate".to_owned());
                    }
                }
                3 if sites.iter().any(|(_, rank)| *rank > MIN_RANK) => {
                    for (_, rank) in &mut sites {
                        *rank = (*rank / 2).max(MIN_RANK);
                    }
                    let rank = sites
                        .iter()
                        .map(|(_, rank)| *rank)
                        .max()
                        .unwrap_or(MIN_RANK);
                    set = vec![format!("lora.r={rank}")];
                }
                _ => break,
            }
            let changed = MemoryInputs {
                batches,
                gradient_checkpointing: checkpointing,
                ..inputs(prepared, &sites, &lengths)
            };
            lowest = MemoryEstimate::of(&changed).peak;
        }
        if !set.is_empty() {
            advice.push(Advice {
                set,
                memory_estimate_bytes: lowest,
            });
        }
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::train::prepare;
    use crate::config::RunConfig;
    use crate::data::test_support::{tiny_llama, write_temp};

    #[test]
    fn advice_comes_in_order_and_reaches_its_aim() {
        let row = r#"{"prompt":"what is red","completion":"a rose, a cherry, a tomato, a brick, a fire engine and a stop sign, all of them"}"#;
        let (dir, rows) = write_temp(&format!("{row}\n").repeat(64));
        let text = format!(
            "[model]\nmodel_id = {:?}\n[data]\ntrain = {rows:?}\n[train]\noutput_dir = {:?}\nper_device_train_batch_size = 4\n",
            tiny_llama(),
            dir.path().join("out")
        );
        let run = RunConfig::from_toml(&text, "run.toml", &[]).expect("resolves");
        let prepared = prepare(run, None).expect("prepares");
        let sites = sites(&prepared).expect("ranks");
        let peak = estimate(&prepared, &sites).peak;
        assert_eq!(advice(&prepared, &sites, peak), []);

        // A little less is reached by a smaller batch alone, and the effective batch stays.
        let little = advice(&prepared, &sites, peak - 1);
        assert_eq!(
            little[0].set,
            [
                "train.per_device_train_batch_size=2",
                "train.gradient_accumulation_steps=2"
            ]
        );
        assert_eq!(little.len(), 1);
        assert!(little[0].memory_estimate_bytes < peak);

        // What cannot be reached names everything, each step lower than the one before.
        let all = advice(&prepared, &sites, 1);
        let keys: Vec<&str> = all
            .iter()
            .map(|change| change.set[0].split('=').next().unwrap_or_default())
            .collect();
        assert_eq!(
            keys,
            [
                "train.per_device_train_batch_size",
                "train.gradient_checkpointing",
                "data.max_seq_length",
                "lora.r"
            ]
        );
        assert!(all.is_sorted_by(|a, b| a.memory_estimate_bytes >= b.memory_estimate_bytes));
    }
}
