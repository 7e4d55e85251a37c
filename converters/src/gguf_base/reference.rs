//! A model directory without weights of its own: they are the blocks of a GGUF file, which stays where it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Findings, GgufBase, weights, write_json};
use crate::architecture::ModelShape;
use crate::error::{Error, Result};
use crate::json;
use crate::tensors::gguf::GgufFile;
use crate::tensors::tensor::Tensor;

/// The file in the directory that says where the blocks are.
const FILE: &str = "model.gguf.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    /// Absolute path.
    file: PathBuf,
    /// Its size when it was referred to.
    bytes: u64,
}

/// Writes into `dir` where the file is.
pub(super) fn write(dir: &Path, source: &GgufFile) -> Result<()> {
    let path = source.path();
    let reference = Reference {
        file: path.canonicalize().map_err(Error::io("read", path))?,
        bytes: source.n_bytes(),
    };
    let value = serde_json::to_value(reference).map_err(|source| Error::json(path, &source))?;
    write_json(dir, FILE, &value)
}

/// The tensors of the file that `dir`, whose config.json is `config`, refers to, and its path; none if it refers to none.
pub(crate) fn open(
    dir: &Path,
    config: &Map<String, Value>,
) -> Result<Option<(PathBuf, BTreeMap<String, Tensor>)>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let reference = Value::Object(json::read_object(&path)?);
    let Reference { file, bytes } =
        serde_json::from_value(reference).map_err(|source| Error::json(&path, &source))?;
    let source = GgufFile::open(&file)?;
    if source.n_bytes() != bytes {
        let message = format!(
            "{} bytes, but `{}` was made for a file of {bytes}: give the .gguf file itself again",
            source.n_bytes(),
            dir.display()
        );
        return Err(Error::malformed(&file, message));
    }
    let shape = ModelShape::layout(config).map_err(|problems| Error::refused(dir, problems))?;
    let mut findings = Findings::default();
    let plan = weights::plan(&source, &shape, &mut findings);
    Error::refuse_any(&file, findings.problems)?;
    let base = GgufBase {
        source,
        shape,
        plan,
    };
    Ok(Some((file, weights::tensors(&base)?)))
}
