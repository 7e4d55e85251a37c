//! Releases of one alias on disk: one directory per release, named by its content, and a record of what was served
//! when.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mistralrs_monteclora::generation_of;
use monteclora_converters::{Adapter, files};
use serde::{Deserialize, Serialize};

use super::client::ServedAdapter;
use super::error::{self, Error};
use super::release::Release;

/// Why a generation came into service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It was already served before the first deployment.
    Adopt,
    /// It was deployed.
    Deploy,
    /// A rollback brought it back.
    Rollback,
}

/// Record that one generation went into service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Time, in UTC.
    pub at: String,
    /// Reason.
    pub action: Action,
    /// The server's hash of the content.
    pub generation: String,
    /// Release directory, relative to the adapter root.
    pub directory: PathBuf,
    /// The generation that it replaced, if any.
    pub previous: Option<String>,
    /// Name of the base model that it was served on, if the server names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// The releases of one alias, below `adapter_root/alias`. Only one process can open them at a time.
#[derive(Debug)]
pub struct Releases {
    root: PathBuf,
    /// Directory of the alias, relative to the root.
    alias: PathBuf,
    history: Vec<Record>,
    _lock: File,
}

impl Releases {
    /// Opens the releases of `alias` and locks them for this process.
    ///
    /// # Errors
    /// Returns an error if `root` does not exist, if another deployment of this alias is running, or if the history is
    /// malformed.
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
        remove_partial(&dir);
        Ok(Self {
            history: read_history(&dir)?,
            root: root.to_owned(),
            alias,
            _lock: lock,
        })
    }

    /// What was served, oldest first. Read-only: takes no lock.
    ///
    /// # Errors
    /// Returns an error if the history is malformed.
    pub fn history_of(root: &Path, alias: &str) -> Result<Vec<Record>, Error> {
        read_history(&root.join(directory_name(alias)))
    }

    /// The history of each alias that was ever deployed below `root`, whether or not it is served now.
    ///
    /// # Errors
    /// Returns an error if a directory cannot be listed or a history is malformed.
    pub fn all(root: &Path) -> Result<Vec<(String, Vec<Record>)>, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir(root).map_err(Error::io("read", root))? {
            let dir = entry.map_err(Error::io("read", root))?.path();
            let name = dir.file_name().and_then(|name| name.to_str());
            if let (Some(name), true) = (name, dir.join(HISTORY).is_file()) {
                found.push((alias_of(name), read_history(&dir)?));
            }
        }
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(found)
    }

    /// What was served, oldest first.
    pub fn history(&self) -> &[Record] {
        &self.history
    }

    /// Writes a release, and returns its directory relative to the root.
    ///
    /// The directory is named by its content and appears whole or not at all; its files are read-only. If the same
    /// content was released before, its directory is reused.
    ///
    /// # Errors
    /// Returns an error if a directory of this name holds something else, or if the release cannot be written.
    pub fn store(&self, release: &Release) -> Result<PathBuf, Error> {
        let content = release.content();
        let name: String = content.chars().take(12).collect();
        let relative = self.alias.join(name);
        let path = self.root.join(&relative);
        if !path.exists() {
            release.write(&path)?;
        } else if Release::read(&path)?.content() != content {
            return Err(error::release(&path, CHANGED));
        }
        Ok(relative)
    }

    /// Makes a release of the adapter that is served now, so that a rollback can restore it.
    ///
    /// Does nothing if this generation was released before, if its directory is unknown or unreadable, or if the
    /// directory no longer holds the served content.
    ///
    /// # Errors
    /// As [`Self::store`] and [`Self::record`].
    pub fn adopt(&mut self, served: &ServedAdapter) -> Result<(), Error> {
        let (Some(source), None) = (&served.source, self.find(&served.generation)) else {
            return Ok(());
        };
        let path = self.root.join(source);
        let found = Adapter::read(&path)
            .and_then(|adapter| Release::served(&adapter, &path, served.content.is_some()));
        let release = match found {
            Ok(release) if is_served(&release, served) => release,
            Ok(_) => return Ok(()),
            Err(error) => {
                tracing::warn!(
                    "what is served now cannot be read, so there is no way back to it: {error}"
                );
                return Ok(());
            }
        };
        let directory = self.store(&release)?;
        let base = served.parent.as_deref();
        self.record(Action::Adopt, &served.generation, &directory, None, base)
    }

    /// Whether a release directory still exists.
    pub fn holds(&self, directory: &Path) -> bool {
        self.root.join(directory).is_dir()
    }

    /// Appends a record to the history and writes the history file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
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

    /// The release that `current` replaced when it last came into service. If that is unknown or no longer exists, the
    /// newest earlier release in the history that differs from `current` and still exists.
    ///
    /// One release may have been served under several generations: with and without scores, and on several bases.
    pub fn before(&self, current: &ServedAdapter) -> Option<&Record> {
        let source = current
            .source
            .as_deref()
            .map(|source| self.root.join(source));
        let is_current = |record: &Record| {
            record.generation == current.generation
                || source.as_ref() == Some(&self.root.join(&record.directory))
        };
        let last = self.history.iter().rposition(is_current);
        let replaced = last.and_then(|last| {
            let previous = self.history[last].previous.as_deref()?;
            self.find(previous).filter(|record| !is_current(record))
        });
        if replaced.is_some() {
            return replaced;
        }
        let end = last.unwrap_or(self.history.len());
        self.history[..end]
            .iter()
            .rev()
            .find(|record| !is_current(record) && self.holds(&record.directory))
    }

    /// Reads the release of a record. The directory is named after its content, so changes are detected.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be read or was changed.
    pub fn read(&self, record: &Record) -> Result<Release, Error> {
        let path = self.root.join(&record.directory);
        let release = Release::read(&path)?;
        let name = record.directory.file_name().and_then(|name| name.to_str());
        match name.is_some_and(|name| release.content().starts_with(name)) {
            true => Ok(release),
            false => Err(error::release(&path, CHANGED)),
        }
    }

    /// Whether the directory `source` of a served adapter is a release of this alias.
    pub fn is_below(&self, source: &str) -> bool {
        self.root
            .join(source)
            .starts_with(self.root.join(&self.alias))
    }

    /// The last record whose generation begins with `wanted` and whose directory still exists.
    pub fn find(&self, wanted: &str) -> Option<&Record> {
        self.history
            .iter()
            .rev()
            .find(|record| record.generation.starts_with(wanted) && self.holds(&record.directory))
    }
}

/// Removes the partial directories of deployments that were killed. Safe because only one process holds the lock.
fn remove_partial(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let partial = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.starts_with(".partial-"))
    });
    for entry in partial {
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(
                "`{}` is left of a deployment that was killed: {error}",
                entry.path().display()
            );
        }
    }
}

/// Whether the hash that the server reports is the hash of this release.
fn is_served(release: &Release, served: &ServedAdapter) -> bool {
    match &served.content {
        Some(content) => release.content() == *content,
        None => {
            let mean = release.adapter().fingerprint();
            let length = served.generation.len().min(mean.len());
            generation_of(&mean[..length], release.variables()) == served.generation
        }
    }
}

const HISTORY: &str = "history.json";

const CHANGED: &str = "was changed since it was released; remove it and deploy again";

fn read_history(dir: &Path) -> Result<Vec<Record>, Error> {
    let path = dir.join(HISTORY);
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| error::release(&path, format!("not a deployment history: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io("read", &path)(error)),
    }
}

/// The directory name of an alias: letters, digits, `-`, `_` and inner dots unchanged, every other byte as `%` and two
/// hex digits.
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

/// The alias that a directory is named after.
fn alias_of(name: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = name;
    while let Some((before, after)) = rest.split_once('%') {
        bytes.extend(before.bytes());
        let code = after
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(byte) => bytes.push(byte),
            None => return name.to_owned(),
        }
        rest = &after[2..];
    }
    bytes.extend(rest.bytes());
    String::from_utf8(bytes).unwrap_or_else(|_| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_come_back_from_the_names_of_their_directories() {
        for alias in ["triage", "team/triage", ".hidden", "ä b%", "a.b-c_d", "%"] {
            assert_eq!(alias_of(&directory_name(alias)), alias);
        }
        assert_eq!(alias_of("50%"), "50%");
    }
}
