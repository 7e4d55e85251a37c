//! Names of tensors that are not the base's, and whole weights beside the adapter: the cases, and some more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::cases;
use crate::fixtures;
use crate::{
    Adapter, Error, ModelFiles, Problem, ReadOptions, Runtime, SafetensorsFile, Tensor, format_of,
    validate_path, write_safetensors,
};

fn case(name: &str) -> PathBuf {
    cases::case(&format!("formats/{name}"))
}

fn base(name: &str) -> ModelFiles {
    let dir = match name {
        "tiny-llama" => fixtures::named("plain-lora").model_dir,
        name => cases::case(&format!("bases/{name}")),
    };
    ModelFiles::open(dir).expect("a model")
}

fn problems_of<T>(read: Result<T, Error>) -> Vec<Problem> {
    match read {
        Ok(_) => Vec::new(),
        Err(error) => error.problems().to_vec(),
    }
}

/// Problems without and with the base.
fn both(name: &str, base_name: &str) -> [Vec<Problem>; 2] {
    let base = base(base_name);
    let of =
        |base| validate_path(&case(name), base, &[Runtime::Peft, Runtime::Vllm]).expect("a report");
    [of(None), of(Some(&base))]
}

fn unwrapping() -> ReadOptions<'static> {
    ReadOptions {
        unwrap: true,
        ..ReadOptions::default()
    }
}

#[test]
fn wrappers_are_named_and_convert_reads_through_them() {
    for (name, segment) in [
        ("orig-mod-inside", "`_orig_mod.`"),
        ("double-wrapped", "`base_model.model.`"),
        ("default-default", "more than once"),
    ] {
        for problems in both(name, "tiny-llama") {
            let here: Vec<_> = problems
                .iter()
                .filter(|problem| problem.code == "wrapped-name")
                .collect();
            assert_eq!(here.len(), 1, "{name}: {problems:?}");
            assert!(
                here[0].message.contains(segment) && here[0].at.contains("(and 11 more)"),
                "{}",
                here[0]
            );
            assert!(
                problems
                    .iter()
                    .all(|problem| problem.code == "wrapped-name"),
                "{problems:?}"
            );
        }
        let path = case(name);
        let read = format_of(&path)
            .read(&path, &unwrapping())
            .expect("the names inside");
        assert_eq!(
            read.check_against(&base("tiny-llama")).expect("no pattern"),
            []
        );
        assert!(read.notes[0].contains("12 tensors"), "{:?}", read.notes);
    }
}

#[test]
fn names_of_another_kind_of_model_are_told_from_the_bases() {
    for (name, base_name, prefix) in [
        ("vl-names", "tiny-llama", "`model.language_model.layers.`"),
        ("automodel-real", "base-untied", "no prefix (`layers.`)"),
    ] {
        let [_, with_base] = both(name, base_name);
        assert_eq!(with_base.len(), 1, "{with_base:?}");
        assert_eq!(with_base[0].code, "unknown-site");
        assert!(
            with_base[0].message.contains(prefix)
                && with_base[0].message.contains("`model.layers.`"),
            "{}",
            with_base[0]
        );
    }
}

#[test]
fn layers_that_the_base_lacks_are_counted() {
    let [without, with_base] = both("layer-gap", "tiny-llama");
    assert_eq!(without, []);
    assert_eq!(with_base[0].code, "unknown-site");
    assert!(
        with_base[0]
            .message
            .contains("the base has 3 layers, 0 to 2"),
        "{}",
        with_base[0]
    );
}

#[test]
fn one_cause_is_reported_once() {
    let [float_rank, _] = both("float-rank", "tiny-llama");
    assert_eq!(float_rank.len(), 1, "{float_rank:?}");
    assert_eq!(
        (float_rank[0].at.as_str(), float_rank[0].code),
        ("r", "config-value")
    );
    let [experts, _] = both("moe-target-parameters", "base-moe");
    assert_eq!(experts.len(), 1, "{experts:?}");
    assert_eq!(experts[0].code, "target-parameters");
    // A rank that no tensor has is the configuration's fault alone.
    let scratch = tempfile::tempdir().expect("temporary directory");
    let dir = edited(
        "float-rank",
        scratch.path(),
        |config| config["r"] = 8.into(),
        str::to_owned,
    );
    let problems = validate_path(&dir, None, &[]).expect("a report");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0]
            .message
            .starts_with("8, but lora_A has 4 rows in all 6 modules"),
        "{}",
        problems[0]
    );
}

#[test]
fn patterns_that_match_nothing_are_noted() {
    let adapter = Adapter::read(&case("alpha-full-prefix")).expect("readable");
    assert_eq!(adapter.notes.len(), 1, "{:?}", adapter.notes);
    assert!(adapter.notes[0].starts_with(
        "alpha_pattern: `base_model.model.model.layers.0.self_attn.q_proj` matches no module"
    ));
    assert!(adapter.notes[0].ends_with("do not begin with base_model.model."));
    let scratch = tempfile::tempdir().expect("temporary directory");
    let dir = edited(
        "alpha-full-prefix",
        scratch.path(),
        |config| {
            config["alpha_pattern"] = serde_json::json!({"q_proj": 4});
            config["rank_pattern"] = serde_json::json!({"layers.7.self_attn.q_proj": 3});
            config["target_modules"] = serde_json::json!(["q_proj", "v_proj", "vproj"]);
        },
        str::to_owned,
    );
    let notes = Adapter::read(&dir).expect("readable").notes;
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[0].starts_with("rank_pattern: `layers.7")
            && notes[1].starts_with("target_modules: `vproj`")
    );
}

#[test]
fn whole_weights_are_the_bases_or_refused() {
    for (name, base_name, copies) in [
        ("lmhead-untied", "base-untied", 1),
        ("lmhead-tied", "base-tied", 1),
        ("embed-saved", "base-untied", 2),
    ] {
        let path = case(name);
        let problems = problems_of(Adapter::read(&path));
        assert_eq!(problems.len(), copies, "{problems:?}");
        assert!(
            problems
                .iter()
                .all(|problem| problem.code == "stored-weight"
                    && problem.message.contains("only the base tells"))
        );
        let base = base(base_name);
        let adapter = Adapter::read_on(&path, &base).expect("copies of the base's");
        assert_eq!(adapter.notes.len(), copies, "{:?}", adapter.notes);
        assert_eq!(adapter.check_against(&base).expect("no pattern"), []);
        // Of another model, they are other weights.
        let other = match base_name {
            "base-tied" => "base-untied",
            _ => "base-tied",
        };
        let problems = problems_of(Adapter::read_on(&path, &self::base(other)));
        assert!(
            problems
                .iter()
                .any(|problem| problem.code == "modules-to-save"
                    && problem.message.contains(" of 2048 values")),
            "{problems:?}"
        );
    }
}

#[test]
fn copies_stay_in_the_files_that_other_runtimes_read() {
    for (name, base_name) in [
        ("lmhead-untied", "base-untied"),
        ("embed-saved", "base-untied"),
    ] {
        let codes = |runtime| -> Vec<&str> {
            let problems =
                validate_path(&case(name), Some(&base(base_name)), &[runtime]).expect("a report");
            problems
                .iter()
                .map(|problem| problem.code)
                .filter(|code| *code == "stored-weight")
                .collect()
        };
        assert_eq!(codes(Runtime::Vllm), ["stored-weight"]);
        assert_eq!(codes(Runtime::Peft), [""; 0]);
    }
    // A pattern without effect may be left unread.
    let problems =
        validate_path(&case("alpha-full-prefix"), None, &[Runtime::Vllm]).expect("a report");
    assert_eq!(problems, []);
}

#[test]
fn trained_and_resized_weights_are_told_from_copies() {
    let base = base("base-untied");
    let scratch = tempfile::tempdir().expect("temporary directory");
    for (idx, (rows, message)) in [
        (64, "differs from the base's in 64 of 2048"),
        (66, "was resized"),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = scratch.path().join(idx.to_string());
        copy(&case("embed-saved"), &dir);
        let path = dir.join("adapter_model.safetensors");
        let file = SafetensorsFile::open(&path).expect("readable");
        let name = "base_model.model.lm_head.weight";
        let tensors: Vec<(String, Tensor)> = file
            .names()
            .map(|tensor| (tensor.to_owned(), file.get(tensor).expect("listed")))
            .map(|(tensor, value)| match tensor == name {
                false => (tensor, value),
                true => {
                    let mut values = value.to_f32().expect("float");
                    // Two trained rows, whether they stand for old tokens or for new ones.
                    values.truncate(62 * 32);
                    values.resize(rows * 32, 0.75);
                    (
                        tensor,
                        Tensor::from_f32(&[rows, 32], values).expect("sized"),
                    )
                }
            })
            .collect();
        write_safetensors(&path, tensors, &BTreeMap::new()).expect("written");
        let problems = problems_of(Adapter::read_on(&dir, &base));
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].message.contains(message), "{}", problems[0]);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("writable");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(from.join(name), to.join(name)).expect("copied");
    }
}

/// A copy of a case with `edit` applied to its configuration and `rename` to its tensors.
fn edited(
    name: &str,
    dir: &Path,
    edit: impl FnOnce(&mut serde_json::Value),
    rename: impl Fn(&str) -> String,
) -> PathBuf {
    let dir = dir.join("adapter");
    copy(&case(name), &dir);
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("readable");
    let mut config = serde_json::from_str(&text).expect("JSON");
    edit(&mut config);
    std::fs::write(&path, config.to_string()).expect("writable");
    let path = dir.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&path).expect("readable");
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|tensor| (rename(tensor), file.get(tensor).expect("listed")))
        .collect();
    write_safetensors(&path, tensors, &BTreeMap::new()).expect("written");
    dir
}

#[test]
fn every_wrapper_around_peft_or_inside_is_named() {
    let base = base("tiny-llama");
    for (segment, at) in [
        ("_orig_mod.", "base_model."),
        ("module.", "base_model."),
        ("_forward_module.", "base_model."),
        ("_fsdp_wrapped_module.", "self_attn."),
        ("_checkpoint_wrapped_module.", "self_attn."),
        ("_orig_mod.", "q_proj."),
    ] {
        let scratch = tempfile::tempdir().expect("temporary directory");
        let insert = |name: &str| name.replacen(at, &format!("{segment}{at}"), 1);
        let dir = edited(
            "float-rank",
            scratch.path(),
            |config| config["r"] = 4.into(),
            insert,
        );
        let problems = validate_path(&dir, Some(&base), &[Runtime::Peft]).expect("a report");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].message.contains(segment), "{}", problems[0]);
        let read = format_of(&dir)
            .read(&dir, &unwrapping())
            .expect("the names inside");
        assert_eq!(read.check_against(&base).expect("no pattern"), []);
    }
}

#[test]
fn merging_an_adapted_head_unties_it() {
    let base = base("base-tied");
    let adapter = Adapter::read_on(&case("lmhead-tied"), &base).expect("a copy of the base's");
    let scratch = tempfile::tempdir().expect("temporary directory");
    for (dtype, name) in [(None, "same"), (Some(crate::DType::BF16), "bf16")] {
        let out = scratch.path().join(name);
        let report =
            crate::merge_dir(&base, &adapter, &out, dtype, &Default::default()).expect("it fits");
        assert!(report.untied);
        let merged = ModelFiles::open(&out).expect("our own output");
        assert!(!merged.ties_embeddings());
        let values = |name: &str| merged.get(name).expect("there").to_f32().expect("float");
        let embedding = base
            .get("model.embed_tokens.weight")
            .expect("there")
            .to_f32()
            .expect("float");
        let site = adapter
            .sites
            .iter()
            .find(|site| site.name == "lm_head")
            .expect("adapted");
        let delta = site.delta_f32().expect("float");
        let tolerance = if dtype.is_some() { 0.02 } else { 1e-6 };
        for ((head, before), delta) in values("lm_head.weight").iter().zip(&embedding).zip(&delta) {
            assert!((head - before - delta).abs() <= tolerance);
        }
        let kept = values("model.embed_tokens.weight");
        assert!(
            kept.iter()
                .zip(&embedding)
                .all(|(kept, before)| (kept - before).abs() <= tolerance)
        );
    }
    let overlay = scratch.path().join("overlay.safetensors");
    crate::write_overlay(&base, &adapter, &overlay).expect("it fits");
    let file = SafetensorsFile::open(&overlay).expect("our own output");
    assert!(
        file.get("lm_head.weight").is_some() && file.get("model.embed_tokens.weight").is_none()
    );
}

#[test]
fn what_names_depend_on_is_said_without_a_base() {
    let of = |name: &str, runtimes: &[Runtime]| {
        crate::examine(&case(name), None, runtimes).expect("a report")
    };
    let media = of("vl-names", &[Runtime::Peft]);
    assert_eq!(media.problems, []);
    assert_eq!(media.warnings.len(), 1, "{:?}", media.warnings);
    assert!(
        media.warnings[0].message.contains("text and other media")
            && media.warnings[0].at.ends_with("(and 5 more)")
    );
    assert_eq!(
        of("vl-names", &[Runtime::Mistralrs]).problems[0].code,
        "unknown-site"
    );
    let headless = of("automodel-real", &[Runtime::Vllm]);
    assert!(headless.problems.is_empty() && headless.warnings[0].message.contains("AutoModel"));
    let experts = of("moe-per-expert", &[Runtime::Peft]);
    assert_eq!(experts.warnings[0].code, "experts");
    // A causal language model has no such names.
    let scratch = tempfile::tempdir().expect("temporary directory");
    let causal = |config: &mut serde_json::Value| config["task_type"] = "CAUSAL_LM".into();
    let dir = edited("automodel-real", scratch.path(), causal, str::to_owned);
    let found = crate::examine(&dir, None, &[]).expect("a report");
    assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
    assert!(
        found.problems[0].message.contains("`model.` is missing"),
        "{}",
        found.problems[0]
    );
}

#[test]
fn experts_as_modules_are_not_written_for_mlx() {
    let adapter = Adapter::read(&case("moe-per-expert")).expect("readable");
    let scratch = tempfile::tempdir().expect("temporary directory");
    let out = scratch.path().join("out");
    let mlx = crate::format_named("mlx").expect("known");
    let problems = problems_of(mlx.write(&adapter, &out, &crate::LoraOptions::default(), None));
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].at.contains("experts.0.down_proj (and 23 more)"),
        "{}",
        problems[0]
    );
    assert!(!out.exists());
}

#[test]
fn what_is_written_for_mlx_is_what_mlx_loads() {
    let scratch = tempfile::tempdir().expect("temporary directory");
    let mlx = crate::format_named("mlx").expect("known");
    let codes = |path: &Path, base: Option<&ModelFiles>| -> Vec<&str> {
        let problems = validate_path(path, base, &[Runtime::Mlx]).expect("a report");
        problems.iter().map(|problem| problem.code).collect()
    };
    assert_eq!(codes(&case("moe-per-expert"), None), ["format"]);
    let base = base("base-tied");
    let adapter = Adapter::read_on(&case("lmhead-tied"), &base).expect("a copy of the base's");
    let out = scratch.path().join("tied");
    mlx.write(&adapter, &out, &crate::LoraOptions::default(), None)
        .expect("written");
    assert_eq!(codes(&out, Some(&base)), ["lm-head"]);
    let plain = Adapter::read(&case("alpha-full-prefix")).expect("readable");
    let out = scratch.path().join("plain");
    mlx.write(&plain, &out, &crate::LoraOptions::default(), None)
        .expect("written");
    assert_eq!(codes(&out, None), [""; 0]);
}

#[test]
fn heads_of_another_number_are_other_shapes() {
    let mut config = base("tiny-llama").config().clone();
    config["num_attention_heads"] = 8.into();
    config["num_key_value_heads"] = 2.into();
    config.shift_remove("head_dim");
    let shape = crate::architecture::ModelShape::from_config(&config).expect("a model");
    let adapter = Adapter::read_dir(&fixtures::named("all-linear").dir).expect("an adapter");
    let problems = adapter
        .check_modules(&shape.linear_modules())
        .expect("no pattern");
    assert!(
        problems
            .iter()
            .any(|problem| problem.code == "shape" && problem.at.contains("k_proj")),
        "{problems:?}"
    );
    let same =
        crate::architecture::ModelShape::from_config(base("tiny-llama").config()).expect("a model");
    assert_eq!(
        adapter
            .check_modules(&same.linear_modules())
            .expect("no pattern"),
        []
    );
}

#[test]
fn the_mean_is_read_without_what_is_left_of_a_posterior() {
    let scratch = tempfile::tempdir().expect("temporary directory");
    let from = fixtures::named("monteclora").dir;
    let dir = scratch.path().join("adapter");
    copy(&from, &dir);
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).expect("readable");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["monteclora_config"] = serde_json::Value::Null;
    std::fs::write(&path, config.to_string()).expect("writable");
    let weights = dir.join("adapter_model.safetensors");
    let file = SafetensorsFile::open(&weights).expect("readable");
    let mut tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|tensor| (tensor.to_owned(), file.get(tensor).expect("listed")))
        .collect();
    let sampler = Tensor::from_f32(&[1], vec![0.0]).expect("sized");
    let name = "base_model.model.model.layers.0.self_attn.q_proj.mc_sampler.x";
    tensors.push((name.to_owned(), sampler));
    write_safetensors(&weights, tensors, &BTreeMap::new()).expect("written");
    let codes: Vec<_> = problems_of(Adapter::read(&dir))
        .iter()
        .map(|problem| problem.code)
        .collect();
    assert_eq!(codes, ["unknown-tensor", "posterior-undeclared"]);
    let lora = crate::format_named("lora").expect("known");
    let mean = crate::read_as(lora, &dir, &ReadOptions::default()).expect("the mean");
    let expected = Adapter::read_dir(&from).expect("an adapter").collapse();
    assert_eq!(mean.fingerprint(), expected.fingerprint());
}

#[test]
fn what_lies_beside_as_a_dead_link_or_in_the_base_is_named() {
    let scratch = tempfile::tempdir().expect("temporary directory");
    let base_dir = scratch.path().join("base");
    std::fs::create_dir(&base_dir).expect("made");
    let base = base("tiny-llama");
    for entry in std::fs::read_dir(base.dir()).expect("listed") {
        let entry = entry.expect("readable");
        std::fs::copy(entry.path(), base_dir.join(entry.file_name())).expect("copied");
    }
    std::fs::write(base_dir.join("adapter_config.json"), "{}").expect("written");
    let adapter = Adapter::read(&case("alpha-full-prefix")).expect("readable");
    let out = scratch.path().join("merged");
    let base = ModelFiles::open(&base_dir).expect("a model");
    let report =
        crate::merge_dir(&base, &adapter, &out, None, &Default::default()).expect("it fits");
    assert_eq!(report.not_copied, ["adapter_config.json"]);
    assert!(!out.join("adapter_config.json").exists());

    #[cfg(unix)]
    {
        let dir = scratch.path().join("adapter");
        copy(&case("alpha-full-prefix"), &dir);
        std::os::unix::fs::symlink("../blobs/none", dir.join("new_embeddings.safetensors"))
            .expect("linked");
        let problems = problems_of(Adapter::read(&dir));
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(
            (problems[0].code, &*problems[0].at),
            ("missing-file", "new_embeddings.safetensors")
        );
    }
}
