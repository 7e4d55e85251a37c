//! Lists the files of a directory or of a data set on the Hub: those of each split, and those that nothing reads.

use std::path::{Path, PathBuf};

use monteclora_converters::{Error, Problem};

use super::Split;
use crate::data::error::unreadable;
use crate::hub::{DatasetId, DatasetRepo};

/// Extensions of data files; `.gz` may follow.
const EXTENSIONS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// Metadata files of data sets, which hold no rows.
const NOT_ROWS: [&str; 4] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// Extensions of files that may hold rows but cannot be read.
const NOT_READ: [&str; 18] = [
    "csv", "tsv", "txt", "yaml", "yml", "arrow", "feather", "avro", "xlsx", "xls", "db", "sqlite",
    "zst", "xz", "bz2", "zip", "tar", "7z",
];

/// Beginnings of the names of text files that accompany data sets.
const NOTES: [&str; 4] = ["readme", "license", "requirements", "notice"];

/// The splits that `name` holds. A single file counts as the training rows.
///
/// # Errors
/// Returns an error if a directory or data set has no data files.
pub fn splits(name: &Path) -> Result<Vec<Split>, Error> {
    let Some(listing) = listing(name)? else {
        return Ok(vec![Split::Train]);
    };
    let present: Vec<Split> = Split::ALL
        .into_iter()
        .filter(|split| holds(&listing.names, *split))
        .collect();
    if present.is_empty() {
        return Err(nothing(name, Split::Train, &listing));
    }
    Ok(present)
}

/// Whether a local directory holds rows of a split. Never uses the network.
pub fn directory_has(name: &Path, split: Split) -> bool {
    name.is_dir() && local_names(name).is_ok_and(|names| holds(&Listing::new(names).names, split))
}

fn holds(names: &[String], split: Split) -> bool {
    select(names, split).is_ok_and(|found| !found.is_empty())
}

/// The files of a directory, or of a data set on the Hub.
struct Listing {
    /// Data files.
    names: Vec<String>,
    /// Other files that may hold rows but are not read.
    others: Vec<String>,
    repo: Option<DatasetRepo>,
}

impl Listing {
    fn new(names: Vec<String>) -> Self {
        let (names, mut others): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| has_data_extension(name));
        others.retain(|name| name.ends_with('/') || may_hold_rows(name));
        Self {
            names,
            others,
            repo: None,
        }
    }

    /// Files that belong to no split: other kinds of files, and files that name no split if others do.
    fn unread(&self) -> Vec<String> {
        let names_one = |name: &&String| split_of(name).is_some();
        let without: Vec<_> = match self.names.iter().any(|name| names_one(&name)) {
            true => self.names.iter().filter(|name| !names_one(name)).collect(),
            false => Vec::new(),
        };
        without.into_iter().chain(&self.others).cloned().collect()
    }
}

/// Lists a directory or a data set on the Hub; `None` if `name` is a file or does not exist.
fn listing(name: &Path) -> Result<Option<Listing>, Error> {
    if name.is_dir() {
        let names = local_names(name).map_err(unreadable(name))?;
        return Ok(Some(Listing::new(names)));
    }
    let id = name
        .to_str()
        .filter(|id| !name.exists() && !has_data_extension(id));
    let Some(wanted) = id.and_then(DatasetId::parse) else {
        return Ok(None);
    };
    let (repo, mut names) =
        DatasetRepo::open(&wanted).map_err(|error| refused(name, error.to_string()))?;
    names.retain(|file| wanted.holds(file));
    Ok(Some(Listing {
        repo: Some(repo),
        ..Listing::new(names)
    }))
}

/// The local files of a split, the files that nothing reads, and the commit of a data set on the Hub.
pub(super) struct Found {
    pub(super) paths: Vec<PathBuf>,
    pub(super) unread: Vec<String>,
    pub(super) revision: Option<String>,
}

pub(super) fn files(name: &Path, split: Split) -> Result<Found, Error> {
    let Some(listing) = listing(name)? else {
        return Ok(Found {
            paths: vec![name.to_owned()],
            unread: Vec::new(),
            revision: None,
        });
    };
    let found = select(&listing.names, split).map_err(|problem| refused(name, problem))?;
    if found.is_empty() {
        return Err(nothing(name, split, &listing));
    }
    let unread = listing.unread();
    let repo = listing.repo;
    let local = |file: &String| match &repo {
        None => Ok(name.join(file)),
        Some(repo) => repo
            .get(file)
            .map_err(|error| refused(name, error.to_string())),
    };
    let paths = found.iter().map(local).collect::<Result<_, _>>()?;
    Ok(Found {
        paths,
        unread,
        revision: repo.map(|repo| repo.commit().to_owned()),
    })
}

/// The error of a directory or Hub data set whose files are ambiguous or cannot be fetched; exit code 3.
fn refused(name: &Path, problem: String) -> Error {
    let at = format!("`{}`", name.display());
    Problem::new("files", at, problem, "").exit(3).into()
}

fn nothing(name: &Path, split: Split, listing: &Listing) -> Error {
    let held = match (&listing.names[..], &listing.others[..]) {
        ([], []) => "it holds no .jsonl, .json or .parquet file".to_owned(),
        ([], others) => {
            let (others, first) = (shortened(others), name.join(&others[0]));
            let problem = format!(
                "it holds no .jsonl, .json or .parquet file, and {others} cannot be read as rows; `monteclora data check {}` says what to do",
                first.display()
            );
            return refused(name, problem);
        }
        (names, _) => format!("it holds {}", shortened(names)),
    };
    let problem = format!(
        "no {0} rows: {held}; name a file {0}.jsonl, or give the path of the file",
        split.name()
    );
    refused(name, problem)
}

fn shortened(names: &[String]) -> String {
    const MAX: usize = 8;
    let mut text = names[..names.len().min(MAX)].join(", ");
    if names.len() > MAX {
        text.push_str(&format!(" and {} more", names.len() - MAX));
    }
    text
}

/// Names of the files in a directory and in its subdirectories, sorted, with `/` between parts. Also names folders one
/// level deeper that hold data files, with `/` at the end.
fn local_names(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if name.starts_with('.') {
            continue;
        }
        if entry.path().is_dir() {
            for inner in std::fs::read_dir(entry.path())? {
                let inner = inner?;
                let Some(file) = inner.file_name().to_str().map(str::to_owned) else {
                    continue;
                };
                if inner.path().is_dir() {
                    names.extend(has_data(&inner.path()).then(|| format!("{name}/{file}/")));
                } else {
                    names.push(format!("{name}/{file}"));
                }
            }
        } else {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a folder holds data files.
fn has_data(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .any(|name| has_data_extension(&name))
}

fn has_data_extension(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let bare = file.strip_suffix(".gz").unwrap_or(file);
    !NOT_ROWS.contains(&file)
        && bare
            .rsplit_once('.')
            .is_some_and(|(_, extension)| EXTENSIONS.contains(&extension))
}

/// Whether a file that cannot be read may hold rows.
fn may_hold_rows(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    let bare = file.strip_suffix(".gz").unwrap_or(&file);
    !NOTES.iter().any(|note| file.starts_with(note))
        && bare
            .rsplit_once('.')
            .is_some_and(|(_, extension)| NOT_READ.contains(&extension))
}

/// The split that a path names by a word of its file name or, if that has none, of its innermost folder that has one.
fn split_of(name: &str) -> Option<Split> {
    name.rsplit('/').find_map(|part| {
        part.split(|c: char| !c.is_ascii_alphanumeric())
            .find_map(Split::from_word)
    })
}

/// The files of a split. If no file names a split, all files are training rows.
///
/// # Errors
/// Returns an error if files of the split are in several folders or formats: they are several data sets, or one set
/// twice.
fn select(names: &[String], split: Split) -> Result<Vec<String>, String> {
    let found: Vec<String> = if names.iter().any(|name| split_of(name).is_some()) {
        let of_split = |name: &&String| split_of(name) == Some(split);
        names.iter().filter(of_split).cloned().collect()
    } else if split == Split::Train {
        names.to_vec()
    } else {
        Vec::new()
    };
    let kind = |name: &String| {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        let extension = file.split_once('.').map_or("", |(_, extension)| extension);
        (folder.to_owned(), extension.to_owned())
    };
    if let Some(other) = found.iter().find(|name| kind(name) != kind(&found[0])) {
        return Err(format!(
            "{} and {other} both hold {} rows; give the path of one of them, or of its folder",
            found[0],
            split.name()
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn splits_are_told_by_name() {
        let files = names(&[
            "README.jsonl",
            "my-train.jsonl",
            "test.json",
            "validation.jsonl.gz",
        ]);
        for (split, file) in [
            (Split::Train, "my-train.jsonl"),
            (Split::Valid, "validation.jsonl.gz"),
            (Split::Test, "test.json"),
        ] {
            assert_eq!(select(&files, split), Ok(names(&[file])));
        }
        let shards = names(&[
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ]);
        assert_eq!(select(&shards, Split::Train), Ok(shards[..2].to_vec()));
        let only = names(&["a.jsonl", "b.jsonl"]);
        assert_eq!(select(&only, Split::Train), Ok(only.clone()));
        assert_eq!(select(&only, Split::Valid), Ok(Vec::new()));
        let folders = names(&["train/a.jsonl", "dev/a.jsonl"]);
        assert_eq!(select(&folders, Split::Valid), Ok(names(&["dev/a.jsonl"])));
        // A part of a longer word does not count.
        assert_eq!(split_of("contest.jsonl"), None);
    }

    #[test]
    fn two_data_sets_are_not_taken_for_one() {
        for pair in [
            ["main/train.parquet", "socratic/train.parquet"],
            ["train.jsonl", "train.parquet"],
        ] {
            let error = select(&names(&pair), Split::Train).expect_err("refused");
            assert!(error.contains("both hold train rows"), "{error}");
        }
    }

    #[test]
    fn a_directory_of_other_files_says_what_to_do() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in ["train.csv", "dataset_info.json"] {
            std::fs::write(dir.path().join(name), "prompt,completion\na,b\n").expect("writes");
        }
        let error = Source::open(dir.path(), Split::Train)
            .expect_err("no rows")
            .to_string();
        let file = dir.path().join("train.csv");
        let command = format!("`monteclora data check {}` says what to do", file.display());
        assert!(
            error.contains("train.csv cannot be read as rows") && error.contains(&command),
            "{error}"
        );
        let error = Source::open(&file, Split::Train)
            .expect_err("CSV")
            .to_string();
        assert!(error.contains("python3 -c"), "{error}");
    }
}
