//! Where results go: directories that may not hold anything yet.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Error, Problem, files};

/// The last part of a path, for texts; the whole where it has none.
pub fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

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

/// Refuses a file to write that cannot be written, or that is one of `inputs`, or lies in one of them; before anything is computed.
///
/// # Errors
/// A directory, a missing parent, a file that is read.
pub fn require_file(flag: &str, path: &Path, inputs: &[&Path]) -> Result<()> {
    let refuse = |what: &str| -> Result<()> {
        let problem = format!("{flag} `{}` {what}", path.display());
        Err(Problem::usage(problem).into())
    };
    if path.is_dir() {
        return refuse("is a directory; give a file");
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        return refuse("is to lie in a directory that is not there");
    }
    if let Ok(found) = path.canonicalize() {
        let is_read = |input: &&Path| {
            input
                .canonicalize()
                .is_ok_and(|input| found.starts_with(input))
        };
        if inputs.iter().any(is_read) {
            return refuse("is there, and among what is read; choose another name");
        }
        if !found.is_file() {
            return Ok(());
        }
    }
    require_writable(flag, parent)
}

/// Refuses a directory, or the nearest one above it that exists, in which no file can be made.
///
/// # Errors
/// Such a directory.
pub fn require_writable(flag: &str, dir: &Path) -> Result<()> {
    let there = dir
        .ancestors()
        .find(|dir| dir.is_dir() || *dir == Path::new(""));
    let there = there
        .filter(|dir| *dir != Path::new(""))
        .unwrap_or(Path::new("."));
    match tempfile::tempfile_in(there) {
        Ok(_) => Ok(()),
        Err(error) => {
            let problem = format!(
                "{flag}: `{}` cannot be written into: {error}",
                there.display()
            );
            Err(Problem::usage(problem).into())
        }
    }
}

/// Writes the file that a user named: as [`files::write_file`], but a link is followed, and what is no file, such as a device or a
/// pipe, is written into.
///
/// # Errors
/// If `fill` fails or the system refuses.
pub fn write_named(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<(), Error>,
) -> Result<(), Error> {
    let followed = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let path = followed.as_path();
    if !path.exists() || path.is_file() {
        return files::write_file(path, fill);
    }
    let open = File::options().write(true).open(path);
    let file = open.map_err(Error::io("write", path))?;
    let mut writer = BufWriter::new(&file);
    fill(&mut writer)?;
    writer.flush().map_err(Error::io("write", path))
}
