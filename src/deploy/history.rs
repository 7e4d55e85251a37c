//! Releases of one alias on disk: a directory named by its content for each, and the record of what was served when.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use monteclora_converters::{Adapter, files};
use serde::{Deserialize, Serialize};

use super::client::ServedAdapter;
use super::error::{self, Error};
use super::release::Release;

/// Why a generation came into service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It was being served when the first deployment came.
    Adopt,
    /// It was deployed.
    Deploy,
    /// It came back.
    Rollback,
}

/// One generation in service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When, in UTC.
    pub at: String,
    /// Why.
    pub action: Action,
    /// The server's name for the content.
    pub generation: String,
    /// Release directory, relative to the adapter root.
    pub directory: PathBuf,
    /// The generation that it replaced.
    pub previous: Option<String>,
    /// Name of the base that it was served on, where the server tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// The releases of one alias, below `adapter_root/alias`, for one command at a time.
#[derive(Debug)]
pub struct Releases {
    root: PathBuf,
    /// Directory of the alias, relative to the root.
    alias: PathBuf,
    history: Vec<Record>,
    _lock: File,
}

impl Releases {
    /// Opens the releases of `alias`; only one process can at a time.
    ///
    /// # Errors
    /// Another deployment of this alias runs, or the history cannot be understood.
    pub fn open(root: &Path, alias: &str) -> Result<Self, Error> {
        if !root.is_dir() {
            return Err(error::release(
                root,
                "no such directory; --adapter-root is the server's adapter root as it is seen from here",
            ));
        }
        let alias = PathBuf::from(directory_name(alias));
        let dir = root.join(&alias);
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let lock_path = dir.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io("write", &lock_path))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => {
                error::release(&dir, "another deployment of this alias is running")
            }
            fs::TryLockError::Error(error) => Error::io("lock", &lock_path)(error),
        })?;
        Ok(Self {
            history: read_history(&dir)?,
            root: root.to_owned(),
            alias,
            _lock: lock,
        })
    }

    /// What was served, oldest first, without the right to change it.
    ///
    /// # Errors
    /// A history that cannot be understood.
    pub fn history_of(root: &Path, alias: &str) -> Result<Vec<Record>, Error> {
        read_history(&root.join(directory_name(alias)))
    }

    /// What was served, oldest first.
    pub fn history(&self) -> &[Record] {
        &self.history
    }

    /// Writes a release, and returns its directory relative to the root.
    ///
    /// The directory is named by its content and appears whole or not at all; its files are read-only. Content that was
    /// released before is found again.
    ///
    /// # Errors
    /// A directory of this name that holds something else.
    pub fn store(&self, release: &Release) -> Result<PathBuf, Error> {
        let fingerprint = release.fingerprint();
        let name: String = fingerprint.chars().take(12).collect();
        let relative = self.alias.join(name);
        let path = self.root.join(&relative);
        if !path.exists() {
            release.write(&path)?;
        } else if Release::whole(&Adapter::read(&path)?, &path)?.fingerprint() != fingerprint {
            let message = "was changed since it was released; remove it and deploy again";
            return Err(error::release(&path, message));
        }
        Ok(relative)
    }

    /// Makes a release of what is being served, so that there is a way back to it.
    ///
    /// Nothing is done for a generation that was released before, or if the directory does not hold its content (any more).
    ///
    /// # Errors
    /// As [`Self::store`] and [`Self::record`].
    pub fn adopt(&mut self, served: &ServedAdapter) -> Result<(), Error> {
        let (Some(source), None) = (&served.source, self.find(&served.generation)) else {
            return Ok(());
        };
        let path = self.root.join(source);
        let Ok(adapter) = Adapter::read(&path) else {
            return Ok(());
        };
        // A server that scores tells the generation of the mean alone, too.
        let mean = served.mean_generation.as_ref();
        let release = match mean {
            Some(_) => Release::whole(&adapter, &path)?,
            None => Release::mean(&adapter, &path)?,
        };
        let mean = mean.unwrap_or(&served.generation);
        if !release.mean_fingerprint().starts_with(mean.as_str()) {
            return Ok(());
        }
        let directory = self.store(&release)?;
        let base = served.parent.as_deref();
        self.record(Action::Adopt, &served.generation, &directory, None, base)
    }

    /// Whether a release is still there.
    pub fn holds(&self, directory: &Path) -> bool {
        self.root.join(directory).is_dir()
    }

    /// Adds a record.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn record(
        &mut self,
        action: Action,
        generation: &str,
        directory: &Path,
        previous: Option<&str>,
        base: Option<&str>,
    ) -> Result<(), Error> {
        let now = chrono::DateTime::<chrono::Utc>::from(SystemTime::now());
        self.history.push(Record {
            at: now.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
            action,
            generation: generation.to_owned(),
            directory: directory.to_owned(),
            previous: previous.map(str::to_owned),
            base: base.map(str::to_owned),
        });
        let dir = self.root.join(&self.alias);
        let path = dir.join(HISTORY);
        let mut text = serde_json::to_string_pretty(&self.history)
            .map_err(|error| Error::io("write", &path)(error.into()))?;
        text.push('\n');
        files::write_text(&path, &text)
    }

    /// The release that `current` replaced when it last came; where that is not known or gone, the last one in the history before
    /// it that is another and still there.
    pub fn before(&self, current: &str) -> Option<&Record> {
        let last = self
            .history
            .iter()
            .rposition(|record| record.generation == current);
        let replaced = last.and_then(|last| {
            let previous = self.history[last].previous.as_deref()?;
            self.find(previous)
                .filter(|record| record.generation != current)
        });
        if replaced.is_some() {
            return replaced;
        }
        let end = last.unwrap_or(self.history.len());
        self.history[..end]
            .iter()
            .rev()
            .find(|record| record.generation != current && self.holds(&record.directory))
    }

    /// The last record of a generation that is still there; `wanted` may be its beginning.
    pub fn find(&self, wanted: &str) -> Option<&Record> {
        self.history
            .iter()
            .rev()
            .find(|record| record.generation.starts_with(wanted) && self.holds(&record.directory))
    }
}

const HISTORY: &str = "history.json";

fn read_history(dir: &Path) -> Result<Vec<Record>, Error> {
    let path = dir.join(HISTORY);
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| error::release(&path, format!("not a deployment history: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

/// A file name for an alias: letters, digits, `-`, `_` and inner dots as they are, everything else as `%` and its bytes.
fn directory_name(alias: &str) -> String {
    let mut name = String::new();
    for byte in alias.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if plain || (byte == b'.' && !name.is_empty()) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name
}
