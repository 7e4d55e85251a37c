//! The file formats of a base, and which of them an adapter can be merged into.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Refuses what is not a Hugging Face directory of full-precision safetensors, with the way there.
pub(super) fn refuse_other_formats(base: &Path) -> Result<()> {
    let refuse = |path: &Path, code, message: &str, fix: &str| {
        let problem =
            monteclora_converters::Problem::new(code, path.display().to_string(), message, fix);
        Err(Error::unsupported(base, vec![problem]))
    };
    let has_extension = |path: &Path, wanted: &str| {
        path.extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
    };
    const GGUF: &str =
        "`monteclora import-gguf FILE -o DIR` makes a full-precision model directory of it";
    const UQFF: &str =
        "use the full-precision model, and in_situ_quant to quantise it while loading";
    if base.is_file() {
        if has_extension(base, "gguf") {
            return refuse(
                base,
                "gguf",
                "an adapter cannot be merged into a GGUF file",
                GGUF,
            );
        }
        if has_extension(base, "uqff") {
            return refuse(
                base,
                "uqff",
                "an adapter cannot be merged into a UQFF file",
                UQFF,
            );
        }
    }
    if !base.is_dir() {
        return Err(Error::not_found(base, "there is no such model directory"));
    }
    let entries: Vec<PathBuf> = fs::read_dir(base)
        .map_err(Error::io("read", base))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    let any = |wanted: &str| entries.iter().any(|path| has_extension(path, wanted));
    if any("safetensors") {
        return Ok(());
    }
    if any("gguf") {
        return refuse(
            base,
            "gguf",
            "holds GGUF files only, into which an adapter cannot be merged",
            GGUF,
        );
    }
    if any("uqff") {
        return refuse(
            base,
            "uqff",
            "holds UQFF files only, into which an adapter cannot be merged",
            UQFF,
        );
    }
    Ok(())
}
