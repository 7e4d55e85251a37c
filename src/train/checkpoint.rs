//! Checkpoints: adapter, moments and progress, each directory complete or absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use monteclora_adapters::Spread;
use monteclora_converters::{self as formats, Adapter, AdapterConfig, SafetensorsFile};
use serde::{Deserialize, Serialize};

use super::optimizer::{AdamW, AdamWSettings, SiteMoments};
use super::state::AdapterState;
use super::{Error, Result};
use crate::data::Cursor;
use crate::model::ModelConfig;

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";

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
}

impl Checkpoint {
    /// A checkpoint of the present; tensors are shared, not copied.
    pub(super) fn borrow(state: &AdapterState, optimizer: &AdamW, progress: &Progress) -> Self {
        Self {
            state: state.clone(),
            optimizer: optimizer.clone(),
            progress: progress.clone(),
        }
    }

    /// Reads `dir`, which must hold the sites of `like` and fit the optimiser's settings.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when a file is missing or belongs to another run.
    pub fn read(
        dir: &Path,
        like: &AdapterState,
        model: &ModelConfig,
        settings: AdamWSettings,
    ) -> Result<Self> {
        let refuse = |problem: String| Error::Checkpoint {
            path: dir.to_owned(),
            problem,
        };
        let state_path = dir.join(STATE);
        let text = std::fs::read_to_string(&state_path).map_err(|e| Error::io(&state_path, e))?;
        let progress: Progress =
            serde_json::from_str(&text).map_err(|e| refuse(format!("{STATE}: {e}")))?;
        let adapter = Adapter::read_dir(dir)?;
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
        let optimizer = read_moments(
            &dir.join(OPTIMIZER),
            &state,
            settings,
            progress.step,
            &refuse,
        )?;
        Ok(Self {
            state,
            optimizer,
            progress,
        })
    }
}

/// Writes the adapter alone into `dir`, in PEFT's form.
pub fn write_adapter(dir: &Path, state: &AdapterState, config: &AdapterConfig) -> Result<()> {
    state.to_adapter(config)?.write_peft(dir, true)?;
    Ok(())
}

/// Writes `output_dir/checkpoint-<step>` and removes the oldest beyond `keep`.
pub(super) fn write(
    output_dir: &Path,
    checkpoint: &Checkpoint,
    config: &AdapterConfig,
    keep: usize,
) -> Result<PathBuf> {
    let step = checkpoint.progress.step;
    let target = output_dir.join(format!("checkpoint-{step}"));
    let partial = tempfile::Builder::new()
        .prefix(&format!(".checkpoint-{step}-"))
        .tempdir_in(output_dir)
        .map_err(|e| Error::io(output_dir, e))?;
    let dir = partial.path();
    write_adapter(dir, &checkpoint.state, config)?;
    write_moments(
        &dir.join(OPTIMIZER),
        &checkpoint.state,
        &checkpoint.optimizer,
    )?;
    let state_path = dir.join(STATE);
    let json = serde_json::to_vec_pretty(&checkpoint.progress)
        .map_err(|e| Error::io(&state_path, e.into()))?;
    std::fs::write(&state_path, json).map_err(|e| Error::io(&state_path, e))?;
    sync(&state_path)?;
    sync(dir)?;
    if target.exists() {
        // A directory cannot be renamed over a full one; the old one is of the same step, so nothing is lost in between.
        std::fs::remove_dir_all(&target).map_err(|e| Error::io(&target, e))?;
    }
    let dir = partial.keep();
    std::fs::rename(&dir, &target).map_err(|e| Error::io(&target, e))?;
    sync(output_dir)?;
    if keep > 0 {
        let mut all = checkpoints(output_dir)?;
        while all.len() > keep {
            let (_, oldest) = all.remove(0);
            std::fs::remove_dir_all(&oldest).map_err(|e| Error::io(&oldest, e))?;
        }
    }
    Ok(target)
}

fn sync(path: &Path) -> Result<()> {
    std::fs::File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io(path, e))
}

/// Checkpoints of `output_dir`, oldest first.
fn checkpoints(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(output_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(output_dir, e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(output_dir, e))?;
        let step = entry
            .file_name()
            .to_str()
            .and_then(|n| n.strip_prefix("checkpoint-")?.parse().ok());
        if let Some(step) = step.filter(|_| entry.path().join(STATE).is_file()) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The newest complete checkpoint of `output_dir`.
pub fn latest_checkpoint(output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(checkpoints(output_dir)?.pop().map(|(_, path)| path))
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
    let file = SafetensorsFile::open(path)?;
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
