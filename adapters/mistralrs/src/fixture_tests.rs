//! Tests of the whole crate on small models with reference logits.

mod abuse;
mod application;
mod choices;
mod connections;
mod conversations;
mod engines;
mod forms;
mod operation;
mod parity;
mod requests;
mod scores;
pub(crate) mod serving;
#[path = "../../../tests/it/fixtures/walk.rs"]
mod walk;

pub(crate) use conversations::{TOOLS, with_template};

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::MonteCloraLoader;

/// One reference case: an adapter, its base, and the expected logits of both.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) adapter: PathBuf,
    pub(crate) base: PathBuf,
    expected: PathBuf,
}

impl Case {
    /// The case `root/adapters/NAME`; its base is a model of the same root.
    fn of_adapter(dir: PathBuf) -> Self {
        let text = fs::read_to_string(dir.join("case.json")).expect("every case has one");
        let case: Value = serde_json::from_str(&text).expect("valid");
        let root = dir.parent().and_then(Path::parent).expect("two above");
        Self {
            name: name(&dir),
            base: root
                .join("models")
                .join(case["model"].as_str().expect("a model")),
            expected: dir.join("expected.safetensors"),
            adapter: dir,
        }
    }

    /// The case `root/architectures/KIND`.
    fn of_architecture(dir: &Path) -> Self {
        Self {
            name: name(dir),
            adapter: dir.join("adapter"),
            base: dir.join("model"),
            expected: dir.join("expected.safetensors"),
        }
    }

    fn must_refuse(&self) -> bool {
        self.name.starts_with("must-refuse-") && !self.was_refused()
    }

    /// A case from the time when DoRA was not read.
    fn was_refused(&self) -> bool {
        self.name == "must-refuse-dora"
    }

    pub(crate) fn loader(&self) -> MonteCloraLoader {
        MonteCloraLoader::builder(&self.base, "adapted")
            .adapter(&self.adapter)
            .build()
            .expect("settings are sound")
    }

    /// The same case on a copy of its base that `change` has modified.
    pub(crate) fn on_changed_base(self, change: impl FnOnce(&Path)) -> (Self, TempDir) {
        let copy = tempfile::tempdir().expect("a temporary directory");
        for entry in fs::read_dir(&self.base).expect("readable") {
            let entry = entry.expect("readable");
            fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
        }
        change(copy.path());
        let base = copy.path().to_owned();
        (Self { base, ..self }, copy)
    }

    /// Copies the adapter's two files into the new directory `to`.
    pub(crate) fn copy_adapter(&self, to: &Path) {
        copy_adapter(&self.adapter, to);
    }

    fn base_loader(&self) -> MonteCloraLoader {
        MonteCloraLoader::builder(&self.base, "base")
            .build()
            .expect("settings are sound")
    }
}

/// Copies the two files of the adapter in `from` into the directory `to`.
pub(crate) fn copy_adapter(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("created");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(from.join(file), to.join(file)).expect("copied");
    }
}

fn name(dir: &Path) -> String {
    let name = dir.file_name().expect("a directory's name");
    name.to_string_lossy().into_owned()
}

/// Every recorded adapter and architecture that is available.
fn cases() -> Vec<Case> {
    let adapters = walk::walk("adapters/").into_iter().map(Case::of_adapter);
    let architectures = walk::walk("architectures/");
    let architectures = architectures.iter().map(|dir| Case::of_architecture(dir));
    adapters.chain(architectures).collect()
}

/// An adapter from the project's own fixtures.
fn named(name: &str) -> Case {
    Case::of_adapter(walk::own().join("adapters").join(name))
}

/// An adapter from the project's own fixtures that can be served.
pub(crate) fn servable() -> Case {
    named("all-linear")
}

/// Another adapter on the same base.
pub(crate) fn servable_too() -> Case {
    named("bf16")
}
