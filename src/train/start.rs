//! Decides, before the base model is loaded, whether a run starts anew, continues from a checkpoint, or is already
//! finished.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};

use super::checkpoint::{
    OPTIMIZER, best_step, latest_checkpoint, rebuild_best, remove_partial,
    write as write_checkpoint,
};
use super::record::finished_step;
use super::{AdapterState, Checkpoint, Error, Prepared, RunLock, checkpoints};
use crate::distributed::Communicator;
use crate::output::require_empty;

/// The point that a run starts or continues from.
pub struct Start {
    pub(super) from: Checkpoint,
    /// Keeps other runs out of the output directory. Rank 0 has it.
    _lock: Option<RunLock>,
}

/// The decision.
pub enum Begin {
    /// Steps are left.
    Run(Box<Start>),
    /// The run ended at this step, and run.toml asks for no more steps.
    Finished(u64),
}

impl Start {
    /// The start of a new run. The output directory exists and is locked by `lock`.
    ///
    /// # Errors
    /// Returns an error if the initial values cannot be made.
    pub fn new(prepared: &Prepared, device: &Device, lock: RunLock) -> Result<Self> {
        Self::with_lock(prepared, device, Some(lock))
    }

    fn with_lock(prepared: &Prepared, device: &Device, lock: Option<RunLock>) -> Result<Self> {
        let (method, model) = (prepared.method.clone(), &prepared.model_config);
        let seed = prepared.run.seed;
        let state = match &prepared.init_from {
            None => {
                let config = &prepared.adapter_config;
                AdapterState::initial(method, config, &prepared.sites, model, seed, device)?
            }
            Some(adapter) => AdapterState::from_adapter(method, adapter, model, seed, device)?,
        };
        Ok(Self {
            from: Checkpoint::fresh(state)?,
            _lock: lock,
        })
    }
}

/// The state of an earlier run in an output directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Earlier {
    /// The run was interrupted. This is the step of its last checkpoint, or 0 without a checkpoint.
    Interrupted(u64),
    /// The run ended at this step.
    Finished(u64),
}

impl Earlier {
    /// Reads the state from an output directory. `None` if it contains no run.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be listed.
    fn in_dir(output_dir: &Path) -> Result<Option<Self>> {
        let record = output_dir.join("run.json");
        if !record.is_file() {
            return Ok(None);
        }
        if let Some(step) = finished_step(&record) {
            return Ok(Some(Self::Finished(step)));
        }
        let last = checkpoints(output_dir)?.pop();
        Ok(Some(Self::Interrupted(last.map_or(0, |(step, _)| step))))
    }

    /// Returns an error if the directory contains a run. The message first tells how to continue this run.
    fn refuse(output_dir: &Path) -> Result<()> {
        let dir = output_dir.display();
        let message = match Self::in_dir(output_dir)? {
            None => return Ok(()),
            Some(Self::Interrupted(0)) => format!(
                "`{dir}` holds a run that was interrupted before its first checkpoint; --resume auto starts it again"
            ),
            Some(Self::Interrupted(step)) => format!(
                "`{dir}` holds a run that was interrupted; --resume auto continues it from step {step} (--force discards it and starts over)"
            ),
            Some(Self::Finished(step)) => format!(
                "`{dir}` holds a run that ended at step {step}; train into another directory with --set train.output_dir=DIR, or further in this one with more max_steps or num_train_epochs and --resume auto (--force discards it and starts over)"
            ),
        };
        bail!(Problem::usage(message))
    }
}

/// Creates the output directory, and decides how the run begins. `resume` is `auto`, a checkpoint directory, or `None`.
///
/// Rank 0 decides, and sends the checkpoint to the other ranks. They need not see the output directory.
///
/// # Errors
/// Returns an error if the directory cannot be written, is not empty or is in use, if the checkpoint is damaged or
/// belongs to another run, or if the run would end before the checkpoint.
pub fn begin(
    prepared: &Prepared,
    resume: Option<&str>,
    force: bool,
    device: &Device,
    ranks: &dyn Communicator,
) -> Result<Begin> {
    if !ranks.is_first() {
        return follow(prepared, device, ranks);
    }
    let begun = begin_first(prepared, resume, force, device)?;
    if ranks.size() > 1 {
        lead(&begun, prepared, ranks)?;
    }
    Ok(begun)
}

/// How rank 0 begins: the finished step, or the names of the checkpoint's files. Without files the run is new.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Led {
    finished: Option<u64>,
    files: Vec<String>,
}

/// Tells the other ranks how this one, rank 0, begins.
fn lead(begun: &Begin, prepared: &Prepared, ranks: &dyn Communicator) -> Result<()> {
    let mut led = Led::default();
    let mut contents = Vec::new();
    match begun {
        Begin::Finished(step) => led.finished = Some(*step),
        Begin::Run(start) if start.from.progress.step > 0 => {
            let dir = tempfile::tempdir()?;
            let config = &prepared.adapter_config;
            write_checkpoint(dir.path(), &start.from, &prepared.identity, config, 0)?;
            for (_, path) in checkpoints(dir.path())? {
                for file in std::fs::read_dir(path)? {
                    let file = file?;
                    led.files
                        .push(file.file_name().to_string_lossy().into_owned());
                    contents.push(std::fs::read(file.path())?);
                }
            }
        }
        Begin::Run(_) => {}
    }
    ranks.broadcast(&mut serde_json::to_vec(&led)?);
    for content in &mut contents {
        ranks.broadcast(content);
    }
    Ok(())
}

/// Begins as rank 0 does.
fn follow(prepared: &Prepared, device: &Device, ranks: &dyn Communicator) -> Result<Begin> {
    let mut told = Vec::new();
    ranks.broadcast(&mut told);
    let led: Led = serde_json::from_slice(&told)?;
    if let Some(step) = led.finished {
        return Ok(Begin::Finished(step));
    }
    let mut start = Start::with_lock(prepared, device, None)?;
    if !led.files.is_empty() {
        let dir = tempfile::tempdir()?;
        for name in &led.files {
            let mut content = Vec::new();
            ranks.broadcast(&mut content);
            std::fs::write(dir.path().join(name), content)?;
        }
        let initial = &start.from.state;
        start.from = Checkpoint::read(dir.path(), initial, &prepared.identity, device)?;
    }
    Ok(Begin::Run(Box::new(start)))
}

fn begin_first(
    prepared: &Prepared,
    resume: Option<&str>,
    force: bool,
    device: &Device,
) -> Result<Begin> {
    let output_dir = prepared.run.train.output_dir.as_path();
    let existed = output_dir.exists();
    let begun = begin_in(output_dir, prepared, resume, force, device);
    if begun.is_err() && !existed {
        // A directory that is not empty stays.
        let _ = std::fs::remove_dir(output_dir);
    }
    begun
}

fn begin_in(
    output_dir: &Path,
    prepared: &Prepared,
    resume: Option<&str>,
    force: bool,
    device: &Device,
) -> Result<Begin> {
    make(output_dir)?;
    let lock = RunLock::take(output_dir, "set another train.output_dir")?;
    if resume.is_none() && !force {
        Earlier::refuse(output_dir)?;
        require_empty(output_dir, false)?;
    }
    remove_partial(output_dir)?;
    let mut start = Start::new(prepared, device, lock)?;
    let (initial, identity) = (&start.from.state, &prepared.identity);
    let read = |dir: &Path| Checkpoint::read(dir, initial, identity, device);
    let checkpoint = match resume {
        None => {
            // --force: checkpoints of an earlier run could later be taken for those of this run.
            for (_, dir) in checkpoints(output_dir)? {
                discard(&dir)?;
            }
            discard(&output_dir.join("best"))?;
            None
        }
        Some("auto") => latest_checkpoint(output_dir, read)?,
        Some(dir) => Some(named(Path::new(dir), output_dir, force, read)?),
    };
    let finished = finished_step(&output_dir.join("run.json"));
    let Some(mut checkpoint) = checkpoint else {
        match (resume, finished) {
            (Some("auto"), Some(step)) => return Ok(Begin::Finished(step)),
            (Some(_), _) => tracing::info!(
                "nothing to resume in `{}`: starting from the beginning",
                output_dir.display()
            ),
            (None, _) => {}
        }
        return Ok(Begin::Run(Box::new(start)));
    };
    let (step, total_steps) = (checkpoint.progress.step, prepared.total_steps);
    if step > total_steps {
        bail!(Problem::usage(format!(
            "[train] max_steps or num_train_epochs: the run would end at step {total_steps}, before the checkpoint at step {step}; raise it"
        )));
    }
    // The configured patience may be larger than at the checkpoint.
    let patience = prepared.settings.train.early_stopping_patience;
    checkpoint.progress.stopped_early =
        patience > 0 && checkpoint.progress.evaluations_without_improvement >= patience;
    if (step == total_steps || checkpoint.progress.stopped_early) && finished == Some(step) {
        return Ok(Begin::Finished(step));
    }
    adjust(&mut checkpoint, prepared)?;
    tracing::info!("continuing at step {step} of {total_steps}");
    start.from = checkpoint;
    Ok(Begin::Run(Box::new(start)))
}

/// Logs what changed since the checkpoint, and checks the best adapter.
///
/// The best adapter is lost if it is missing or damaged, or if it belongs to a later step that the changed run may not
/// reach. Then it is rebuilt from the checkpoint of the best step. If that is not possible, the next evaluation starts
/// the comparison anew.
///
/// # Errors
/// Returns an error if the best adapter is missing, cannot be rebuilt and is needed at the end of the run.
fn adjust(checkpoint: &mut Checkpoint, prepared: &Prepared) -> Result<()> {
    let output_dir = prepared.run.train.output_dir.as_path();
    let needed = prepared.settings.train.load_best_model_at_end;
    let drift = &checkpoint.drift;
    if !drift.allowed.is_empty() {
        tracing::info!("changed since the checkpoint: {}", drift.allowed.join(", "));
    }
    let length = |key: &String| key == "train.max_steps" || key == "train.num_train_epochs";
    if drift.allowed.iter().any(length) {
        tracing::warn!(
            "the run has another length now: the learning rate's schedule spans {} steps from here on",
            prepared.total_steps
        );
    }
    let progress = &mut checkpoint.progress;
    let Some(best) = progress.best else {
        return Ok(());
    };
    let found = best_step(output_dir);
    let lost = found.is_none_or(|found| drift.changes_course() && found > progress.step);
    let path = output_dir.join("best");
    if !lost {
        return Ok(());
    }
    if rebuild_best(output_dir, best)? {
        tracing::warn!(
            "`{}` was made again from the checkpoint of step {}",
            path.display(),
            best.1
        );
        return Ok(());
    }
    if found.is_none() && needed {
        bail!(Problem::usage(format!(
            "`{}`, the best adapter (of step {}), is missing or damaged, and [train] load_best_model_at_end needs it; bring it back, or leave it to what later evaluations find with --set train.load_best_model_at_end=false",
            path.display(),
            best.1
        )));
    }
    tracing::warn!(
        "`{}` does not hold the best adapter of this checkpoint; the next evaluation starts the comparison again",
        path.display()
    );
    progress.best = None;
    progress.evaluations_without_improvement = 0;
    Ok(())
}

/// Reads the checkpoint that the user named. Later checkpoints in the output directory are an error, since they would
/// mix with those of the continued run; with `force` they are removed.
fn named(
    dir: &Path,
    output_dir: &Path,
    force: bool,
    read: impl Fn(&Path) -> Result<Checkpoint, Error>,
) -> Result<Checkpoint> {
    let holds = |name: &str| dir.join(name).is_file();
    if !holds(OPTIMIZER)
        && let Some((_, newest)) = checkpoints(dir).ok().and_then(|mut found| found.pop())
    {
        bail!(Problem::usage(format!(
            "--resume {}: no checkpoint itself, but its checkpoints can be given; the newest is {}",
            dir.display(),
            newest.display()
        )));
    }
    if holds("optimizer.pt") || holds("optimizer.bin") {
        bail!(Problem::usage(format!(
            "--resume {}: a checkpoint of another trainer, whose optimizer's state cannot be continued; start from its adapter with --set lora.init_from={:?}",
            dir.display(),
            dir.display().to_string()
        )));
    }
    if !holds("trainer_state.json") {
        bail!(Problem::usage(format!(
            "--resume {}: not a checkpoint directory; give `auto` or a directory such as {}",
            dir.display(),
            output_dir.join("checkpoint-200").display()
        )));
    }
    let checkpoint = read(dir)?;
    let later: Vec<_> = checkpoints(output_dir)?
        .into_iter()
        .filter(|(step, _)| *step > checkpoint.progress.step)
        .collect();
    if let (Some((_, newest)), false) = (later.last(), force) {
        bail!(Problem::usage(format!(
            "`{}` is later than `{}`; --resume auto continues from it, --force discards it",
            newest.display(),
            dir.display()
        )));
    }
    for (_, later) in later {
        discard(&later)?;
    }
    Ok(checkpoint)
}

fn discard(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {
            tracing::warn!("discarded `{}`", dir.display());
            Ok(())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot remove `{}`", dir.display())),
    }
}

/// Creates the output directory and checks that it is writable, before hours of training.
fn make(output_dir: &Path) -> Result<()> {
    let tried = std::fs::create_dir_all(output_dir)
        .and_then(|()| tempfile::tempfile_in(output_dir).map(drop));
    tried.map_err(|error| {
        Problem::usage(format!(
            "[train] output_dir: cannot write to `{}`: {error}",
            output_dir.display()
        ))
        .into()
    })
}
