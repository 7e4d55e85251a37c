//! Files and directories that are either complete or absent: written beside their place, synced, renamed.

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};
use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};
use crate::problem::Problem;

/// How the names of what is not complete yet begin: what a killed process leaves, no later run reads.
pub const PARTIAL: &str = ".partial-";
/// What to do about a destination that exists.
pub(crate) const OVERWRITE: &str = "choose another directory or allow overwriting";

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// [`sha256`] of a file's bytes, or none where it cannot be read.
pub fn file_sha256(path: &Path) -> Option<String> {
    fs::read(path).ok().map(|bytes| sha256(&bytes))
}

/// The directory in which a sibling of `path` is made.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A temporary sibling of `path`, made by `make` with the permissions that the umask leaves of `mode`.
fn beside<T>(
    path: &Path,
    mode: u32,
    make: impl FnOnce(&Builder<'_, '_>, &Path) -> std::io::Result<T>,
) -> Result<T> {
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let mut builder = Builder::new();
    builder.prefix(PARTIAL);
    #[cfg(unix)]
    builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(mode));
    make(&builder, parent).map_err(Error::io("create", path))
}

/// An empty temporary directory beside `path`, removed when it is dropped.
///
/// # Errors
/// If the system refuses.
pub fn dir_beside(path: &Path) -> Result<TempDir> {
    beside(path, 0o777, |builder, parent| builder.tempdir_in(parent))
}

/// Writes `path` through a temporary sibling: `fill` writes, then the file is synced and renamed. A reader sees what was
/// there before, or all of the new.
///
/// # Errors
/// If `fill` fails or the system refuses; nothing has changed then.
pub fn write_file<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<(), E>,
) -> Result<(), E> {
    let temporary = prepare_file(path, fill)?;
    let failed = |error: tempfile::PersistError| Error::io("write", path)(error.error);
    temporary.persist(path).map_err(failed)?;
    Ok(sync_dir(parent_of(path))?)
}

/// [`write_file`] with a whole text.
///
/// # Errors
/// If the system refuses.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_file(path, |writer| {
        writer
            .write_all(text.as_bytes())
            .map_err(Error::io("write", path))
    })
}

/// [`write_file`] with a value as indented JSON, without a newline at the end.
///
/// # Errors
/// If the system refuses, or the value is none that JSON can hold.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::json(path, &error))?;
    write_text(path, &text)
}

/// The first half of [`write_file`]: a complete, synced temporary sibling of `path`.
pub(crate) fn prepare_file<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<(), E>,
) -> Result<NamedTempFile, E> {
    let temporary = beside(path, 0o666, |builder, parent| builder.tempfile_in(parent))?;
    let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file());
    fill(&mut writer)?;
    writer.flush().map_err(Error::io("write", path))?;
    drop(writer);
    let file = temporary.as_file();
    file.sync_all().map_err(Error::io("write", path))?;
    Ok(temporary)
}

/// Makes renames inside `path` durable. Some file systems refuse to sync a directory; that is not a failure.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    let _ = dir.sync_all();
    Ok(())
}

/// Whether `path` is a directory with something in it, or a file.
///
/// # Errors
/// If the directory cannot be read.
pub fn is_occupied(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(true),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Makes the directory `path` appear at once, as [`replace_dir`] does, where there was none or an empty one. A link to an
/// empty directory is followed.
///
/// # Errors
/// `exists` if `path` exists and is not an empty directory; `not-found` if it is a link to nothing.
pub fn write_new_dir<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    if is_occupied(path)? {
        return Err(Error::exists(path, OVERWRITE).into());
    }
    let followed = match path.is_symlink() {
        true => fs::canonicalize(path).map_err(|_| {
            Error::not_found(path, "is a link to nothing; remove it or make its target")
        })?,
        false => path.to_path_buf(),
    };
    publish(&followed, fill, |from| fs::rename(from, &followed))
}

/// Makes the directory `path` what `fill` writes: into a temporary sibling, which is then synced and renamed. What was
/// there before steps aside, and comes back if the new one cannot take its place.
///
/// # Errors
/// If `path` is no directory, `fill` fails or the system refuses.
pub fn replace_dir<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    if !path.is_dir() && path.symlink_metadata().is_ok() {
        let message = format!("`{}` is a file; give a directory with -o", path.display());
        return Err(Error::from(Problem::usage(message)).into());
    }
    let aside = dir_beside(path)?;
    // A directory cannot be renamed over a full one.
    let old = aside.path().join("old");
    publish(path, fill, |from| {
        match fs::rename(path, &old) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::rename(from, path).inspect_err(|_| {
            let _ = fs::rename(&old, path);
        })
    })
}

/// Fills a sibling of `path`, which `rename` then gives its place.
fn publish<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
    rename: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<(), E> {
    let temporary = dir_beside(path)?;
    fill(temporary.path())?;
    sync_dir(temporary.path())?;
    rename(temporary.path()).map_err(Error::io("write", path))?;
    // The directory has moved: there is nothing left to remove.
    let _ = temporary.keep();
    Ok(sync_dir(parent_of(path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_not_replaced_by_a_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("notes");
        fs::write(&file, "kept").expect("writable");
        let refused = replace_dir(&file, |_| Ok::<(), Error>(())).expect_err("a file");
        assert!(refused.to_string().contains("is a file"), "{refused}");
        assert_eq!(fs::read_to_string(&file).expect("it is there"), "kept");
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let failed = write_new_dir(&dir.path().join("out"), |inside| {
            fs::write(inside.join("half"), "x").expect("writable");
            Err::<(), _>(Error::setting("x", "stop"))
        });
        assert!(failed.is_err());
        let failed = write_file(&dir.path().join("file"), |writer| {
            writer.write_all(b"half").expect("writable");
            Err::<(), _>(Error::setting("x", "stop"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn an_occupied_destination_is_refused_and_an_empty_one_filled() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fill =
            |inside: &Path| fs::write(inside.join("a"), "x").map_err(Error::io("write", inside));
        let out = dir.path().join("out");
        fs::create_dir(&out).expect("writable");
        write_new_dir(&out, fill).expect("empty");
        assert!(write_new_dir(&out, fill).is_err_and(|error| error.code() == "exists"));
    }
}
