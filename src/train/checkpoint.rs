//! Checkpoints: adapter, moments and progress. Each directory is either complete or absent.

use super::io_error;
use monteclora_adapters::{Error, Result};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use monteclora_adapters::methods::{Group, Storage, Value};
use monteclora_converters::{
    self as formats, Adapter, AdapterConfig, Problem, SafetensorsFile, files,
};
use serde::{Deserialize, Serialize};

use super::identity::{Drift, Identity};
use super::optimizer::{AdamW, no_moments};
use super::progress::Progress;
use super::state::AdapterState;

pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";
const BEST: &str = "best";
/// The problem code of a checkpoint with a missing or damaged file. An earlier checkpoint may be complete.
const TORN: &str = "torn-checkpoint";
const PREFIX: &str = "checkpoint-";

/// The content of `trainer_state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Stored<'a> {
    #[serde(flatten)]
    progress: Cow<'a, Progress>,
    run: Cow<'a, Identity>,
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
    /// The differences between the checkpoint's run and the present one.
    pub drift: Drift,
}

impl Checkpoint {
    /// The start of a new run with `state`.
    pub fn fresh(state: AdapterState) -> Result<Self> {
        Ok(Self {
            optimizer: AdamW::new(&state)?,
            state,
            progress: Progress::default(),
            drift: Drift::default(),
        })
    }

    /// Reads the checkpoint `dir` for a run with the identity `run` and the adapted modules of `like`.
    ///
    /// # Errors
    /// Returns an error if a file is missing or damaged, or if the checkpoint belongs to another run.
    pub fn read(dir: &Path, like: &AdapterState, run: &Identity, device: &Device) -> Result<Self> {
        let refuse = |problem: String| {
            let message = format!("`{}` cannot be resumed{problem}", dir.display());
            Problem::sentence("checkpoint", message)
        };
        let torn = |problem: String| {
            let message = format!(
                "`{}` is not a complete checkpoint: {problem}",
                dir.display()
            );
            Error::from(Problem::sentence(TORN, message))
        };
        let in_state = |e: &dyn std::fmt::Display| torn(format!("{STATE}: {e}"));
        let text = std::fs::read(dir.join(STATE)).map_err(|e| in_state(&e))?;
        let stored: Stored = serde_json::from_slice(&text).map_err(|e| in_state(&e))?;
        let (progress, drift) = (stored.progress.into_owned(), stored.run.drift(run));
        if !drift.refused.is_empty() {
            let problem = refuse(format!(
                ", for the run would not be the same:\n  {}\nundo the changes, or begin another run in another output_dir (`lora.init_from` can start it from this adapter)",
                drift.refused.join("\n  ")
            ));
            return Err(problem.exit(if drift.data { 3 } else { 2 }).into());
        }
        let adapter = Adapter::read_dir(dir).map_err(|e| torn(e.to_string()))?;
        let mut wanted: Vec<_> = like.modules.iter().map(|(_, m)| &m.name).collect();
        wanted.sort();
        if !adapter.sites.iter().map(|site| &site.name).eq(wanted) {
            let problem = ": its adapter has other sites than run.toml asks for";
            return Err(refuse(problem.to_owned()).into());
        }
        let mut state = like.with_values_of(&adapter.sites, device)?;
        for (found, wanted) in state.owners.iter().zip(&like.owners) {
            let mut pairs = found.values.iter().zip(&wanted.values);
            if pairs.any(|(found, wanted)| found.shape() != wanted.shape()) {
                let what = "rank or num_samples is not what run.toml asks for";
                return Err(refuse(format!(": {}: {what}", found.name)).into());
            }
        }
        let path = dir.join(OPTIMIZER);
        let optimizer = read_moments(&path, &mut state, progress.step, device, &torn)?;
        Ok(Self {
            state,
            optimizer,
            progress,
            drift,
        })
    }
}

/// Writes `output_dir/checkpoint-<step>`, and removes the oldest checkpoints so that `keep` are left. It never removes
/// the new one; a `keep` of 0 keeps all.
pub(super) fn write(
    output_dir: &Path,
    checkpoint: &Checkpoint,
    run: &Identity,
    config: &AdapterConfig,
    keep: usize,
) -> Result<()> {
    let mut progress = checkpoint.progress.clone();
    let metrics = checkpoint.state.method.kind().metrics;
    progress.window = progress.window.stored(metrics);
    let step = progress.step;
    files::replace_dir(&output_dir.join(format!("{PREFIX}{step}")), |dir| {
        let adapter = checkpoint.state.to_adapter(config)?;
        adapter.write_peft(dir, true)?;
        write_moments(&dir.join(OPTIMIZER), checkpoint)?;
        let stored = Stored {
            progress: Cow::Owned(progress),
            run: Cow::Borrowed(run),
        };
        Ok::<_, Error>(files::write_json(&dir.join(STATE), &stored)?)
    })?;
    if keep > 0 {
        let mut others = checkpoints(output_dir)?;
        others.retain(|(other, _)| *other != step);
        let excess = (others.len() + 1).saturating_sub(keep);
        for (_, oldest) in others.drain(..excess) {
            std::fs::remove_dir_all(&oldest).map_err(io_error(&oldest))?;
        }
    }
    Ok(())
}

/// Writes `output_dir/best`: the adapter with the lowest validation loss, its step and its loss.
pub(super) fn write_best(
    output_dir: &Path,
    adapter: &Adapter,
    (loss, step): (f64, u64),
) -> Result<()> {
    files::replace_dir(&output_dir.join(BEST), |dir| -> Result<()> {
        adapter.write_peft(dir, true)?;
        let best = BestState { step, loss };
        Ok(files::write_json(&dir.join(STATE), &best)?)
    })
}

/// The step of `output_dir/best`. `None` if the directory is missing or incomplete.
pub(super) fn best_step(output_dir: &Path) -> Option<u64> {
    let dir = output_dir.join(BEST);
    Adapter::read_dir(&dir).ok()?;
    let text = std::fs::read(dir.join(STATE)).ok()?;
    let best: BestState = serde_json::from_slice(&text).ok()?;
    Some(best.step)
}

/// Rebuilds `output_dir/best` from the checkpoint of the same step, which contains the same adapter. Returns false if
/// there is no such checkpoint.
pub(super) fn rebuild_best(output_dir: &Path, best: (f64, u64)) -> Result<bool> {
    let checkpoint = output_dir.join(format!("{PREFIX}{}", best.1));
    let Ok(adapter) = Adapter::read_dir(&checkpoint) else {
        return Ok(false);
    };
    write_best(output_dir, &adapter, best)?;
    Ok(true)
}

/// Replaces the adapter in `output_dir` by the one in `output_dir/best`.
pub(super) fn restore_best(output_dir: &Path) -> Result<()> {
    Adapter::read_dir(&output_dir.join(BEST))?.write_peft(output_dir, true)?;
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
struct BestState {
    step: u64,
    loss: f64,
}

/// Removes partial files and directories that a killed run left in `output_dir`.
pub(super) fn remove_partial(output_dir: &Path) -> Result<()> {
    for entry in entries(output_dir)? {
        let path = entry.path();
        if !(entry.file_name().to_string_lossy()).starts_with(files::PARTIAL) {
            continue;
        }
        let removed = match path.is_dir() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
        removed.map_err(io_error(&path))?;
    }
    Ok(())
}

fn entries(output_dir: &Path) -> Result<Vec<std::fs::DirEntry>> {
    match std::fs::read_dir(output_dir) {
        Ok(entries) => entries
            .collect::<std::io::Result<_>>()
            .map_err(io_error(output_dir)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(io_error(output_dir)(e)),
    }
}

/// The checkpoint directories of `output_dir` with their steps, oldest first. Some may be incomplete.
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

/// Reads the newest complete checkpoint of `output_dir` with `read`. Incomplete checkpoints are logged and skipped.
///
/// # Errors
/// Returns the errors of `read`, except those for incomplete checkpoints.
pub(super) fn latest_checkpoint(
    output_dir: &Path,
    read: impl Fn(&Path) -> Result<Checkpoint>,
) -> Result<Option<Checkpoint>> {
    for (_, dir) in checkpoints(output_dir)?.into_iter().rev() {
        match read(&dir) {
            Err(Error::Format(error)) if error.code() == TORN => {
                tracing::warn!("{error}; skipped");
            }
            found => return found.map(Some),
        }
    }
    Ok(None)
}

/// Names of a value's moments in the file. [`VALUE`] names the value itself, if the adapter's files have no place for
/// it.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
const VALUE: &str = "value";

fn write_moments(path: &Path, at: &Checkpoint) -> Result<()> {
    let mut tensors = Vec::new();
    for (owner, moments) in at.state.owners.iter().zip(&at.optimizer.moments) {
        let values = owner.values.iter().zip(moments);
        for (parameter, (value, (m, v))) in owner.parameters.iter().zip(values) {
            let mut push = |leaf: &str, value: &Value| -> Result<()> {
                let tensor = match value {
                    Value::Tensor(_) => value.to_format()?,
                    Value::Vector(values) => formats::Tensor::from_bytes(
                        formats::DType::F64,
                        &[values.len()],
                        values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    )?,
                };
                tensors.push((format!("{}.{}.{leaf}", owner.name, parameter.name), tensor));
                Ok(())
            };
            if parameter.group != Group::State {
                push(MOMENTS[0], m)?;
                push(MOMENTS[1], v)?;
            }
            if parameter.peft.is_none() {
                push(VALUE, value)?;
            }
        }
    }
    formats::write_safetensors(path, tensors, &BTreeMap::new())?;
    Ok(())
}

/// Reads the moments from `path`. Values that only this file contains are written into `state`.
fn read_moments(
    path: &Path,
    state: &mut AdapterState,
    step: u64,
    device: &Device,
    refuse: &dyn Fn(String) -> Error,
) -> Result<AdamW> {
    let file = SafetensorsFile::open(path).map_err(|e| refuse(format!("{OPTIMIZER}: {e}")))?;
    let mut moments = Vec::with_capacity(state.owners.len());
    for owner in &mut state.owners {
        let mut of_owner = Vec::with_capacity(owner.values.len());
        for (parameter, value) in owner.parameters.iter().zip(&mut owner.values) {
            let shape = value.shape();
            let read = |leaf: &str| -> Result<Value> {
                let name = format!("{}.{}.{leaf}", owner.name, parameter.name);
                let tensor = file
                    .get(&name)
                    .ok_or_else(|| refuse(format!("{OPTIMIZER}: {name} is missing")))?;
                if tensor.shape() != shape {
                    return Err(refuse(format!(
                        "{OPTIMIZER}: {name} has shape {:?}, expected {shape:?}",
                        tensor.shape()
                    )));
                }
                Ok(match parameter.storage {
                    storage @ Storage::Tensor => {
                        Value::new(storage, &shape, tensor.to_f32()?, device)?
                    }
                    Storage::Vector => {
                        let bytes = tensor.bytes();
                        let values = bytes.as_chunks::<8>().0.iter();
                        Value::Vector(values.copied().map(f64::from_le_bytes).collect())
                    }
                })
            };
            of_owner.push(match parameter.group {
                Group::State => no_moments(),
                _ => (read(MOMENTS[0])?, read(MOMENTS[1])?),
            });
            if parameter.peft.is_none() {
                *value = read(VALUE)?;
            }
        }
        moments.push(of_owner);
    }
    Ok(AdamW { step, moments })
}
