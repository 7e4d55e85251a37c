//! Adapters that change something, and the hashes of what a run was made from.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{Adapter, Problem};
use sha2::{Digest, Sha256};

/// Reads an adapter and refuses one that changes nothing, unless `force`.
pub fn read_effective(path: &Path, force: bool) -> Result<Adapter> {
    let adapter = Adapter::read(path)?;
    require_effect(&adapter, path, force)?;
    Ok(adapter)
}

/// Refuses an adapter that changes nothing, unless `force`.
pub fn require_effect(adapter: &Adapter, path: &Path, force: bool) -> Result<()> {
    if force || adapter.has_effect()? {
        return Ok(());
    }
    let message = format!(
        "`{}` changes nothing: B A is zero at every site; was it saved before training? Pass --force to go on",
        path.display()
    );
    Err(Problem::sentence("no-effect", message).into())
}

/// SHA-256 of a file's bytes, or none where it is missing.
pub fn file_sha256(path: &Path) -> Option<String> {
    std::fs::read(path).ok().map(|bytes| sha256(&bytes))
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}
