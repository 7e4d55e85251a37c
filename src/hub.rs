//! Finds models: a local directory, a GGUF file through its description or import in the cache, or a Hub id. Also finds
//! data sets on the Hub.

mod client;
mod dataset;
mod gguf;
mod push;

use std::path::{Path, PathBuf};

use anyhow::Result;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use monteclora_converters::is_gguf;

pub use self::client::is_hub_id;
pub use self::dataset::{DatasetId, DatasetRepo};
pub use self::gguf::OfGguf;
pub use self::push::{Destination, Pushed, push, require_repo, require_revision};

use self::client::{builder, problem, refusal};
use crate::sample_models::SampleModel;

/// A model that was found: its directory, and the name that the user gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// A Hugging Face directory.
    pub dir: PathBuf,
    /// Hub id or path, as given.
    pub name: String,
    /// Commit, if the model came from the Hub.
    pub revision: Option<String>,
}

/// Options for requests to the Hub.
#[derive(Debug, Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit.
    pub revision: Option<String>,
    /// Source of the access token, as in mistral.rs's `--token-source`; empty means `cache`.
    pub token_source: String,
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

/// Finds the model `id`. For a GGUF file, finds or makes its description in the cache.
///
/// # Errors
/// Returns a [`monteclora_converters::Problem`] if the model is missing or cannot be fetched, or an error of
/// [`crate::gguf_import`] if the GGUF file cannot be read.
pub fn locate(id: &str, options: &HubOptions) -> Result<Located> {
    locate_as(id, options, OfGguf::Description)
}

/// As [`locate`]. `of_gguf` says what the cache must hold of a GGUF file.
///
/// # Errors
/// As [`locate`].
pub fn locate_as(id: &str, options: &HubOptions, of_gguf: OfGguf) -> Result<Located> {
    let path = Path::new(id);
    let local = |dir: PathBuf| Located {
        dir,
        name: id.to_owned(),
        revision: None,
    };
    let refused = |message: &str, fix: &str| Err(problem(format!("`{id}`"), message, fix).into());
    if path.is_dir() {
        return Ok(local(path.to_owned()));
    }
    if is_gguf(path) {
        if !path.is_file() {
            return refused(
                "no such file",
                "give a .gguf file, a model directory or a Hub id",
            );
        }
        return Ok(local(gguf::cached(path, of_gguf)?));
    }
    if path.exists() {
        return refused(
            "a file, and no GGUF file",
            "give the model directory that holds it, a .gguf file or a Hub id",
        );
    }
    if !is_hub_id(id) {
        return refused(
            "no such directory",
            "give a model directory, a .gguf file or a Hub id such as org/name",
        );
    }
    if options.revision.is_none()
        && let Some(found) = SampleModel::fetched(id)
    {
        tracing::info!(
            "{id}: the copy that quickstart fetched, `{}`; --revision main takes the Hub's",
            found.dir.display()
        );
        return Ok(found);
    }
    from_hub(id, options)
}

/// Finds a model on the Hub. A model that was fetched before is used unchanged; its snapshot directory names the
/// commit.
fn from_hub(id: &str, options: &HubOptions) -> Result<Located> {
    let revision = options.revision.as_deref().unwrap_or("main");
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
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
    let fetched = info
        .and_then(|info| fetch(&api, &repo, &info))
        .map_err(|error| match refusal(&error) {
            Some(refusal) => problem(format!("model `{id}`"), refusal, ""),
            None => problem(
                "",
                format!(
                    "model `{id}` is neither a local directory nor in the local cache, and the Hub cannot be reached ({error})"
                ),
                "check the name, connect to the network, or give a local directory or .gguf file with -m",
            ),
        })?;
    let dir = fetched.ok_or_else(|| {
        problem(
            format!("`{id}`"),
            "the repository has no config.json",
            "is it a model, and in Hugging Face's layout?",
        )
    })?;
    Ok(located(dir))
}

fn cached(repo: &Repo) -> Option<PathBuf> {
    let config = Cache::from_env().repo(repo.clone()).get("config.json")?;
    let dir = config.parent()?;
    let is_whole = monteclora_converters::ModelFiles::open(dir).is_ok();
    is_whole.then(|| dir.to_owned())
}

/// Fetches the files of one commit, even if the branch moves meanwhile. Only then the cache points at the commit.
fn fetch(api: &Api, repo: &Repo, info: &RepoInfo) -> Result<Option<PathBuf>, ApiError> {
    let commit = Repo::with_revision(repo.url(), RepoType::Model, info.sha.clone());
    let pinned = api.repo(commit);
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
    Cache::from_env().repo(repo.clone()).create_ref(&info.sha)?;
    Ok(dir)
}
