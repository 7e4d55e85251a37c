//! A data set on the Hub: its name, its list of files, and fetching one of them.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use monteclora_converters::Problem;

use super::client::{builder, is_hub_id, problem, refusal};

/// `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`, or `ORG/NAME` alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetId {
    /// `ORG/NAME`.
    pub id: String,
    /// Branch, tag or commit; `main` by default.
    pub revision: String,
    /// Only files below this folder belong to the data set; empty for all files.
    pub folder: String,
}

impl DatasetId {
    /// Parses the name of a data set; `None` if the text has another form.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision, folder) = match text.strip_prefix("hf://datasets/") {
            None => (text.to_owned(), "main", ""),
            Some(rest) => {
                let mut parts = rest.splitn(3, '/');
                let (org, name) = (parts.next()?, parts.next()?);
                let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
                (
                    format!("{org}/{name}"),
                    revision,
                    parts.next().unwrap_or(""),
                )
            }
        };
        (is_hub_id(&id) && !revision.is_empty()).then(|| Self {
            id,
            revision: revision.to_owned(),
            folder: folder.trim_end_matches('/').to_owned(),
        })
    }

    /// Whether a file of the repository is below the folder.
    pub fn holds(&self, file: &str) -> bool {
        Path::new(file).starts_with(&self.folder)
    }
}

/// A data set whose files are all of one commit. They come from the Hub, or from the local cache if the Hub does not
/// respond.
pub struct DatasetRepo {
    /// The repository at the commit, if the Hub responds.
    online: Option<ApiRepo>,
    /// The repository at the revision that was asked for.
    cache: CacheRepo,
    commit: String,
}

impl DatasetRepo {
    /// Opens a data set, and returns it with the names of all its files. The token is that of `HF_TOKEN` or
    /// `huggingface-cli login`.
    ///
    /// # Errors
    /// Returns an error if the data set is neither on the Hub nor in the cache.
    pub fn open(wanted: &DatasetId) -> Result<(Self, Vec<String>), Problem> {
        let at = |revision: &str| {
            Repo::with_revision(wanted.id.clone(), RepoType::Dataset, revision.to_owned())
        };
        let repo = at(&wanted.revision);
        let cache = Cache::from_env();
        let api = builder("")?;
        let asked = || -> Result<_, ApiError> {
            let api = api.build()?;
            let info = api.repo(repo.clone()).info()?;
            Ok((api.repo(at(&info.sha)), info))
        };
        let (online, commit, mut names) = match asked() {
            Ok((api, info)) => {
                let names = info.siblings.into_iter().map(|file| file.rfilename);
                (Some(api), info.sha, names.collect())
            }
            Err(error) => {
                let (commit, names) =
                    cached_names(&cache, &repo).ok_or_else(|| not_given(&error))?;
                (None, commit, names)
            }
        };
        names.sort();
        let found = Self {
            online,
            cache: cache.repo(repo),
            commit,
        };
        Ok((found, names))
    }

    /// The commit of the files.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Returns the path of a local copy of a file, and fetches the file if necessary.
    ///
    /// # Errors
    /// Returns an error if the file is not in the cache and cannot be fetched, or if the cache cannot be written.
    pub fn get(&self, name: &str) -> Result<PathBuf, Problem> {
        let refused = |message: String, fix: &str| problem(format!("`{name}`"), message, fix);
        let Some(api) = &self.online else {
            return self.cache.get(name).ok_or_else(|| {
                let message = "the Hub cannot be reached, and the file is not in the cache";
                refused(message.to_owned(), "connect to the network")
            });
        };
        let path = api.get(name).map_err(|error| match refusal(&error) {
            Some(refusal) => refused(refusal, ""),
            None => refused(format!("cannot be fetched ({error})"), "try again"),
        })?;
        // Without the Hub, the revision's name then means this commit.
        self.cache
            .create_ref(&self.commit)
            .map_err(|error| refused(format!("cannot be cached: {error}"), ""))?;
        Ok(path)
    }
}

fn not_given(error: &ApiError) -> Problem {
    match refusal(error) {
        Some(refusal) => {
            let message = format!("no local file or directory has this name, and {refusal}");
            problem("", message, "")
        }
        None => problem(
            "",
            format!(
                "neither a local file or directory nor in the local cache, and the Hub cannot be reached ({error})"
            ),
            "check the name, connect to the network, or give a local file",
        ),
    }
}

/// The commit that the revision points at in the cache, and the files of its snapshot; `None` if nothing was fetched.
fn cached_names(cache: &Cache, repo: &Repo) -> Option<(String, Vec<String>)> {
    let root = cache.path().join(repo.folder_name());
    let commit = std::fs::read_to_string(root.join("refs").join(repo.revision())).ok()?;
    let commit = commit.trim().to_owned();
    let mut names = Vec::new();
    names_below(&root.join("snapshots").join(&commit), "", &mut names);
    (!names.is_empty()).then_some((commit, names))
}

fn names_below(dir: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let name = format!("{prefix}{name}");
        if entry.path().is_dir() {
            names_below(&entry.path(), &format!("{name}/"), names);
        } else {
            names.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_data_sets() {
        let parsed = |text| DatasetId::parse(text).map(|id| (id.id, id.revision, id.folder));
        let triple = |a: &str, b: &str, c: &str| Some((a.to_owned(), b.to_owned(), c.to_owned()));
        assert_eq!(parsed("org/name"), triple("org/name", "main", ""));
        assert_eq!(
            parsed("hf://datasets/org/name@v1/main/sub"),
            triple("org/name", "v1", "main/sub")
        );
        for text in [
            "name",
            "a/b/c",
            "hf://datasets/org",
            "hf://datasets/a/b@",
            "../up",
            "hf://a/b",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
        let id = DatasetId::parse("hf://datasets/org/name/main").expect("parses");
        assert!(id.holds("main/train.parquet") && !id.holds("mainly/train.parquet"));
    }

    #[test]
    fn a_cached_snapshot_lists_its_files() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let repo = Repo::with_revision("o/n".to_owned(), RepoType::Dataset, "main".to_owned());
        let root = dir.path().join(repo.folder_name());
        let snapshot = root.join("snapshots/abc/data");
        std::fs::create_dir_all(&snapshot).expect("creates");
        std::fs::create_dir_all(root.join("refs")).expect("creates");
        std::fs::write(root.join("refs/main"), "abc").expect("writes");
        std::fs::write(snapshot.join("train.jsonl"), "{}").expect("writes");
        let cache = Cache::new(dir.path().to_owned());
        assert_eq!(
            cached_names(&cache, &repo),
            Some(("abc".to_owned(), vec!["data/train.jsonl".to_owned()]))
        );
    }
}
