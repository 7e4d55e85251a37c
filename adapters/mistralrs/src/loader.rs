//! The `Loader` that merges a collapsed adapter into its base while mistral.rs loads it.

mod builder;
mod fingerprint;
mod format;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use candle_core::Device;
use mistralrs_core::{
    AdapterPaths, AutoDeviceMapParams, DeviceMapSetting, IsqType, Loader, LocalModelPaths,
    ModelDType, ModelKind, ModelPaths, MultimodalLoaderBuilder, MultimodalSpecificConfig,
    NormalLoaderBuilder, NormalSpecificConfig, PagedAttentionConfig, Pipeline, TokenSource,
    TryIntoDType,
};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{
    Adapter, ConversationSettings, ModelFiles, Problem, base_warnings, other_conversation,
    write_overlay,
};
use tempfile::TempDir;
use tokio::sync::Mutex;

use self::fingerprint::base_fingerprint;
use self::format::refuse_other_formats;
use crate::chat_files::{chat_template, write_chat_files, write_json};
use crate::chat_template::ChatTemplate;
use crate::error::{Error, Result, code};
use crate::quirks_0_8::conversations::Rendering;
use crate::quirks_0_8::logger_threads::NormalModel;
use crate::quirks_0_8::model_config::{NormalisedConfig, normalise};
use crate::quirks_0_8::stacked_experts::stack_experts;
use crate::quirks_0_8::thread_locals::on_fresh_thread;
use crate::quirks_0_8::windows::restore_caches;

pub use self::builder::MonteCloraLoaderBuilder;
pub use self::builder::check_public_name;

/// The module of the output head.
const HEAD: &str = "lm_head";

/// A loaded model, in the type that every mistral.rs API takes.
pub type SharedPipeline = Arc<Mutex<dyn Pipeline + Send + Sync>>;

/// A weak reference that tells whether a loaded model is still in memory.
pub(crate) type WeakPipeline = Weak<Mutex<dyn Pipeline + Send + Sync>>;

/// Loads a base model, with or without a MonteCLoRA or LoRA adapter merged into it, into mistral.rs.
///
/// The loader reads the adapter, checks it against the base's headers, collapses it to its posterior mean and merges it
/// in float32. It writes only the merged tensors, to a temporary overlay that it removes when the load ends. Each load
/// runs on its own thread, because mistral.rs keeps quantisation and adapter settings in thread-locals that it never
/// clears.
///
/// # Example
/// ```no_run
/// use mistralrs_monteclora::MonteCloraLoader;
///
/// let loader = MonteCloraLoader::builder("models/smollm2", "smollm2-triage")
///     .adapter("out")
///     .build()?;
/// let pipeline = loader.load()?; // ready for mistralrs_core::MistralRsBuilder
/// # Ok::<(), mistralrs_monteclora::Error>(())
/// ```
#[derive(Clone)]
pub struct MonteCloraLoader {
    base: PathBuf,
    adapter: Option<PathBuf>,
    name: String,
    dtype: ModelDType,
    device: Device,
    isq: Option<IsqType>,
    chat_template: Option<PathBuf>,
    device_map: Option<DeviceMapSetting>,
    pub(crate) paged_attention: Option<PagedAttentionConfig>,
    pub(crate) force: bool,
    /// Who renders conversations. With [`Rendering::Before`], the template of [`Self::chat_template`] renders them
    /// before the engine.
    pub(crate) rendering: Rendering,
    silent: bool,
    staging_root: Option<PathBuf>,
}

/// Files ready for mistral.rs, in a directory that is removed when this value is dropped.
struct Staged {
    paths: LocalModelPaths<PathBuf>,
    /// Fingerprint of the adapter that was merged.
    adapter: Option<String>,
    /// Whether mistral.rs knows the family only in its loader for vision models.
    is_multimodal: bool,
    /// The shape of the model, if its caches must be restored.
    windowed: Option<ModelShape>,
    _dir: TempDir,
}

/// The base and the adapter, read once.
struct Opened {
    files: ModelFiles,
    config: NormalisedConfig,
    /// The posterior mean.
    adapter: Option<Adapter>,
    warnings: Vec<Problem>,
}

/// What the files say about a model before it is loaded.
pub(crate) struct Survey {
    pub(crate) max_sequence_length: usize,
    /// Number of vectors in the embedding.
    pub(crate) vocab_size: usize,
    /// See [`MonteCloraLoader::generation`].
    pub(crate) generation: String,
    /// See [`MonteCloraLoader::weight_bytes`].
    pub(crate) weight_bytes: u64,
    /// Possible faults that do not prevent serving.
    pub(crate) warnings: Vec<Problem>,
}

impl MonteCloraLoader {
    /// Starts a loader for the Hugging Face directory `base` that answers under the public name `name`.
    ///
    /// The name is what clients send and receive as `model`; it is never a path.
    pub fn builder(base: impl Into<PathBuf>, name: impl Into<String>) -> MonteCloraLoaderBuilder {
        MonteCloraLoaderBuilder(Self {
            base: base.into(),
            adapter: None,
            name: name.into(),
            dtype: ModelDType::Auto,
            device: Device::Cpu,
            isq: None,
            chat_template: None,
            device_map: None,
            paged_attention: None,
            force: false,
            rendering: Rendering::InEngine,
            silent: true,
            staging_root: None,
        })
    }

    /// The public name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The base model's directory.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The adapter's directory, if there is one.
    pub fn adapter(&self) -> Option<&Path> {
        self.adapter.as_deref()
    }

    /// Checks the base and the adapter without loading weights, and returns the base's configuration for mistral.rs.
    ///
    /// # Errors
    /// Returns every error that [`Self::load`] would return before it starts mistral.rs.
    pub fn check(&self) -> Result<NormalisedConfig> {
        Ok(self.open()?.config)
    }

    /// As [`Self::check`], but returns everything that the files say about the model before it is loaded.
    pub(crate) fn survey(&self) -> Result<Survey> {
        let Opened {
            files,
            config,
            adapter,
            mut warnings,
        } = self.open()?;
        if let (Some(path), Some(adapter)) = (&self.adapter, &adapter) {
            let notes = adapter.notes.iter();
            warnings.extend(notes.map(|note| Problem::sentence("note", note)));
            warnings.extend(base_warnings(path, adapter, &files)?);
            let settings = ConversationSettings {
                template: self.chat_template.as_deref(),
                prompts_as_chats: Some(true),
            };
            warnings.extend(other_conversation(path, files.dir(), settings)?);
        }
        Ok(Survey {
            max_sequence_length: config.max_sequence_length,
            vocab_size: config.shape.vocab_size,
            generation: generation(&files, adapter.as_ref())?,
            weight_bytes: self.weight_bytes_of(&files),
            warnings,
        })
    }

    /// Reads and checks the base and the adapter; it loads no weights.
    fn open(&self) -> Result<Opened> {
        let (files, config, warnings) = self.open_base()?;
        let adapter = self.open_adapter(&files, &config)?;
        self.chat_template()?;
        Ok(Opened {
            files,
            config,
            adapter,
            warnings,
        })
    }

    /// The template that replaces the model's own if given, else the model's chat template; none if there is neither.
    pub(crate) fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        let found = chat_template(&self.base, self.chat_template.as_deref())?;
        let trained_with = self
            .adapter
            .as_deref()
            .map(recorded_variables)
            .transpose()?;
        Ok(found.map(|template| template.with_variables(trained_with.unwrap_or_default())))
    }

    /// A short hexadecimal name of the model's content, equal on every machine.
    ///
    /// It is a hash of the base's content or of the adapter's posterior mean, so an adapter and its collapsed form have
    /// the same generation.
    ///
    /// # Errors
    /// Returns an error if the files cannot be read.
    pub fn generation(&self) -> Result<String> {
        let files = ModelFiles::open(&self.base)?;
        let adapter = self.adapter.as_deref();
        let adapter = adapter.map(|source| Adapter::read_on(source, &files));
        let adapter = adapter.transpose()?.map(|adapter| adapter.collapse());
        generation(&files, adapter.as_ref())
    }

    /// Estimates the memory of the weights in bytes, from the headers of the base's files. The adapter does not change
    /// it.
    ///
    /// # Errors
    /// Returns an error if the base cannot be read.
    pub fn weight_bytes(&self) -> Result<u64> {
        Ok(self.weight_bytes_of(&ModelFiles::open(&self.base)?))
    }

    fn weight_bytes_of(&self, files: &ModelFiles) -> u64 {
        crate::memory::weight_bytes(files, self.dtype, self.device.is_cpu(), self.isq)
    }

    /// Merges the adapter, loads the model and removes the temporary files.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] or [`Error::Format`] for files that cannot be served, [`Error::Io`] if the system
    /// fails to read or write a file, and [`Error::Problem`] for a missing file, an adapter without effect or a failure
    /// of mistral.rs.
    pub fn load(&self) -> Result<SharedPipeline> {
        Ok(self.load_with_fingerprint()?.0)
    }

    /// As [`Self::load`], and returns the [`generation`](Self::generation) of the weights in memory. The files may
    /// change between a check and a load.
    pub(crate) fn load_generation(&self) -> Result<(NormalModel, String)> {
        let (pipeline, adapter) = self.load_with_fingerprint()?;
        let digest = match adapter {
            Some(digest) => digest,
            None => base_fingerprint(&ModelFiles::open(&self.base)?)?,
        };
        // SAFETY: `pipeline` comes from `load_as`, which returns only what a loader of mistral.rs returns.
        let model = unsafe { NormalModel::new(pipeline) };
        Ok((model, shortened(&digest)))
    }

    fn load_with_fingerprint(&self) -> Result<(SharedPipeline, Option<String>)> {
        let dtype = match self.dtype {
            ModelDType::Auto if self.device.is_cpu() => ModelDType::F32,
            dtype => dtype,
        };
        self.load_as(Box::new(dtype))
    }

    /// Loads the model with elements of `dtype`; also returns the fingerprint of the merged adapter.
    fn load_as(
        &self,
        dtype: Box<dyn TryIntoDType + Send>,
    ) -> Result<(SharedPipeline, Option<String>)> {
        let staged = self.stage()?;
        let is_multimodal = staged.is_multimodal;
        let windowed = staged.windowed.clone();
        let paths: Box<dyn ModelPaths + Send> = Box::new(staged.paths.clone());
        let mapper = self.device_map.clone().unwrap_or_else(|| {
            if self.device.is_cpu() {
                DeviceMapSetting::dummy()
            } else {
                DeviceMapSetting::Auto(AutoDeviceMapParams::default_text())
            }
        });
        let asked = self.clone();
        let run = move || {
            let loader = loader_of(asked.name, is_multimodal)?;
            let paths: Box<dyn ModelPaths> = paths;
            let pipeline = loader.load_model_from_path(
                &paths,
                &*dtype,
                &asked.device,
                asked.silent,
                mapper,
                asked.isq,
                asked.paged_attention,
            )?;
            if let Some(shape) = windowed {
                restore_caches(&pipeline, &shape, &asked.device)?;
            }
            Ok::<_, anyhow::Error>(pipeline)
        };
        let failed = |message: String| {
            let message = format!("mistral.rs could not load `{}`: {message}", self.name);
            Problem::sentence(code::LOAD, message)
        };
        let pipeline = on_fresh_thread(run)
            .map_err(|error| Error::no_threads(&error))?
            .map_err(|panic| failed(panic_text(panic.as_ref())))?
            .map_err(|error| failed(format!("{error:#}")))?;
        Ok((pipeline, staged.adapter.clone()))
    }

    /// Opens the base; returns its files, its configuration for mistral.rs, and possible faults that do not prevent its
    /// use.
    fn open_base(&self) -> Result<(ModelFiles, NormalisedConfig, Vec<Problem>)> {
        let base = &self.base;
        refuse_other_formats(base)?;
        let files = ModelFiles::open(base)?;
        let warnings = files.check().map_err(|error| match error.problems() {
            [] => Error::from(error),
            problems => Error::unsupported(base, problems.to_vec()),
        })?;
        if let Some(method) = files.quantization() {
            let message = format!(
                "the weights are quantised ({method}): an adapter cannot be merged into them"
            );
            let fix = match files.gguf() {
                Some(_) => "give the .gguf file itself to `monteclora serve`, which imports it",
                None => {
                    "use the full-precision model, and in_situ_quant to quantise it while loading"
                }
            };
            let at = files.place().display().to_string();
            let problem = Problem::new("quantised-base", at, message, fix);
            return Err(Error::unsupported(base, vec![problem]));
        }
        // Attention and caches differ on other devices.
        let on_cpu = self.device.is_cpu() && self.paged_attention.is_none();
        let normalised = normalise(files.config(), on_cpu)
            .map_err(|problems| Error::unsupported(base, problems))?;
        if normalised.peculiar.is_multimodal && self.isq.is_some() {
            let message = format!(
                "mistral.rs 0.8.1 quantises only the output head of a {}",
                normalised.shape.family.class_name
            );
            return Err(Error::setting("in_situ_quant", message));
        }
        Ok((files, normalised, warnings))
    }

    fn open_adapter(
        &self,
        files: &ModelFiles,
        config: &NormalisedConfig,
    ) -> Result<Option<Adapter>> {
        let Some(source) = &self.adapter else {
            return Ok(None);
        };
        let adapter = Adapter::read_on(source, files)?;
        adapter.require_fit(files)?;
        if !self.force && !adapter.has_effect()? {
            let message = format!(
                "the adapter `{}` changes nothing: B A = 0 at every site; train it first, or start the server with --force if that is meant",
                source.display()
            );
            return Err(Problem::sentence(code::ZERO_EFFECT, message).into());
        }
        if config.peculiar.always_ties && adapter.unties(files) {
            let problem = Problem::new(
                "lm-head",
                HEAD,
                "is adapted, but mistral.rs 0.8.1 always takes the embedding as output head for this family",
                "merge the adapter into a full model directory and serve that with a runtime that supports it",
            );
            return Err(Error::unsupported(source, vec![problem]));
        }
        Ok(Some(adapter.collapse()))
    }

    fn stage(&self) -> Result<Staged> {
        let base = &self.base;
        let (files, normalised, _) = self.open_base()?;
        let adapter = self.open_adapter(&files, &normalised)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix("monteclora-");
        let dir = match &self.staging_root {
            Some(root) => {
                fs::create_dir_all(root).map_err(Error::io("create", root))?;
                builder.tempdir_in(root)
            }
            None => builder.tempdir(),
        }
        .map_err(Error::io("create a temporary directory for", base))?;

        let chat = write_chat_files(
            base,
            self.chat_template.as_deref(),
            self.rendering,
            files.config(),
            dir.path(),
        )?;
        let config = dir.path().join("config.json");
        let NormalisedConfig {
            shape,
            mut json,
            peculiar,
            restores_caches,
            ..
        } = normalised;
        if adapter
            .as_ref()
            .is_some_and(|adapter| adapter.unties(&files))
        {
            json["tie_word_embeddings"] = false.into();
        }
        write_json(&config, &json)?;
        // A later file wins in mistral.rs, so the merged tensors come last.
        let mut filenames: Vec<PathBuf> = files.files().to_vec();
        if peculiar.stacks_experts {
            filenames.extend(stack_experts(&files, &shape, dir.path())?);
        }
        let fingerprint = adapter.as_ref().map(Adapter::fingerprint);
        if let Some(adapter) = adapter {
            let overlay = dir.path().join("overlay.safetensors");
            write_overlay(&files, &adapter, &overlay)?;
            filenames.push(overlay);
        }
        Ok(Staged {
            paths: LocalModelPaths {
                tokenizer_filename: chat.tokenizer,
                config_filename: config,
                template_filename: Some(chat.template),
                filenames,
                adapter_paths: AdapterPaths::None,
                gen_conf: Some(chat.generation),
                preprocessor_config: None,
                processor_config: None,
                chat_template_json_filename: None,
            },
            adapter: fingerprint,
            is_multimodal: peculiar.is_multimodal,
            windowed: restores_caches.then_some(shape),
            _dir: dir,
        })
    }
}

/// mistral.rs's loader for a family, with the public name.
fn loader_of(name: String, is_multimodal: bool) -> anyhow::Result<Box<dyn Loader>> {
    if is_multimodal {
        let config = MultimodalSpecificConfig::default();
        let builder = MultimodalLoaderBuilder::new(config, None, None, Some(name), None);
        return Ok(builder.build(None));
    }
    let config = NormalSpecificConfig::default();
    NormalLoaderBuilder::new(config, None, None, Some(name), false, None).build(None)
}

/// Computes [`MonteCloraLoader::generation`]; `adapter` is the posterior mean.
fn generation(base: &ModelFiles, adapter: Option<&Adapter>) -> Result<String> {
    let digest = match adapter {
        Some(adapter) => adapter.fingerprint(),
        None => base_fingerprint(base)?,
    };
    Ok(shortened(&digest))
}

/// The part of a fingerprint that clients see.
fn shortened(digest: &str) -> String {
    digest.chars().take(12).collect()
}

impl Loader for MonteCloraLoader {
    /// Loads the base directory given to the builder. It downloads nothing, so it ignores revision and token.
    fn load_model_from_hf(
        &self,
        _revision: Option<String>,
        _token_source: TokenSource,
        dtype: &dyn TryIntoDType,
        device: &Device,
        silent: bool,
        mapper: DeviceMapSetting,
        in_situ_quant: Option<IsqType>,
        paged_attn_config: Option<PagedAttentionConfig>,
    ) -> anyhow::Result<SharedPipeline> {
        let dtype = dtype.try_into_dtype(&[device])?;
        let loader = Self {
            device: device.clone(),
            silent,
            device_map: Some(mapper),
            isq: in_situ_quant,
            paged_attention: paged_attn_config,
            ..self.clone()
        };
        Ok(loader.load_as(Box::new(dtype))?.0)
    }

    /// Loads the model whose `config.json` is in `paths`. It takes weights, tokenizer and template from the directory
    /// of that file.
    fn load_model_from_path(
        &self,
        paths: &Box<dyn ModelPaths>,
        dtype: &dyn TryIntoDType,
        device: &Device,
        silent: bool,
        mapper: DeviceMapSetting,
        in_situ_quant: Option<IsqType>,
        paged_attn_config: Option<PagedAttentionConfig>,
    ) -> anyhow::Result<SharedPipeline> {
        let config = paths.get_config_filename();
        let base = config.parent().unwrap_or(Path::new("."));
        let strangers: Vec<_> = paths
            .get_weight_filenames()
            .iter()
            .filter(|file| file.parent() != Some(base))
            .map(|file| file.display().to_string())
            .collect();
        if !strangers.is_empty() {
            let strangers = strangers.join(", ");
            let message =
                format!("weights outside the model directory of config.json: {strangers}");
            return Err(Error::setting("paths", message).into());
        }
        let mut loader = self.clone();
        loader.base = base.to_path_buf();
        loader.load_model_from_hf(
            None,
            TokenSource::None,
            dtype,
            device,
            silent,
            mapper,
            in_situ_quant,
            paged_attn_config,
        )
    }

    fn get_id(&self) -> String {
        self.name.clone()
    }

    fn get_kind(&self) -> ModelKind {
        ModelKind::Normal
    }
}

pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("the loader stopped unexpectedly")
        .to_owned()
}
