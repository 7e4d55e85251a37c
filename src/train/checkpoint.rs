//! Checkpoints: adapter, moments and progress, each directory complete or absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use monteclora_adapters::Spread;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{self as formats, Adapter, AdapterConfig, SafetensorsFile, files};
use serde::{Deserialize, Serialize};

use super::identity::{Drift, Identity};
use super::optimizer::{AdamW, AdamWSettings, SiteMoments};
use super::state::AdapterState;
use super::window::Window;
use super::{Error, Result};
use crate::data::Cursor;

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";
const BEST: &str = "best";
const PREFIX: &str = "checkpoint-";

/// How far a run has come; with the adapter and the moments, all that continues it exactly. Noise, order and dropout are
/// functions of the seed and of these counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps made.
    pub step: u64,
    /// Next batch.
    pub cursor: Cursor,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// Seconds so far.
    pub wall_s: f64,
    /// Best validation loss and its step.
    pub best: Option<(f64, u64)>,
    /// Evaluations since then.
    pub evaluations_without_improvement: u64,
    /// Whether the run ended for lack of improvement.
    pub stopped_early: bool,
    /// Whether the evaluation of this step was broken off and is still to be made.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Sums since the last `train` line of the metrics.
    pub window: Window,
}

/// `trainer_state.json`.
#[derive(Debug, Deserialize)]
struct Stored {
    #[serde(flatten)]
    progress: Progress,
    run: Identity,
}

/// [`Stored`] as it is written.
#[derive(Debug, Serialize)]
struct Storing<'a> {
    #[serde(flatten)]
    progress: &'a Progress,
    run: &'a Identity,
}

/// A point from which a run continues.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The adapter.
    pub state: AdapterState,
    /// The moments.
    pub optimizer: AdamW,
    /// The counters.
    pub progress: Progress,
    /// What may change since the checkpoint, and did.
    pub drift: Drift,
}

impl Checkpoint {
    /// Reads `dir` for a run made of `run`, whose adapter has the sites of `like`.
    ///
    /// # Errors
    /// [`Error::Torn`] when a file is missing or damaged, [`Error::Drift`] and [`Error::Checkpoint`] when it belongs to
    /// another run.
    pub fn read(
        dir: &Path,
        like: &AdapterState,
        model: &ModelShape,
        settings: AdamWSettings,
        run: &Identity,
    ) -> Result<Self> {
        let refuse = |problem: String| Error::Checkpoint {
            path: dir.to_owned(),
            problem,
        };
        let torn = |problem: String| Error::Torn {
            path: dir.to_owned(),
            problem,
        };
        let stored: Stored = std::fs::read(dir.join(STATE))
            .map_err(|e| torn(format!("{STATE}: {e}")))
            .and_then(|text| {
                serde_json::from_slice(&text).map_err(|e| torn(format!("{STATE}: {e}")))
            })?;
        let (progress, drift) = (stored.progress, stored.run.drift(run));
        if !drift.refused.is_empty() {
            return Err(Error::Drift {
                path: dir.to_owned(),
                drift,
            });
        }
        let adapter = Adapter::read_dir(dir).map_err(|e| torn(e.to_string()))?;
        let device = like
            .sites
            .first()
            .map_or(Device::Cpu, |s| s.a.device().clone());
        let state = AdapterState::from_adapter(
            &adapter,
            like.settings.as_ref(),
            model,
            like.objective,
            0,
            &device,
        )?;
        let names = |state: &AdapterState| {
            state
                .sites
                .iter()
                .map(|s| s.name.clone())
                .collect::<Vec<_>>()
        };
        if names(&state) != names(like) {
            return Err(refuse(
                "its adapter has other sites than run.toml asks for".to_owned(),
            ));
        }
        for (found, wanted) in state.sites.iter().zip(&like.sites) {
            let spread = |s: &Option<Spread>| s.as_ref().map(|s| s.log_concentration.len());
            if found.a.dims() != wanted.a.dims() || spread(&found.spread) != spread(&wanted.spread)
            {
                return Err(refuse(format!(
                    "{}: rank or num_samples is not what run.toml asks for",
                    found.name
                )));
            }
        }
        let optimizer = read_moments(&dir.join(OPTIMIZER), &state, settings, progress.step, &torn)?;
        Ok(Self {
            state,
            optimizer,
            progress,
            drift,
        })
    }
}

/// Writes the adapter alone into `dir`, in PEFT's form.
pub fn write_adapter(dir: &Path, state: &AdapterState, config: &AdapterConfig) -> Result<()> {
    state.to_adapter(config)?.write_peft(dir, true)?;
    Ok(())
}

/// Writes `output_dir/checkpoint-<step>` and removes the oldest beyond `keep`, never the one just written.
pub(super) fn write(
    output_dir: &Path,
    (state, optimizer): (&AdapterState, &AdamW),
    progress: &Progress,
    run: &Identity,
    config: &AdapterConfig,
    keep: usize,
) -> Result<()> {
    let target = output_dir.join(format!("{PREFIX}{}", progress.step));
    let stored = Progress {
        window: progress.window.stored(),
        ..progress.clone()
    };
    files::replace_dir(&target, |dir| -> Result<()> {
        write_adapter(dir, state, config)?;
        write_moments(&dir.join(OPTIMIZER), state, optimizer)?;
        let storing = Storing {
            progress: &stored,
            run,
        };
        Ok(files::write_json(&dir.join(STATE), &storing)?)
    })?;
    if keep > 0 {
        let mut others = checkpoints(output_dir)?;
        others.retain(|(step, _)| *step != progress.step);
        let excess = (others.len() + 1).saturating_sub(keep);
        for (_, oldest) in others.drain(..excess) {
            std::fs::remove_dir_all(&oldest).map_err(|e| Error::io(&oldest, e))?;
        }
    }
    Ok(())
}

/// Writes `output_dir/best`: the adapter of the lowest validation loss, with its step and loss.
pub(super) fn write_best(
    output_dir: &Path,
    state: &AdapterState,
    config: &AdapterConfig,
    best: (f64, u64),
) -> Result<()> {
    files::replace_dir(&output_dir.join(BEST), |dir| -> Result<()> {
        write_adapter(dir, state, config)?;
        let (loss, step) = best;
        Ok(files::write_json(
            &dir.join(STATE),
            &BestState { step, loss },
        )?)
    })
}

/// The step that `output_dir/best` is of; none where there is no complete one.
pub fn best_step(output_dir: &Path) -> Option<u64> {
    let dir = output_dir.join(BEST);
    Adapter::read_dir(&dir).ok()?;
    let text = std::fs::read(dir.join(STATE)).ok()?;
    let best: BestState = serde_json::from_slice(&text).ok()?;
    Some(best.step)
}

/// Makes `output_dir/best` anew from the checkpoint of the same step, which holds the same adapter; false where there is none.
pub fn rebuild_best(output_dir: &Path, (loss, step): (f64, u64)) -> Result<bool> {
    let Ok(adapter) = Adapter::read_dir(&output_dir.join(format!("{PREFIX}{step}"))) else {
        return Ok(false);
    };
    files::replace_dir(&output_dir.join(BEST), |dir| -> Result<()> {
        adapter.write_peft(dir, true)?;
        Ok(files::write_json(
            &dir.join(STATE),
            &BestState { step, loss },
        )?)
    })?;
    Ok(true)
}

/// Replaces the adapter in `output_dir` by that in `output_dir/best`.
pub(super) fn restore_best(output_dir: &Path) -> Result<()> {
    Adapter::read_dir(&output_dir.join(BEST))?.write_peft(output_dir, true)?;
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
struct BestState {
    step: u64,
    loss: f64,
}

/// Removes what a killed run left half written in `output_dir`.
pub fn remove_partial(output_dir: &Path) -> Result<()> {
    for entry in entries(output_dir)? {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(files::PARTIAL)
        {
            let path = entry.path();
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

fn entries(output_dir: &Path) -> Result<Vec<std::fs::DirEntry>> {
    match std::fs::read_dir(output_dir) {
        Ok(entries) => entries
            .collect::<std::io::Result<_>>()
            .map_err(|e| Error::io(output_dir, e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(output_dir, e)),
    }
}

/// Checkpoint directories of `output_dir` with their steps, oldest first; not all need be complete.
pub fn checkpoints(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = entries(output_dir)?
        .into_iter()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse();
            Some((step.ok()?, entry.path()))
        })
        .filter(|(_, path)| path.is_dir())
        .collect();
    found.sort();
    Ok(found)
}

/// The newest complete checkpoint of `output_dir`, as `read` reads it; torn ones are told to `skipped` and passed over.
///
/// # Errors
/// What `read` fails with, except [`Error::Torn`].
pub fn latest_checkpoint(
    output_dir: &Path,
    mut read: impl FnMut(&Path) -> Result<Checkpoint>,
    mut skipped: impl FnMut(&Error),
) -> Result<Option<Checkpoint>> {
    for (_, dir) in checkpoints(output_dir)?.into_iter().rev() {
        match read(&dir) {
            Err(error @ Error::Torn { .. }) => skipped(&error),
            found => return found.map(Some),
        }
    }
    Ok(None)
}

fn write_moments(path: &Path, state: &AdapterState, optimizer: &AdamW) -> Result<()> {
    let mut tensors = Vec::new();
    for (site, moments) in state.sites.iter().zip(&optimizer.moments) {
        let pairs = [("lora_A", &moments.a), ("lora_B", &moments.b)];
        for (name, (m, v)) in pairs {
            for (order, tensor) in [("exp_avg", m), ("exp_avg_sq", v)] {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                let tensor = formats::Tensor::from_f32(tensor.dims(), values)?;
                tensors.push((format!("{}.{name}.{order}", site.name), tensor));
            }
        }
        if let Some((m, v)) = &moments.spread {
            for (order, spread) in [("exp_avg", m), ("exp_avg_sq", v)] {
                for (name, values) in [
                    ("log_std", &spread.log_std),
                    ("log_concentration", &spread.log_concentration),
                ] {
                    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    let tensor =
                        formats::Tensor::from_bytes(formats::DType::F64, &[values.len()], bytes)?;
                    tensors.push((format!("{}.{name}.{order}", site.name), tensor));
                }
            }
        }
    }
    formats::write_safetensors(path, tensors, &BTreeMap::new())?;
    Ok(())
}

fn read_moments(
    path: &Path,
    state: &AdapterState,
    settings: AdamWSettings,
    step: u64,
    refuse: &dyn Fn(String) -> Error,
) -> Result<AdamW> {
    let file = SafetensorsFile::open(path).map_err(|e| refuse(format!("{OPTIMIZER}: {e}")))?;
    let tensor = |name: String, like: &[usize]| -> Result<formats::Tensor> {
        let tensor = file
            .get(&name)
            .ok_or_else(|| refuse(format!("{OPTIMIZER}: {name} is missing")))?;
        if tensor.shape() != like {
            return Err(refuse(format!(
                "{OPTIMIZER}: {name} has shape {:?}, expected {like:?}",
                tensor.shape()
            )));
        }
        Ok(tensor)
    };
    let matrix = |site: &str, name: &str, order: &str, like: &Tensor| -> Result<Tensor> {
        let values = tensor(format!("{site}.{name}.{order}"), like.dims())?.to_f32()?;
        Ok(Tensor::from_vec(values, like.shape(), &Device::Cpu)?.to_device(like.device())?)
    };
    let vector = |site: &str, name: &str, order: &str, len: usize| -> Result<Vec<f64>> {
        let tensor = tensor(format!("{site}.{name}.{order}"), &[len])?;
        Ok(tensor
            .bytes()
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect())
    };
    let moments = state
        .sites
        .iter()
        .map(|site| {
            let pair = |name: &str, like: &Tensor| -> Result<(Tensor, Tensor)> {
                Ok((
                    matrix(&site.name, name, "exp_avg", like)?,
                    matrix(&site.name, name, "exp_avg_sq", like)?,
                ))
            };
            let spread = |order: &str, like: &Spread| -> Result<Spread> {
                Ok(Spread {
                    log_std: vector(&site.name, "log_std", order, like.log_std.len())?,
                    log_concentration: vector(
                        &site.name,
                        "log_concentration",
                        order,
                        like.log_concentration.len(),
                    )?,
                })
            };
            Ok(SiteMoments {
                a: pair("lora_A", &site.a)?,
                b: pair("lora_B", &site.b)?,
                spread: site
                    .spread
                    .as_ref()
                    .map(|like| {
                        Ok::<_, Error>((spread("exp_avg", like)?, spread("exp_avg_sq", like)?))
                    })
                    .transpose()?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(AdamW {
        settings,
        step,
        moments,
    })
}
