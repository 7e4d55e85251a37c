//! The crate as a whole on small models with reference logits.

mod abuse;
mod choices;
mod operation;
mod parity;
mod requests;
pub(crate) mod serving;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::MonteCloraLoader;

/// One reference case: an adapter, its base and what both compute.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) adapter: PathBuf,
    pub(crate) base: PathBuf,
}

impl Case {
    pub(crate) fn must_refuse(&self) -> bool {
        self.name.starts_with("must-refuse-")
    }

    pub(crate) fn loader(&self) -> MonteCloraLoader {
        MonteCloraLoader::builder(&self.base, "adapted")
            .adapter(&self.adapter)
            .build()
            .expect("settings are sound")
    }

    fn base_loader(&self) -> MonteCloraLoader {
        MonteCloraLoader::builder(&self.base, "base")
            .build()
            .expect("settings are sound")
    }
}

fn fixtures() -> PathBuf {
    std::env::var_os("MONTECLORA_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures"),
        PathBuf::from,
    )
}

pub(crate) fn cases() -> Vec<Case> {
    let root = fixtures();
    let mut cases: Vec<Case> = fs::read_dir(root.join("adapters"))
        .expect("the fixtures are there")
        .map(|entry| {
            let adapter = entry.expect("readable").path();
            let text = fs::read_to_string(adapter.join("case.json")).expect("every case has one");
            let case: Value = serde_json::from_str(&text).expect("valid");
            Case {
                name: adapter
                    .file_name()
                    .expect("named")
                    .to_string_lossy()
                    .into_owned(),
                base: root
                    .join("models")
                    .join(case["model"].as_str().expect("a model")),
                adapter,
            }
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!cases.is_empty());
    cases
}

pub(crate) fn servable() -> Case {
    let servable = |case: &Case| !case.must_refuse() && case.loader().check().is_ok();
    cases()
        .into_iter()
        .find(servable)
        .expect("a case that can be served")
}
