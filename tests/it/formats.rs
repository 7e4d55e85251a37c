//! The verbs around adapter files: collapse, convert, sample, merge, inspect and validate.

use std::path::{Path, PathBuf};

use monteclora_converters::{Adapter, ModelFiles, SafetensorsFile, Tensor};
use serde_json::Value;

use crate::cli::{json, ok, own_adapter, run, text, tiny};
use crate::fixtures::{
    AdapterCase, adapters, floats, largest_difference, named, own, supported_architectures, usable,
    with_own,
};

/// `case` in every format, each with a name for messages.
fn in_every_format(case: &AdapterCase, dir: &Path) -> Vec<(&'static str, PathBuf)> {
    let model = text(&case.model);
    let mut made = vec![("source", case.dir.clone())];
    // What is more than B A has a place in PEFT's directory alone.
    let n_formats = if case.is_low_rank() { 4 } else { 1 };
    for (format, name) in [
        ("peft", "peft"),
        ("lora", "lora"),
        ("mlx", "mlx"),
        ("gguf", "adapter.gguf"),
    ]
    .into_iter()
    .take(n_formats)
    {
        let path = dir.join(name);
        ok(&[
            "convert",
            text(&case.dir),
            "-o",
            text(&path),
            "--to",
            format,
            "-m",
            model,
        ]);
        made.push((format, path));
    }
    made
}

/// Merging gives base plus the recorded update, whatever format the adapter went through.
#[test]
fn merge_reproduces_every_update_through_every_format() {
    for case in usable().iter().chain(&supported_architectures()) {
        let dir = tempfile::tempdir().unwrap();
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let base = ModelFiles::open(&case.model).unwrap();
        for (format, path) in in_every_format(case, dir.path()) {
            let out = dir.path().join(format!("merged-{format}"));
            ok(&[
                "merge",
                "-m",
                text(&case.model),
                "-a",
                text(&path),
                "-o",
                text(&out),
                "--dtype",
                "f32",
            ]);
            let merged = ModelFiles::open(&out).unwrap();
            let mut n_updates = 0;
            for name in base.names() {
                let old = base.get(name).unwrap().to_f32().unwrap();
                let new = merged.get(name).unwrap().to_f32().unwrap();
                let update: Vec<f32> = old.iter().zip(&new).map(|(old, new)| new - old).collect();
                let recorded = format!("delta.{}", name.trim_end_matches(".weight"));
                if expected.get(&recorded).is_none() {
                    assert!(update.iter().all(|value| *value == 0.0), "{name}");
                    continue;
                }
                n_updates += 1;
                let difference = largest_difference(&update, &floats(&expected, &recorded));
                assert!(
                    difference <= case.delta_tolerance(),
                    "{} through {format}: {name}: {difference}",
                    case.name
                );
            }
            assert!(n_updates > 0, "{}", case.name);
        }
    }
}

#[test]
fn inspect_reads_every_format_and_models() {
    let case = named("all-linear");
    let dir = tempfile::tempdir().unwrap();
    let mut norms = Vec::new();
    for (format, path) in in_every_format(&case, dir.path()) {
        let summary = json(&["inspect", text(&path)]);
        let name = summary["format"].as_str().unwrap();
        let is_expected = match format {
            "gguf" => name == "gguf-lora",
            "mlx" => name == "mlx",
            "lora" => name == "peft-lora",
            _ => name.starts_with("peft-"),
        };
        assert!(is_expected, "{format}: {name}");
        for key in [
            "r",
            "lora_alpha",
            "n_sites",
            "n_parameters",
            "base_model",
            "problems",
        ] {
            assert!(summary.get(key).is_some(), "{format}: {key}");
        }
        let site = &summary["sites"][0];
        for key in [
            "name",
            "r",
            "alpha",
            "scaling",
            "in_features",
            "out_features",
            "dtype",
            "norm_a",
            "norm_b",
            "norm_delta",
        ] {
            assert!(site.get(key).is_some(), "{format}: {key}");
        }
        norms.push(site["norm_delta"].as_f64().unwrap());
        let table = ok(&["inspect", text(&path)]).stdout;
        assert!(table.contains(site["name"].as_str().unwrap()), "{table}");
    }
    assert!(
        norms
            .iter()
            .all(|norm| (norm - norms[0]).abs() <= 1e-5 * norms[0]),
        "{norms:?}"
    );
    let model = json(&["inspect", text(&case.model)]);
    assert_eq!(model["format"], "model");
    assert!(model["n_sites"].as_u64().unwrap() > 0);
}

#[test]
fn validate_reports_everything_and_fails_with_4() {
    let dir = tempfile::tempdir().unwrap();
    for case in with_own(adapters(), &["must-refuse-modules-to-save"]) {
        let done = run(&[
            "validate",
            text(&case.dir),
            "--for",
            "vllm",
            "--for",
            "peft",
            "--json",
        ]);
        let report: Value = serde_json::from_str(&done.stdout).unwrap();
        let problems = report["problems"].as_array().unwrap();
        assert_eq!(report["ok"], problems.is_empty());
        assert_eq!(
            done.code,
            if problems.is_empty() { 0 } else { 4 },
            "{}",
            case.name
        );
        for problem in problems {
            for key in ["code", "where", "message", "fix"] {
                assert!(!problem[key].as_str().unwrap().is_empty(), "{problem}");
            }
        }
        if case.must_be_refused() {
            assert!(!problems.is_empty(), "{}", case.name);
        }
    }
    let rslora = own_adapter("rslora");
    let codes = |path: &str, runtime: &str| -> Vec<String> {
        let done = run(&["validate", path, "-m", &tiny(), "--for", runtime, "--json"]);
        let report: Value = serde_json::from_str(&done.stdout).unwrap();
        let problems = report["problems"].as_array().unwrap();
        problems
            .iter()
            .map(|problem| problem["code"].as_str().unwrap().to_owned())
            .collect()
    };
    assert!(codes(&rslora, "llamacpp").contains(&"rslora".to_owned()));
    assert!(codes(&rslora, "peft").is_empty());
    let gguf = dir.path().join("adapter.gguf");
    ok(&[
        "convert",
        &rslora,
        "-o",
        text(&gguf),
        "--to",
        "gguf",
        "-m",
        &tiny(),
    ]);
    assert!(codes(text(&gguf), "llamacpp").is_empty());
    assert_eq!(codes(text(&gguf), "vllm"), ["format"]);
    let unknown = run(&["validate", &rslora, "--for", "ollama"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.stderr.contains("llamacpp"), "{}", unknown.stderr);
}

#[test]
fn adapters_that_change_nothing_need_force() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::read(Path::new(&own_adapter("monteclora"))).unwrap();
    for site in &mut adapter.sites {
        let zeros = vec![0.0; site.lora_b.n_elements()];
        site.lora_b = Tensor::from_f32(site.lora_b.shape(), zeros).unwrap();
    }
    let zero = dir.path().join("zero");
    adapter.write_peft(&zero, false).unwrap();
    let (zero, model) = (text(&zero), tiny());
    let at = |name: &str| dir.path().join(name).display().to_string();
    for arguments in [
        vec!["collapse", zero, "-o", &at("collapsed")],
        vec!["sample", zero, "-o", &at("draws")],
        vec!["convert", zero, "--to", "peft", "-o", &at("peft")],
        vec!["convert", zero, "--to", "lora", "-o", &at("lora")],
        vec!["convert", zero, "--to", "mlx", "-o", &at("mlx")],
        vec![
            "convert",
            zero,
            "--to",
            "gguf",
            "-m",
            &model,
            "-o",
            &at("x.gguf"),
        ],
        vec!["merge", "-m", &model, "-a", zero, "-o", &at("merged")],
    ] {
        let refused = run(&arguments);
        assert_eq!(refused.code, 4, "{arguments:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
        let output = arguments[arguments.iter().position(|a| *a == "-o").unwrap() + 1];
        assert!(!Path::new(output).exists(), "{output}");
        ok(&[&arguments[..], &["--force"]].concat());
        assert!(Path::new(output).exists(), "{output}");
    }
    let report = run(&["validate", zero, "--json"]);
    assert!(report.code == 4 && report.stdout.contains("no-effect"));
}

#[test]
fn destinations_are_protected() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    Adapter::read(Path::new(&own_adapter("monteclora")))
        .unwrap()
        .write_peft(&source, false)
        .unwrap();
    let before = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
    let (source, model) = (text(&source), tiny());
    let occupied = dir.path().join("occupied");
    std::fs::create_dir(&occupied).unwrap();
    std::fs::write(occupied.join("notes.txt"), "mine").unwrap();
    let occupied = text(&occupied);
    for arguments in [
        vec!["collapse", source, "-o", source, "--force"],
        vec!["convert", source, "--to", "lora", "-o", source, "--force"],
        vec!["sample", source, "-o", source, "--force"],
        vec!["merge", "-m", &model, "-a", source, "-o", &model, "--force"],
        vec!["merge", "-m", &model, "-a", source, "-o", source, "--force"],
        vec!["collapse", source, "-o", occupied],
        vec!["convert", source, "--to", "mlx", "-o", occupied],
        vec![
            "convert", source, "--to", "gguf", "-m", &model, "-o", occupied, "--force",
        ],
        vec!["convert", source, "--to", "gguf", "-o", "nowhere.gguf"],
        vec!["sample", source, "-o", occupied],
        vec!["merge", "-m", &model, "-a", source, "-o", occupied],
    ] {
        let refused = run(&arguments);
        assert_eq!(refused.code, 2, "{arguments:?}: {}", refused.stderr);
    }
    let after = std::fs::read(Path::new(source).join("adapter_model.safetensors")).unwrap();
    assert_eq!(before, after);
    assert_eq!(std::fs::read_dir(occupied).unwrap().count(), 1);
    for arguments in [
        vec!["collapse", source, "-o", occupied, "--force"],
        vec!["sample", source, "-k", "2", "-o", occupied, "--force"],
        vec!["sample", source, "-k", "2", "-o", occupied, "--force"],
        vec![
            "merge", "-m", &model, "-a", source, "-o", occupied, "--force",
        ],
    ] {
        ok(&arguments);
        assert!(Path::new(occupied).join("notes.txt").exists());
    }
    assert!(ModelFiles::open(occupied).is_ok());
}

#[test]
fn draws_are_repeatable_and_need_a_posterior() {
    let dir = tempfile::tempdir().unwrap();
    let source = own_adapter("monteclora");
    let draws = |name: &str| {
        let out = dir.path().join(name);
        let report = json(&[
            "sample",
            &source,
            "-k",
            "3",
            "--seed",
            "5",
            "-o",
            text(&out),
        ]);
        let paths = report["draws"].as_array().unwrap().clone();
        assert_eq!(paths.len(), 3);
        paths
            .iter()
            .map(|path| {
                let dir = Path::new(path.as_str().unwrap());
                assert_eq!(Adapter::read(dir).unwrap().format, "peft-lora");
                std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
            })
            .collect::<Vec<_>>()
    };
    let (first, second) = (draws("a"), draws("b"));
    assert_eq!(first, second);
    assert!(first[0] != first[1] && first[1] != first[2]);
    let out = dir.path().join("none");
    let refused = run(&["sample", &own_adapter("plain-lora"), "-o", text(&out)]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(!out.exists());
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// The authors' own configuration: flat keys, no sampler on disk.
#[test]
fn the_authors_dialect_is_said_to_be_its_mean() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("authors");
    std::fs::create_dir(&source).unwrap();
    let plain = own().join("adapters/plain-lora");
    std::fs::copy(
        plain.join("adapter_model.safetensors"),
        source.join("adapter_model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(plain.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("monteclora_config");
    for (key, value) in [
        ("use_monteclora", Value::from(true)),
        ("monteclora_at", "lora_A".into()),
        ("monteclora_targets", "query".into()),
        ("monteclora_n", 4.into()),
        ("monteclora_m", 4.into()),
        ("sample_scaler", 5e-3.into()),
        ("use_entropy", true.into()),
        ("dirichlet_prior", 1.into()),
        ("kl_loss_weight", 1e-5.into()),
        ("mc_training", true.into()),
    ] {
        config[key] = value;
    }
    std::fs::write(source.join("adapter_config.json"), config.to_string()).unwrap();
    let source = text(&source);
    assert_eq!(json(&["inspect", source])["format"], "peft-lora");
    let (lora, peft) = (dir.path().join("lora"), dir.path().join("peft"));
    for (format, out) in [("lora", &lora), ("peft", &peft)] {
        let told = ok(&["convert", source, "--to", format, "-o", text(out)]).stdout;
        assert!(
            told.contains("stores no posterior") && told.contains("monteclora_n"),
            "{told}"
        );
        let written = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
        assert!(!written.contains("monteclora_n"), "{written}");
    }
    let drawn = run(&["sample", source, "-o", text(&dir.path().join("draws"))]);
    assert_eq!(drawn.code, 4, "{}", drawn.stderr);
}

#[test]
fn element_types_are_chosen_or_kept() {
    let dir = tempfile::tempdir().unwrap();
    let source = own_adapter("monteclora");
    for (format, dtype, name) in [
        ("peft", "bf16", "BF16"),
        ("lora", "f16", "F16"),
        ("mlx", "f32", "F32"),
    ] {
        let out = dir.path().join(format);
        let report = json(&[
            "convert",
            &source,
            "--to",
            format,
            "--dtype",
            dtype,
            "-o",
            text(&out),
        ]);
        let adapter = Adapter::read(&out).unwrap();
        assert!(
            adapter
                .sites
                .iter()
                .all(|site| site.lora_a.dtype().name() == name)
        );
        let n_converted = report["converted"].as_array().unwrap().len();
        let expected = if name == "F32" {
            0
        } else {
            adapter.sites.len()
        };
        assert_eq!(n_converted, expected, "{format}");
        if format == "peft" {
            let posterior = adapter.sites[0].posterior.as_ref().unwrap();
            assert_eq!(posterior.log_std.dtype().name(), "F32");
        }
    }
}

#[test]
fn a_quantised_base_is_not_merged_into() {
    let dir = tempfile::tempdir().unwrap();
    let quantised = dir.path().join("quantised");
    std::fs::create_dir(&quantised).unwrap();
    std::fs::copy(
        own().join("models/tiny-llama/model.safetensors"),
        quantised.join("model.safetensors"),
    )
    .unwrap();
    std::fs::write(
        quantised.join("config.json"),
        r#"{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}"#,
    )
    .unwrap();
    let out = dir.path().join("merged");
    let refused = run(&[
        "merge",
        "-m",
        text(&quantised),
        "-a",
        &own_adapter("plain-lora"),
        "-o",
        text(&out),
    ]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("gptq") && refused.stderr.contains("full-precision"),
        "{}",
        refused.stderr
    );
    assert!(!out.exists());
}
