//! Compares the logits of our decoder, of mistral.rs and of a recorded reference.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use indexmap::IndexMap;
use mistralrs_monteclora::{IsqType, MonteCloraLoader, prompt_logits};
use monteclora_converters::{
    Adapter, Carried, DType, ModelFiles, Problem, SafetensorsFile, merge_dir,
};
use serde::Serialize;

use crate::model::{ActiveAdapter, Decoder, Sequences};

/// Logits of one sequence, row-major `[tokens, vocab]`.
type Logits = Vec<f32>;

/// The difference between two sets of logits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Largest absolute difference.
    pub max_abs_diff: f64,
    /// Mean absolute difference.
    pub mean_abs_diff: f64,
    /// Share of positions with the same most likely token.
    pub top1_agreement: f64,
    /// First position, over all sequences in order, at which the most likely tokens differ.
    pub first_divergence: Option<usize>,
}

/// The report of `parity`.
#[derive(Debug, Clone, Serialize)]
pub struct Parity {
    /// Number of compared positions.
    pub positions: usize,
    /// The comparisons, by name:
    /// - `ours`, `mistralrs`: our logits, or those of mistral.rs, against the reference;
    /// - `ours_base`, `mistralrs_base`: the same without the adapter, against the reference's base;
    /// - `ours_vs_mistralrs`: ours against those of mistral.rs;
    /// - `merged_vs_mistralrs`: mistral.rs on the merged model against mistral.rs on base and adapter, with the same
    ///   quantisation.
    #[serde(flatten)]
    pub compared: IndexMap<&'static str, Agreement>,
}

/// The decoders that run, and their settings.
#[derive(Debug, Clone)]
pub struct Engines {
    /// Whether our decoder runs.
    pub ours: bool,
    /// Whether mistral.rs runs.
    pub mistralrs: bool,
    /// The device of both.
    pub device: Device,
    /// The quantisation that mistral.rs applies to the base model when it loads it.
    pub isq: Option<IsqType>,
}

/// Recorded logits.
pub struct Reference {
    /// The sequences of the logits.
    pub sequences: Vec<Vec<u32>>,
    logits: Vec<Logits>,
    base_logits: Option<Vec<Logits>>,
}

impl Parity {
    /// The largest absolute difference of all comparisons. With quantisation it is that of `merged_vs_mistralrs` alone,
    /// since the other comparisons measure the quantisation itself.
    pub fn worst(&self) -> f64 {
        let largest = |agreement: &Agreement| agreement.max_abs_diff;
        match self.compared.get("merged_vs_mistralrs") {
            Some(merged) => largest(merged),
            None => self.compared.values().map(largest).fold(0.0, f64::max),
        }
    }

    fn compare(
        &mut self,
        name: &'static str,
        left: &[Logits],
        right: &[Logits],
        sequences: &[Vec<u32>],
    ) -> Result<()> {
        self.compared
            .insert(name, agreement(left, right, sequences)?);
        Ok(())
    }
}

/// The directories that the engines load the base model from. mistral.rs needs one that contains the weights.
#[derive(Debug, Clone, Copy)]
pub struct Bases<'a> {
    /// The directory for our decoder.
    pub ours: &'a Path,
    /// The directory for mistral.rs.
    pub mistralrs: &'a Path,
}

/// Runs `sequences` through the engines and compares the logits. If the reference has logits of the base, the engines
/// also run without the adapter.
///
/// # Errors
/// Returns an error if a model does not load or if logits differ in size.
pub fn compare(
    bases: Bases<'_>,
    adapter: Option<(&Path, &Adapter)>,
    sequences: &[Vec<u32>],
    reference: Option<&Reference>,
    engines: &Engines,
) -> Result<Parity> {
    let base_reference = reference.and_then(|r| r.base_logits.as_ref());
    let expected = match (adapter, base_reference) {
        (None, Some(base)) => Some(base),
        _ => reference.map(|r| &r.logits),
    };
    // Without an adapter, `expected` is already the base's.
    let base_reference = base_reference.filter(|_| adapter.is_some());
    let mut report = Parity {
        positions: sequences.iter().map(Vec::len).sum(),
        compared: IndexMap::new(),
    };
    let mut ours = None;
    if engines.ours {
        let decoder = Decoder::load(bases.ours, &engines.device)?;
        let active = match adapter {
            Some((_, adapter)) => {
                ActiveAdapter::from_adapter(adapter, decoder.config(), decoder.device())?
            }
            None => ActiveAdapter::default(),
        };
        let logits = decoder_logits(&decoder, &active, sequences)?;
        if let Some(expected) = expected {
            report.compare("ours", &logits, expected, sequences)?;
        }
        if let Some(expected) = base_reference {
            let plain = decoder_logits(&decoder, &ActiveAdapter::default(), sequences)?;
            report.compare("ours_base", &plain, expected, sequences)?;
        }
        ours = Some(logits);
    }
    if engines.mistralrs {
        let path = adapter.map(|(path, _)| path);
        let logits = prompt_logits(&engines.loader(bases.mistralrs, path)?, sequences)?;
        if let Some(expected) = expected {
            report.compare("mistralrs", &logits, expected, sequences)?;
        }
        if let Some(expected) = base_reference {
            let plain = prompt_logits(&engines.loader(bases.mistralrs, None)?, sequences)?;
            report.compare("mistralrs_base", &plain, expected, sequences)?;
        }
        if let Some(ours) = &ours {
            report.compare("ours_vs_mistralrs", ours, &logits, sequences)?;
        }
        if let (Some((_, adapter)), Some(_)) = (adapter, engines.isq) {
            let dir = tempfile::tempdir().context("cannot create a temporary directory")?;
            let merged = dir.path().join("merged");
            let (base, carried) = (ModelFiles::open(bases.mistralrs)?, Carried::default());
            merge_dir(&base, adapter, &merged, Some(DType::F32), &carried)?;
            let merged = prompt_logits(&engines.loader(&merged, None)?, sequences)?;
            report.compare("merged_vs_mistralrs", &merged, &logits, sequences)?;
        }
    }
    Ok(report)
}

impl Engines {
    fn loader(&self, base: &Path, adapter: Option<&Path>) -> Result<MonteCloraLoader> {
        let mut builder = MonteCloraLoader::builder(base, "parity")
            .dtype(mistralrs_monteclora::ModelDType::F32)
            .device(self.device.clone())
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

impl Reference {
    /// Reads `input_ids`, `logits` and the optional `base_logits` of a model with `vocab_size` tokens.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if a tensor is missing or has the wrong shape or type.
    pub fn read(path: &Path, vocab_size: usize) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let malformed = |problem: String| {
            Problem::new("reference", format!("`{}`", path.display()), problem, "")
        };
        let tensor = |name: &str| {
            file.get(name).ok_or_else(|| {
                malformed(format!(
                    "{name}: missing; a reference holds input_ids and logits"
                ))
            })
        };
        let ids = tensor("input_ids")?;
        let [rows, length] = ids.shape()[..] else {
            bail!(malformed(format!(
                "input_ids: expected two dimensions, found {:?}",
                ids.shape()
            )));
        };
        let values: Vec<i64> = match ids.dtype() {
            DType::I64 => ids
                .bytes()
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
                .collect(),
            DType::U32 | DType::I32 => ids
                .bytes()
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            other => {
                return Err(
                    malformed(format!("input_ids: expected I64 or U32, found {other}")).into(),
                );
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
                bail!(malformed(format!(
                    "{name}: expected shape {:?}, found {:?}; does the reference belong to this model?",
                    [rows, length, vocab_size],
                    tensor.shape()
                )));
            }
            let values = tensor
                .to_f32()
                .with_context(|| format!("`{}`: {name}", path.display()))?;
            Ok(values
                .chunks_exact((length * vocab_size).max(1))
                .map(<[f32]>::to_vec)
                .collect())
        };
        Ok(Self {
            logits: logits("logits")?,
            base_logits: file
                .info("base_logits")
                .is_some()
                .then(|| logits("base_logits"))
                .transpose()?,
            sequences,
        })
    }
}

fn agreement(left: &[Logits], right: &[Logits], sequences: &[Vec<u32>]) -> Result<Agreement> {
    let (mut largest, mut sum, mut count) = (0f64, 0f64, 0usize);
    let (mut positions, mut agreeing, mut first_divergence) = (0, 0, None);
    for ((left, right), tokens) in left.iter().zip(right).zip(sequences) {
        if left.len() != right.len() || tokens.is_empty() {
            let (left, right) = (left.len(), right.len());
            let message = format!("logits of {left} and {right} values are not comparable");
            bail!(Problem::sentence("logits", message));
        }
        let vocab = left.len() / tokens.len();
        for (a, b) in left.chunks_exact(vocab).zip(right.chunks_exact(vocab)) {
            for (a, b) in a.iter().zip(b) {
                let difference = f64::from((a - b).abs());
                // `f64::max` ignores NaN.
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
