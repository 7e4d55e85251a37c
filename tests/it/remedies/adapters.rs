//! Remedies around adapters: what validation, conversion, merging and inspection advise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use monteclora_converters::{Adapter, DType, SafetensorsFile, Tensor, write_safetensors};
use serde_json::{Value, json};

use super::{By, Remedy, Run, data};
use crate::cli::{copy, json as answer, ok, own_adapter, run, text, tiny};

pub(super) const REMEDIES: [Remedy; 18] = [
    (
        "-o DIR --from lora --to lora takes it alone",
        Run(the_mean_is_taken_alone),
    ),
    (
        "-o DIR --from lora --to lora leaves the sampler out",
        By(
            "converters/src/tests/names.rs",
            "the_mean_is_read_without_what_is_left_of_a_posterior",
        ),
    ),
    (
        "merge it (monteclora merge -m BASE -a ADAPTER -o DIR)",
        Run(a_tied_head_is_merged_for_mlx),
    ),
    (
        "convert it: monteclora convert --to mlx",
        Run(convert_for_a_runtime),
    ),
    (
        "-o DIR --to lora writes the names without it",
        Run(names_are_written_plainly),
    ),
    (
        "-o DIR --to lora -m BASE leaves out what is a copy",
        Run(copies_of_the_base_are_left_out),
    ),
    (
        "-o DIR --to lora -m BASE leaves it out",
        Run(copies_of_the_base_are_left_out),
    ),
    (
        "give the base with -m to compare the names",
        Run(names_are_compared),
    ),
    ("(--json lists all)", Run(all_problems_are_listed)),
    (
        "monteclora collapse writes the posterior mean as plain LoRA",
        Run(collapse_for_a_runtime),
    ),
    (
        "monteclora collapse turns float64 into float32",
        Run(collapse_for_a_runtime),
    ),
    (
        "monteclora collapse writes one file",
        Run(collapse_for_a_runtime),
    ),
    (
        "monteclora collapse drops the name",
        Run(collapse_for_a_runtime),
    ),
    (
        "convert it: monteclora convert --to gguf",
        Run(convert_for_a_runtime),
    ),
    (
        "convert it: monteclora convert --to lora",
        Run(convert_for_a_runtime),
    ),
    (
        "use the adapter's with --chat-template",
        By(
            "tests/it/beside.rs",
            "tokenizer_and_template_are_carried_along_and_the_rest_is_named",
        ),
    ),
    (
        "or compare both with `monteclora eval`",
        Run(another_base_is_compared),
    ),
    ("use --dtype f32 to keep it", Run(a_small_update_is_kept)),
];

pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub(super) fn changed(
    dir: &Path,
    name: &str,
    change: impl FnOnce(&mut Value, &mut BTreeMap<String, Tensor>),
) -> PathBuf {
    let (from, to) = (PathBuf::from(own_adapter("plain-lora")), dir.join(name));
    std::fs::create_dir_all(&to).unwrap();
    let config = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let file = SafetensorsFile::open(from.join("adapter_model.safetensors")).unwrap();
    let named = |name: &str| (name.to_owned(), file.get(name).unwrap());
    let mut tensors = file.names().map(named).collect();
    change(&mut config, &mut tensors);
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
    write_safetensors(
        to.join("adapter_model.safetensors"),
        tensors,
        &BTreeMap::new(),
    )
    .unwrap();
    to
}

fn fixes(path: &Path, runtime: &str) -> Vec<String> {
    let found = run(&["validate", text(path), "--for", runtime, "--json"]);
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    let problems = found["problems"].as_array().unwrap().iter();
    problems
        .map(|problem| problem["fix"].as_str().unwrap().to_owned())
        .collect()
}

fn collapse_for_a_runtime() {
    let dir = scratch();
    let rslora = changed(dir.path(), "rslora", |config, _| {
        config["use_rslora"] = json!(true)
    });
    let wide = changed(dir.path(), "f64", |_, tensors| {
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F64).unwrap();
        }
    });
    let named = changed(dir.path(), "named", |_, tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| (name.replace(".weight", ".mine.weight"), tensor))
            .collect();
    });
    let sharded = changed(dir.path(), "sharded", |_, _| ());
    let (one, shard) = (
        "adapter_model.safetensors",
        "adapter_model-00001-of-00001.safetensors",
    );
    std::fs::rename(sharded.join(one), sharded.join(shard)).unwrap();
    for (path, runtime, expected) in [
        (
            &rslora,
            "mistralrs",
            "monteclora collapse writes the posterior mean",
        ),
        (&wide, "mistralrs", "turns float64 into float32"),
        (&named, "vllm", "drops the name"),
        (&sharded, "vllm", "writes one file"),
    ] {
        let advised = fixes(path, runtime);
        assert!(
            advised.iter().any(|fix| fix.contains(expected)),
            "{advised:?}"
        );
        let out = path.with_extension("plain");
        ok(&["collapse", text(path), "-o", text(&out)]);
        ok(&["validate", text(&out), "-m", &tiny(), "--for", runtime]);
    }
}

fn convert_for_a_runtime() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (base, plain) = (tiny(), own_adapter("plain-lora"));
    let (mlx, gguf) = (at("mlx"), at("a.gguf"));
    ok(&["convert", &plain, "-o", text(&mlx), "--to", "mlx"]);
    assert!(fixes(&mlx, "llamacpp")[0].contains("convert --to gguf"));
    ok(&[
        "convert",
        text(&mlx),
        "-o",
        text(&gguf),
        "--to",
        "gguf",
        "-m",
        &base,
    ]);
    ok(&["validate", text(&gguf), "--for", "llamacpp"]);
    assert!(
        fixes(Path::new(&plain), "mlx")
            .iter()
            .any(|fix| fix.contains("convert --to mlx"))
    );
    ok(&["validate", text(&mlx), "--for", "mlx"]);
    assert!(fixes(&gguf, "vllm")[0].contains("convert --to lora"));
    let lora = at("lora");
    ok(&[
        "convert",
        text(&gguf),
        "-o",
        text(&lora),
        "--to",
        "lora",
        "-m",
        &base,
    ]);
    ok(&["validate", text(&lora), "--for", "vllm"]);
}

fn another_base_is_compared() {
    let dir = scratch();
    let path = changed(dir.path(), "tuned", |_, _| ());
    let record = json!({"base": {"model_id": "org/base", "fingerprint": "0123456789abcdef"}});
    std::fs::write(path.join("run.json"), record.to_string()).unwrap();
    let base = tiny();
    let told = ok(&["validate", text(&path), "-m", &base]);
    assert!(
        told.stdout.contains("compare both with `monteclora eval`"),
        "{}",
        told.stdout
    );
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    let scores = answer(&[
        "eval",
        "-m",
        &base,
        "-a",
        text(&path),
        "--data",
        text(&rows),
    ]);
    assert!(
        scores["base"]["loss"].is_number() && scores["mean"]["loss"].is_number(),
        "{scores}"
    );
}

fn a_small_update_is_kept() {
    let dir = scratch();
    let path = dir.path().join("small");
    let mut adapter = Adapter::read(Path::new(&own_adapter("plain-lora"))).unwrap();
    for site in &mut adapter.sites {
        let values = site
            .lora_b
            .to_f32()
            .unwrap()
            .iter()
            .map(|x| x * 1e-6)
            .collect();
        site.lora_b = Tensor::from_f32(site.lora_b.shape(), values).unwrap();
    }
    adapter.write_peft(&path, false).unwrap();
    // What is below the rounding of bf16 is lost on weights that are of that type.
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    let plain = own_adapter("plain-lora");
    ok(&[
        "merge",
        "-m",
        &tiny(),
        "-a",
        &plain,
        "-o",
        text(&base),
        "--dtype",
        "bf16",
    ]);
    let merge = |more: &[&str]| {
        let arguments = [
            "merge",
            "-m",
            text(&base),
            "-a",
            text(&path),
            "-o",
            text(&out),
            "--force",
        ];
        ok(&[&arguments[..], more].concat()).stderr
    };
    let told = merge(&[]);
    assert!(told.contains("use --dtype f32 to keep it"), "{told}");
    let told = merge(&["--dtype", "f32"]);
    assert!(!told.contains("to keep it"), "{told}");
}

fn names_are_written_plainly() {
    let dir = scratch();
    for name in ["orig-mod-inside", "double-wrapped"] {
        let path = data("cases/formats").join(name);
        let told = run(&["validate", text(&path)]);
        assert!(
            told.stdout.contains("writes the names without it"),
            "{name}: {}{}",
            told.stdout,
            told.stderr
        );
        let out = dir.path().join(name);
        ok(&["convert", text(&path), "-o", text(&out), "--to", "lora"]);
        ok(&[
            "validate",
            text(&out),
            "-m",
            &tiny(),
            "--for",
            "vllm",
            "--for",
            "peft",
        ]);
    }
}

fn the_mean_is_taken_alone() {
    let dir = scratch();
    let (from, path) = (
        PathBuf::from(own_adapter("monteclora")),
        dir.path().join("lost"),
    );
    std::fs::create_dir(&path).unwrap();
    std::fs::copy(
        from.join("adapter_model.safetensors"),
        path.join("adapter_model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["monteclora_config"] = Value::Null;
    std::fs::write(path.join("adapter_config.json"), config.to_string()).unwrap();
    let told = run(&["convert", text(&path), "-o", "unused", "--to", "lora"]);
    assert!(
        told.code == 4 && told.stderr.contains("--from lora --to lora"),
        "{}",
        told.stderr
    );
    let (mean, expected) = (dir.path().join("mean"), dir.path().join("expected"));
    ok(&[
        "convert",
        text(&path),
        "-o",
        text(&mean),
        "--from",
        "lora",
        "--to",
        "lora",
    ]);
    ok(&["collapse", text(&from), "-o", text(&expected)]);
    let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes(&mean), bytes(&expected));
}

fn a_tied_head_is_merged_for_mlx() {
    let dir = scratch();
    let (path, base) = (
        data("cases/formats/lmhead-tied"),
        data("cases/bases/base-tied"),
    );
    let (mlx, merged) = (dir.path().join("mlx"), dir.path().join("merged"));
    let told = run(&[
        "convert",
        text(&path),
        "-o",
        text(&mlx),
        "--to",
        "mlx",
        "-m",
        text(&base),
    ]);
    assert!(
        told.code == 4 && told.stderr.contains("monteclora merge"),
        "{}",
        told.stderr
    );
    ok(&[
        "merge",
        "-m",
        text(&base),
        "-a",
        text(&path),
        "-o",
        text(&merged),
    ]);
}

fn copies_of_the_base_are_left_out() {
    let dir = scratch();
    let (path, base) = (
        data("cases/formats/lmhead-untied"),
        data("cases/bases/base-untied"),
    );
    let told = run(&["validate", text(&path)]);
    assert!(
        told.stdout.contains("leaves out what is a copy"),
        "{}{}",
        told.stdout,
        told.stderr
    );
    let told = run(&["validate", text(&path), "-m", text(&base), "--for", "vllm"]);
    assert!(
        told.stdout.contains("-m BASE leaves it out"),
        "{}{}",
        told.stdout,
        told.stderr
    );
    let out = dir.path().join("out");
    ok(&[
        "convert",
        text(&path),
        "-o",
        text(&out),
        "--to",
        "lora",
        "-m",
        text(&base),
    ]);
    let told = run(&["validate", text(&out), "-m", text(&base), "--for", "vllm"]);
    assert!(!told.stdout.contains("leaves it out"), "{}", told.stdout);
}

fn names_are_compared() {
    let dir = scratch();
    let bare = data("cases/formats/automodel-real");
    let causal = dir.path().join("causal");
    copy(&bare, &causal);
    let config = std::fs::read_to_string(causal.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["task_type"] = json!("CAUSAL_LM");
    std::fs::write(causal.join("adapter_config.json"), config.to_string()).unwrap();
    for (path, code) in [(data("cases/formats/vl-names"), 0), (bare, 0), (causal, 4)] {
        let told = run(&["validate", text(&path)]);
        assert_eq!(told.code, code, "{}{}", told.stdout, told.stderr);
        assert!(
            told.stdout.contains("with -m to compare the names"),
            "{}",
            told.stdout
        );
        let compared = run(&["validate", text(&path), "-m", &tiny()]);
        assert!(
            !compared.stdout.contains("to compare the names"),
            "{}",
            compared.stdout
        );
    }
}

fn all_problems_are_listed() {
    let dir = scratch();
    let path = changed(dir.path(), "heads", |_, _| ());
    for idx in 0..25 {
        std::fs::write(path.join(format!("head-{idx}.bin")), "").unwrap();
    }
    let told = run(&["validate", text(&path)]);
    assert!(
        told.stdout.contains("(--json lists all)"),
        "{}",
        told.stdout
    );
    let listed = run(&["validate", text(&path), "--json"]).stdout;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["problems"].as_array().unwrap().len(), 25);
}
