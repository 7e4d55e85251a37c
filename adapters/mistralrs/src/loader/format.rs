//! The file formats of a base, and which of them an adapter can be merged into.

use std::fs;
use std::path::{Path, PathBuf};

use monteclora_converters::Problem;

use crate::error::{Error, Result};

/// Extensions of formats that an adapter cannot be merged into, each with the remedy.
const OTHERS: [(&str, &str); 2] = [
    (
        "gguf",
        "`monteclora import-gguf FILE -o DIR` makes a full-precision model directory of it",
    ),
    (
        "uqff",
        "use the full-precision model, and in_situ_quant to quantise it while loading",
    ),
];

/// Refuses a base that is not a Hugging Face directory of full-precision safetensors; the error names the remedy.
pub(super) fn refuse_other_formats(base: &Path) -> Result<()> {
    let refuse = |code, message: String, fix| {
        let problem = Problem::new(code, base.display().to_string(), message, fix);
        Err(Error::unsupported(base, vec![problem]))
    };
    let has_extension = |path: &Path, wanted: &str| {
        path.extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case(wanted))
    };
    for (extension, fix) in OTHERS {
        if base.is_file() && has_extension(base, extension) {
            let name = extension.to_uppercase();
            let message = format!("an adapter cannot be merged into a {name} file");
            return refuse(extension, message, fix);
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
    for (extension, fix) in OTHERS {
        if !any("safetensors") && any(extension) {
            let name = extension.to_uppercase();
            let message =
                format!("holds {name} files only, into which an adapter cannot be merged");
            return refuse(extension, message, fix);
        }
    }
    Ok(())
}
