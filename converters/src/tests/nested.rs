//! Files of models that hold their language model beside a vision tower: both layouts of names, what is checked, and what is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::fixtures::architecture;
use crate::{
    Adapter, Carried, Error, LoraOptions, ModelFiles, SafetensorsFile, Tensor, format_named,
    merge_dir, write_safetensors,
};

type Tensors = BTreeMap<String, Tensor>;

fn model(kind: &str) -> PathBuf {
    architecture(kind).model_dir
}

fn adapter(kind: &str) -> Adapter {
    Adapter::read(&architecture(kind).dir).expect("an adapter")
}

/// The model of a fixture with other tensors, by their names in its file, and another config.json.
fn changed(
    kind: &str,
    edit: impl FnOnce(&mut Tensors, &mut Map<String, Value>),
) -> tempfile::TempDir {
    let model = model(kind);
    let mut config = ModelFiles::read_config(&model).expect("a model");
    let file = SafetensorsFile::open(model.join("model.safetensors")).expect("weights");
    let tensors = file.names().map(|name| {
        let tensor = file.get(name).expect("there");
        (name.to_owned(), tensor)
    });
    let mut tensors: Tensors = tensors.collect();
    edit(&mut tensors, &mut config);
    let dir = tempfile::tempdir().expect("a directory");
    let text = Value::Object(config).to_string();
    std::fs::write(dir.path().join("config.json"), text).expect("writable");
    write_safetensors(
        dir.path().join("model.safetensors"),
        tensors,
        &BTreeMap::new(),
    )
    .expect("written");
    dir
}

fn open(dir: impl AsRef<Path>) -> ModelFiles {
    ModelFiles::open(dir).expect("opens")
}

/// Names as the modules in memory have them.
fn in_memory(tensors: &mut Tensors) {
    let old = std::mem::take(tensors);
    tensors.extend(old.into_iter().map(|(name, tensor)| {
        let name = match name.strip_prefix("language_model.") {
            Some(rest) => match rest.strip_prefix("model.") {
                Some(rest) => format!("model.language_model.{rest}"),
                None => rest.to_owned(),
            },
            None => format!("model.{name}"),
        };
        (name, tensor)
    }));
}

fn refused(files: &ModelFiles) -> String {
    files.check().expect_err("refused").to_string()
}

#[test]
fn both_layouts_are_one_model() {
    for kind in ["nested-mistral3", "nested-gemma3"] {
        let stored = open(model(kind));
        let other_dir = changed(kind, |tensors, _| in_memory(tensors));
        let other = open(other_dir.path());
        let names: Vec<&str> = stored.names().collect();
        assert_eq!(names, other.names().collect::<Vec<_>>());
        for name in names {
            assert_eq!(stored.get(name), other.get(name), "{name}");
        }
        assert_eq!(stored.linear_modules(), other.linear_modules());
        for files in [&stored, &other] {
            let warnings = files.check().expect("whole");
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            assert_eq!(
                warnings[0].at,
                "model.vision_tower, model.multi_modal_projector"
            );
        }
    }
}

/// Published weights of older transformers have one more segment in the vision tower.
#[test]
fn older_names_in_the_vision_tower_are_the_same_modules() {
    let older = changed("nested-gemma3", |tensors, _| {
        let old = std::mem::take(tensors);
        tensors.extend(old.into_iter().map(|(name, tensor)| {
            (
                name.replace("vision_tower.", "vision_tower.vision_model."),
                tensor,
            )
        }));
    });
    let (older, new) = (open(older.path()), open(model("nested-gemma3")));
    assert!(older.names().eq(new.names()));
}

#[test]
fn a_tensor_under_both_names_is_refused() {
    let dir = changed("nested-gemma3", |tensors, _| {
        let norm = tensors["language_model.model.norm.weight"].clone();
        tensors.insert("model.language_model.norm.weight".to_owned(), norm);
    });
    let error = ModelFiles::open(dir.path()).expect_err("twice");
    assert_eq!(error.code(), "malformed");
    assert!(
        error
            .to_string()
            .contains("model.language_model.norm.weight"),
        "{error}"
    );
}

#[test]
fn the_language_model_is_checked_as_any_other() {
    let missing = changed("nested-mistral3", |tensors, _| {
        tensors.retain(|name, _| !name.ends_with("layers.1.mlp.up_proj.weight"));
    });
    let text = refused(&open(missing.path()));
    assert!(
        text.contains("model.language_model.layers.1.mlp.up_proj.weight: missing"),
        "{text}"
    );
    let shallow = changed("nested-mistral3", |_, config| {
        config["text_config"]["num_hidden_layers"] = json!(2);
    });
    let text = refused(&open(shallow.path()));
    assert!(
        text.contains("text_config.num_hidden_layers") && text.contains("layers 2"),
        "{text}"
    );
    let narrow = changed("nested-mistral3", |_, config| {
        config["text_config"]["intermediate_size"] = json!(90);
    });
    let text = refused(&open(narrow.path()));
    assert!(
        text.contains("text_config.intermediate_size: is 90") && text.contains("96"),
        "{text}"
    );
    let more = changed("nested-mistral3", |tensors, _| {
        let norm = tensors["language_model.model.norm.weight"].clone();
        tensors.insert(
            "language_model.model.layers.0.self_attn.q_norm.weight".to_owned(),
            norm.clone(),
        );
        tensors.insert("vision_tower.anything.weight".to_owned(), norm);
    });
    let text = refused(&open(more.path()));
    assert!(
        text.contains("q_norm") && !text.contains("anything"),
        "{text}"
    );
}

/// Where config.json says nothing, a stored head is one of its own, as transformers finds.
#[test]
fn a_silent_config_leaves_the_head_to_the_weights() {
    let silent = |config: &mut Map<String, Value>| {
        config.shift_remove("tie_word_embeddings");
    };
    let own_head = changed("nested-mistral3", |_, config| silent(config));
    let own_head = open(own_head.path());
    assert!(!own_head.ties_embeddings());
    own_head.check().expect("a head of its own");
    let tied = changed("nested-mistral3", |tensors, config| {
        silent(config);
        tensors.remove("language_model.lm_head.weight");
    });
    assert!(open(tied.path()).ties_embeddings());
    let said = changed("nested-mistral3", |_, config| {
        config["tie_word_embeddings"] = json!(true);
    });
    assert!(refused(&open(said.path())).contains("lm_head.weight"));
}

/// An adapter with one more module in the vision tower and one on the head.
fn wider() -> (ModelFiles, Adapter) {
    let base = open(model("nested-gemma3"));
    let mut adapter = adapter("nested-gemma3");
    let modules = base.linear_modules();
    for name in [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "lm_head",
    ] {
        let module = modules
            .iter()
            .find(|module| module.name == name)
            .expect("there");
        let mut site = adapter.sites[0].clone();
        site.name = name.to_owned();
        site.posterior = None;
        let values = |n: usize| (0..n).map(|i| (i % 7) as f32 * 0.01).collect::<Vec<_>>();
        let (n_in, n_out, r) = (module.in_features, module.out_features, site.rank);
        site.lora_a = Tensor::from_f32(&[r, n_in], values(r * n_in)).expect("sized");
        site.lora_b = Tensor::from_f32(&[n_out, r], values(r * n_out)).expect("sized");
        adapter.sites.push(site);
    }
    let sites: Vec<String> = adapter.sites.iter().map(|site| site.name.clone()).collect();
    adapter.config.target_in_full(&sites);
    (base, adapter)
}

#[test]
fn merging_keeps_the_layout_and_reaches_the_vision_tower() {
    let (base, adapter) = wider();
    let scratch = tempfile::tempdir().expect("a directory");
    let out = scratch.path().join("merged");
    let report = merge_dir(&base, &adapter, &out, None, &Carried::default()).expect("merged");
    assert!(report.untied);
    let file = SafetensorsFile::open(out.join("model.safetensors")).expect("written");
    assert!(file.info("language_model.lm_head.weight").is_some());
    assert!(file.names().all(|name| !name.starts_with("model.")));
    let merged = open(&out);
    assert!(!merged.ties_embeddings());
    merged.check().expect("whole");
    for site in &adapter.sites {
        let name = format!("{}.weight", site.name);
        let old = base.weight(&name).expect("there").to_f32().expect("float");
        let new = merged.get(&name).expect("there").to_f32().expect("float");
        let delta = site.delta_f32().expect("float");
        assert!(
            old.iter()
                .zip(&delta)
                .zip(&new)
                .all(|((old, delta), new)| old + delta == *new)
        );
    }
    let kept = "model.vision_tower.encoder.layers.0.mlp.fc1.weight";
    assert_eq!(base.get(kept), merged.get(kept));
}

#[test]
fn what_other_runtimes_do_not_have_is_refused_for_them() {
    let (base, mut adapter) = wider();
    adapter.sites.retain(|site| site.name != "lm_head");
    let scratch = tempfile::tempdir().expect("a directory");
    for format in ["mlx", "gguf"] {
        let out = scratch.path().join(format);
        let writer = format_named(format).expect("known");
        let error: Error = writer
            .write(&adapter, &out, &LoraOptions::default(), Some(base.config()))
            .expect_err("a vision tower");
        assert!(error.to_string().contains("model.vision_tower"), "{error}");
    }
}

#[test]
fn mlx_lm_has_the_names_of_files() {
    for kind in ["nested-mistral3", "nested-gemma3"] {
        let adapter = adapter(kind);
        let scratch = tempfile::tempdir().expect("a directory");
        let out = scratch.path().join("mlx");
        let mlx = format_named("mlx").expect("known");
        mlx.write(&adapter, &out, &LoraOptions::default(), None)
            .expect("written");
        let file = SafetensorsFile::open(out.join("adapters.safetensors")).expect("written");
        let name = "language_model.model.layers.0.self_attn.q_proj.lora_a";
        assert!(file.info(name).is_some());
        let back = Adapter::read(&out).expect("our own output");
        let names = |adapter: &Adapter| -> Vec<String> {
            adapter.sites.iter().map(|site| site.name.clone()).collect()
        };
        assert_eq!(names(&back), names(&adapter));
    }
}

#[test]
fn an_adapter_of_the_language_model_by_itself_is_told() {
    let base = open(model("nested-gemma3"));
    let mut adapter = adapter("nested-gemma3");
    let mut told = |from: &str, to: &str| {
        for site in &mut adapter.sites {
            site.name = site.name.replace(from, to);
        }
        let problems = adapter.check_against(&base).expect("no pattern");
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].to_string()
    };
    let text = told("model.language_model.", "model.");
    assert!(text.contains("the language model by itself"), "{text}");
    let text = told("model.", "language_model.model.");
    assert!(text.contains("before transformers 4.52"), "{text}");
}
