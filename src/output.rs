//! Where results go: directories that may not hold anything yet.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::Problem;

/// Refuses a directory that holds something, unless `force`.
///
/// # Errors
/// Such a directory, or what is no directory.
pub fn require_empty(dir: &Path, force: bool) -> Result<()> {
    let counts = |name: &std::ffi::OsStr| name != crate::train::RunLock::NAME;
    let occupied = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.any(|entry| entry.is_ok_and(|entry| counts(&entry.file_name()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            bail!(Problem::usage(format!(
                "`{}` is a file; give a directory with -o",
                dir.display()
            )));
        }
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot use `{}` as output directory", dir.display()));
        }
    };
    if occupied && !force {
        bail!(Problem::usage(format!(
            "`{}` exists and is not empty; choose another directory or pass --force",
            dir.display()
        )));
    }
    Ok(())
}
