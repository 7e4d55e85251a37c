//! Checks where results are written, before anything is computed.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Error, Problem, files};

/// The last part of a path, for texts; the whole path if it has none.
pub fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Refuses a directory that is not empty, unless `force`.
///
/// # Errors
/// Returns an error if the directory is not empty, or if the path cannot be used as a directory.
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

/// Refuses an output file that cannot be written, or that is one of `inputs` or lies in one of them.
///
/// # Errors
/// Returns an error if `path` is a directory, if its parent does not exist or is not writable, or if the file is also
/// read.
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
    if is_read(path, inputs) {
        return refuse("is there, and among what is read; choose another name");
    }
    if path.exists() && !path.is_file() {
        return Ok(());
    }
    require_writable(flag, parent)
}

/// Whether `path` exists and is one of `inputs`, or lies in one of them.
pub fn is_read(path: &Path, inputs: &[&Path]) -> bool {
    let Ok(found) = path.canonicalize() else {
        return false;
    };
    let inputs = inputs.iter().filter_map(|input| input.canonicalize().ok());
    inputs.into_iter().any(|input| found.starts_with(input))
}

/// Refuses a directory in which no file can be created. If `dir` does not exist, its nearest existing parent is
/// checked.
///
/// # Errors
/// Returns an error if no file can be created there.
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

/// Writes the file that a user named, as [`files::write_file`]. A link is followed, and a device or a pipe is written
/// into.
///
/// # Errors
/// Returns an error if `fill` fails or the file cannot be written.
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
