//! `parity`: compares our decoder with mistral.rs in this process, and both with a recorded reference.

mod chat;

use std::path::Path;

use anyhow::{Result, bail};
use candle_core::Device;
use mistralrs_monteclora::{MonteCloraLoader, parse_in_situ_quant};
use monteclora_converters::{DType, Problem};

use super::{device, numerical, show, weight_type};
use crate::cli::{EngineArg, ParityArgs};
use crate::data::{EncodeOptions, Encoder, Overlong, Remedies, TrainOn};
use crate::eval::{Bases, Engines, Parity, Reference, compare};
use crate::hub::{self, OfGguf};
use crate::model::{open_base, read_shape};
use crate::provenance::read_effective_on;

/// More than 200 tokens of prose, numbers, code and other scripts.
const BUILT_IN_TEXT: &str = include_str!("parity.txt");

pub(super) fn run(args: &ParityArgs) -> Result<()> {
    if args.chat {
        return chat::run(args);
    }
    if !["auto", "f32"].contains(&weight_type(args.model.options.dtype)?.name) {
        bail!(Problem::usage(
            "parity compares in f32; use --dtype auto or f32"
        ));
    }
    let device = device(args.model.options.cpu)?;
    let isq = match &args.isq {
        Some(_) if args.engine == EngineArg::Ours => {
            let problem = "--isq is mistral.rs's, which --engine ours leaves out";
            bail!(Problem::usage(problem));
        }
        Some(name) => Some(parse_in_situ_quant(name, &device)?),
        None => None,
    };
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    let config = read_shape(&base.dir)?;
    let files = open_base(&base.dir)?;
    let served = match files.gguf() {
        Some(file) if args.engine != EngineArg::Ours => {
            tracing::info!("mistral.rs computes on the import of `{}`", file.display());
            let whole = OfGguf::Import(DType::F32);
            hub::locate_as(args.model.id()?, &args.model.options.hub(), whole)?.dir
        }
        _ => base.dir.clone(),
    };
    let adapter = args
        .adapter
        .as_ref()
        .map(|path| read_effective_on(path, &files, false))
        .transpose()?;
    let reference = args
        .reference
        .as_ref()
        .map(|path| Reference::read(path, config.vocab_size))
        .transpose()?;
    if reference.is_none() && args.engine != EngineArg::Both {
        bail!(Problem::usage(
            "--engine ours or mistralrs needs --reference FILE; without one, the two are compared",
        ));
    }
    let sequences = match &reference {
        Some(reference) => reference.sequences.clone(),
        None => {
            let (text, limit) = match args.prompt.as_deref() {
                Some(prompt) => (prompt, config.max_position_embeddings),
                None => (BUILT_IN_TEXT, room_for_our_text(&served, &device)?),
            };
            vec![tokens(&base.dir, text, limit)?]
        }
    };
    let bases = Bases {
        ours: &base.dir,
        mistralrs: &served,
    };
    let report = compare(
        bases,
        args.adapter.as_deref().zip(adapter.as_ref()),
        &sequences,
        reference.as_ref(),
        &Engines {
            ours: args.engine != EngineArg::Mistralrs,
            mistralrs: args.engine != EngineArg::Ours,
            device,
            isq,
        },
    )?;
    show(args.json, &report, || describe(&report))?;
    let worst = report.worst();
    match args.tolerance {
        Some(tolerance) if worst.is_nan() || worst > tolerance => Err(numerical(format!(
            "the largest difference {worst:.3e} exceeds --tolerance {tolerance:.3e}"
        ))),
        _ => Ok(()),
    }
}

/// The sequence length that mistral.rs supports for the model, minus 1: mistral.rs panics if the one token of its
/// answer has no position.
fn room_for_our_text(base: &Path, device: &Device) -> Result<usize> {
    let loader = MonteCloraLoader::builder(base, "parity").device(device.clone());
    let served = loader.build()?.check()?.max_sequence_length;
    Ok(served.saturating_sub(1).max(1))
}

fn tokens(dir: &Path, text: &str, limit: usize) -> Result<Vec<u32>> {
    let options = EncodeOptions {
        train_on: TrainOn::All,
        apply_chat_template: false,
        max_seq_length: limit,
        overlong: Overlong::Error,
        remedies: Remedies::Keys,
    };
    let mut ids = Encoder::from_dir(dir, None, options)?.plain_prompt_tokens(text)?;
    if ids.is_empty() {
        bail!(Problem::usage("--prompt: the text has no tokens"));
    }
    ids.truncate(limit);
    Ok(ids)
}

/// Titles of the comparisons.
const NAMES: [(&str, &str); 6] = [
    ("ours", "ours - reference"),
    ("ours_base", "ours - reference (base)"),
    ("mistralrs", "mistral.rs - reference"),
    ("mistralrs_base", "mistral.rs - reference (base)"),
    ("ours_vs_mistralrs", "ours - mistral.rs"),
    ("merged_vs_mistralrs", "merged - mistral.rs"),
];

fn describe(report: &Parity) -> String {
    let mut text = format!(
        "{} positions\n{:<30} {:>12} {:>12} {:>10} {:>18}\n",
        report.positions, "", "max |diff|", "mean |diff|", "top-1", "first divergence"
    );
    for (name, a) in &report.compared {
        let name = NAMES
            .iter()
            .find(|(key, _)| key == name)
            .map_or(*name, |(_, name)| name);
        let first = a
            .first_divergence
            .map_or("none".to_owned(), |p| p.to_string());
        text.push_str(&format!(
            "{name:<30} {:>12.3e} {:>12.3e} {:>10.4} {first:>18}\n",
            a.max_abs_diff, a.mean_abs_diff, a.top1_agreement
        ));
    }
    text
}
