//! Descriptions and imports of GGUF files in the cache.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Result;
use monteclora_converters::DType;
use sha2::{Digest, Sha256};

use super::cache_dir;
use super::client::problem;
use crate::gguf_import::{ImportOptions, import_gguf, refer_to_gguf};
use crate::progress;

/// Version of the import. It is raised when imports change, so that older ones are not reused.
const IMPORT: u32 = 3;

/// Number of bytes at each end of a file that identify it; the first bytes hold its keys.
const END: u64 = 1 << 20;

/// What the cache must hold of a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfGguf {
    /// The configuration and the tokenizer; the weights stay in the file.
    Description,
    /// The whole model, its weights decoded as elements of this type.
    Import(DType),
}

/// The directory in the cache for `file`. It is made once per path, size, modification time and content of both ends.
pub(super) fn cached(file: &Path, what: OfGguf) -> Result<PathBuf> {
    let identity = identity(file, what).map_err(|source| {
        let at = format!("`{}`", file.display());
        problem(at, format!("cannot be read: {source}"), "")
    })?;
    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or("model");
    let models = cache_dir().join("models");
    let dir = models.join(format!("{stem}-{identity:.16}"));
    if is_whole(&dir, what) {
        return Ok(dir);
    }
    let unusable = |source: &dyn Display| {
        let message = format!("cannot use the cache directory `{}`", models.display());
        let fix = format!("set MONTECLORA_CACHE to a writable one with room: {source}");
        problem("", message, &fix)
    };
    std::fs::create_dir_all(&models).map_err(|source| unusable(&source))?;
    if dir.exists() {
        // The directory is incomplete: something was removed from it.
        std::fs::remove_dir_all(&dir).map_err(|source| unusable(&source))?;
    }
    let bar = progress::bytes(match what {
        OfGguf::Description => "reading weights",
        OfGguf::Import(_) => "writing weights",
    });
    let mut show = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let made = match what {
        OfGguf::Description => {
            tracing::info!("reading {} for the first time", file.display());
            refer_to_gguf(file, &dir, &mut show)
        }
        OfGguf::Import(dtype) => {
            tracing::info!("importing {} into the cache, as {dtype}", file.display());
            let options = ImportOptions {
                dtype,
                ..ImportOptions::default()
            };
            import_gguf(file, &dir, &options, &mut show)
        }
    };
    bar.finish_and_clear();
    match made {
        Ok(_) => Ok(dir),
        // Another process made the directory first.
        Err(_) if is_whole(&dir, what) => Ok(dir),
        Err(error) if error.code() == "io" => Err(unusable(&error).into()),
        Err(error) => Err(error.into()),
    }
}

/// Whether `dir` has the files that are read from it.
fn is_whole(dir: &Path, what: OfGguf) -> bool {
    let weights: &[&str] = match what {
        OfGguf::Description => &["model.gguf.json"],
        OfGguf::Import(_) => &["model.safetensors", "model.safetensors.index.json"],
    };
    let is_there = |name: &&str| dir.join(name).is_file();
    weights.iter().any(is_there) && ["config.json", "tokenizer.json"].iter().all(is_there)
}

/// A hash that identifies the file and what is made from it.
fn identity(file: &Path, what: OfGguf) -> io::Result<String> {
    let canonical = file.canonicalize()?;
    let mut open = File::open(&canonical)?;
    let metadata = open.metadata()?;
    let mut hasher = Sha256::new();
    hasher.update(format!(
        "{IMPORT}\n{what:?}\n{}\n{}\n{:?}\n",
        canonical.display(),
        metadata.len(),
        metadata.modified().ok()
    ));
    let mut end = Vec::new();
    for from in [0, metadata.len().saturating_sub(END)] {
        open.seek(SeekFrom::Start(from))?;
        end.clear();
        Read::by_ref(&mut open).take(END).read_to_end(&mut end)?;
        hasher.update(&end);
    }
    Ok(format!("{:x}", hasher.finalize()))
}
