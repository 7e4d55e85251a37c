//! Where the recorded cases are, and how they are read.

use std::path::{Path, PathBuf};

use monteclora_converters::SafetensorsFile;

/// The folder named by `MONTECLORA_FIXTURES`, or the project's copy.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("MONTECLORA_FIXTURES") {
        Some(dir) => PathBuf::from(dir),
        None => own(),
    }
}

/// The project's copy, for tests that need a case by name.
pub(crate) fn own() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/fixtures"))
}

/// A recorded adapter.
pub(crate) struct AdapterCase {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) model: PathBuf,
}

impl AdapterCase {
    /// Whether every consumer must refuse it.
    pub(crate) fn must_be_refused(&self) -> bool {
        self.name.starts_with("must-refuse")
    }

    /// Allowed difference in logits: the case `bf16` was computed in bfloat16.
    pub(crate) fn tolerance(&self) -> f64 {
        if self.name.contains("bf16") {
            0.05
        } else {
            1e-4
        }
    }
}

/// Every adapter directory present.
pub(crate) fn adapters() -> Vec<AdapterCase> {
    let root = root();
    let mut cases: Vec<AdapterCase> = subdirectories(&root.join("adapters"))
        .into_iter()
        .map(|dir| {
            let case: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap())
                    .unwrap();
            AdapterCase {
                name: dir.file_name().unwrap().to_str().unwrap().to_owned(),
                model: root.join("models").join(case["model"].as_str().unwrap()),
                dir,
            }
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!cases.is_empty(), "no adapter case in {}", root.display());
    cases
}

/// Every recorded training run present.
pub(crate) fn trajectories() -> Vec<PathBuf> {
    subdirectories(&root())
        .into_iter()
        .filter(|dir| {
            dir.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("trajectory")
        })
        .collect()
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect()
}

/// A tensor's values.
pub(crate) fn floats(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.get(name)
        .unwrap_or_else(|| panic!("{name} in {}", file.path().display()))
        .to_f32()
        .unwrap()
}

/// Rows of an integer matrix.
pub(crate) fn integers(file: &SafetensorsFile, name: &str) -> Vec<Vec<i64>> {
    let tensor = file.get(name).unwrap();
    let values: Vec<i64> = tensor
        .bytes()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    values
        .chunks_exact(tensor.shape()[1])
        .map(<[i64]>::to_vec)
        .collect()
}

/// Largest absolute difference; infinite where anything is NaN or lengths differ.
pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| {
        let d = f64::from((a - b).abs());
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}
