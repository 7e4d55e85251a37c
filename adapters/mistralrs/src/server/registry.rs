//! The swap table: which engine answers for which public name, and when an engine that nobody needs any more goes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, Weak, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};

use indexmap::IndexMap;
use mistralrs_core::{AddModelConfig, EngineConfig, MistralRs, MistralRsBuilder};
use tokio::sync::Mutex;

use crate::chat_files::{TextFrame, text_frame};
use crate::config::{ModelConfig, ServeConfig};
use crate::engine::scheduler;
use crate::error::{Error, Result};
use crate::loader::MonteCloraLoader;

/// One loaded state of one public name.
///
/// The table holds one reference and each request in flight another; the engine is removed with the last of them.
pub(crate) struct Generation {
    pub(crate) name: String,
    /// Base model's name, for an adapter.
    pub(crate) parent: Option<String>,
    /// Hash of the content.
    pub(crate) hash: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) max_sequence_length: usize,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(crate) frame: TextFrame,
    engine_id: String,
    reaper: mpsc::Sender<String>,
}

/// A generation that is in use: it stays loaded as long as this is held.
pub(crate) type Lease = Arc<Generation>;

impl Generation {
    pub(crate) fn engine_id(&self) -> &str {
        &self.engine_id
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Removal blocks, which a task must not do. With the reaper gone the whole host is going.
        let _ = self.reaper.send(std::mem::take(&mut self.engine_id));
    }
}

/// All that is served.
pub(crate) struct Registry {
    table: RwLock<IndexMap<String, Lease>>,
    models: Vec<ModelConfig>,
    default_model: String,
    settings: EngineSettings,
    /// Held while the table is being changed, so that changes are decided one after the other.
    changing: Mutex<()>,
    next_serial: AtomicU64,
    reaper: mpsc::Sender<String>,
    host: Arc<MistralRs>,
}

#[derive(Clone, Copy)]
struct EngineSettings {
    max_seqs: std::num::NonZeroUsize,
    prefix_cache_n: usize,
}

impl Registry {
    /// Loads every model and adapter of `config`, checking all of them before the first is loaded.
    pub(crate) async fn load(config: &ServeConfig) -> Result<Self> {
        let mut jobs = Vec::new();
        for model in &config.models {
            jobs.push((model.loader(&model.name, None)?, None));
            for (alias, source) in &model.adapters {
                jobs.push((model.loader(alias, Some(source))?, Some(model.name.clone())));
            }
        }
        for (loader, _) in &jobs {
            loader.check()?;
        }
        let settings = EngineSettings {
            max_seqs: config.max_seqs,
            prefix_cache_n: config.prefix_cache_n,
        };
        let mut jobs = jobs.into_iter();
        let (first, _) = jobs
            .next()
            .ok_or_else(|| Error::setting("models", "at least one model is needed"))?;
        let prepared = Prepared::new(first, None, 0).await?;
        let schedule = scheduler(&prepared.pipeline, &prepared.loader, settings.max_seqs).await;
        let host = MistralRsBuilder::new(prepared.pipeline.clone(), schedule, false, None)
            .with_model_id(prepared.engine_id.clone())
            .with_prefix_cache_n(settings.prefix_cache_n)
            .build()
            .await;
        let reaper = spawn_reaper(Arc::downgrade(&host))?;
        let registry = Self {
            table: RwLock::new(IndexMap::new()),
            models: config.models.clone(),
            default_model: config.default_model.clone(),
            settings,
            changing: Mutex::new(()),
            next_serial: AtomicU64::new(1),
            reaper,
            host,
        };
        registry.publish(prepared);
        for (loader, parent) in jobs {
            let prepared = registry.start_engine(loader, parent).await?;
            registry.publish(prepared);
        }
        Ok(registry)
    }

    pub(crate) fn host(&self) -> &Arc<MistralRs> {
        &self.host
    }

    /// The generation that answers for `name` now; without a name, or for `default`, the default model's.
    pub(crate) fn lease(&self, name: Option<&str>) -> Option<Lease> {
        let name = match name {
            None | Some("default") => &self.default_model,
            Some(name) => name,
        };
        self.read_table().get(name).cloned()
    }

    /// Everything served, bases before their adapters.
    pub(crate) fn list(&self) -> Vec<Lease> {
        self.read_table().values().cloned().collect()
    }

    /// Loads the adapter in `source` under `name` on the first base model, or on the one it replaces an adapter of.
    ///
    /// Requests in flight finish on the generation they began with. On failure the old generation goes on serving.
    pub(crate) async fn load_adapter(
        &self,
        name: &str,
        source: &Path,
        in_place: bool,
        expected: Option<&str>,
    ) -> Result<Lease> {
        let _changing = self.changing.lock().await;
        let current = self.read_table().get(name).cloned();
        check_expected(name, current.as_ref(), expected)?;
        let parent = match &current {
            Some(lease) if lease.parent.is_none() || !(in_place || expected.is_some()) => {
                return Err(Error::NameTaken(name.to_owned()));
            }
            Some(lease) => lease.parent.clone(),
            None => None,
        };
        let model = parent
            .as_ref()
            .and_then(|parent| self.models.iter().find(|model| model.name == *parent))
            .or(self.models.first())
            .ok_or_else(|| Error::setting("models", "there is no base model"))?;
        let loader = model.loader(name, Some(source))?;
        let hash = blocking({
            let loader = loader.clone();
            move || loader.generation()
        })
        .await?;
        if let Some(lease) = current.filter(|lease| lease.hash == hash) {
            return Ok(lease);
        }
        let prepared = self.start_engine(loader, Some(model.name.clone())).await?;
        Ok(self.publish(prepared))
    }

    /// Stops serving the adapter `name`; requests in flight finish.
    pub(crate) async fn unload_adapter(&self, name: &str, expected: Option<&str>) -> Result<()> {
        let _changing = self.changing.lock().await;
        let current = self.read_table().get(name).cloned();
        check_expected(name, current.as_ref(), expected)?;
        match current {
            None => Err(Error::UnknownName(name.to_owned())),
            Some(lease) if lease.parent.is_none() => Err(Error::setting(
                "lora_name",
                format!("`{name}` is a base model, not an adapter"),
            )),
            Some(_) => {
                self.table
                    .write()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .shift_remove(name);
                Ok(())
            }
        }
    }

    async fn start_engine(
        &self,
        loader: MonteCloraLoader,
        parent: Option<String>,
    ) -> Result<Prepared> {
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        let prepared = Prepared::new(loader, parent, serial).await?;
        let schedule =
            scheduler(&prepared.pipeline, &prepared.loader, self.settings.max_seqs).await;
        let engine = EngineConfig {
            prefix_cache_n: self.settings.prefix_cache_n,
            throughput_logging_enabled: false,
            ..EngineConfig::default()
        };
        self.host
            .add_model(
                prepared.engine_id.clone(),
                prepared.pipeline.clone(),
                schedule,
                AddModelConfig::new(engine),
            )
            .await
            .map_err(Error::Engine)?;
        Ok(prepared)
    }

    fn publish(&self, prepared: Prepared) -> Lease {
        let lease = Arc::new(Generation {
            name: prepared.loader.name().to_owned(),
            parent: prepared.parent,
            hash: prepared.hash,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |elapsed| elapsed.as_secs()),
            max_sequence_length: prepared.max_sequence_length,
            frame: prepared.frame,
            engine_id: prepared.engine_id,
            reaper: self.reaper.clone(),
        });
        self.table
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .insert(lease.name.clone(), lease.clone());
        tracing::info!(name = lease.name, generation = lease.hash, "serving");
        lease
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, IndexMap<String, Lease>> {
        // A poisoned table is still a whole one: each change is a single insert or removal.
        self.table
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A model that is loaded and has no engine yet.
struct Prepared {
    loader: MonteCloraLoader,
    parent: Option<String>,
    pipeline: crate::loader::SharedPipeline,
    hash: String,
    max_sequence_length: usize,
    frame: TextFrame,
    engine_id: String,
}

impl Prepared {
    async fn new(loader: MonteCloraLoader, parent: Option<String>, serial: u64) -> Result<Self> {
        blocking(move || {
            let max_sequence_length = loader.check()?.max_sequence_length;
            let hash = loader.generation()?;
            Ok(Self {
                frame: text_frame(loader.base())?,
                pipeline: loader.load()?,
                // The serial keeps ids apart when content returns while its former engine still drains.
                engine_id: format!("{}@{hash}.{serial}", loader.name()),
                hash,
                max_sequence_length,
                parent,
                loader,
            })
        })
        .await
    }
}

fn check_expected(name: &str, current: Option<&Lease>, expected: Option<&str>) -> Result<()> {
    let found = current.map_or("none", |lease| lease.hash.as_str());
    match expected {
        Some(expected) if expected != found => Err(Error::GenerationMoved {
            name: name.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }),
        _ => Ok(()),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Engine(format!("loading stopped unexpectedly: {error}")))?
}

/// Starts the thread that removes engines whose last lease has gone.
fn spawn_reaper(host: Weak<MistralRs>) -> Result<mpsc::Sender<String>> {
    let (sender, receiver) = mpsc::channel::<String>();
    std::thread::Builder::new()
        .name("engine-reaper".to_owned())
        .spawn(move || {
            for engine_id in receiver {
                let Some(host) = host.upgrade() else {
                    return;
                };
                match host.remove_model(&engine_id) {
                    Ok(()) => tracing::info!(engine_id, "engine removed"),
                    Err(error) => tracing::debug!(engine_id, error, "engine kept"),
                }
            }
        })
        .map_err(|error| Error::Engine(format!("cannot start a thread: {error}")))?;
    Ok(sender)
}
