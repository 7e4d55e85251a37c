//! `serve.toml` as written: its sections, and the errors for unknown keys.

mod limits;
mod parse;
mod resolve;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::field_names::field_names;
use crate::scoring::ScoringDtype;

pub use limits::LimitsSection;
pub use resolve::{Held, Locate, ModelConfig, ServeConfig, TlsFiles, Wanted, local_only};

/// `serve.toml` as written; keys have the names of mistral.rs `from-config`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeFile {
    /// Where the server listens.
    pub server: ServerSection,
    /// Limits per engine and for all engines together.
    pub runtime: RuntimeSection,
    /// Limits for clients.
    pub limits: LimitsSection,
    /// Keys for clients.
    pub auth: AuthSection,
    /// The endpoints that change what is served.
    pub admin: AdminSection,
    /// The base models.
    pub models: Vec<ModelSection>,
    /// Model name for requests without `model`. Default: the first model.
    pub default_model_id: Option<String>,
}

/// `[server]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSection {
    /// Address or host name to bind.
    pub host: String,
    /// Port to bind. 0 lets the system choose.
    pub port: u16,
    /// Certificate chain, PEM. With it and `tls_key` the server accepts only HTTPS. Read again on SIGHUP.
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    pub tls_key: Option<PathBuf>,
    /// Serve a page at `/` that asks two models side by side and shows their confidence. The page itself needs no key;
    /// its requests do.
    pub ui: bool,
    /// Example questions on the page.
    pub examples: Vec<PageExample>,
    /// Web origins allowed to call the server (`https://app.example`, or `*`). Default: none.
    pub allowed_origins: Vec<String>,
}

/// `[[server.examples]]`: a question that the page at `/` offers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct PageExample {
    /// Text of the button.
    pub title: String,
    /// Question to ask.
    pub question: String,
    /// System message before the question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Possible answers. Without them, the model answers in free text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
    /// Maximum tokens of a free-text answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
}

impl Default for ServerSection {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 1234,
            tls_cert: None,
            tls_key: None,
            ui: false,
            examples: Vec::new(),
            allowed_origins: Vec::new(),
        }
    }
}

/// `[runtime]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimeSection {
    /// Maximum concurrent sequences per engine. At least 1.
    pub max_seqs: usize,
    /// Number of prompts in an engine's prefix cache. Must be 0: with mistral.rs's cache, the turn after a truncated
    /// answer is computed without one token, and on a CPU the cache grows without limit.
    pub prefix_cache_n: usize,
    /// Maximum memory for the weights of all engines together, in MiB. Each adapter is a copy of its base.
    pub max_memory_mb: Option<u64>,
}

impl Default for RuntimeSection {
    fn default() -> Self {
        Self {
            max_seqs: 32,
            prefix_cache_n: 0,
            max_memory_mb: None,
        }
    }
}

/// `[auth]`. Without keys for inference the server binds to loopback only.
///
/// Keys in the environment, `MONTECLORA_API_KEYS` and `MONTECLORA_ADMIN_KEYS`, are added to those of the files.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthSection {
    /// File of keys for inference: one per line, plain or `sha256:<hex>`.
    pub api_keys_file: Option<PathBuf>,
    /// File of admin keys, in the same format. Admin keys also work for inference.
    pub admin_keys_file: Option<PathBuf>,
}

/// `[admin]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminSection {
    /// Allow loading and unloading adapters at run time.
    pub enabled: bool,
    /// Directory that must contain every adapter loaded at run time.
    pub adapter_root: Option<PathBuf>,
    /// File that records adapters loaded and unloaded at run time, so that a restart serves the same. Default:
    /// `.monteclora-state.json` in the adapter root. Each server needs its own file.
    pub state_file: Option<PathBuf>,
}

/// `[[models]]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Model directory, `.gguf` file (imported once into the cache), or Hub id.
    pub model_id: String,
    /// Revision of a Hub id.
    pub revision: Option<String>,
    /// Public name. Default: the last part of `model_id`.
    pub name: Option<String>,
    /// dtype of weights: `auto`, `f32`, `f16` or `bf16`. `auto` is f32 on a CPU.
    pub dtype: Option<String>,
    /// Chat template file that replaces the model's own.
    pub chat_template: Option<PathBuf>,
    /// Quantisation during loading.
    pub quantization: QuantizationSection,
    /// Device.
    pub device: DeviceSection,
    /// Confidence scores of answers.
    pub uncertainty: UncertaintySection,
    /// Adapters on this model.
    pub adapters: Vec<AdapterSection>,
}

/// `[models.quantization]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizationSection {
    /// In-situ quantisation, with mistral.rs's names: `"4"`, `"8"`, `"Q4K"`, ...
    pub in_situ_quant: Option<String>,
}

/// `[models.device]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceSection {
    /// Run on the CPU even if an accelerator is available.
    pub cpu: bool,
}

/// `[models.uncertainty]`: scores for `POST /v1/monteclora/score`, from a second copy of the base that all its adapters
/// share.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct UncertaintySection {
    /// Score answers.
    pub enabled: bool,
    /// dtype of the copy used for scoring. `blocks` needs a quantised `.gguf` file as `model_id`.
    pub dtype: ScoringDtype,
    /// Posterior draws per adapter held in memory, and the maximum per request. At least 1.
    pub draws: usize,
    /// Scores computed concurrently; others wait. At least 1.
    pub max_concurrent: usize,
}

impl Default for UncertaintySection {
    fn default() -> Self {
        Self {
            enabled: false,
            dtype: ScoringDtype::default(),
            draws: 8,
            max_concurrent: 1,
        }
    }
}

/// `[[models.adapters]]`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterSection {
    /// `monteclora` or `lora`. The real type is detected from the content.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Public name of the adapter.
    pub alias: String,
    /// Adapter directory or Hub id.
    pub source: String,
    /// Revision of a Hub id.
    pub revision: Option<String>,
    /// Number of posterior draws served as separate models, `ALIAS@draw-0` and so on. Needs `[models.uncertainty]`.
    pub draws: usize,
}

impl ServeFile {
    /// Reads a file. Relative paths in it become relative to the directory of the file.
    ///
    /// Environment variables override its keys: `MONTECLORA_SERVER__PORT=8080` sets `port` in `[server]`, and
    /// `MONTECLORA_MODELS__0__DTYPE=f16` sets `dtype` of the first model.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] if the file does not exist or is not valid. The error names every value of a wrong
    /// type, and every unknown key with the nearest known key. Returns [`Error::Io`] if the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        // Reading a pipe would never end, or would give nothing at a reload.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(Error::config(path, "not a regular file"));
        }
        let text = fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                Error::not_found(path, "the configuration does not exist")
            }
            _ => Error::io("read", path)(source),
        })?;
        let mut file =
            parse::parse(&text, environment()).map_err(|message| Error::config(path, message))?;
        // Absolute paths: a record of them must mean the same wherever the server is started.
        let path = std::path::absolute(path).map_err(Error::io("find", path))?;
        file.anchor(path.parent().unwrap_or(Path::new("")));
        Ok(file)
    }

    /// Reads the configuration from the environment alone, for a server without a file.
    ///
    /// # Errors
    /// Returns [`Error::Problem`]; it names every variable that cannot be used.
    pub fn from_environment() -> Result<Self> {
        parse::parse("", environment()).map_err(|message| Error::setting("environment", message))
    }

    /// Makes relative paths relative to `root`. An id changes only if it names something in `root`.
    fn anchor(&mut self, root: &Path) {
        let files = [
            &mut self.server.tls_cert,
            &mut self.server.tls_key,
            &mut self.auth.api_keys_file,
            &mut self.auth.admin_keys_file,
            &mut self.admin.adapter_root,
            &mut self.admin.state_file,
        ];
        let templates = self.models.iter_mut().map(|model| &mut model.chat_template);
        for path in files.into_iter().chain(templates).flatten() {
            *path = root.join(&path);
        }
        for model in &mut self.models {
            let sources = model.adapters.iter_mut().map(|adapter| &mut adapter.source);
            for id in sources.chain([&mut model.model_id]) {
                let local = root.join(&*id);
                if !id.is_empty() && local.exists() {
                    *id = local.to_string_lossy().into_owned();
                }
            }
        }
    }
}

/// The environment variables that are valid UTF-8.
fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Every key of the file, by table.
fn keys() -> [(&'static str, &'static [&'static str]); 12] {
    [
        ("", field_names::<ServeFile>()),
        ("server", field_names::<ServerSection>()),
        ("server.examples", field_names::<PageExample>()),
        ("runtime", field_names::<RuntimeSection>()),
        ("limits", field_names::<LimitsSection>()),
        ("auth", field_names::<AuthSection>()),
        ("admin", field_names::<AdminSection>()),
        ("models", field_names::<ModelSection>()),
        ("models.quantization", field_names::<QuantizationSection>()),
        ("models.device", field_names::<DeviceSection>()),
        ("models.uncertainty", field_names::<UncertaintySection>()),
        ("models.adapters", field_names::<AdapterSection>()),
    ]
}
