//! The builder of a model, in the style of `mistralrs::TextModelBuilder`.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use indexmap::IndexMap;
use mistralrs::{
    DefaultSchedulerMethod, DeviceMapSetting, IsqBits, IsqSetting, IsqType, MistralRs, Model,
    ModelDType, PagedAttentionConfig, SchedulerConfig, best_device, initialize_logging,
};
use mistralrs_core::{AddModelConfig, EngineConfig, MistralRsBuilder};
use tempfile::TempDir;

use super::model::MonteCloraModel;
use super::served::Served;
use crate::engine::engine_error;
use crate::error::{Error, Result};
use crate::loader::MonteCloraLoader;
use crate::quirks_0_8::split_models::allow_another_model;

/// Configures a [`MonteCloraModel`]: a base model, the adapters on it, and how they are loaded and run.
///
/// It has the methods of [`mistralrs::TextModelBuilder`] that make sense here, with the same names and meanings. It
/// leaves out:
///
/// - methods for downloads (token, revision, cache): models and adapters are local directories here;
/// - methods for other formats (`from_uqff`, `write_uqff`, topology, imatrix);
/// - web search and tool callbacks, which never answer in this version of mistral.rs: the application runs the tools
///   that an answer calls;
/// - the prefix cache, which gives wrong answers in this version of mistral.rs.
///
/// # Example
/// ```no_run
/// use mistralrs_monteclora::MonteCloraModelBuilder;
/// use mistralrs_monteclora::mistralrs::{IsqBits, TextMessageRole, TextMessages};
///
/// # async fn example() -> anyhow::Result<()> {
/// let model = MonteCloraModelBuilder::new("models/SmolLM2-135M-Instruct")
///     .with_adapter("triage", "adapters/triage")
///     .with_adapter("billing", "adapters/billing")
///     .with_auto_isq(IsqBits::Eight)
///     .build()
///     .await?;
/// let question = TextMessages::new().add_message(TextMessageRole::User, "I was charged twice.");
/// let answer = model.send_chat_request_with_model(question, Some("billing")).await?;
/// println!("{}", answer.choices[0].message.content.as_deref().unwrap_or_default());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct MonteCloraModelBuilder {
    base: PathBuf,
    name: Option<String>,
    adapters: Vec<(String, PathBuf)>,
    with_base: bool,
    default_model: Option<String>,
    force: bool,
    staging_dir: Option<PathBuf>,
    chat_template: Option<String>,
    jinja_explicit: Option<PathBuf>,
    dtype: ModelDType,
    force_cpu: bool,
    device: Option<Device>,
    device_mapping: Option<DeviceMapSetting>,
    isq: Option<IsqSetting>,
    paged_attn: Option<PagedAttentionConfig>,
    max_num_seqs: usize,
    logging: bool,
    throughput_logging: bool,
}

/// The name of a model and the directory of its adapter.
type Named = (String, Option<PathBuf>);

impl MonteCloraModelBuilder {
    /// Builds a model from the Hugging Face directory `base`.
    ///
    /// The defaults are those of [`mistralrs::TextModelBuilder`], except the element type on a CPU: it is f32 here and
    /// f16 in mistral.rs.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self {
            base: base.into(),
            name: None,
            adapters: Vec::new(),
            with_base: true,
            default_model: None,
            force: false,
            staging_dir: None,
            chat_template: None,
            jinja_explicit: None,
            dtype: ModelDType::Auto,
            force_cpu: false,
            device: None,
            device_mapping: None,
            isq: None,
            paged_attn: None,
            max_num_seqs: 32,
            logging: false,
            throughput_logging: false,
        }
    }

    /// Serves the raw MonteCLoRA or plain LoRA adapter in the directory `source` as a separate model named `alias`.
    ///
    /// Each adapter is merged into its own copy of the base, so each takes the base's memory once more.
    pub fn with_adapter(mut self, alias: impl ToString, source: impl Into<PathBuf>) -> Self {
        self.adapters.push((alias.to_string(), source.into()));
        self
    }

    /// Sets the name of the base model; by default the name of its directory.
    pub fn with_name(mut self, name: impl ToString) -> Self {
        self.name = Some(name.to_string());
        self
    }

    /// Does not serve the base itself, only the adapters. This saves the memory of one copy.
    pub fn without_base(mut self) -> Self {
        self.with_base = false;
        self
    }

    /// Sets the model that answers calls that name none. The default is the adapter if there is exactly one, else the
    /// base, else the first adapter.
    pub fn with_default_model(mut self, name: impl ToString) -> Self {
        self.default_model = Some(name.to_string());
        self
    }

    /// Loads adapters even if they change nothing; without this call they are refused.
    pub fn with_force(mut self) -> Self {
        self.force = true;
        self
    }

    /// Sets the directory for the temporary files of a load, which are as large as the merged tensors in float32. The
    /// default is the system's temporary directory.
    pub fn with_staging_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.staging_dir = Some(dir.into());
        self
    }

    /// Sets the chat template: literal Jinja text, or a path that ends in `.json`.
    pub fn with_chat_template(mut self, chat_template: impl ToString) -> Self {
        self.chat_template = Some(chat_template.to_string());
        self
    }

    /// Sets an explicit Jinja chat template file (`.jinja`). It overrides all other chat templates.
    pub fn with_jinja_explicit(mut self, jinja_explicit: impl Into<PathBuf>) -> Self {
        self.jinja_explicit = Some(jinja_explicit.into());
        self
    }

    /// Load the model in a certain dtype.
    pub fn with_dtype(mut self, dtype: ModelDType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Force usage of the CPU device.
    pub fn with_force_cpu(mut self) -> Self {
        self.force_cpu = true;
        self
    }

    /// Set the main device to load this model onto. Automatic device mapping starts with this device.
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Placement of layers on devices.
    pub fn with_device_mapping(mut self, device_mapping: DeviceMapSetting) -> Self {
        self.device_mapping = Some(device_mapping);
        self
    }

    /// Use ISQ of a certain type: quantisation while loading, after the merge.
    pub fn with_isq(mut self, isq: IsqType) -> Self {
        self.isq = Some(IsqSetting::Specific(isq));
        self
    }

    /// Automatically select the best ISQ type for the given bit width and the device.
    pub fn with_auto_isq(mut self, bits: IsqBits) -> Self {
        self.isq = Some(IsqSetting::Auto(bits));
        self
    }

    /// Enables PagedAttention for each model. A CPU has no PagedAttention: the setting is dropped there, with a warning
    /// in the log.
    ///
    /// Every model reserves its own memory for keys and values. Set its size: the default is nearly all free memory.
    pub fn with_paged_attn(mut self, config: PagedAttentionConfig) -> Self {
        self.paged_attn = Some(config);
        self
    }

    /// Sets the maximum number of sequences that an engine runs at once; 32 by default. On a CPU it is always one.
    pub fn with_max_num_seqs(mut self, max_num_seqs: usize) -> Self {
        self.max_num_seqs = max_num_seqs;
        self
    }

    /// Enables logging and the progress bars of loads.
    pub fn with_logging(mut self) -> Self {
        self.logging = true;
        self
    }

    /// Enable runner throughput logging.
    pub fn with_throughput_logging(mut self) -> Self {
        self.throughput_logging = true;
        self
    }

    /// Checks everything, then loads the base and the adapters one after the other.
    ///
    /// # Errors
    /// Returns an error if a setting cannot be used, or as [`MonteCloraLoader::load`]. The error names every problem of
    /// the files.
    pub async fn build(self) -> Result<MonteCloraModel> {
        if self.logging {
            initialize_logging();
        }
        let (names, default) = self.names()?;
        let recipe = Recipe::of(self)?;
        recipe.check(names.clone()).await?;
        if names.len() > 1 {
            allow_another_model()?;
        }
        let mut served = IndexMap::new();
        let mut host = None;
        for (name, source) in names {
            let model = Arc::new(recipe.load(&name, source).await?);
            match &host {
                None => host = Some(recipe.start(&model).await),
                Some(host) => recipe.add(host, &model).await?,
            }
            served.insert(name, model);
        }
        let host = host.ok_or_else(|| Error::setting("adapters", "nothing is to be loaded"))?;
        host.set_default_model_id(&default).map_err(Error::Engine)?;
        Ok(MonteCloraModel {
            model: Model::new(host.clone()),
            host,
            served: served.into(),
            recipe,
            changes: tokio::sync::Mutex::default(),
        })
    }

    /// Returns every name with its adapter, the base first, and the name of the default model.
    fn names(&self) -> Result<(Vec<Named>, String)> {
        if !self.base.is_dir() {
            let message = "there is no such directory; nothing is downloaded here: fetch the model first, \
                as with `hf download NAME --local-dir DIRECTORY`, and name its directory";
            return Err(Error::not_found(&self.base, message));
        }
        let mut names = Vec::new();
        if self.with_base {
            names.push((self.base_name()?, None));
        }
        for (alias, source) in &self.adapters {
            if names.iter().any(|(name, _)| name == alias) {
                let message = format!("two models are named `{alias}`");
                return Err(Error::setting("alias", message));
            }
            names.push((alias.clone(), Some(source.clone())));
        }
        let usual = match &self.adapters[..] {
            [(alias, _)] => Some(alias),
            _ => names.first().map(|(name, _)| name),
        };
        let Some(usual) = usual else {
            let message = "there is no base and no adapter; leave out `without_base`";
            return Err(Error::setting("adapters", message));
        };
        let default = self.default_model.as_ref().unwrap_or(usual).clone();
        if !names.iter().any(|(name, _)| *name == default) {
            return Err(Error::unknown_name(&default));
        }
        Ok((names, default))
    }

    fn base_name(&self) -> Result<String> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let path = fs::canonicalize(&self.base).map_err(Error::io("find", &self.base))?;
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        name.ok_or_else(|| {
            Error::setting("name", "the base's directory has no name; use `with_name`")
        })
    }
}

/// How the models of one host are loaded and run. The models differ only in their adapters.
pub(super) struct Recipe {
    base: PathBuf,
    force: bool,
    staging_dir: Option<PathBuf>,
    chat_template: Option<PathBuf>,
    /// The directory that holds the file of a literal template.
    _template_dir: Option<TempDir>,
    dtype: ModelDType,
    device: Device,
    device_mapping: Option<DeviceMapSetting>,
    isq: Option<IsqType>,
    paged_attn: Option<PagedAttentionConfig>,
    max_num_seqs: NonZeroUsize,
    progress: bool,
    engine: EngineConfig,
}

impl Recipe {
    fn of(builder: MonteCloraModelBuilder) -> Result<Self> {
        let max_num_seqs = NonZeroUsize::new(builder.max_num_seqs)
            .ok_or_else(|| Error::setting("max_num_seqs", "must be at least 1"))?;
        let device = match builder.device {
            Some(device) => device,
            None => best_device(builder.force_cpu)
                .map_err(|error| Error::setting("device", error.to_string()))?,
        };
        let mut paged_attn = builder.paged_attn;
        if device.is_cpu() && paged_attn.take().is_some() {
            tracing::warn!("there is no PagedAttention on a CPU: it is left out");
        }
        let (chat_template, template_dir) = match (builder.jinja_explicit, builder.chat_template) {
            (Some(path), _) => (Some(path), None),
            (None, Some(text)) if text.ends_with(".json") => (Some(PathBuf::from(text)), None),
            (None, Some(text)) => {
                let (path, dir) = write_template(&text)?;
                (Some(path), Some(dir))
            }
            (None, None) => (None, None),
        };
        Ok(Self {
            base: builder.base,
            force: builder.force,
            staging_dir: builder.staging_dir,
            chat_template,
            _template_dir: template_dir,
            dtype: builder.dtype,
            isq: builder.isq.map(|isq| match isq {
                IsqSetting::Auto(bits) => bits.resolve(&device),
                IsqSetting::Specific(isq) => isq,
            }),
            device,
            device_mapping: builder.device_mapping,
            paged_attn,
            max_num_seqs,
            progress: builder.logging,
            engine: EngineConfig {
                throughput_logging_enabled: builder.throughput_logging,
                // The prefix cache gives wrong answers: see `quirks_0_8::prefix_cache`.
                no_prefix_cache: true,
                ..EngineConfig::default()
            },
        })
    }

    fn loader(&self, name: &str, adapter: Option<&Path>) -> Result<MonteCloraLoader> {
        let mut loader = MonteCloraLoader::builder(&self.base, name)
            .dtype(self.dtype)
            .device(self.device.clone())
            .in_situ_quant(self.isq)
            .chat_template(self.chat_template.clone())
            .paged_attention(self.paged_attn)
            .force(self.force)
            .progress(self.progress);
        if let Some(adapter) = adapter {
            loader = loader.adapter(adapter);
        }
        if let Some(mapping) = &self.device_mapping {
            loader = loader.device_map(mapping.clone());
        }
        if let Some(dir) = &self.staging_dir {
            loader = loader.staging_dir(dir);
        }
        loader.build()
    }

    /// Checks the files of all `names`; the error holds every problem.
    async fn check(&self, names: Vec<Named>) -> Result<()> {
        let loaders: Vec<(String, Result<MonteCloraLoader>)> = names
            .into_iter()
            .map(|(name, adapter)| {
                let loader = self.loader(&name, adapter.as_deref());
                (name, loader)
            })
            .collect();
        let check = || {
            let failed = loaders.into_iter().filter_map(|(name, loader)| {
                let source = loader.and_then(|loader| loader.check()).err()?;
                Some(Error::Of {
                    name,
                    problem: Box::new(source),
                })
            });
            Error::all(failed.collect())
        };
        blocking(check).await
    }

    /// Loads the base as the model `name`, with the adapter in the directory `adapter` if given.
    pub(super) async fn load(&self, name: &str, adapter: Option<PathBuf>) -> Result<Served> {
        let loader = self.loader(name, adapter.as_deref())?;
        blocking(move || Served::new(&loader, loader.load()?)).await
    }

    /// Starts a host with its first engine.
    async fn start(&self, served: &Served) -> Arc<MistralRs> {
        let pipeline = served.model.shared().clone();
        let scheduler = self.scheduler(served).await;
        let throughput = self.engine.throughput_logging_enabled;
        let builder = MistralRsBuilder::new(pipeline, scheduler, throughput, None)
            .with_model_id(served.name.clone())
            .with_no_prefix_cache(self.engine.no_prefix_cache);
        builder.build().await
    }

    /// Adds one more engine to `host`.
    pub(super) async fn add(&self, host: &MistralRs, served: &Served) -> Result<()> {
        let pipeline = served.model.shared().clone();
        let scheduler = self.scheduler(served).await;
        let config = AddModelConfig::new(self.engine.clone());
        let added = host.add_model(served.name.clone(), pipeline, scheduler, config);
        added.await.map_err(Error::Engine)
    }

    async fn scheduler(&self, served: &Served) -> SchedulerConfig {
        let loaded = served.model.shared().lock().await;
        match loaded.get_metadata().cache_config.clone() {
            Some(config) if self.paged_attn.is_some() => SchedulerConfig::PagedAttentionMeta {
                max_num_seqs: self.max_num_seqs.get(),
                config,
            },
            _ => SchedulerConfig::DefaultScheduler {
                method: DefaultSchedulerMethod::Fixed(self.max_num_seqs),
            },
        }
    }
}

/// Writes a literal template to a file that a loader can read.
fn write_template(text: &str) -> Result<(PathBuf, TempDir)> {
    let made = tempfile::Builder::new().prefix("monteclora-").tempdir();
    let dir = made.map_err(Error::io(
        "create a temporary directory in",
        &std::env::temp_dir(),
    ))?;
    let path = dir.path().join("chat_template.jinja");
    fs::write(&path, text).map_err(Error::io("write", &path))?;
    Ok((path, dir))
}

/// Runs `work` on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(engine_error)?
}
