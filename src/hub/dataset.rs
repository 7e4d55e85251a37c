//! A data set on the Hub: how it is named, which files it holds, and getting one of them.

use std::path::PathBuf;

use hf_hub::api::sync::ApiRepo;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{Refusal, is_hub_id};

/// `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`, or `ORG/NAME` alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetId {
    /// `ORG/NAME`.
    pub id: String,
    /// Branch, tag or commit; `main` by default.
    pub revision: String,
    /// Only files below it, where it is not empty.
    pub folder: String,
}

impl DatasetId {
    /// `None` for a text of another form.
    pub fn parse(text: &str) -> Option<Self> {
        let main = || "main".to_owned();
        let Some(rest) = text.strip_prefix("hf://datasets/") else {
            return is_hub_id(text).then(|| Self {
                id: text.to_owned(),
                revision: main(),
                folder: String::new(),
            });
        };
        let mut parts = rest.splitn(3, '/');
        let (org, name) = (parts.next()?, parts.next()?);
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) if !revision.is_empty() => (name, revision.to_owned()),
            Some(_) => return None,
            None => (name, main()),
        };
        let id = format!("{org}/{name}");
        is_hub_id(&id).then(|| Self {
            id,
            revision,
            folder: parts.next().unwrap_or("").trim_end_matches('/').to_owned(),
        })
    }

    /// Whether a file of the data set is meant.
    pub fn holds(&self, file: &str) -> bool {
        self.folder.is_empty()
            || file == self.folder
            || file
                .strip_prefix(self.folder.as_str())
                .is_some_and(|rest| rest.starts_with('/'))
    }
}

/// A data set whose files can be had, all of one commit: from the Hub, or from the local cache where the Hub does not answer.
pub struct DatasetRepo {
    place: Place,
    commit: String,
}

enum Place {
    /// The Hub answers; the repository at the commit, and as it was asked for.
    Online(Box<ApiRepo>, CacheRepo),
    /// It does not, but the data set has been fetched before.
    Cached(CacheRepo),
}

impl DatasetRepo {
    /// The data set with the names of all its files. The token is that of `HF_TOKEN` or `huggingface-cli login`.
    ///
    /// # Errors
    /// Why it is neither on the Hub nor in the cache.
    pub fn open(wanted: &DatasetId) -> Result<(Self, Vec<String>), String> {
        let at = |revision: &str| {
            Repo::with_revision(wanted.id.clone(), RepoType::Dataset, revision.to_owned())
        };
        let repo = at(&wanted.revision);
        let cache = Cache::from_env();
        let online = || {
            let api = super::builder("").map_err(|problem| unreachable(&problem.to_string()))?;
            let asked = || {
                let api = api.build()?;
                let info = api.repo(repo.clone()).info()?;
                Ok((api.repo(at(&info.sha)), info))
            };
            asked().map_err(|error| match Refusal::of(&error) {
                Some(refusal) => {
                    format!("no local file or directory has this name, and {refusal}")
                }
                None => unreachable(&error.to_string()),
            })
        };
        match online() {
            Ok((api, info)) => {
                let names = info.siblings.into_iter().map(|file| file.rfilename);
                let mut names: Vec<_> = names.collect();
                names.sort();
                let place = Place::Online(Box::new(api), cache.repo(repo));
                let commit = info.sha;
                Ok((Self { place, commit }, names))
            }
            Err(error) => {
                let (commit, names) = cached_names(&cache, &repo).ok_or(error)?;
                let place = Place::Cached(cache.repo(repo));
                Ok((Self { place, commit }, names))
            }
        }
    }

    /// The commit that the files are of.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// A local copy of a file.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn get(&self, name: &str) -> Result<PathBuf, String> {
        let file = |problem: String| format!("`{name}`: {problem}");
        match &self.place {
            Place::Online(api, asked) => {
                let path = api.get(name).map_err(|error| match Refusal::of(&error) {
                    Some(refusal) => file(refusal.to_string()),
                    None => file(format!("cannot be fetched ({error}); try again")),
                })?;
                // Without the Hub, the name is then taken for this commit.
                asked
                    .create_ref(&self.commit)
                    .map_err(|error| file(format!("cannot be cached: {error}")))?;
                Ok(path)
            }
            Place::Cached(cache) => cache.get(name).ok_or_else(|| {
                file("the Hub cannot be reached, and the file is not in the cache; connect to the network".to_owned())
            }),
        }
    }
}

fn unreachable(reason: &str) -> String {
    format!(
        "neither a local file or directory nor in the local cache, and the Hub cannot be reached ({reason}); check the name, connect to \
         the network, or give a local file"
    )
}

/// The commit that the revision points at in the cache, and the files of its snapshot; none where nothing was fetched.
fn cached_names(cache: &Cache, repo: &Repo) -> Option<(String, Vec<String>)> {
    let root = cache.path().join(repo.folder_name());
    let commit = std::fs::read_to_string(root.join("refs").join(repo.revision())).ok()?;
    let commit = commit.trim().to_owned();
    let snapshot = root.join("snapshots").join(&commit);
    let mut names = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(snapshot.join(&folder))
            .into_iter()
            .flatten()
            .flatten()
        {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            let name = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            if entry.path().is_dir() {
                folders.push(name);
            } else {
                names.push(name);
            }
        }
    }
    names.sort();
    (!names.is_empty()).then_some((commit, names))
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
