//! One loaded model: its specification, and its engine in the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, DeviceLocation};
use mistralrs_core::{IsqType, MistralRs, ModelDType, Request};
use monteclora_converters::Problem;
use monteclora_converters::jinja::recorded_variables;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Sender;

use super::alive::Pulse;
use super::memory::{Memory, Reservation};
use super::reaper::{Reaper, Retired};
use super::scored::{Scored, ScoredBy, SharedBase, whole_generation};
use super::slots::{Occupied, Slot, Slots, blocking};
use crate::chat_files::text_frame;
use crate::chat_template::ChatTemplate;
use crate::config::{ModelConfig, ServeConfig};
use crate::error::{Error, Result, code};
use crate::loader::{MonteCloraLoader, Survey};
use crate::quirks_0_8::batches_on_a_cpu::Turns;
use crate::quirks_0_8::conversations::Rendering;
use crate::quirks_0_8::logger_threads::NormalModel;
use crate::quirks_0_8::own_text;
use crate::quirks_0_8::special_tokens::TextFrame;
use crate::quirks_0_8::split_models::{allow_another_model, samples_in_step};
use crate::scoring::{ScoredAdapter, ScorerSurvey, UncertaintyConfig};
use crate::server::answers::now;
use crate::server::sampling::Sampling;
use crate::server::vocabulary::ModelTokens;

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

/// Everything that an engine depends on, except the base's files and the adapter. The generation's hash represents
/// those.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spec {
    base: PathBuf,
    dtype: ModelDType,
    isq: Option<IsqType>,
    device: DeviceLocation,
    /// Content of the template that replaces the model's own.
    chat_template: Option<Vec<u8>>,
    uncertainty: Option<UncertaintyConfig>,
    /// Number of posterior draws served as separate models.
    draws: usize,
    settings: EngineSettings,
}

/// A model to load, with its public name.
#[derive(Clone)]
pub(crate) struct Wanted {
    pub(crate) loader: MonteCloraLoader,
    /// Name of the base model, for an adapter.
    pub(crate) parent: Option<String>,
    scored: Option<ScoredBy>,
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
        loader.rendering = Rendering::Before;
        Ok(Self {
            loader,
            parent: source.map(|_| model.name.clone()),
            scored: ScoredBy::of(model)?,
            spec: Spec {
                base: model.base.clone(),
                dtype: model.dtype,
                isq: model.isq,
                device: model.device.location(),
                // The check reports a template that cannot be read.
                chat_template: model
                    .chat_template
                    .as_ref()
                    .and_then(|path| std::fs::read(path).ok()),
                uncertainty: model.uncertainty.clone(),
                draws: model.draws.get(name).copied().unwrap_or(0),
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

    /// The adapter in the form that a scorer takes.
    fn scored_adapter(&self) -> Option<ScoredAdapter<'_>> {
        let n_asked = self.scored.as_ref().map_or(0, |by| by.base.config.draws);
        Some(ScoredAdapter {
            path: self.loader.adapter()?,
            n_held: n_asked.max(self.spec.draws),
            n_asked,
        })
    }

    /// Checks the files and hashes their content. It blocks.
    pub(crate) fn check(self) -> Result<Checked> {
        let Survey {
            max_sequence_length,
            vocab_size,
            generation,
            weight_bytes,
            mut warnings,
        } = self.loader.survey()?;
        let adapter = self.scored_adapter();
        let scorer = self.scored.as_ref();
        let scorer = scorer.map(|by| by.scoring.survey(&by.base, adapter.as_ref()));
        let scorer = scorer.transpose()?;
        if self.spec.draws > 0 && !scorer.as_ref().is_some_and(|s| s.has_posterior) {
            let message = format!(
                "{} draws of `{}` are to be served, and it has no posterior; `monteclora fit` makes one around any LoRA",
                self.spec.draws,
                self.name()
            );
            return Err(Error::setting("models.adapters.draws", message));
        }
        warnings.extend(scorer.iter().flat_map(|scorer| scorer.warnings.clone()));
        let variables = self.loader.adapter().map(recorded_variables);
        let variables = variables.transpose()?.unwrap_or_default();
        Ok(Checked {
            max_sequence_length,
            vocab_size,
            warnings,
            hash: whole_generation(&generation, &variables, scorer.as_ref()),
            mean_hash: generation,
            scorer,
            frame: text_frame(self.loader.base())?,
            weight_bytes,
            wanted: self,
        })
    }
}

/// A model whose files passed every check.
pub(crate) struct Checked {
    pub(crate) wanted: Wanted,
    pub(crate) hash: String,
    /// Hash of what the engine loads, without the parts that only scores depend on.
    mean_hash: String,
    scorer: Option<ScorerSurvey>,
    weight_bytes: u64,
    max_sequence_length: usize,
    vocab_size: usize,
    frame: TextFrame,
    /// Possible faults that do not prevent serving.
    warnings: Vec<Problem>,
}

/// The directory from which an adapter was loaded, and the warnings about it.
struct Source {
    dir: Option<PathBuf>,
    warnings: Vec<Problem>,
}

impl Checked {
    /// Memory of the weights of the engine and of the scorer, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.weight_bytes + self.scorer_bytes()
    }

    fn scorer_bytes(&self) -> u64 {
        self.scorer.as_ref().map_or(0, |scorer| scorer.bytes)
    }

    /// Memory that is freed with the generation, in bytes. The copy of a base for scores stays while an adapter uses
    /// it.
    fn own_bytes(&self) -> u64 {
        match self.wanted.parent {
            Some(_) => self.bytes(),
            None => self.weight_bytes,
        }
    }

    fn source(&self) -> Source {
        for warning in &self.warnings {
            tracing::warn!(name = self.wanted.name(), "{warning}");
        }
        Source {
            dir: self.wanted.source(),
            warnings: self.warnings.clone(),
        }
    }

    /// Loads the scorer on the base copy `parent`, or else on a new copy. It blocks.
    fn scored(
        &self,
        parent: Option<Arc<SharedBase>>,
        memory: Option<Reservation>,
    ) -> Result<Option<Scored>> {
        let Some(by) = &self.wanted.scored else {
            return Ok(None);
        };
        let base = match (parent, memory) {
            (Some(parent), _) => parent,
            (None, Some(memory)) => Arc::new(SharedBase {
                scorer: by.scoring.load(&by.base)?,
                places: Arc::new(Semaphore::new(by.base.config.max_concurrent.get())),
                checks: Arc::new(Semaphore::new(1)),
                memory,
            }),
            (None, None) => {
                let message = "the copy of the base for scores is not there";
                return Err(Error::Engine(message.to_owned()));
            }
        };
        let scorer = base.scorer.scorer(self.wanted.scored_adapter().as_ref())?;
        let expected = self.scorer.as_ref().map(|s| s.fingerprint.as_str());
        if Some(scorer.fingerprint()) != expected {
            return Err(self.changed());
        }
        Ok(Some(Scored { scorer, base }))
    }

    /// The error for files that differ from those that were checked.
    fn changed(&self) -> Error {
        let (name, hash) = (self.wanted.name(), &self.hash);
        let message = format!(
            "the files of `{name}`, or of its base, are no longer those of generation {hash} that were checked; load it again when \
             nothing writes them, and reload the configuration for a base that has changed"
        );
        Problem::sentence(code::FILES_CHANGED, message).into()
    }

    /// Whether this is the generation `generation`, with or without scores.
    pub(crate) fn is_generation(&self, generation: &str) -> bool {
        self.hash == generation || self.mean_hash == generation
    }

    /// Whether `lease` is already this model.
    pub(crate) fn is(&self, lease: &Generation) -> bool {
        lease.hash == self.hash
            && lease.spec == self.wanted.spec
            && lease.parent == self.wanted.parent
    }
}

/// One loaded state of one public name.
///
/// The table holds one reference, and each running request holds another. When the last reference is dropped, the
/// engine is emptied or ends.
pub(crate) struct Generation {
    pub(crate) name: String,
    /// Name of the base model, for an adapter.
    pub(crate) parent: Option<String>,
    pub(crate) hash: String,
    /// See [`ScorerSurvey::content`].
    pub(crate) content: Option<String>,
    /// Unix time in seconds.
    pub(crate) created: u64,
    pub(crate) max_sequence_length: usize,
    /// Number of vectors in the embedding; the tokenizer may have more tokens.
    pub(crate) vocab_size: usize,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(crate) frame: TextFrame,
    pub(crate) tokens: ModelTokens,
    pub(crate) sampling: Sampling,
    /// The template that renders conversations; none for a model that only continues text.
    pub(crate) template: Option<ChatTemplate>,
    spec: Spec,
    /// The directory of this content that was loaded last.
    source: Mutex<Source>,
    /// The turns at the engine; a request holds one while the engine works on it.
    pub(crate) turns: Turns,
    /// None only during the drop.
    engine: Option<Occupied>,
    /// The scorer of its answers, if scoring is enabled.
    pub(crate) scored: Option<Scored>,
    pub(super) pulse: Pulse,
    memory: Option<Reservation>,
    reaper: Reaper,
}

/// A generation in use; it stays loaded while this is held.
pub(crate) type Lease = Arc<Generation>;

impl Generation {
    pub(super) fn slot(&self) -> &Slot {
        let engine = self.engine.as_ref();
        &engine.expect("it is taken only when this is dropped").slot
    }

    /// The host, which has only this engine.
    pub(crate) fn host(&self) -> Arc<MistralRs> {
        self.slot().host()
    }

    /// The input of the engine. An engine that has ended is restarted.
    ///
    /// # Errors
    /// Returns an error if the engine has ended and cannot be restarted.
    pub(crate) fn input(&self) -> Result<Sender<Request>> {
        self.slot().input()
    }

    /// Number of posterior draws served as separate models.
    pub(crate) fn n_draws(&self) -> usize {
        self.spec.draws
    }

    /// Memory of the weights in bytes. For a base it includes the copy for scores.
    pub(crate) fn weight_bytes(&self) -> u64 {
        let shared = self.scored.as_ref().filter(|_| self.parent.is_none());
        let shared = shared.map_or(0, |scored| scored.base.memory.bytes);
        shared + self.memory.as_ref().map_or(0, |memory| memory.bytes)
    }

    /// The adapter's directory. Clients must not see the full path.
    pub(crate) fn source(&self) -> Option<PathBuf> {
        self.source.lock().dir.clone()
    }

    /// The warnings about the adapter. They hold paths that clients must not see in full.
    pub(crate) fn warnings(&self) -> Vec<Problem> {
        self.source.lock().warnings.clone()
    }

    /// Records that the same content was now loaded from the directory of `checked`.
    pub(crate) fn set_source(&self, checked: &Checked) {
        *self.source.lock() = checked.source();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.leave();
        }
        if let Some(engine) = self.engine.take() {
            self.reaper.remove(Retired {
                name: std::mem::take(&mut self.name),
                generation: std::mem::take(&mut self.hash),
                engine,
                scored: self.scored.take(),
                memory: self.memory.take(),
            });
        }
    }
}

/// The loader's chat template. Logs once where mistral.rs alone would render it differently.
fn told(loader: &MonteCloraLoader) -> Result<Option<ChatTemplate>> {
    let template = loader.chat_template()?;
    if let Some(template) = &template {
        own_text::warn_once(loader.base(), &template.content());
    }
    Ok(template)
}

/// A model in memory without an engine.
struct Loaded {
    checked: Checked,
    model: NormalModel,
    tokens: ModelTokens,
    sampling: Sampling,
    template: Option<ChatTemplate>,
    scored: Option<Scored>,
    memory: Reservation,
}

/// Retries `reserve` while memory is about to be freed. A client that unloads one adapter to load another need not wait
/// in between.
async fn patiently<T>(memory: &Memory, reserve: impl Fn() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match reserve() {
            Err(error)
                if error.code() == code::OVER_BUDGET
                    && memory.is_leaving()
                    && begun.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            outcome => return outcome,
        }
    }
}

impl Loaded {
    /// Loads a checked model; `parent` is the copy of its base that scores an adapter.
    async fn load(
        checked: Checked,
        parent: Option<Arc<SharedBase>>,
        memory: &Arc<Memory>,
    ) -> Result<Self> {
        let name = checked.wanted.name();
        let own = || memory.reserve(name, checked.own_bytes());
        let own = patiently(memory, own).await?;
        let shared = match (&checked.wanted.scored, &parent) {
            (Some(_), None) => {
                let shared = || memory.reserve_beside(name, checked.scorer_bytes());
                Some(patiently(memory, shared).await?)
            }
            _ => None,
        };
        let memory = own;
        blocking(move || {
            let (model, found) = checked.wanted.loader.load_generation()?;
            memory.reclaim();
            if found != checked.mean_hash {
                return Err(checked.changed());
            }
            let scored = checked.scored(parent, shared)?;
            let (tokens, sampling) = {
                let loaded = model.shared().blocking_lock();
                let sampling = Sampling::of(loaded.generation_defaults().as_ref());
                (ModelTokens::of(&*loaded)?, sampling)
            };
            Ok(Self {
                model,
                tokens,
                sampling,
                template: told(&checked.wanted.loader)?,
                scored,
                memory,
                checked,
            })
        })
        .await
    }

    /// Makes a lease with the engine of `slot`, or with a new engine that ends with the model. It blocks.
    fn with_engine(self, slot: Option<Slot>, reaper: &Reaper) -> Result<Lease> {
        let checked = self.checked;
        let source = checked.source();
        let wanted = checked.wanted;
        let engine = match slot {
            Some(slot) => slot.occupy(self.model)?,
            None => Occupied::with(self.model, wanted.spec.settings.max_seqs)?,
        };
        Ok(Arc::new(Generation {
            name: wanted.name().to_owned(),
            source: Mutex::new(source),
            parent: wanted.parent,
            hash: checked.hash,
            content: checked.scorer.as_ref().map(|scorer| scorer.content.clone()),
            created: now(),
            max_sequence_length: checked.max_sequence_length,
            vocab_size: checked.vocab_size,
            frame: checked.frame,
            tokens: self.tokens,
            sampling: self.sampling,
            template: self.template,
            turns: Turns::new(wanted.spec.device),
            spec: wanted.spec,
            engine: Some(engine),
            scored: self.scored,
            pulse: Pulse::default(),
            memory: Some(self.memory),
            reaper: reaper.clone(),
        }))
    }
}

/// The engines of a registry, their memory, and the thread that removes models from them.
pub(crate) struct Host {
    pub(super) memory: Arc<Memory>,
    pub(super) slots: Arc<Slots>,
    /// Maximum time for the first token of a new engine.
    pub(super) first_answer: Duration,
    reaper: Reaper,
    /// Applied to a new engine before its first request. The result is kept until the engine has answered or failed.
    #[cfg(test)]
    pub(super) hinder: Option<Hinder>,
}

#[cfg(test)]
type Hinder = fn(&Generation) -> Box<dyn Send>;

impl Host {
    pub(super) fn start(memory: Arc<Memory>) -> Result<Self> {
        let slots = Arc::new(Slots::default());
        Ok(Self {
            reaper: Reaper::spawn(slots.clone())?,
            memory,
            slots,
            first_answer: FIRST_ANSWER,
            #[cfg(test)]
            hinder: None,
        })
    }

    /// Loads a model and gives it an engine. When this returns, the engine has answered a request.
    ///
    /// `n_wanted` is the number of generations that are served or about to be. Further generations only finish their
    /// last requests. `parent` is the copy of an adapter's base that scores answers.
    pub(crate) async fn add(
        &self,
        checked: Checked,
        n_wanted: usize,
        parent: Option<Arc<SharedBase>>,
    ) -> Result<Lease> {
        if n_wanted > 0 {
            allow_another_model()?;
        }
        let name = checked.wanted.name().to_owned();
        let slot = match samples_in_step() {
            true => None,
            false => Some(self.slot(&checked, n_wanted).await?),
        };
        let loaded = match Loaded::load(checked, parent, &self.memory).await {
            Ok(loaded) => loaded,
            Err(error) => {
                slot.into_iter().for_each(|slot| self.slots.put(slot));
                return Err(error);
            }
        };
        let reaper = self.reaper.clone();
        let lease = blocking(move || loaded.with_engine(slot, &reaper)).await?;
        #[cfg(test)]
        let _hindrance = self.hinder.map(|hinder| hinder(&lease));
        match lease.prove(self.first_answer).await {
            Ok(()) => Ok(lease),
            Err(error) => {
                tracing::error!(name, %error, "a new engine did not answer");
                Err(Error::engine_unavailable(&format!(
                    "that of `{name}` did not answer its first request"
                )))
            }
        }
    }

    async fn slot(&self, checked: &Checked, n_wanted: usize) -> Result<Slot> {
        let (loader, max_seqs) = (
            &checked.wanted.loader,
            checked.wanted.spec.settings.max_seqs,
        );
        let one_is_leaving = || self.memory.in_use().0 > n_wanted;
        self.slots
            .take(loader.device(), max_seqs, one_is_leaving)
            .await
    }

    /// Ensures that the next load to `device` finds a running engine.
    pub(super) async fn keep_one_ready(
        &self,
        device: &Device,
        settings: EngineSettings,
    ) -> Result<()> {
        match samples_in_step() {
            true => Ok(()),
            false => self.slots.keep_one_ready(device, settings.max_seqs).await,
        }
    }
}

/// Default of [`Host::first_answer`]. Loading a model takes as long as reading it; one token takes far less.
const FIRST_ANSWER: Duration = Duration::from_secs(60);

/// Time that a load waits for the memory of models that were unloaded before it.
const PATIENCE: Duration = Duration::from_secs(10);
