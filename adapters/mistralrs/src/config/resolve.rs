//! Turns `serve.toml` into the server's configuration: checks every setting, finds every path and fills in every
//! default.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use mistralrs_core::{IsqType, ModelDType};

use super::{AdminSection, LimitsSection, ModelSection, PageExample, ServeFile, ServerSection};
use crate::error::{Error, Result};
use crate::keys::{ADMIN_KEYS_VARIABLE, API_KEYS_VARIABLE, KeySet};
use crate::loader::{MonteCloraLoader, check_public_name};
use crate::quantisation::parse_in_situ_quant;
use crate::quirks_0_8::prefix_cache;
use crate::scoring::{Scoring, UncertaintyConfig};

/// Finds the directory of a model or adapter.
pub type Locate<'a> = dyn Fn(&Wanted<'_>) -> Result<PathBuf> + 'a;

/// A model or an adapter that is not a local directory.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Hub id, or path of a file.
    pub id: &'a str,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<&'a str>,
    /// For a base model: how the engine holds its weights. None for an adapter.
    pub weights: Option<Held>,
}

impl Wanted<'_> {
    /// Whether this is a GGUF file with a base model.
    pub fn is_gguf(&self) -> bool {
        self.weights.is_some() && is_gguf_name(Path::new(self.id))
    }
}

fn is_gguf_name(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// How an engine holds the weights of a base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Whether the engine holds the weights as bfloat16. A file in bfloat16 then loses no precision.
    pub in_bf16: bool,
    /// Whether the weights are quantised while they are loaded.
    pub quantised: bool,
}

/// Maximum number of posterior draws held per adapter.
const MOST_DRAWS: usize = 1000;

/// Name of the state file below the adapter root.
const STATE_FILE_NAME: &str = ".monteclora-state.json";

/// Paths of the TLS certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, PEM.
    pub cert: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
}

/// The configuration of a server: checked, and with all defaults filled in.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Address to bind.
    pub address: SocketAddr,
    /// The host name or address as given.
    pub host: String,
    /// Maximum number of sequences that an engine processes at the same time.
    pub max_seqs: NonZeroUsize,
    /// Maximum memory for the weights of all engines together, in bytes.
    pub max_memory: Option<u64>,
    /// Limits for clients.
    pub limits: LimitsSection,
    /// Certificate and key, if the server uses HTTPS.
    pub tls: Option<TlsFiles>,
    /// Whether the server serves a page at `/`.
    pub ui: bool,
    /// Example questions on the page.
    pub examples: Vec<PageExample>,
    /// Web origins whose pages may call the server.
    pub allowed_origins: Vec<String>,
    /// Keys for inference. If empty, the server accepts requests without a key and binds to loopback only.
    pub api_keys: KeySet,
    /// Keys for administration.
    pub admin_keys: KeySet,
    /// Canonical adapter root, if administration is on.
    pub adapter_root: Option<PathBuf>,
    /// File that records adapters loaded at run time, if administration is on.
    pub state_file: Option<PathBuf>,
    /// The base models, at least one.
    pub models: Vec<ModelConfig>,
    /// Name of the model that answers requests without `model`.
    pub default_model: String,
    /// Whether adapters that change nothing are served; they are refused otherwise.
    pub force: bool,
    /// Called, on any thread, after a model was loaded or its weights were freed. It lets an allocator that keeps freed
    /// pages return them to the system.
    pub reclaim: Option<fn()>,
}

impl ServeConfig {
    /// Sets the `scoring` of the models that have uncertainty enabled.
    #[must_use]
    pub fn with_scoring(mut self, scoring: &Arc<dyn Scoring>) -> Self {
        for model in &mut self.models {
            model.scoring = model.uncertainty.is_some().then(|| scoring.clone());
        }
        self
    }
}

/// One base model and its adapters.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Public name.
    pub name: String,
    /// Model directory.
    pub base: PathBuf,
    /// Element type.
    pub dtype: ModelDType,
    /// Quantisation while loading.
    pub isq: Option<IsqType>,
    /// Device.
    pub device: Device,
    /// Chat template override.
    pub chat_template: Option<PathBuf>,
    /// Adapters by public name.
    pub adapters: Vec<(String, PathBuf)>,
    /// Number of posterior draws served as separate models, by the adapter's public name. An adapter without an entry
    /// has none.
    pub draws: BTreeMap<String, usize>,
    /// Settings of scoring, if it is enabled.
    pub uncertainty: Option<UncertaintyConfig>,
    /// The implementation that scores answers.
    pub scoring: Option<Arc<dyn Scoring>>,
}

impl ModelConfig {
    /// Starts a loader for this base under the public name `name`, with the adapter in `source` if given.
    ///
    /// # Errors
    /// Returns an error as [`crate::MonteCloraLoaderBuilder::build`].
    pub fn loader(&self, name: &str, source: Option<&Path>) -> Result<MonteCloraLoader> {
        let mut builder = MonteCloraLoader::builder(&self.base, name)
            .dtype(self.dtype)
            .device(self.device.clone())
            .in_situ_quant(self.isq)
            .chat_template(self.chat_template.clone());
        if let Some(source) = source {
            builder = builder.adapter(source);
        }
        builder.build()
    }
}

impl ServeFile {
    /// Checks everything that can be checked before loading, and finds models and adapters.
    ///
    /// `locate` finds whatever is not a local path, and GGUF files. It is called for anything that may need a download
    /// or an import only after everything else has passed.
    ///
    /// # Errors
    /// Returns [`Error::Problem`]; it names every wrong setting.
    pub fn resolve(&self, locate: &Locate<'_>) -> Result<ServeConfig> {
        let without_fetching = |wanted: &Wanted<'_>| match is_hub_id(wanted.id) || wanted.is_gguf()
        {
            true => Ok(PathBuf::from(wanted.id)),
            false => locate(wanted),
        };
        self.resolve_with(&without_fetching)?;
        self.resolve_with(locate)
    }

    fn resolve_with(&self, locate: &Locate<'_>) -> Result<ServeConfig> {
        let mut wrong = Wrong::default();
        let auth = &self.auth;
        let (api, admin) = (
            auth.api_keys_file.as_deref(),
            auth.admin_keys_file.as_deref(),
        );
        let api_keys = wrong.keys("auth.api_keys_file", api, API_KEYS_VARIABLE);
        let admin_keys = wrong.keys("auth.admin_keys_file", admin, ADMIN_KEYS_VARIABLE);
        let address = self.server.address(&api_keys, &mut wrong);
        let tls = self.server.tls(&mut wrong);
        for origin in &self.server.allowed_origins {
            if !is_origin(origin) {
                let expected = "is not `*` or an origin such as `https://app.example`";
                wrong.note("server.allowed_origins", format!("`{origin}` {expected}"));
            }
        }
        let max_seqs = NonZeroUsize::new(self.runtime.max_seqs);
        if max_seqs.is_none() {
            wrong.note("runtime.max_seqs", "must be at least 1");
        }
        if self.runtime.prefix_cache_n > 0 {
            wrong.note("runtime.prefix_cache_n", prefix_cache::refusal());
        }
        let adapter_root = self.admin.root(&mut wrong);
        let state_file = adapter_root.as_ref().map(|root| {
            let default = || root.join(STATE_FILE_NAME);
            self.admin.state_file.clone().unwrap_or_else(default)
        });
        if self.admin.enabled && admin_keys.is_empty() && !api_keys.is_empty() {
            let needed = "needed where administration is enabled on a server with keys";
            wrong.note("auth.admin_keys_file", needed);
        }
        if self.models.is_empty() {
            wrong.note("models", "at least one [[models]] section is needed");
        }
        self.limits.check(&mut wrong.0);
        let mut names = BTreeMap::new();
        let mut models = Vec::new();
        for (idx, section) in self.models.iter().enumerate() {
            let at = format!("models[{idx}]");
            models.extend(section.resolve(&at, locate, &mut names, &mut wrong));
        }
        if let Some(name) = &self.default_model_id
            && !names.contains_key(name)
        {
            let message = format!("`{name}` is not a model or alias of this file");
            wrong.note("default_model_id", message);
        }
        let max_memory = self.runtime.max_memory_mb;
        if max_memory == Some(0) {
            let message = "expected at least 1 MiB, found 0; leave the key out for no limit";
            wrong.note("runtime.max_memory_mb", message);
        }
        let max_memory = max_memory.map(|mb| mb.saturating_mul(1 << 20));
        let first = models.first().map(|model| model.name.clone());
        let default_model = self.default_model_id.clone().or(first);
        match (wrong.0.is_empty(), address, max_seqs, default_model) {
            (true, Some(address), Some(max_seqs), Some(default_model)) => Ok(ServeConfig {
                address,
                max_seqs,
                host: self.server.host.clone(),
                max_memory,
                limits: self.limits.clone(),
                tls,
                ui: self.server.ui,
                examples: self.server.examples.clone(),
                allowed_origins: self.server.allowed_origins.clone(),
                api_keys,
                admin_keys,
                adapter_root,
                state_file,
                models,
                default_model,
                force: false,
                reclaim: None,
            }),
            _ => Err(Error::setting("serve configuration", wrong.0.join("\n  "))),
        }
    }
}

/// All faults found, one entry per setting.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn note(&mut self, key: &str, message: impl Display) {
        self.0.push(format!("{key}: {message}"));
    }

    /// Reads the keys of a file and an environment variable; returns no keys if they cannot be read.
    fn keys(&mut self, key: &str, path: Option<&Path>, variable: &str) -> KeySet {
        KeySet::gather(path, variable).unwrap_or_else(|error| {
            self.note(key, error);
            KeySet::default()
        })
    }
}

impl ServerSection {
    fn address(&self, api_keys: &KeySet, wrong: &mut Wrong) -> Option<SocketAddr> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let address = found.ok().and_then(|mut addresses| addresses.next());
        match address {
            None => wrong.note(
                "server.host",
                format!("`{}` is not an address of this machine", self.host),
            ),
            Some(address) if !address.ip().is_loopback() && api_keys.is_empty() => wrong.note(
                "server.host",
                format!(
                    "{} is reachable from outside and there are no keys; set auth.api_keys_file or {API_KEYS_VARIABLE}, or bind to 127.0.0.1",
                    address.ip()
                ),
            ),
            Some(_) => {}
        }
        address
    }

    fn tls(&self, wrong: &mut Wrong) -> Option<TlsFiles> {
        match (self.tls_cert.clone(), self.tls_key.clone()) {
            (Some(cert), Some(key)) => {
                for (name, file) in [("server.tls_cert", &cert), ("server.tls_key", &key)] {
                    if !file.is_file() {
                        wrong.note(name, format!("`{}` is no file", file.display()));
                    }
                }
                return Some(TlsFiles { cert, key });
            }
            (Some(_), None) => wrong.note("server.tls_key", "needed where tls_cert is given"),
            (None, Some(_)) => wrong.note("server.tls_cert", "needed where tls_key is given"),
            (None, None) => {}
        }
        None
    }
}

impl AdminSection {
    /// The adapter root, if administration is on.
    fn root(&self, wrong: &mut Wrong) -> Option<PathBuf> {
        if !self.enabled {
            return None;
        }
        let Some(root) = &self.adapter_root else {
            wrong.note("admin.adapter_root", "needed where admin.enabled is true");
            return None;
        };
        let found = root.canonicalize().ok().filter(|root| root.is_dir());
        if found.is_none() {
            let message = format!("`{}` is not a directory", root.display());
            wrong.note("admin.adapter_root", message);
        }
        found
    }
}

impl ModelSection {
    /// Resolves the model. Returns none if `wrong` got an entry that makes this impossible.
    fn resolve(
        &self,
        at: &str,
        locate: &Locate<'_>,
        names: &mut BTreeMap<String, String>,
        wrong: &mut Wrong,
    ) -> Option<ModelConfig> {
        let name = self.name.clone().unwrap_or_else(|| {
            let last = Path::new(&self.model_id).file_name();
            last.map(|last| last.to_string_lossy().into_owned())
                .unwrap_or_default()
        });
        if self.model_id.is_empty() {
            wrong.note(&format!("{at}.model_id"), "missing");
            return None;
        }
        claim(&name, &format!("{at}.name"), names, wrong);
        let given = self.dtype.as_deref().unwrap_or("auto");
        let dtype = given.parse::<ModelDType>().unwrap_or_else(|_| {
            let message = format!("`{given}` is not auto, f32, f16 or bf16");
            wrong.note(&format!("{at}.dtype"), message);
            ModelDType::default()
        });
        let device = default_device(self.device.cpu).unwrap_or_else(|error| {
            wrong.0.push(format!("{at}.{error}"));
            Device::Cpu
        });
        let isq = self.quantization.in_situ_quant.as_deref().and_then(|text| {
            parse_in_situ_quant(text, &device)
                .map_err(|error| wrong.0.push(format!("{at}.quantization.{error}")))
                .ok()
        });
        if let Some(template) = self.chat_template.as_ref().filter(|path| !path.is_file()) {
            let message = format!("there is no file `{}`", template.display());
            wrong.note(&format!("{at}.chat_template"), message);
        }
        let mut find = |at: &str, wanted: Wanted<'_>| {
            let local = Path::new(wanted.id);
            if local.exists() && !(wanted.is_gguf() && local.is_file()) {
                return local.to_path_buf();
            }
            locate(&wanted).unwrap_or_else(|error| {
                wrong.note(at, error);
                PathBuf::new()
            })
        };
        let in_bf16 = match dtype {
            ModelDType::Auto => !device.is_cpu(),
            ModelDType::BF16 => true,
            ModelDType::F32 | ModelDType::F16 => false,
        };
        let wanted = Wanted {
            id: &self.model_id,
            revision: self.revision.as_deref(),
            weights: Some(Held {
                in_bf16,
                quantised: isq.is_some(),
            }),
        };
        let base = find(&format!("{at}.model_id"), wanted);
        let mut sources = Vec::new();
        for (idx, adapter) in self.adapters.iter().enumerate() {
            let at = format!("{at}.adapters[{idx}].source");
            sources.push(match adapter.source.as_str() {
                "" => None,
                source => Some(find(
                    &at,
                    Wanted {
                        id: source,
                        revision: adapter.revision.as_deref(),
                        weights: None,
                    },
                )),
            });
        }
        let mut adapters = Vec::new();
        let mut draws = BTreeMap::new();
        for (idx, (adapter, source)) in self.adapters.iter().zip(sources).enumerate() {
            let at = format!("{at}.adapters[{idx}]");
            claim(&adapter.alias, &format!("{at}.alias"), names, wrong);
            let kind = adapter.kind.as_deref().unwrap_or("lora");
            if !["monteclora", "lora"].contains(&kind) {
                let message = format!("`{kind}` is not monteclora or lora");
                wrong.note(&format!("{at}.type"), message);
            }
            if adapter.draws > 0 {
                let at = format!("{at}.draws");
                match (self.uncertainty.enabled, adapter.draws) {
                    (false, _) => {
                        wrong.note(&at, "needs `enabled = true` below [models.uncertainty]")
                    }
                    (_, n) if n > MOST_DRAWS => {
                        wrong.note(&at, format!("{n}: expected at most {MOST_DRAWS}"));
                    }
                    (_, n) => {
                        draws.insert(adapter.alias.clone(), n);
                    }
                }
            }
            match source {
                Some(source) => adapters.push((adapter.alias.clone(), source)),
                None => wrong.note(&format!("{at}.source"), "missing"),
            }
        }
        let uncertainty = self.uncertainty(at, wrong);
        Some(ModelConfig {
            name,
            base,
            dtype,
            isq,
            device,
            chat_template: self.chat_template.clone(),
            adapters,
            draws,
            uncertainty,
            scoring: None,
        })
    }

    fn uncertainty(&self, at: &str, wrong: &mut Wrong) -> Option<UncertaintyConfig> {
        let section = self.uncertainty.clone();
        if !section.enabled {
            return None;
        }
        if !(1..=MOST_DRAWS).contains(&section.draws) {
            let message = format!("{}: expected 1 to {MOST_DRAWS}", section.draws);
            wrong.note(&format!("{at}.uncertainty.draws"), message);
        }
        let max_concurrent = NonZeroUsize::new(section.max_concurrent);
        if max_concurrent.is_none() {
            wrong.note(
                &format!("{at}.uncertainty.max_concurrent"),
                "must be at least 1",
            );
        }
        Some(UncertaintyConfig {
            model_id: self.model_id.clone(),
            revision: self.revision.clone(),
            dtype: section.dtype,
            draws: section.draws,
            max_concurrent: max_concurrent?,
        })
    }
}

/// Whether `text` is `*`, or a scheme and an authority, as browsers send them in `Origin`.
fn is_origin(text: &str) -> bool {
    let authority = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-.:[]".contains(c);
    text == "*" || authority.is_some_and(|host| !host.is_empty() && host.chars().all(plain))
}

/// Records a public name, or reports why it is not allowed.
fn claim(name: &str, at: &str, names: &mut BTreeMap<String, String>, wrong: &mut Wrong) {
    if let Err(Error::Problem(problem)) = check_public_name(name) {
        wrong.note(at, problem.message);
    } else if let Some(first) = names.insert(name.to_owned(), at.to_owned()) {
        wrong.note(at, format!("`{name}` is already the name at {first}"));
    }
}

/// Whether `id` has the form `organisation/name`. A local path can have this form too.
fn is_hub_id(id: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(id.split('/').collect::<Vec<_>>()[..], [organisation, name] if part(organisation) && part(name))
}

/// Finds nothing; for programs that take local directories only.
///
/// # Errors
/// Always returns [`Error::Problem`].
pub fn local_only(wanted: &Wanted<'_>) -> Result<PathBuf> {
    let message = "there is no such directory";
    Err(Error::not_found(Path::new(wanted.id), message))
}

/// The accelerator this build supports, or the CPU.
fn default_device(cpu: bool) -> Result<Device> {
    let found = if cpu {
        Ok(Device::Cpu)
    } else if cfg!(feature = "metal") {
        Device::new_metal(0)
    } else {
        Device::cuda_if_available(0)
    };
    let remedy = "set cpu = true to run on the CPU";
    found.map_err(|error| Error::setting("device", format!("{error}; {remedy}")))
}
