//! Adapters that are more than B A: what is read, written, merged and refused.

use std::fs;

use crate::adapter::Adapter;
use crate::beyond::Beyond;
use crate::config::{AdapterConfig, PeftType, TargetModules};
use crate::fixtures;
use crate::formats::format_named;
use crate::formats::lora::LoraOptions;
use crate::merge::write_overlay;
use crate::model_files::ModelFiles;
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::tensor::Tensor;
use crate::validate::runtime::Runtime;
use crate::validate::validate;

/// PEFT's AdaLoRA as it stands, as a plain LoRA, and written again.
#[test]
fn adalora_collapses_to_a_plain_lora_and_is_written_as_peft_has_it() {
    let case = fixtures::named("adalora");
    let adapter = Adapter::read_dir(&case.dir).expect("read");
    assert_eq!(adapter.format, "peft-adalora");
    let ranks: Vec<usize> = adapter.sites.iter().map(|site| site.rank).collect();
    assert!(
        ranks.contains(&0) && ranks.iter().any(|rank| *rank > 3),
        "{ranks:?}"
    );
    // The scale is that of the initial rank.
    let scaling = 12.0 / (6.0 + 1e-5);
    assert!(adapter.sites.iter().all(|site| site.scaling == scaling));
    let dir = tempfile::tempdir().expect("temporary directory");
    let again = dir.path().join("again");
    adapter.write_peft(&again, false).expect("written");
    for file in ["adapter_model.safetensors"] {
        let (ours, theirs) = (
            SafetensorsFile::open(again.join(file)).expect("written"),
            SafetensorsFile::open(case.dir.join(file)).expect("recorded"),
        );
        let names = |file: &SafetensorsFile| file.names().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs));
        for name in names(&ours) {
            assert_eq!(ours.get(&name), theirs.get(&name), "{name}");
        }
    }
    let keys = |dir: &std::path::Path| -> serde_json::Value {
        let text = fs::read_to_string(dir.join("adapter_config.json")).expect("readable");
        serde_json::from_str(&text).expect("JSON")
    };
    let (ours, theirs) = (keys(&again), keys(&case.dir));
    for key in [
        "peft_type",
        "rank_pattern",
        "init_r",
        "target_r",
        "deltaT",
        "tinit",
        "lora_alpha",
    ] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let plain = dir.path().join("plain");
    adapter
        .write_lora(&plain, &LoraOptions::default())
        .expect("a plain LoRA");
    let plain = Adapter::read_dir(&plain).expect("our own output");
    assert_eq!(plain.format, "peft-lora");
    fixtures::assert_deltas(&case, &plain);
    fixtures::assert_deltas(&case, &adapter.collapse());
    let problems = validate(&adapter, None, &[Runtime::Vllm, Runtime::Peft]).expect("float");
    let codes: Vec<_> = problems.iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["adalora"]);
}

/// DoRA keeps its magnitudes in every format that has a place for them; the others refuse it, with the remedy.
#[test]
fn dora_is_written_by_peft_alone() {
    let case = fixtures::named("dora");
    let base = ModelFiles::open(&case.model_dir).expect("a model");
    let adapter = Adapter::read_dir(&case.dir).expect("read");
    assert_eq!(adapter.format, "peft-dora");
    let dir = tempfile::tempdir().expect("temporary directory");
    for name in ["lora", "mlx", "gguf"] {
        let format = format_named(name).expect("registered");
        let out = dir.path().join(name);
        let written = format.write(&adapter, &out, &LoraOptions::default(), Some(base.config()));
        let error = written.expect_err("no place for the magnitudes");
        assert_eq!(error.code(), "merge-only", "{name}");
        assert!(error.to_string().contains("monteclora merge"), "{error}");
        assert!(!out.exists());
    }
    let half = format_named("peft").expect("registered");
    let options = LoraOptions {
        dtype: Some(DType::BF16),
        ..LoraOptions::default()
    };
    half.write(&adapter, &dir.path().join("half"), &options, None)
        .expect("written");
    let read = Adapter::read_dir(&dir.path().join("half")).expect("our own output");
    let Some(Beyond::Magnitude(magnitude)) = &read.sites[0].beyond else {
        panic!("{:?}", read.sites[0].beyond);
    };
    assert_eq!(magnitude.dtype(), DType::BF16);
    let mut undeclared = adapter.clone();
    undeclared.config.use_dora = false;
    undeclared
        .write_peft(&dir.path().join("undeclared"), false)
        .expect("written");
    let error = Adapter::read_dir(&dir.path().join("undeclared")).expect_err("refused");
    assert!(
        error
            .problems()
            .iter()
            .all(|problem| problem.code == "unknown-tensor"),
        "{error}"
    );
    for runtime in [Runtime::Vllm, Runtime::LlamaCpp, Runtime::Mistralrs] {
        let problems = validate(&adapter, Some(&base), &[runtime]).expect("float");
        assert_eq!(problems[0].code, "dora");
    }
    assert_eq!(
        validate(&adapter, Some(&base), &[Runtime::Peft]).expect("float"),
        []
    );
}

/// An adapter on one module of the tiny model with biases, which is no B A at all.
fn beyond(module: &str, beyond: Beyond, peft_type: PeftType) -> (ModelFiles, Adapter) {
    let case = fixtures::named("qwen2-monteclora");
    let base = ModelFiles::open(&case.model_dir).expect("a model");
    let weight = base.weight(&format!("{module}.weight")).expect("a module");
    let [out, n_in] = *weight.shape() else {
        panic!("{:?}", weight.shape());
    };
    let empty = |shape: [usize; 2]| Tensor::from_f32(&shape, Vec::new()).expect("sized");
    let site = crate::adapter::Site {
        name: module.to_owned(),
        rank: 0,
        alpha: 1.0,
        scaling: 1.0,
        lora_a: empty([0, n_in]),
        lora_b: empty([out, 0]),
        posterior: None,
        beyond: Some(beyond),
        triplets: None,
    };
    let config = AdapterConfig {
        peft_type,
        lora_alpha: 1.0,
        target_modules: TargetModules::List(vec![module.to_owned()]),
        ..AdapterConfig::default()
    };
    let adapter = Adapter {
        format: config.peft_format(),
        config,
        sites: vec![site],
        metadata: [("format".to_owned(), "pt".to_owned())].into(),
        notes: Vec::new(),
    };
    (base, adapter)
}

fn written_and_read(adapter: &Adapter) -> Adapter {
    let dir = tempfile::tempdir().expect("temporary directory");
    let out = dir.path().join("out");
    adapter.write_peft(&out, false).expect("written");
    let read = Adapter::read_dir(&out).expect("our own output");
    assert_eq!(read.fingerprint(), adapter.fingerprint());
    // Mapped tensors outlive their directory.
    assert_eq!(read.sites, adapter.sites);
    read
}

const BIASED: &str = "model.layers.1.self_attn.q_proj";
const WITHOUT_BIAS: &str = "model.layers.1.mlp.up_proj";

/// A scale and a shift merge into weight and bias; a shift without a bias is refused by name.
#[test]
fn a_scale_merges_and_a_shift_needs_a_bias() {
    let vector = |module: &str, value: fn(usize) -> f32| {
        let (base, _) = beyond(
            module,
            Beyond::Magnitude(Tensor::from_f32(&[0], Vec::new()).expect("sized")),
            PeftType::Lora,
        );
        let rows = base
            .weight(&format!("{module}.weight"))
            .expect("a module")
            .shape()[0];
        Tensor::from_f32(&[rows], (0..rows).map(value).collect()).expect("sized")
    };
    let scale_and_shift = |module: &str| Beyond::Scale {
        scale: vector(module, |row| 1.0 + 0.1 * row as f32),
        shift: Some(vector(module, |row| row as f32)),
    };
    let (base, adapter) = beyond(BIASED, scale_and_shift(BIASED), PeftType::Ssf);
    let adapter = written_and_read(&adapter);
    assert!(adapter.has_effect().expect("float"));
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("overlay.safetensors");
    assert_eq!(
        write_overlay(&base, &adapter, &path)
            .expect("merged")
            .n_tensors,
        2
    );
    let merged = SafetensorsFile::open(&path).expect("our own output");
    let values = |tensor: Option<Tensor>| tensor.expect("there").to_f32().expect("float");
    let (weight, bias) = (format!("{BIASED}.weight"), format!("{BIASED}.bias"));
    let (old, new) = (values(base.weight(&weight)), values(merged.get(&weight)));
    let n_in = old.len() / values(base.weight(&bias)).len();
    for (at, (old, new)) in old.iter().zip(&new).enumerate() {
        assert_eq!(*new, old * (1.0 + 0.1 * (at / n_in) as f32));
    }
    let (old, new) = (values(base.weight(&bias)), values(merged.get(&bias)));
    for (row, (old, new)) in old.iter().zip(&new).enumerate() {
        assert_eq!(*new, (1.0 + 0.1 * row as f32) * old + row as f32);
    }
    let error = adapter.to_lora(None).expect_err("no B A");
    assert_eq!(error.code(), "merge-only");
    let (base, adapter) = beyond(WITHOUT_BIAS, scale_and_shift(WITHOUT_BIAS), PeftType::Ssf);
    let error = write_overlay(&base, &adapter, &path).expect_err("no bias");
    assert_eq!(error.code(), "no-bias");
    assert!(error.to_string().contains(WITHOUT_BIAS), "{error}");
}

/// Single entries are added where they are, and places that are none are refused.
#[test]
fn single_entries_are_added() {
    let entries = |places: &[i64]| {
        let bytes = places
            .iter()
            .flat_map(|place| place.to_le_bytes())
            .collect();
        Beyond::Sparse {
            indices: Tensor::from_bytes(DType::I64, &[places.len()], bytes).expect("sized"),
            values: Tensor::from_f32(&[places.len()], vec![0.5; places.len()]).expect("sized"),
        }
    };
    let (base, adapter) = beyond(WITHOUT_BIAS, entries(&[1, 64, 130]), PeftType::Sparse);
    let adapter = written_and_read(&adapter);
    let weight = base
        .weight(&format!("{WITHOUT_BIAS}.weight"))
        .expect("a module");
    let delta = adapter.sites[0].delta_on(&weight).expect("float");
    for (at, delta) in delta.iter().enumerate() {
        let expected = if [1, 64, 130].contains(&at) { 0.5 } else { 0.0 };
        assert!((delta - expected).abs() < 1e-6, "{at}");
    }
    for wrong in [&[3, 3][..], &[5, 4], &[-1], &[1 << 40]] {
        let (_, adapter) = beyond(WITHOUT_BIAS, entries(wrong), PeftType::Sparse);
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        adapter.write_peft(&out, false).expect("written");
        let error = Adapter::read_dir(&out).expect_err("refused");
        assert_eq!(error.problems()[0].code, "sparse", "{wrong:?}");
    }
}
