//! Training on models that hold their language model beside a vision tower.

use std::path::Path;

use monteclora_converters::{Adapter, ModelFiles, TargetModules};

use crate::cli::{ok, run_toml, tiny};
use crate::fixtures::own_architectures;

/// Leaf names mean modules of the vision tower too; what is written means those that were trained, in every program that reads it.
#[test]
fn a_trained_adapter_targets_the_language_model_alone() {
    let mut n_cases = 0;
    for case in own_architectures() {
        let base = ModelFiles::open(&case.model).unwrap();
        let Some(wrapper) = base.wrapper() else {
            continue;
        };
        n_cases += 1;
        let dir = tempfile::tempdir().unwrap();
        let targets = "target_modules = [\"q_proj\", \"down_proj\"]";
        let path = run_toml(dir.path(), "", targets, "learning_rate = 1e-2");
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace(&tiny(), case.model.to_str().unwrap());
        std::fs::write(&path, text).unwrap();
        ok(&["train", "-c", path.to_str().unwrap()]);

        let out = dir.path().join("out");
        let adapter = Adapter::read(&out).unwrap();
        let sites: Vec<&str> = adapter
            .sites
            .iter()
            .map(|site| site.name.as_str())
            .collect();
        assert!(!sites.is_empty(), "{}", case.name);
        let body = format!("{}.layers.", wrapper.body);
        assert!(
            sites.iter().all(|site| site.starts_with(&body)),
            "{sites:?}"
        );
        let TargetModules::List(targets) = &adapter.config.target_modules else {
            panic!("{:?}", adapter.config.target_modules);
        };
        assert_eq!(*targets, sites, "{}", case.name);
        assert_eq!(adapter.check_against(&base).unwrap(), []);
        kept_beside(&base, &out, &dir.path().join("merged"));
    }
    assert!(n_cases > 0);
}

/// Merging changes what is adapted and nothing of the rest.
fn kept_beside(base: &ModelFiles, adapter: &Path, merged: &Path) {
    let [model, adapter, out] = [base.dir(), adapter, merged].map(|path| path.to_str().unwrap());
    ok(&["merge", "-m", model, "-a", adapter, "-o", out]);
    let merged = ModelFiles::open(merged).unwrap();
    let adapted = |name: &str| name.contains("q_proj") || name.contains("down_proj");
    for name in base.names() {
        let is_changed = adapted(name) && !base.is_beside(name);
        assert_eq!(base.get(name) != merged.get(name), is_changed, "{name}");
    }
}
