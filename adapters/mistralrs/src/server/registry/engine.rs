//! One loaded model: what it was made of, and its engine in the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::DeviceLocation;
use mistralrs_core::{
    AddModelConfig, DefaultSchedulerMethod, IsqType, MistralRs, MistralRsBuilder, ModelDType,
    SchedulerConfig,
};
use monteclora_converters::Problem;
use parking_lot::Mutex;
use tokenizers::Tokenizer;
use tokio::sync::Semaphore;

use super::memory::{Memory, Reservation};
use super::reaper::{Reaper, Retired};
use crate::chat_files::text_frame;
use crate::config::{ModelConfig, ServeConfig};
use crate::error::{Error, Result, code};
use crate::loader::{MonteCloraLoader, SharedPipeline, WeakPipeline};
use crate::quirks_0_8::special_tokens::TextFrame;
use crate::quirks_0_8::split_models::allow_another_model;
use crate::quirks_0_8::{batches_on_a_cpu, prefix_cache};
use crate::server::answers::now;
use crate::server::sampling::Sampling;

/// Settings of every engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineSettings {
    max_seqs: std::num::NonZeroUsize,
    force: bool,
}

impl EngineSettings {
    pub(crate) fn of(config: &ServeConfig) -> Self {
        Self {
            max_seqs: config.max_seqs,
            force: config.force,
        }
    }
}

/// All that an engine is made of, besides the base's files and the adapter, which the generation's hash stands for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spec {
    base: PathBuf,
    dtype: ModelDType,
    isq: Option<IsqType>,
    device: DeviceLocation,
    /// Content of the template that replaces the model's own.
    chat_template: Option<Vec<u8>>,
    settings: EngineSettings,
}

/// A model to be loaded, with the public name it is to answer for.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) loader: MonteCloraLoader,
    /// Base model's name, for an adapter.
    pub(crate) parent: Option<String>,
    spec: Spec,
}

impl Wanted {
    pub(crate) fn new(
        model: &ModelConfig,
        adapter: Option<(&str, &Path)>,
        settings: EngineSettings,
    ) -> Result<Self> {
        let (name, source) = match adapter {
            Some((alias, source)) => (alias, Some(source)),
            None => (model.name.as_str(), None),
        };
        let mut loader = model.loader(name, source)?;
        loader.force = settings.force;
        Ok(Self {
            loader,
            parent: source.map(|_| model.name.clone()),
            spec: Spec {
                base: model.base.clone(),
                dtype: model.dtype,
                isq: model.isq,
                device: model.device.location(),
                // One that cannot be read is found by the check.
                chat_template: model
                    .chat_template
                    .as_ref()
                    .and_then(|path| std::fs::read(path).ok()),
                settings,
            },
        })
    }

    pub(crate) fn name(&self) -> &str {
        self.loader.name()
    }

    fn source(&self) -> Option<PathBuf> {
        self.loader.adapter().map(Path::to_path_buf)
    }

    /// Checks the files and hashes their content; blocking.
    pub(crate) fn check(self) -> Result<Checked> {
        let max_sequence_length = self.loader.check()?.max_sequence_length;
        Ok(Checked {
            max_sequence_length,
            hash: self.loader.generation()?,
            frame: text_frame(self.loader.base())?,
            weight_bytes: self.loader.weight_bytes()?,
            wanted: self,
        })
    }
}

/// A model whose files passed every check.
pub(crate) struct Checked {
    pub(crate) wanted: Wanted,
    pub(crate) hash: String,
    pub(crate) weight_bytes: u64,
    max_sequence_length: usize,
    frame: TextFrame,
}

impl Checked {
    /// Whether `lease` is this very model already.
    pub(crate) fn is(&self, lease: &Generation) -> bool {
        lease.hash == self.hash
            && lease.spec == self.wanted.spec
            && lease.parent == self.wanted.parent
    }
}

/// One loaded state of one public name.
///
/// The table holds one reference and each request in flight another; the engine is removed with the last of them.
pub(crate) struct Generation {
    pub(crate) name: String,
    /// Base model's name, for an adapter.
    pub(crate) parent: Option<String>,
    pub(crate) hash: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) max_sequence_length: usize,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(crate) frame: TextFrame,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) tokenizer: Arc<Tokenizer>,
    spec: Spec,
    /// The adapter's directory, of several with this content the one that was loaded last.
    source: Mutex<Option<PathBuf>>,
    pub(crate) engine_id: String,
    /// What a request holds while the engine works on it, where the engine may work on one sequence at a time only.
    pub(crate) turns: Option<Arc<Semaphore>>,
    pub(super) pipeline: WeakPipeline,
    memory: Option<Reservation>,
    /// None as long as it has no engine.
    reaper: Option<Reaper>,
}

/// A generation that is in use: it stays loaded as long as this is held.
pub(crate) type Lease = Arc<Generation>;

impl Generation {
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.bytes)
    }

    /// The adapter's directory, which clients must not see as it is.
    pub(crate) fn source(&self) -> Option<PathBuf> {
        self.source.lock().clone()
    }

    /// Notes that the same content was loaded from where `checked` was.
    pub(crate) fn set_source(&self, checked: &Checked) {
        *self.source.lock() = checked.wanted.source();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.leave();
        }
        if let Some(reaper) = &self.reaper {
            reaper.remove(Retired {
                engine_id: std::mem::take(&mut self.engine_id),
                pipeline: self.pipeline.clone(),
                _memory: self.memory.take(),
            });
        }
    }
}

impl Generation {
    /// Loads what was checked, and returns it without an engine; the weights are to become one's.
    async fn load(
        checked: Checked,
        serial: u64,
        memory: &Arc<Memory>,
    ) -> Result<(SharedPipeline, Self)> {
        let begun = Instant::now();
        let memory = loop {
            match memory.reserve(checked.wanted.name(), checked.weight_bytes) {
                // Who unloads one adapter to load another need not know how long that takes.
                Err(error)
                    if error.code() == code::OVER_BUDGET
                        && memory.is_leaving()
                        && begun.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                outcome => break outcome?,
            }
        };
        blocking(move || {
            let wanted = checked.wanted;
            let (name, hash) = (wanted.name().to_owned(), checked.hash);
            let (pipeline, found) = wanted.loader.load_generation()?;
            memory.reclaim();
            if found != hash {
                let message = format!(
                    "the files of `{name}` changed from {hash} to {found} while it was loaded; load it again when nothing writes them"
                );
                return Err(Problem::sentence(code::FILES_CHANGED, message).into());
            }
            let (end_tokens, sampling, tokenizer) = {
                let loaded = pipeline.blocking_lock();
                (
                    loaded.get_metadata().eos_tok.clone(),
                    Sampling::of(loaded.generation_defaults().as_ref()),
                    loaded.tokenizer(),
                )
            };
            let tokenizer = tokenizer
                .ok_or_else(|| Error::Engine("the model came without a tokenizer".to_owned()))?;
            let generation = Self {
                // The serial keeps ids apart when content returns while its former engine still drains.
                engine_id: format!("{name}@{hash}.{serial}"),
                source: Mutex::new(wanted.source()),
                name,
                parent: wanted.parent,
                hash,
                created: now(),
                max_sequence_length: checked.max_sequence_length,
                frame: checked.frame,
                end_tokens,
                sampling,
                tokenizer,
                turns: batches_on_a_cpu::turns(wanted.spec.device),
                spec: wanted.spec,
                pipeline: Arc::downgrade(&pipeline),
                memory: Some(memory),
                reaper: None,
            };
            Ok((pipeline, generation))
        })
        .await
    }

    fn schedule(&self) -> SchedulerConfig {
        SchedulerConfig::DefaultScheduler {
            method: DefaultSchedulerMethod::Fixed(self.spec.settings.max_seqs),
        }
    }

    /// In use, to be removed by `reaper` in the end.
    fn leased(mut self, reaper: &Reaper) -> Lease {
        self.reaper = Some(reaper.clone());
        Arc::new(self)
    }
}

/// mistral.rs's host, and the thread that removes engines from it.
pub(crate) struct Host {
    pub(super) inner: Arc<MistralRs>,
    pub(super) memory: Arc<Memory>,
    reaper: Reaper,
    /// Of the next generation.
    serial: AtomicU64,
}

impl Host {
    /// Starts a host with its first model, which it cannot be without.
    pub(crate) async fn start(first: Checked, memory: Arc<Memory>) -> Result<(Self, Lease)> {
        let (pipeline, generation) = Generation::load(first, 0, &memory).await?;
        let inner = MistralRsBuilder::new(pipeline, generation.schedule(), false, None)
            .with_model_id(generation.engine_id.clone())
            .with_no_prefix_cache(true)
            .build()
            .await;
        let reaper = Reaper::spawn(Arc::downgrade(&inner))?;
        let lease = generation.leased(&reaper);
        let host = Self {
            inner,
            memory,
            reaper,
            serial: AtomicU64::new(1),
        };
        Ok((host, lease))
    }

    /// Loads one more model and starts its engine.
    pub(crate) async fn add(&self, checked: Checked) -> Result<Lease> {
        allow_another_model()?;
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let (pipeline, generation) = Generation::load(checked, serial, &self.memory).await?;
        let config = AddModelConfig::new(prefix_cache::engine_without());
        let (id, schedule) = (generation.engine_id.clone(), generation.schedule());
        let added = self.inner.add_model(id, pipeline, schedule, config);
        added.await.map_err(Error::Engine)?;
        Ok(generation.leased(&self.reaper))
    }
}

/// How long a load waits for the memory of what was unloaded before it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Engine(format!("loading stopped unexpectedly: {error}")))?
}
