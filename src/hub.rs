//! Where a model is: a local directory, a GGUF file imported once into the cache, or a Hub id; and data sets on the Hub.

mod dataset;
mod refusal;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use monteclora_converters::Problem;
use sha2::{Digest, Sha256};

pub use dataset::{DatasetId, DatasetRepo};
pub use refusal::Refusal;

use crate::gguf_import::{ImportOptions, import_gguf};

/// A model found: its directory, and its name as the user gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// A Hugging Face directory.
    pub dir: PathBuf,
    /// Hub id or path as given.
    pub name: String,
    /// Commit on the Hub, where it came from there.
    pub revision: Option<String>,
}

/// How the Hub is asked.
#[derive(Debug, Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit.
    pub revision: Option<String>,
    /// As mistral.rs's `--token-source`; empty means `cache`.
    pub token_source: String,
}

impl crate::cli::ModelOptions {
    /// How the Hub is asked for this model.
    pub fn hub(&self) -> HubOptions {
        HubOptions {
            revision: self.revision.clone(),
            token_source: self.token_source.clone(),
        }
    }
}

/// `MONTECLORA_CACHE`, or `monteclora` in the user's cache directory.
pub fn cache_dir() -> PathBuf {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    variable("MONTECLORA_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("monteclora")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/monteclora")))
        .unwrap_or_else(|| PathBuf::from(".monteclora-cache"))
}

/// Finds the model `id`.
///
/// # Errors
/// What is not there; a GGUF file that cannot be imported.
pub fn locate(id: &str, options: &HubOptions) -> anyhow::Result<Located> {
    let path = Path::new(id);
    if path.is_dir() {
        return Ok(local(path, id));
    }
    if path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    {
        if !path.is_file() {
            return Err(not_a_model(
                id,
                "no such file; give a .gguf file, a model directory or a Hub id",
            ));
        }
        return Ok(local(&imported(path)?, id));
    }
    if path.exists() {
        return Err(not_a_model(
            id,
            "not a model; give a model directory, a .gguf file or a Hub id",
        ));
    }
    if !is_hub_id(id) {
        return Err(not_a_model(
            id,
            "no such directory; give a model directory, a .gguf file or a Hub id such as org/name",
        ));
    }
    from_hub(id, options)
}

fn local(dir: &Path, id: &str) -> Located {
    Located {
        dir: dir.to_owned(),
        name: id.to_owned(),
        revision: None,
    }
}

fn is_hub_id(id: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(id.split('/').collect::<Vec<_>>()[..], [org, name] if part(org) && part(name))
}

/// Imports a GGUF file into the cache, once for its path, size and time of change.
fn imported(file: &Path) -> anyhow::Result<PathBuf> {
    let unusable = |source: std::io::Error| {
        not_a_model(
            &file.display().to_string(),
            &format!("cannot be read: {source}"),
        )
    };
    let canonical = file.canonicalize().map_err(unusable)?;
    let metadata = canonical.metadata().map_err(unusable)?;
    let identity = format!(
        "{}\n{}\n{:?}",
        canonical.display(),
        metadata.len(),
        metadata.modified().ok()
    );
    let digest = format!("{:.16x}", Sha256::digest(identity.as_bytes()));
    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or("model");
    let models = cache_dir().join("models");
    let dir = models.join(format!("{stem}-{digest}"));
    if dir.join("config.json").is_file() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&models).map_err(|source| {
        Problem::usage(format!(
            "cannot use the cache directory `{}`; set MONTECLORA_CACHE to a writable one: {source}",
            models.display()
        ))
    })?;
    tracing::info!("importing {} into the cache", file.display());
    import_gguf(file, &dir, &ImportOptions::default(), &mut |_, _| {})?;
    Ok(dir)
}

/// A model that was fetched before is taken as it was then; its commit is that of its snapshot.
fn from_hub(id: &str, options: &HubOptions) -> anyhow::Result<Located> {
    let revision = options
        .revision
        .clone()
        .unwrap_or_else(|| "main".to_owned());
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision);
    let located = |dir: PathBuf| Located {
        revision: dir.file_name().and_then(|n| n.to_str()).map(str::to_owned),
        dir,
        name: id.to_owned(),
    };
    let api = builder(&options.token_source)?.build()?;
    let info = api.repo(repo.clone()).info();
    if let Some(dir) = cached(&repo) {
        let found = located(dir);
        if let (Ok(info), Some(commit)) = (&info, &found.revision)
            && info.sha != *commit
        {
            tracing::warn!(
                "{id}: the Hub has another commit now; the one fetched before, {commit}, is used (--revision {} takes the other)",
                info.sha
            );
        }
        return Ok(found);
    }
    let fetched = info.and_then(|info| fetch(&api, &repo, &info));
    match fetched {
        Ok(Some(dir)) => Ok(located(dir)),
        Ok(None) => Err(not_a_model(
            id,
            "the repository has no config.json; is it a model, and in Hugging Face's layout?",
        )),
        Err(error) => Err(Problem::usage(match Refusal::of(&error) {
            Some(refusal) => format!("model `{id}`: {refusal}"),
            None => format!(
                "model `{id}` is neither a local directory nor in the local cache, and the Hub cannot be reached ({error}); check the name, \
                 connect to the network, or give a local directory or .gguf file with -m"
            ),
        })
        .into()),
    }
}

/// What is no model, and the remedy.
fn not_a_model(name: &str, problem: &str) -> anyhow::Error {
    Problem::usage(format!("`{name}`: {problem}")).into()
}

fn cached(repo: &Repo) -> Option<PathBuf> {
    let dir = Cache::from_env()
        .repo(repo.clone())
        .get("config.json")?
        .parent()?
        .to_owned();
    monteclora_converters::ModelFiles::open(&dir)
        .is_ok()
        .then_some(dir)
}

/// Fetches the files of one commit, whatever the branch does meanwhile, and only then lets the cache point at it.
fn fetch(api: &Api, repo: &Repo, info: &RepoInfo) -> Result<Option<PathBuf>, ApiError> {
    let pinned = api.repo(Repo::with_revision(
        repo.url(),
        RepoType::Model,
        info.sha.clone(),
    ));
    let mut dir = None;
    for sibling in &info.siblings {
        let name = sibling.rfilename.as_str();
        let wanted = !name.contains('/')
            && (name.ends_with(".safetensors")
                || name.ends_with(".json")
                || name.ends_with(".jinja")
                || name == "tokenizer.model");
        if wanted {
            let path = pinned.get(name)?;
            if name == "config.json" {
                dir = path.parent().map(Path::to_owned);
            }
        }
    }
    Cache::from_env()
        .repo(repo.clone())
        .create_ref(&info.sha)
        .map_err(ApiError::from)?;
    Ok(dir)
}

/// A client of the Hub with the token that `token_source` names.
fn builder(token_source: &str) -> Result<ApiBuilder, Problem> {
    let builder = ApiBuilder::from_env().with_progress(std::io::stderr().is_terminal());
    Ok(match token(token_source)? {
        Some(token) => builder.with_token(token),
        None => builder,
    })
}

/// The token that a source names; `None` leaves the choice to the Hub client: for `cache`, where HF_TOKEN is not set, that of
/// `huggingface-cli login`.
fn token(source: &str) -> Result<Option<Option<String>>, Problem> {
    // Without what may be a literal token.
    let kind = source.split(':').next().unwrap_or_default();
    let refuse = |problem: &str| Problem::usage(format!("--token-source {kind}: {problem}"));
    match source.split_once(':') {
        None if source.is_empty() || source == "cache" => Ok(std::env::var("HF_TOKEN")
            .ok()
            .filter(|token| !token.is_empty())
            .map(Some)),
        None if source == "none" => Ok(Some(None)),
        Some(("literal", token)) => Ok(Some(Some(token.to_owned()))),
        Some(("env", name)) => std::env::var(name)
            .map(|token| Some(Some(token)))
            .map_err(|_| refuse("the variable is not set")),
        Some(("path", path)) => std::fs::read_to_string(path)
            .map(|token| Some(Some(token.trim().to_owned())))
            .map_err(|_| refuse("the file cannot be read")),
        _ => Err(refuse(
            "expected literal:TOKEN, env:VARIABLE, path:FILE, cache or none",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_two_plain_parts() {
        assert!(is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct"));
        for id in [
            "model",
            "a/b/c",
            "/abs/path",
            "../up",
            "a/..",
            "a/",
            "a b/c",
        ] {
            assert!(!is_hub_id(id), "{id}");
        }
    }

    #[test]
    fn token_sources() {
        assert!(matches!(token("none"), Ok(Some(None))));
        assert!(matches!(token("literal:x"), Ok(Some(Some(t))) if t == "x"));
        let error = token("secret-by-mistake:abc")
            .expect_err("unknown kind")
            .to_string();
        assert!(!error.contains("abc"));
    }
}
