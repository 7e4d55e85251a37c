//! Tests the effect of a changed configuration, and what a restart restores.

mod kept_engines;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::fixture_tests::copy_adapter;
use crate::fixture_tests::{Case, servable, servable_too};
use crate::{ServeFile, local_only};

/// A directory with a `serve.toml`, an adapter root, and copies of two adapters of one base.
struct Site {
    dir: tempfile::TempDir,
    base: String,
}

impl Site {
    fn new() -> Self {
        let (first, second) = (servable(), servable_too());
        let dir = tempfile::tempdir().expect("a temporary directory");
        let site = Self {
            dir,
            base: first.base.display().to_string(),
        };
        site.put("one", &first);
        site.put("two", &second);
        site
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        let root = self.dir.path().canonicalize().expect("it exists");
        root.join("adapters").join(name)
    }

    fn put(&self, name: &str, case: &Case) {
        self.copy(&case.adapter, name);
    }

    /// Replaces the adapter `name` by a copy of `from`.
    fn copy(&self, from: &Path, name: &str) {
        let to = self.path(name);
        copy_adapter(from, &to);
    }

    /// The resolved configuration of a base with `adapters`, each given as alias and directory.
    fn config(&self, extra: &str, adapters: &[(&str, &str)]) -> ServeConfig {
        let mut text = format!(
            "[server]\nport = 0\n[admin]\nenabled = true\nadapter_root = 'adapters'\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\n{extra}\n",
            self.base
        );
        for (alias, source) in adapters {
            text.push_str(&format!(
                "[[models.adapters]]\nalias = '{alias}'\nsource = 'adapters/{source}'\n"
            ));
        }
        let path = self.dir.path().join("serve.toml");
        fs::write(&path, text).expect("written");
        ServeFile::read(&path)
            .and_then(|file| file.resolve(&local_only))
            .expect("a sound configuration")
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new()
        .expect("a runtime")
        .block_on(work)
}

fn served(registry: &Registry) -> Vec<(String, Option<String>, String)> {
    let entry = |lease: &Lease| (lease.name.clone(), lease.parent.clone(), lease.hash.clone());
    registry.list().iter().map(entry).collect()
}

fn load<'a>(name: &'a str, source: &'a Path) -> AdapterLoad<'a> {
    AdapterLoad {
        name,
        source,
        model: None,
        in_place: true,
        expected: None,
    }
}

async fn engines(registry: &Registry, expected: usize) {
    let start = Instant::now();
    while registry.in_use().0 != expected {
        assert!(start.elapsed() < Duration::from_secs(20), "engines remain");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn only_the_difference_is_loaded() {
    let site = Site::new();
    run(async {
        let registry = Registry::load(&site.config("", &[("a", "one")]))
            .await
            .expect("loaded");
        let (base, a) = (registry.lease(Some("base")), registry.lease(Some("a")));
        let (base, a) = (base.expect("served"), a.expect("served"));

        let same = registry.apply(&site.config("", &[("a", "one")])).await;
        assert_eq!(same.expect("applied").kept, ["base", "a"]);
        assert!(Arc::ptr_eq(&registry.lease(Some("a")).expect("served"), &a));

        let applied = registry.apply(&site.config("", &[("b", "two")])).await;
        let applied = applied.expect("applied");
        assert_eq!(
            (applied.kept, applied.loaded),
            (vec!["base".to_owned()], vec!["b".to_owned()])
        );
        assert_eq!(applied.removed, ["a"]);
        assert!(registry.lease(Some("a")).is_none());
        assert!(Arc::ptr_eq(
            &registry.lease(Some("base")).expect("served"),
            &base
        ));
        // A holder of the old generation keeps its engine; the engine goes with the last holder.
        engines(&registry, 3).await;
        drop((a, base));
        engines(&registry, 2).await;

        let before = served(&registry);
        for broken in ["x", "y"] {
            fs::create_dir(site.path(broken)).expect("created");
            fs::write(site.path(broken).join("adapter_config.json"), "{").expect("written");
        }
        let wrong = site.config("", &[("x", "x"), ("y", "y"), ("c", "one")]);
        let error = registry
            .apply(&wrong)
            .await
            .expect_err("refused")
            .to_string();
        assert!(error.contains("/x/") && error.contains("/y/"), "{error}");
        assert_eq!(
            served(&registry),
            before,
            "a refused configuration changes nothing"
        );

        // The content identifies an adapter, not its path or its former name.
        fs::remove_dir_all(site.path("two")).expect("removed");
        fs::rename(site.path("one"), site.path("two")).expect("moved");
        let applied = registry
            .apply(&site.config("", &[("b", "two")]))
            .await
            .expect("applied");
        assert_eq!(
            (applied.replaced, applied.kept),
            (vec!["b".to_owned()], vec!["base".to_owned()])
        );

        let quantised = site.config("quantization.in_situ_quant = '8'", &[("b", "two")]);
        let applied = registry.apply(&quantised).await.expect("applied");
        assert_eq!(
            applied.replaced,
            ["base", "b"],
            "an adapter goes with its base"
        );
        engines(&registry, 2).await;
    });
}

/// Memory that counts as free is free: no engine, queue or log keeps the weights of a replaced model.
#[test]
fn swaps_leave_nothing_in_memory() {
    let site = Site::new();
    run(async {
        let registry = Registry::load(&site.config("", &[])).await.expect("loaded");
        let before = registry.in_use();
        let mut replaced = Vec::new();
        for swap in 0..12 {
            let source = site.path(if swap % 2 == 0 { "one" } else { "two" });
            let lease = registry
                .load_adapter(load("a", &source))
                .await
                .expect("swapped");
            replaced.push(Arc::downgrade(&lease.tokens.tokenizer));
        }
        registry.unload_adapter("a", None).await.expect("unloaded");
        let start = Instant::now();
        while registry.in_use().0 > before.0 {
            assert!(start.elapsed() < Duration::from_secs(20), "they remain");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let remaining = replaced.iter().filter(|model| model.strong_count() > 0);
        assert_eq!(remaining.count(), 0);
        assert_eq!(registry.in_use().1, before.1);
        engines(&registry, 1).await;
    });
}

/// A client that unloads one adapter to load another need not wait in between.
#[test]
fn memory_that_is_about_to_be_free_is_waited_for() {
    let site = Site::new();
    run(async {
        let mut config = site.config("", &[]);
        let (one, two) = (site.path("one"), site.path("two"));
        let bytes = config.models[0].loader("base", None);
        let bytes = bytes.and_then(|loader| loader.weight_bytes());
        config.max_memory = Some(2 * bytes.expect("estimated"));
        let registry = Registry::load(&config).await.expect("loaded");
        for source in [&one, &two, &one] {
            let lease = registry.load_adapter(load("a", source)).await;
            drop(lease.expect("it fits"));
            // While the adapter is served there is no room for another.
            let other = registry.load_adapter(load("b", &two)).await;
            assert_eq!(other.err().expect("refused").code(), code::OVER_BUDGET);
            registry.unload_adapter("a", None).await.expect("unloaded");
        }
    });
}

#[test]
fn a_restart_serves_what_was_loaded_at_run_time() {
    let site = Site::new();
    let config = site.config("", &[("a", "one"), ("gone", "two")]);
    let before = run(async {
        let registry = Registry::load(&config).await.expect("loaded");
        let (one, two) = (site.path("one"), site.path("two"));
        registry
            .load_adapter(load("a", &two))
            .await
            .expect("replaced");
        registry
            .load_adapter(load("extra", &one))
            .await
            .expect("loaded");
        registry
            .load_adapter(load("brief", &one))
            .await
            .expect("loaded");
        registry
            .unload_adapter("brief", None)
            .await
            .expect("unloaded");
        registry
            .unload_adapter("gone", None)
            .await
            .expect("unloaded");
        let clash = AdapterLoad {
            in_place: false,
            ..load("extra", &one)
        };
        let refused = registry.load_adapter(clash).await.err();
        assert_eq!(refused.expect("refused").code(), code::NAME_TAKEN);
        let nowhere = AdapterLoad {
            model: Some("nobody"),
            ..load("new", &one)
        };
        let refused = registry.load_adapter(nowhere).await.err();
        assert_eq!(refused.expect("refused").code(), code::MODEL_NOT_FOUND);
        // Reading the same file again changes nothing.
        registry.apply(&config).await.expect("applied");
        served(&registry)
    });
    let names: Vec<&str> = before.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["base", "a", "extra"]);
    assert_ne!(before[1].2, before[2].2);

    let again = run(async { served(&Registry::load(&config).await.expect("loaded")) });
    assert_eq!(again, before);

    // An edit of serve.toml takes precedence.
    let edited = site.config("", &[("a", "one"), ("gone", "one")]);
    let names = run(async { served(&Registry::load(&edited).await.expect("loaded")) });
    assert!(
        names
            .iter()
            .any(|(name, _, hash)| name == "gone" && *hash == before[2].2)
    );
    assert!(
        names
            .iter()
            .any(|(name, _, hash)| name == "a" && *hash == before[1].2)
    );

    fs::remove_dir_all(site.path("two")).expect("removed");
    let error = run(async { Registry::load(&edited).await.map(drop) }).expect_err("it is gone");
    assert!(
        error.to_string().contains("`a`, loaded at run time") && error.exit_code() == 2,
        "{error}"
    );
}

/// The announced generation is the one in memory, even if a trainer writes files while models are loaded.
#[test]
fn files_that_change_between_check_and_load_are_not_served() {
    let site = Site::new();
    run(async {
        let config = site.config("", &[]);
        let registry = Registry::load(&config).await.expect("loaded");
        let source = site.path("one");
        let adapter = Some(("a", source.as_path()));
        let wanted = Wanted::new(&config.models[0], adapter, EngineSettings::of(&config));
        let checked = blocking(|| wanted.and_then(Wanted::check)).await;
        site.copy(&site.path("two"), "one");
        let error = registry.host.add(checked.expect("sound"), 1, None).await;
        let error = error.err().expect("refused").to_string();
        assert!(error.contains("changed"), "{error}");
        engines(&registry, 1).await;
    });
}

#[test]
fn a_start_that_fails_forgets_nothing() {
    let site = Site::new();
    let config = site.config("", &[]);
    run(async {
        let registry = Registry::load(&config).await.expect("loaded");
        let source = site.path("one");
        registry
            .load_adapter(load("b", &source))
            .await
            .expect("loaded");
    });
    fs::create_dir(site.path("broken")).expect("created");
    let wrong = site.config("", &[("b", "broken")]);
    run(async { assert!(Registry::load(&wrong).await.is_err()) });
    run(async {
        let registry = Registry::load(&config).await.expect("loaded");
        assert!(
            registry.lease(Some("b")).is_some(),
            "it was loaded at run time"
        );
    });
    // If the configuration is valid, it takes precedence permanently.
    let right = site.config("", &[("b", "two")]);
    run(async { Registry::load(&right).await.expect("loaded") });
    run(async {
        let registry = Registry::load(&config).await.expect("loaded");
        assert!(registry.lease(Some("b")).is_none());
    });
}

#[test]
fn an_adapter_is_loaded_on_the_base_that_the_file_gives_it() {
    let site = Site::new();
    let second = format!(
        "[[models]]\nmodel_id = '{}'\nname = 'second'\ndevice.cpu = true",
        site.base
    );
    run(async {
        let mut config = site.config(&second, &[("b", "one")]);
        config.default_model = "b".to_owned();
        let registry = Registry::load(&config).await.expect("loaded");
        let source = site.path("two");
        let elsewhere = AdapterLoad {
            model: Some("base"),
            ..load("b", &source)
        };
        let error = registry.load_adapter(elsewhere).await;
        let error = error.err().expect("refused").to_string();
        assert!(error.contains("`second`"), "{error}");
        registry.unload_adapter("b", None).await.expect("unloaded");
        for name in ["b", "c"] {
            let lease = registry.load_adapter(load(name, &source)).await;
            assert_eq!(lease.expect("loaded").parent.as_deref(), Some("second"));
        }
    });
}

#[test]
fn equal_content_from_elsewhere_is_the_same_adapter() {
    let site = Site::new();
    run(async {
        let config = site.config("", &[]);
        let registry = Registry::load(&config).await.expect("loaded");
        let (one, copy) = (site.path("one"), site.path("copy"));
        let first = registry
            .load_adapter(load("a", &one))
            .await
            .expect("loaded");
        site.copy(&one, "copy");
        let second = registry
            .load_adapter(load("a", &copy))
            .await
            .expect("loaded");
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(first.source().as_ref(), Some(&copy));
        let applied = registry.apply(&config).await.expect("applied");
        assert_eq!(applied.kept, ["base", "a"]);
    });
}

#[test]
fn an_edited_template_is_another_model() {
    let site = Site::new();
    let template = site.dir.path().join("template.jinja");
    let write = |end: &str| {
        let text = "{% for message in messages %}{{ message.content }}{% endfor %}";
        fs::write(&template, format!("{text}{end}")).expect("written");
    };
    write("");
    run(async {
        let config = site.config("chat_template = 'template.jinja'", &[]);
        let registry = Registry::load(&config).await.expect("loaded");
        let kept = registry.apply(&config).await.expect("applied").kept;
        assert_eq!(kept, ["base"]);
        write("!");
        let replaced = registry.apply(&config).await.expect("applied").replaced;
        assert_eq!(replaced, ["base"]);
    });
}

#[test]
fn an_adapter_without_effect_is_served_on_demand_only() {
    let site = Site::new();
    let mut adapter = monteclora_converters::Adapter::read(&site.path("one")).expect("sound");
    for target in &mut adapter.sites {
        let shape = target.lora_b.shape().to_vec();
        let zeros = vec![0.0; shape.iter().product()];
        target.lora_b = monteclora_converters::Tensor::from_f32(&shape, zeros).expect("a tensor");
    }
    let still = site.path("still");
    let options = monteclora_converters::LoraOptions::default();
    let plain = adapter.collapse();
    plain.write_lora(&still, &options).expect("written");
    run(async {
        let mut config = site.config("", &[]);
        let registry = Registry::load(&config).await.expect("loaded");
        let error = registry.load_adapter(load("a", &still)).await;
        let error = error.err().expect("refused").to_string();
        assert!(error.contains("--force"), "{error}");
        drop(registry);
        config.force = true;
        let registry = Registry::load(&config).await.expect("loaded");
        registry
            .load_adapter(load("a", &still))
            .await
            .expect("it is meant");
        // A restart with `force` serves the adapter again.
        drop(registry);
        let registry = Registry::load(&config).await.expect("loaded");
        assert!(registry.lease(Some("a")).is_some());
    });
}
