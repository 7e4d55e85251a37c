//! What is refused, and that the refusal names it.

use std::path::Path;

use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::fixtures::{self, Stream};
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_write::write_safetensors;

/// A valid MonteCLoRA adapter of one module, for tests to damage.
struct Spoilt {
    config: Value,
    tensors: BTreeMap<String, Tensor>,
}

const SITE: &str = "base_model.model.model.layers.0.self_attn.q_proj";

fn good(monteclora: bool) -> Spoilt {
    let mut stream = Stream(1);
    let mut tensors = BTreeMap::new();
    let mut put = |field: &str, shape: &[usize]| {
        tensors.insert(format!("{SITE}.{field}"), stream.tensor(shape, DType::F32));
    };
    put("lora_A.weight", &[2, 3]);
    put("lora_B.weight", &[4, 2]);
    if monteclora {
        put("lora_monteclora_sampler.std_prior", &[2]);
        put("lora_monteclora_sampler.expert_weights_prior", &[5]);
        put("lora_monteclora_sampler.gaussian_var_prior", &[2, 2]);
        put("lora_monteclora_sampler.expert_weights", &[5]);
    }
    let settings = if monteclora {
        json!({"num_samples": 5})
    } else {
        Value::Null
    };
    let config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "monteclora_config": settings,
    });
    Spoilt { config, tensors }
}

impl Spoilt {
    fn read_with<T>(&self, read: impl FnOnce(&Path) -> T) -> T {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join(CONFIG_FILE), self.config.to_string()).expect("writable");
        write_safetensors(
            dir.path().join(WEIGHTS_FILE),
            self.tensors.clone(),
            &BTreeMap::new(),
        )
        .expect("written");
        read(dir.path())
    }

    fn read(&self) -> Result<Adapter> {
        self.read_with(Adapter::read_dir)
    }

    fn codes(&self) -> Vec<&'static str> {
        let error = self.read().expect_err("spoilt");
        assert!(error.to_string().contains("is refused:"), "{error}");
        error
            .problems()
            .iter()
            .map(|problem| problem.code)
            .collect()
    }

    fn take(&mut self, field: &str) -> Tensor {
        self.tensors
            .remove(&format!("{SITE}.{field}"))
            .expect("there")
    }

    fn put(&mut self, name: &str, shape: &[usize]) {
        self.tensors
            .insert(name.to_owned(), Stream(2).tensor(shape, DType::F32));
    }
}

#[test]
fn fixtures_that_must_be_refused_are_refused_by_name() {
    let codes = |case: &fixtures::Case| -> Vec<&str> {
        let error = Adapter::read_dir(&case.dir).expect_err(&case.name);
        assert!(error.to_string().contains("is refused:"), "{error}");
        // Reading as plain LoRA leaves out only the posterior.
        assert!(Adapter::read_dir_as_lora(&case.dir).is_err());
        error
            .problems()
            .iter()
            .map(|problem| problem.code)
            .collect()
    };
    for case in fixtures::must_be_refused() {
        assert!(!codes(&case).is_empty(), "{}", case.name);
    }
    let codes = codes(&fixtures::named("must-refuse-modules-to-save"));
    assert!(codes.contains(&"modules-to-save"), "{codes:?}");
}

#[test]
fn what_is_not_spoilt_is_read_and_adapter_names_are_stripped() {
    assert_eq!(good(false).read().expect("good").format, "peft-lora");
    let adapter = good(true).read().expect("good");
    assert_eq!(adapter.format, "peft-monteclora");
    let mut named = good(true);
    named.tensors = named
        .tensors
        .into_iter()
        .map(|(name, tensor)| {
            let name = name
                .replace("lora_A.", "lora_A.default.")
                .replace("lora_B.", "lora_B.default.");
            (name.replace("_sampler.", "_sampler.default."), tensor)
        })
        .collect();
    assert_eq!(named.read().expect("good").sites, adapter.sites);
    // The buffers are state of the sampler, not parameters.
    let mut without_buffers = good(true);
    without_buffers.take("lora_monteclora_sampler.gaussian_var_prior");
    without_buffers.take("lora_monteclora_sampler.expert_weights");
    assert_eq!(without_buffers.read().expect("good").sites, adapter.sites);
}

#[test]
fn tensors_that_are_not_understood_are_each_named() {
    let cases = [
        (format!("{SITE}.lora_magnitude_vector"), "unknown-tensor"),
        (
            format!("{SITE}.lora_magnitude_vector.default.weight"),
            "unknown-tensor",
        ),
        (format!("{SITE}.lora_B.bias"), "bias"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A".into(),
            "embedding",
        ),
        ("base_model.model.lm_head.weight".into(), "stored-weight"),
        (format!("{SITE}.bias"), "stored-weight"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
            "trainable-tokens",
        ),
        (format!("{SITE}.lora_C.weight"), "unknown-tensor"),
        (
            format!("{SITE}.lora_monteclora_sampler.surprise"),
            "unknown-tensor",
        ),
        (format!("{SITE}.lora_A.a.b.weight"), "unknown-tensor"),
        ("base_model.model.lora_A.weight".into(), "unknown-tensor"),
        (
            "model.layers.0.q_proj.lora_A.weight".into(),
            "unknown-tensor",
        ),
        (
            "base_model.model...q_proj.lora_A.weight".into(),
            "tensor-name",
        ),
        (
            "base_model.model.../../etc.q_proj.lora_A.weight".into(),
            "tensor-name",
        ),
        (
            "/base_model.model.q_proj.lora_A.weight".into(),
            "tensor-name",
        ),
        ("base_model.model.a\nb.lora_A.weight".into(), "tensor-name"),
    ];
    let mut all = good(true);
    for (name, code) in &cases {
        let mut spoilt = good(true);
        spoilt.put(name, &[2]);
        assert_eq!(spoilt.codes(), [*code], "{name}");
        all.put(name, &[2]);
    }
    assert_eq!(all.codes().len(), cases.len());
}

#[test]
fn half_sites_and_half_samplers_are_refused() {
    for field in ["lora_A.weight", "lora_B.weight"] {
        let mut spoilt = good(false);
        spoilt.take(field);
        assert_eq!(spoilt.codes(), ["incomplete-site"]);
    }
    for field in ["std_prior", "expert_weights_prior"] {
        let mut spoilt = good(true);
        spoilt.take(&format!("lora_monteclora_sampler.{field}"));
        assert_eq!(spoilt.codes(), ["sampler-incomplete"]);
    }
}

#[test]
fn a_posterior_and_its_settings_come_together_unless_only_the_mean_is_asked_for() {
    let mut lost = good(false);
    lost.config["monteclora_config"] = json!({});
    assert_eq!(lost.codes(), ["posterior-lost"]);
    let mut undeclared = good(true);
    undeclared.config["monteclora_config"] = Value::Null;
    assert_eq!(undeclared.codes(), ["posterior-undeclared"]);
    for spoilt in [lost, undeclared] {
        let mean = spoilt
            .read_with(Adapter::read_dir_as_lora)
            .expect("the mean is there");
        assert_eq!(mean.format, "peft-lora");
        assert_eq!(mean, mean.collapse());
    }
}

#[test]
fn shapes_must_agree_with_the_configuration() {
    let cases: [(&str, &[usize]); 8] = [
        ("lora_A.weight", &[3, 3]),
        ("lora_A.weight", &[2]),
        ("lora_A.weight", &[2, 0]),
        ("lora_B.weight", &[4, 3]),
        ("lora_monteclora_sampler.std_prior", &[3]),
        ("lora_monteclora_sampler.expert_weights_prior", &[4]),
        ("lora_monteclora_sampler.gaussian_var_prior", &[2, 3]),
        ("lora_monteclora_sampler.expert_weights", &[6]),
    ];
    for (field, shape) in cases {
        let mut spoilt = good(true);
        spoilt.put(&format!("{SITE}.{field}"), shape);
        assert_eq!(spoilt.codes(), ["shape"], "{field} {shape:?}");
    }
    let mut pattern = good(true);
    pattern.config["rank_pattern"] = json!({"q_proj": 7});
    assert!(pattern.codes().iter().all(|code| *code == "shape"));
}

#[test]
fn weights_must_be_finite_and_real() {
    for field in [
        "lora_A.weight",
        "lora_B.weight",
        "lora_monteclora_sampler.std_prior",
    ] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut spoilt = good(true);
            let tensor = spoilt.take(field);
            let mut values = tensor.to_f32().expect("float");
            values[1] = bad;
            let tensor = Tensor::from_f32(tensor.shape(), values).expect("sized");
            spoilt.tensors.insert(format!("{SITE}.{field}"), tensor);
            assert_eq!(spoilt.codes(), ["non-finite"]);
        }
    }
    let mut integers = good(false);
    integers.take("lora_A.weight");
    let tensor = Tensor::from_bytes(DType::I8, &[2, 3], vec![1; 6]).expect("sized");
    integers
        .tensors
        .insert(format!("{SITE}.lora_A.weight"), tensor);
    assert_eq!(integers.codes(), ["dtype"]);
}

#[test]
fn sites_outside_the_targets_and_two_adapters_in_one_are_refused() {
    let mut untargeted = good(false);
    untargeted.config["target_modules"] = json!(["k_proj"]);
    assert_eq!(untargeted.codes(), ["not-targeted"]);
    let mut twice = good(false);
    twice.put(&format!("{SITE}.lora_A.other.weight"), &[2, 3]);
    assert_eq!(twice.codes(), ["ambiguous"]);
    let mut nothing = good(false);
    nothing.tensors.clear();
    assert_eq!(nothing.codes(), ["no-tensors"]);
}

#[test]
fn pickles_are_refused_and_missing_files_not_found() {
    let dir = tempfile::tempdir().expect("temporary directory");
    assert!(
        Adapter::read(&dir.path().join("absent"))
            .expect_err("absent")
            .is_not_found()
    );
    assert!(Adapter::read(dir.path()).expect_err("empty").is_not_found());
    fs::write(dir.path().join(CONFIG_FILE), good(false).config.to_string()).expect("writable");
    assert!(
        Adapter::read(dir.path())
            .expect_err("no weights")
            .is_not_found()
    );
    fs::write(dir.path().join("adapter_model.bin"), "x").expect("writable");
    let error = Adapter::read(dir.path()).expect_err("a pickle");
    assert_eq!(error.problems()[0].code, "pickle");
    assert!(error.to_string().contains("safe_serialization"));
}

#[test]
fn sharded_adapters_are_read() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let spoilt = good(true);
    fs::write(dir.path().join(CONFIG_FILE), spoilt.config.to_string()).expect("writable");
    let mut weight_map = BTreeMap::new();
    for (idx, (name, tensor)) in spoilt.tensors.clone().into_iter().enumerate() {
        let file = format!(
            "adapter_model-{:05}-of-{:05}.safetensors",
            idx + 1,
            spoilt.tensors.len()
        );
        write_safetensors(
            dir.path().join(&file),
            [(name.clone(), tensor)],
            &BTreeMap::new(),
        )
        .expect("written");
        weight_map.insert(name, file);
    }
    let whole = spoilt.read().expect("good");
    assert_eq!(Adapter::read(dir.path()).expect("good"), whole);
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(
        dir.path().join("adapter_model.safetensors.index.json"),
        index.to_string(),
    )
    .expect("writable");
    assert_eq!(Adapter::read(dir.path()).expect("good"), whole);
    fs::remove_file(
        dir.path()
            .join(&weight_map[&format!("{SITE}.lora_B.weight")]),
    )
    .expect("there");
    assert!(
        Adapter::read(dir.path())
            .expect_err("a shard is missing")
            .is_not_found()
    );
}

#[test]
fn the_authors_dialect_is_plain_lora_and_its_keys_are_reported_as_dropped() {
    let mut authors = good(false);
    let keys = authors.config.as_object_mut().expect("an object");
    for (key, value) in [
        ("use_monteclora", json!(true)),
        ("monteclora_at", json!("lora_A")),
        ("monteclora_n", json!(4)),
        ("sample_scaler", json!(5e-3)),
        ("dirichlet_prior", json!(1)),
    ] {
        keys.insert(key.into(), value);
    }
    keys.remove("monteclora_config");
    authors.read_with(|dir| {
        let adapter = Adapter::read(dir).expect("A and B are all there is");
        assert_eq!(adapter.format, "peft-lora");
        let (_, report) = adapter.to_lora(None).expect("float");
        assert_eq!(report.dropped_keys.len(), 5);
        assert!(adapter.config.to_json().get("monteclora_n").is_none());
    });
    authors.put(&format!("{SITE}.mc_sampler_A.std_prior"), &[2]);
    assert_eq!(authors.codes(), ["unknown-tensor"]);
    authors.read_with(|dir| assert!(Adapter::read_dir_as_lora(dir).is_ok()));
}
