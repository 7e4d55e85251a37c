//! Whether an adapter meets the base it was trained on, by the record that training left beside it.

use std::path::Path;

use monteclora_converters::{ModelFiles, Problem};
use serde_json::Value;

use crate::session::fingerprint;

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
