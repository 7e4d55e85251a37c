//! Whether an adapter and a base belong together: by names and shapes, and by the record that training left beside the adapter.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{Adapter, ModelFiles, Problem};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Bytes of each end of a file that go into a fingerprint.
const SAMPLE: usize = 1 << 20;

/// A warning if the run.json beside `adapter` (or above it, for a checkpoint) names a base of another fingerprint. An adapter
/// without a record, such as a collapsed one, cannot be told and passes.
///
/// # Errors
/// The base's files cannot be read. A record that cannot be read is no error: nothing depends on it.
pub fn other_base(adapter: &Path, base: &ModelFiles) -> std::io::Result<Option<Problem>> {
    let dir = if adapter.is_file() {
        adapter.parent().unwrap_or(adapter)
    } else {
        adapter
    };
    let record = [Some(dir), dir.parent()]
        .into_iter()
        .flatten()
        .find_map(|dir| {
            let text = std::fs::read_to_string(dir.join("run.json")).ok()?;
            serde_json::from_str::<Value>(&text).ok()
        });
    let Some(record) = record else {
        return Ok(None);
    };
    let trained = &record["base"];
    let Some(expected) = trained["fingerprint"].as_str() else {
        return Ok(None);
    };
    let found = fingerprint(base)?;
    if found == expected {
        return Ok(None);
    }
    let short = |hash: &str| hash.chars().take(12).collect::<String>();
    let revision = trained["revision"]
        .as_str()
        .map_or(String::new(), |revision| format!(" at {revision}"));
    Ok(Some(Problem::new(
        "other-base",
        base.dir().display().to_string(),
        format!(
            "the adapter was trained on `{}`{revision} with fingerprint {}, this base has {}: names and shapes agree, the weights may not",
            trained["model_id"].as_str().unwrap_or("another base"),
            short(expected),
            short(&found)
        ),
        "give the base it was trained on, or compare both with `monteclora eval`",
    )))
}

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

/// Identity of a base without reading all of it: SHA-256 over config.json and, for every weight file, its length and its
/// first and last MiB (the first holds every tensor's name, type, shape and place).
pub fn fingerprint(files: &ModelFiles) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut hasher = Sha256::new();
    hasher.update(std::fs::read(files.config_path())?);
    for path in files.files() {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        hasher.update(length.to_le_bytes());
        let mut buffer = vec![0; SAMPLE.min(length as usize)];
        file.read_exact(&mut buffer)?;
        hasher.update(&buffer);
        file.seek(SeekFrom::End(-(buffer.len() as i64)))?;
        file.read_exact(&mut buffer)?;
        hasher.update(&buffer);
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// SHA-256 of a file's bytes, or none where it is missing.
pub fn file_sha256(path: &Path) -> Option<String> {
    std::fs::read(path).ok().map(|bytes| sha256(&bytes))
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::tiny_llama;

    #[test]
    fn the_base_of_the_run_is_recognised() {
        let dir = tempfile::tempdir().expect("a directory");
        let base = ModelFiles::open(tiny_llama()).expect("opens");
        let checkpoint = dir.path().join("checkpoint-5");
        std::fs::create_dir(&checkpoint).expect("creates");
        let warn = |adapter: &Path| other_base(adapter, &base).expect("reads");
        assert_eq!(warn(dir.path()), None, "no record");
        let record = |fingerprint: &str| {
            let record = serde_json::json!({"base": {"model_id": "org/base", "revision": "abc", "fingerprint": fingerprint}});
            std::fs::write(dir.path().join("run.json"), record.to_string()).expect("writes");
        };
        record(&fingerprint(&base).expect("reads"));
        assert_eq!(warn(dir.path()), None);
        record("0123456789abcdef");
        for adapter in [dir.path(), checkpoint.as_path()] {
            let warning = warn(adapter).expect("another base").to_string();
            assert!(
                warning.contains("`org/base` at abc with fingerprint 0123456789ab"),
                "{warning}"
            );
        }
    }
}
