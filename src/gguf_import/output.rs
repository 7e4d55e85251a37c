//! The directory being written: a temporary sibling that takes its name when it is complete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::{Builder, TempDir};

use super::ImportError;

/// Refuses a destination that holds something, unless it may be replaced.
pub(super) fn check_destination(path: &Path, force: bool) -> Result<(), ImportError> {
    let occupied = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(ImportError::io("write", path)(error)),
    };
    if occupied && !force {
        return Err(ImportError::Exists {
            path: path.to_path_buf(),
        });
    }
    Ok(())
}

/// A directory in the making.
#[derive(Debug)]
pub(super) struct Directory {
    temporary: TempDir,
    destination: PathBuf,
}

impl Directory {
    pub(super) fn create(destination: &Path) -> Result<Self, ImportError> {
        let parent = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(ImportError::io("create", parent))?;
        let temporary = sibling(parent).map_err(ImportError::io("create", destination))?;
        Ok(Self {
            temporary,
            destination: destination.to_path_buf(),
        })
    }

    /// Writes one file of the directory and syncs it.
    pub(super) fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), ImportError>,
    ) -> Result<(), ImportError> {
        // Errors name the file by the path it will have.
        let shown = self.destination.join(name);
        let file = File::create_new(self.temporary.path().join(name))
            .map_err(ImportError::io("write", &shown))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer)?;
        let file = writer
            .into_inner()
            .map_err(|error| ImportError::io("write", &shown)(error.into_error()))?;
        file.sync_all().map_err(ImportError::io("write", &shown))
    }

    pub(super) fn write_text(&self, name: &str, text: &str) -> Result<(), ImportError> {
        self.write(name, |writer| {
            writer
                .write_all(text.as_bytes())
                .map_err(ImportError::io("write", &self.destination.join(name)))
        })
    }

    pub(super) fn write_json(&self, name: &str, value: &Value) -> Result<(), ImportError> {
        self.write_text(name, &format!("{value:#}\n"))
    }

    /// The path a file of the directory will have.
    pub(super) fn destination(&self, name: &str) -> PathBuf {
        self.destination.join(name)
    }

    /// Gives the directory its name and returns the names of its files, sorted.
    pub(super) fn publish(self, force: bool) -> Result<Vec<String>, ImportError> {
        let failed = |error| ImportError::io("write", &self.destination)(error);
        let mut names = Vec::new();
        for entry in fs::read_dir(self.temporary.path()).map_err(failed)? {
            names.push(
                entry
                    .map_err(failed)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        // Something may have appeared there meanwhile.
        check_destination(&self.destination, force)?;
        let parent = self
            .temporary
            .path()
            .parent()
            .unwrap_or(Path::new("."))
            .to_path_buf();
        let replaced = if self.destination.exists() {
            let aside = sibling(&parent).map_err(failed)?;
            fs::rename(&self.destination, aside.path().join("replaced")).map_err(failed)?;
            Some(aside)
        } else {
            None
        };
        if let Err(error) = fs::rename(self.temporary.path(), &self.destination) {
            if let Some(aside) = &replaced {
                fs::rename(aside.path().join("replaced"), &self.destination).map_err(failed)?;
            }
            return Err(failed(error));
        }
        // Some file systems refuse to sync a directory; that is not a failure.
        let _ = File::open(&parent).and_then(|parent| parent.sync_all());
        Ok(names)
    }
}

fn sibling(parent: &Path) -> io::Result<TempDir> {
    let mut builder = Builder::new();
    builder.prefix(".partial-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent)
}
