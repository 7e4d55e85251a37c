//! Files and directories that are either complete or absent.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// What to do about a destination that exists.
pub(crate) const OVERWRITE: &str = "choose another directory or allow overwriting";

/// The directory in which a sibling of `path` is made.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes `path` through a temporary sibling: `fill` writes, then the file is synced and renamed.
pub(crate) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>,
) -> Result<()> {
    let parent = parent_of(path);
    let temporary = prepare_file(path, fill)?;
    temporary
        .persist(path)
        .map_err(|error| Error::io("write", path)(error.error))?;
    sync_dir(parent)
}

/// The first half of [`write_file`]: a complete, synced temporary sibling of `path`.
pub(crate) fn prepare_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>,
) -> Result<NamedTempFile> {
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let mut builder = Builder::new();
    builder.prefix(".partial-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let temporary = builder
        .tempfile_in(parent)
        .map_err(Error::io("create", path))?;
    let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file());
    fill(&mut writer)?;
    writer.flush().map_err(Error::io("write", path))?;
    drop(writer);
    temporary
        .as_file()
        .sync_all()
        .map_err(Error::io("write", path))?;
    Ok(temporary)
}

/// Makes renames inside `path` durable. Some file systems refuse to sync a directory; that is not a failure.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    let dir = File::open(path).map_err(Error::io("open", path))?;
    let _ = dir.sync_all();
    Ok(())
}

/// Whether `path` is a directory with something in it, or a file.
pub(crate) fn is_occupied(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(true),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Makes the directory `path` appear at once: `fill` writes into a temporary sibling, which is then renamed. What a
/// killed process leaves of one, `.partial-` and a random name, no later run reads or reuses. A link to an empty
/// directory is followed.
///
/// # Errors
/// `exists` if `path` exists and is not an empty directory; `not-found` if it is a link to nothing.
pub(crate) fn write_new_dir(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if is_occupied(path)? {
        return Err(Error::exists(path, OVERWRITE));
    }
    let followed;
    let path = if path.is_symlink() {
        followed = fs::canonicalize(path).map_err(|_| {
            Error::not_found(path, "is a link to nothing; remove it or make its target")
        })?;
        &followed
    } else {
        path
    };
    let parent = parent_of(path);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let mut builder = Builder::new();
    builder.prefix(".partial-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    let temporary: TempDir = builder
        .tempdir_in(parent)
        .map_err(Error::io("create", path))?;
    fill(temporary.path())?;
    sync_dir(temporary.path())?;
    fs::rename(temporary.path(), path).map_err(Error::io("write", path))?;
    // The directory has moved: there is nothing left to remove.
    let _: PathBuf = temporary.keep();
    sync_dir(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let failed = write_new_dir(&dir.path().join("out"), |inside| {
            fs::write(inside.join("half"), "x").expect("writable");
            Err(Error::setting("x", "stop"))
        });
        assert!(failed.is_err());
        let failed = write_file(&dir.path().join("file"), |writer| {
            writer.write_all(b"half").expect("writable");
            Err(Error::setting("x", "stop"))
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
