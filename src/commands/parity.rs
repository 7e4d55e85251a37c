//! `parity`: our decoder against mistral.rs in this process, and either against a recorded reference.

use std::path::Path;

use anyhow::{Context, Result};
use mistralrs_monteclora::{IsqType, MonteCloraLoader, parse_in_situ_quant, prompt_logits};
use monteclora_converters::{Adapter, DType, ModelFiles, SafetensorsFile, merge_dir};
use serde::Serialize;

use super::{Numerical, Usage, device, print, print_json, read_effective, weight_type};
use crate::cli::{EngineArg, ParityArgs};
use crate::data::{EncodeOptions, Overlong, TrainOn};
use crate::hub;
use crate::model::{ActiveAdapter, Decoder, Sequences, read_shape};
use crate::session;

/// Over 200 tokens of prose, figures, code and other scripts.
const BUILT_IN_TEXT: &str = include_str!("parity.txt");

/// Logits of one sequence, row-major `[tokens, vocab]`.
type Logits = Vec<f32>;

/// How far two sets of logits are apart.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Agreement {
    /// Largest absolute difference.
    pub(super) max_abs_diff: f64,
    /// Mean absolute difference.
    pub(super) mean_abs_diff: f64,
    /// Share of positions with the same most likely token.
    pub(super) top1_agreement: f64,
    /// First position, over all sequences in order, whose most likely tokens differ.
    pub(super) first_divergence: Option<usize>,
}

/// The report of `parity`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Parity {
    /// Positions compared.
    pub(super) positions: usize,
    /// Our decoder against the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    ours: Option<Agreement>,
    /// Our decoder without the adapter against the reference's base.
    #[serde(skip_serializing_if = "Option::is_none")]
    ours_base: Option<Agreement>,
    /// mistral.rs against the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    mistralrs: Option<Agreement>,
    /// mistral.rs without the adapter against the reference's base.
    #[serde(skip_serializing_if = "Option::is_none")]
    mistralrs_base: Option<Agreement>,
    /// Our decoder against mistral.rs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ours_vs_mistralrs: Option<Agreement>,
    /// mistral.rs on the base with the adapter merged into it beforehand, against mistral.rs on both, quantised alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    merged_vs_mistralrs: Option<Agreement>,
}

/// Which decoders run, and how.
#[derive(Clone, Copy)]
struct Engines {
    engine: EngineArg,
    cpu: bool,
    isq: Option<IsqType>,
}

struct Reference {
    sequences: Vec<Vec<u32>>,
    logits: Vec<Logits>,
    base_logits: Option<Vec<Logits>>,
}

pub(super) fn run(args: &ParityArgs) -> Result<()> {
    if weight_type(args.model.options.dtype)? != candle_core::DType::F32 {
        return Err(Usage("parity compares in f32; use --dtype auto or f32".to_owned()).into());
    }
    let cpu = args.model.options.cpu;
    let isq = match &args.isq {
        Some(_) if args.engine == EngineArg::Ours => {
            return Err(
                Usage("--isq is mistral.rs's, which --engine ours leaves out".to_owned()).into(),
            );
        }
        Some(name) => Some(parse_in_situ_quant(name, &device(cpu)?)?),
        None => None,
    };
    let adapter = args
        .adapter
        .as_ref()
        .map(|path| read_effective(path, false))
        .transpose()?;
    let base = hub::locate(&args.model.model_id, &args.model.options.hub())?;
    let config = read_shape(&base.dir)?;
    if let Some(adapter) = &adapter {
        adapter.require_fit(&ModelFiles::open(&base.dir)?)?;
    }
    let reference = args
        .reference
        .as_ref()
        .map(|path| read_reference(path, config.vocab_size))
        .transpose()?;
    if reference.is_none() && args.engine != EngineArg::Both {
        return Err(Usage(
            "--engine ours or mistralrs needs --reference FILE; without one, the two are compared"
                .to_owned(),
        )
        .into());
    }
    let sequences = match &reference {
        Some(reference) => reference.sequences.clone(),
        None => vec![tokens(
            &base.dir,
            args.prompt.as_deref().unwrap_or(BUILT_IN_TEXT),
            config.max_position_embeddings,
        )?],
    };
    let report = compare(
        &base.dir,
        args.adapter.as_deref().zip(adapter.as_ref()),
        &sequences,
        reference.as_ref(),
        Engines {
            engine: args.engine,
            cpu,
            isq,
        },
    )?;
    if args.json {
        print_json(&report)?;
    } else {
        print(&describe(&report))?;
    }
    let worst = match &report.merged_vs_mistralrs {
        // The other differences are those of the quantisation itself.
        Some(merged) => merged.max_abs_diff,
        None => report
            .all()
            .map(|(_, a)| a.max_abs_diff)
            .fold(0.0, f64::max),
    };
    match args.tolerance {
        Some(tolerance) if worst.is_nan() || worst > tolerance => Err(Numerical(format!(
            "the largest difference {worst:.3e} exceeds --tolerance {tolerance:.3e}"
        ))
        .into()),
        _ => Ok(()),
    }
}

impl Parity {
    fn all(&self) -> impl Iterator<Item = (&'static str, &Agreement)> {
        [
            ("ours - reference", &self.ours),
            ("ours - reference (base)", &self.ours_base),
            ("mistral.rs - reference", &self.mistralrs),
            ("mistral.rs - reference (base)", &self.mistralrs_base),
            ("ours - mistral.rs", &self.ours_vs_mistralrs),
            ("merged - mistral.rs", &self.merged_vs_mistralrs),
        ]
        .into_iter()
        .filter_map(|(name, agreement)| agreement.as_ref().map(|a| (name, a)))
    }
}

/// Our decoder against mistral.rs on `sequences`, for `quickstart`.
pub(super) fn engines(
    base: &Path,
    adapter: (&Path, &Adapter),
    sequences: &[Vec<u32>],
) -> Result<Parity> {
    let engines = Engines {
        engine: EngineArg::Both,
        cpu: true,
        isq: None,
    };
    compare(base, Some(adapter), sequences, None, engines)
}

fn compare(
    base: &Path,
    adapter: Option<(&Path, &Adapter)>,
    sequences: &[Vec<u32>],
    reference: Option<&Reference>,
    engines: Engines,
) -> Result<Parity> {
    let Engines { engine, cpu, isq } = engines;
    let base_reference = reference.and_then(|r| r.base_logits.as_ref());
    let expected = match (adapter, base_reference) {
        (None, Some(base)) => Some(base),
        _ => reference.map(|r| &r.logits),
    };
    // Both with and without the adapter, where the reference knows both.
    let base_reference = base_reference.filter(|_| adapter.is_some());
    let mut report = Parity {
        positions: sequences.iter().map(Vec::len).sum(),
        ours: None,
        ours_base: None,
        mistralrs: None,
        mistralrs_base: None,
        ours_vs_mistralrs: None,
        merged_vs_mistralrs: None,
    };
    let mut ours = None;
    if engine != EngineArg::Mistralrs {
        let decoder = Decoder::load(base, &device(cpu)?)?;
        let active = match adapter {
            Some((_, adapter)) => {
                ActiveAdapter::from_adapter(adapter, decoder.config(), decoder.device())?
            }
            None => ActiveAdapter::default(),
        };
        let logits = decoder_logits(&decoder, &active, sequences)?;
        report.ours = expected
            .map(|e| agreement(&logits, e, sequences))
            .transpose()?;
        if let Some(expected) = base_reference {
            let plain = decoder_logits(&decoder, &ActiveAdapter::default(), sequences)?;
            report.ours_base = Some(agreement(&plain, expected, sequences)?);
        }
        ours = Some(logits);
    }
    if engine != EngineArg::Ours {
        let path = adapter.map(|(path, _)| path);
        let logits = prompt_logits(&engines.loader(base, path)?, sequences)?;
        report.mistralrs = expected
            .map(|e| agreement(&logits, e, sequences))
            .transpose()?;
        if let Some(expected) = base_reference {
            let plain = prompt_logits(&engines.loader(base, None)?, sequences)?;
            report.mistralrs_base = Some(agreement(&plain, expected, sequences)?);
        }
        if let Some(ours) = &ours {
            report.ours_vs_mistralrs = Some(agreement(ours, &logits, sequences)?);
        }
        if let (Some((_, adapter)), Some(_)) = (adapter, isq) {
            let dir = tempfile::tempdir().context("cannot create a temporary directory")?;
            let merged = dir.path().join("merged");
            merge_dir(&ModelFiles::open(base)?, adapter, &merged, Some(DType::F32))?;
            let merged = prompt_logits(&engines.loader(&merged, None)?, sequences)?;
            report.merged_vs_mistralrs = Some(agreement(&merged, &logits, sequences)?);
        }
    }
    Ok(report)
}

impl Engines {
    fn loader(self, base: &Path, adapter: Option<&Path>) -> Result<MonteCloraLoader> {
        let mut builder = MonteCloraLoader::builder(base, "parity")
            .dtype(mistralrs_monteclora::ModelDType::F32)
            .device(device(self.cpu)?)
            .in_situ_quant(self.isq);
        if let Some(adapter) = adapter {
            builder = builder.adapter(adapter);
        }
        Ok(builder.build()?)
    }
}

fn decoder_logits(
    decoder: &Decoder,
    adapter: &ActiveAdapter,
    sequences: &[Vec<u32>],
) -> Result<Vec<Logits>> {
    sequences
        .iter()
        .map(|tokens| {
            let logits = decoder.logits(&Sequences::new(&[tokens]), adapter)?;
            Ok(logits.flatten_all()?.to_vec1::<f32>()?)
        })
        .collect()
}

fn tokens(dir: &Path, text: &str, limit: usize) -> Result<Vec<u32>> {
    let options = EncodeOptions {
        train_on: TrainOn::All,
        apply_chat_template: false,
        max_seq_length: limit,
        overlong: Overlong::Error,
    };
    let mut ids = session::encoder(dir, None, options)?.plain_prompt_tokens(text)?;
    if ids.is_empty() {
        return Err(Usage("--prompt: the text has no tokens".to_owned()).into());
    }
    ids.truncate(limit);
    Ok(ids)
}

fn read_reference(path: &Path, vocab_size: usize) -> Result<Reference> {
    let file = SafetensorsFile::open(path)?;
    let malformed =
        |problem: String| super::Incompatible(format!("`{}`: {problem}", path.display()));
    let tensor = |name: &str| {
        file.get(name).ok_or_else(|| {
            malformed(format!(
                "{name}: missing; a reference holds input_ids and logits"
            ))
        })
    };
    let ids = tensor("input_ids")?;
    let [rows, length] = ids.shape()[..] else {
        return Err(malformed(format!(
            "input_ids: expected two dimensions, found {:?}",
            ids.shape()
        ))
        .into());
    };
    let values: Vec<i64> = match ids.dtype() {
        monteclora_converters::DType::I64 => ids
            .bytes()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect(),
        monteclora_converters::DType::U32 | monteclora_converters::DType::I32 => ids
            .bytes()
            .chunks_exact(4)
            .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        other => {
            return Err(malformed(format!("input_ids: expected I64 or U32, found {other}")).into());
        }
    };
    let sequences = values
        .chunks_exact(length.max(1))
        .map(|row| {
            row.iter()
                .map(|id| {
                    u32::try_from(*id)
                        .map_err(|_| malformed(format!("input_ids: {id} is no token id")))
                })
                .collect::<Result<Vec<u32>, _>>()
        })
        .collect::<Result<Vec<_>, _>>()?;
    let logits = |name: &str| -> Result<Vec<Logits>> {
        let tensor = tensor(name)?;
        if tensor.shape() != [rows, length, vocab_size] {
            return Err(malformed(format!(
                "{name}: expected shape {:?}, found {:?}; does the reference belong to this model?",
                [rows, length, vocab_size],
                tensor.shape()
            ))
            .into());
        }
        let values = tensor
            .to_f32()
            .with_context(|| format!("`{}`: {name}", path.display()))?;
        Ok(values
            .chunks_exact((length * vocab_size).max(1))
            .map(<[f32]>::to_vec)
            .collect())
    };
    Ok(Reference {
        logits: logits("logits")?,
        base_logits: file
            .info("base_logits")
            .is_some()
            .then(|| logits("base_logits"))
            .transpose()?,
        sequences,
    })
}

fn agreement(left: &[Logits], right: &[Logits], sequences: &[Vec<u32>]) -> Result<Agreement> {
    let (mut largest, mut sum, mut count) = (0f64, 0f64, 0usize);
    let (mut positions, mut agreeing, mut first_divergence) = (0, 0, None);
    for ((left, right), tokens) in left.iter().zip(right).zip(sequences) {
        if left.len() != right.len() || tokens.is_empty() {
            return Err(super::Incompatible(format!(
                "logits of {} and {} values are not comparable",
                left.len(),
                right.len()
            ))
            .into());
        }
        let vocab = left.len() / tokens.len();
        for (a, b) in left.chunks_exact(vocab).zip(right.chunks_exact(vocab)) {
            for (a, b) in a.iter().zip(b) {
                let difference = f64::from((a - b).abs());
                // A NaN must not vanish in a maximum.
                largest = if difference.is_nan() {
                    f64::INFINITY
                } else {
                    largest.max(difference)
                };
                sum += difference;
            }
            count += vocab;
            if argmax(a) == argmax(b) {
                agreeing += 1;
            } else {
                first_divergence.get_or_insert(positions);
            }
            positions += 1;
        }
    }
    Ok(Agreement {
        max_abs_diff: largest,
        mean_abs_diff: sum / count.max(1) as f64,
        top1_agreement: agreeing as f64 / positions.max(1) as f64,
        first_divergence,
    })
}

fn argmax(row: &[f32]) -> usize {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index)
}

fn describe(report: &Parity) -> String {
    let mut text = format!(
        "{} positions\n{:<30} {:>12} {:>12} {:>10} {:>18}\n",
        report.positions, "", "max |diff|", "mean |diff|", "top-1", "first divergence"
    );
    for (name, a) in report.all() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_finds_the_first_divergence_and_the_largest_difference() -> Result<()> {
        let left = vec![vec![1.0, 2.0, 3.0, 0.0, 5.0, 1.0]];
        let right = vec![vec![1.0, 2.5, 3.0, 0.0, 5.0, 6.0]];
        let found = agreement(&left, &right, &[vec![7, 8]])?;
        assert_eq!(found.max_abs_diff, 5.0);
        assert_eq!(found.top1_agreement, 0.5);
        assert_eq!(found.first_divergence, Some(1));
        Ok(())
    }

    #[test]
    fn nan_is_never_agreement() -> Result<()> {
        let found = agreement(&[vec![f32::NAN, 0.0]], &[vec![0.0, 0.0]], &[vec![1]])?;
        assert_eq!(found.max_abs_diff, f64::INFINITY);
        Ok(())
    }
}
