//! The files that a path given by a user means: a directory's standard files, or the one file that was named.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::peft::read::{CONFIG_FILE, WEIGHTS_STEM};
use crate::problem::Problem;
use crate::tensors::shards::{ShardSet, shard_number};

/// A directory, and the file in it that was named, if one was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) dir: PathBuf,
    /// The weight file that stands in place of the directory's standard one.
    pub(crate) named: Option<PathBuf>,
}

impl Source {
    /// What `path` means. The configuration and the index of an adapter stand for its directory.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::not_found(path, "there is no such file or directory"));
        }
        if path.is_dir() {
            return Ok(Self::directory(path));
        }
        let dir = dir_of(path);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_whole =
            name == CONFIG_FILE || name == format!("{WEIGHTS_STEM}.safetensors.index.json");
        Ok(Self {
            named: (!is_whole).then(|| path.to_path_buf()),
            dir,
        })
    }

    /// The standard files of `dir`.
    pub(crate) fn directory(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            named: None,
        }
    }

    /// The weights: the named file, or the set called `stem` in the directory.
    pub(crate) fn open_weights(&self, stem: &str) -> Result<ShardSet> {
        let Some(path) = &self.named else {
            return ShardSet::open(&self.dir, stem);
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some((_, number, total)) = shard_number(&name).filter(|(_, _, total)| *total > 1) {
            let message = format!("shard {number} of {total}, which holds a part of the adapter");
            let fix = format!("give the directory `{}`", self.dir.display());
            return Err(
                Problem::new("shard", format!("`{}`", path.display()), message, fix).into(),
            );
        }
        ShardSet::open_file(path)
    }
}

/// The directory in which the file at `path` lies; the current one has a name too.
fn dir_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
