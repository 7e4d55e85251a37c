//! Allows only one run at a time in an output directory.

use super::io_error;
use monteclora_adapters::Result;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use monteclora_converters::Problem;

/// An exclusive lock on an output directory, held by the process. The kernel releases it when the process ends for any
/// reason.
///
/// The lock is on the file `.lock` of the directory. The file contains the process id, and is removed with the lock.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    /// The open file that holds the lock.
    _file: File,
}

impl RunLock {
    /// The file's name.
    pub const NAME: &str = ".lock";

    /// Takes the lock of `output_dir`. `elsewhere` is how the user names another directory.
    ///
    /// # Errors
    /// Returns an error if another process holds the lock or the file cannot be written.
    pub fn take(output_dir: &Path, elsewhere: &str) -> Result<Self> {
        let path = output_dir.join(Self::NAME);
        let own = std::process::id().to_string();
        loop {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(io_error(&path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = match std::fs::read_to_string(&path).unwrap_or_default() {
                        id if id.is_empty() => id,
                        id => format!(" (process {id})"),
                    };
                    return Err(Problem::usage(format!(
                        "another run{holder} is writing to `{}`; wait for it, stop it, or {elsewhere}",
                        output_dir.display()
                    ))
                    .into());
                }
                Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {
                    tracing::warn!(
                        "the file system of `{}` has no locks: see to it that no other run writes there",
                        output_dir.display()
                    );
                }
                Err(TryLockError::Error(e)) => return Err(io_error(&path)(e)),
            }
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(own.as_bytes()))
                .map_err(io_error(&path))?;
            // The last holder may have removed the file after it was opened here and before it was locked.
            if std::fs::read_to_string(&path).is_ok_and(|found| found == own) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for RunLock {
    /// Removes the file. A file that is left behind does no harm.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_holder_at_a_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let held = RunLock::take(dir.path(), "wait").expect("free");
        let refused = RunLock::take(dir.path(), "wait")
            .expect_err("held")
            .to_string();
        assert!(
            refused.contains(&std::process::id().to_string())
                && refused.contains(&dir.path().display().to_string()),
            "{refused}"
        );
        drop(held);
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 0);
        // The file of a killed process does not prevent the lock.
        std::fs::write(dir.path().join(RunLock::NAME), "4194305").expect("writes");
        drop(RunLock::take(dir.path(), "wait").expect("free"));
    }
}
