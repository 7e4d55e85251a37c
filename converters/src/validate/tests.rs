use super::*;
use crate::fixtures;

fn codes(adapter: &Adapter, runtime: Runtime) -> Vec<&'static str> {
    let problems = validate(adapter, None, &[runtime]).expect("float");
    problems.iter().map(|problem| problem.code).collect()
}

#[test]
fn what_write_lora_gives_is_accepted_everywhere() {
    for case in &fixtures::low_rank() {
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        let (plain, _) = adapter.to_lora(None).expect("float");
        assert_eq!(
            validate(&plain, Some(&base), &Runtime::OF_PEFT).expect("float"),
            [],
            "{}",
            case.name
        );
        assert_eq!(
            validate(&adapter, Some(&base), &[Runtime::Peft]).expect("float"),
            []
        );
    }
}

#[test]
fn each_runtime_names_what_it_cannot_do() {
    let mut adapter = fixtures::small_adapter(20, true);
    adapter.config.use_rslora = true;
    adapter.config.rank_pattern = [("q_proj".to_owned(), 2)].into();
    adapter.config.alpha_pattern = [("q_proj".to_owned(), 2.0)].into();
    adapter.sites[0].lora_a = adapter.sites[0].lora_a.to_dtype(DType::F64).expect("float");
    assert_eq!(codes(&adapter, Runtime::Peft), [""; 0]);
    assert_eq!(
        codes(&adapter, Runtime::Mistralrs),
        ["rslora", "alpha-pattern", "rank-pattern", "dtype"]
    );
    assert_eq!(
        codes(&adapter, Runtime::Mistralrs09),
        ["monteclora", "dtype"]
    );
    assert_eq!(
        codes(&adapter, Runtime::Vllm),
        ["monteclora", "alpha-pattern", "rank-pattern"]
    );
    assert_eq!(
        codes(&adapter, Runtime::LlamaCpp),
        ["monteclora", "rslora", "alpha-pattern"]
    );
    adapter.config.target_modules = TargetModules::AllLinear;
    adapter.config.layers_to_transform = Some(vec![1]);
    let found = codes(&adapter, Runtime::Mistralrs);
    let n_forms = found
        .iter()
        .filter(|code| **code == "target-modules-form")
        .count();
    assert_eq!(n_forms, 2);
}

#[test]
fn rank_limits_the_head_and_zero_effect_are_reported() {
    let mut adapter = fixtures::small_adapter(21, false)
        .to_lora(None)
        .expect("float")
        .0;
    let site = &mut adapter.sites[0];
    let with_rank = |site: &mut crate::Site, rank: usize| {
        let ones = |shape: [usize; 2]| {
            crate::Tensor::from_f32(&shape, vec![1.0; shape[0] * shape[1]]).expect("sized")
        };
        (site.rank, site.lora_a, site.lora_b) = (rank, ones([rank, 5]), ones([3, rank]));
    };
    with_rank(site, 17);
    site.name = OUTPUT_HEAD.into();
    assert_eq!(codes(&adapter, Runtime::Vllm), ["rank-limit", "lm-head"]);
    assert_eq!(codes(&adapter, Runtime::Mistralrs09), ["lm-head"]);
    assert_eq!(codes(&adapter, Runtime::LlamaCpp), ["lm-head"]);
    let fix = |adapter: &Adapter| {
        let problems = validate(adapter, None, &[Runtime::Vllm]).expect("float");
        problems[0].fix.clone()
    };
    assert!(fix(&adapter).ends_with("--max-lora-rank 32"));
    with_rank(&mut adapter.sites[0], 513);
    assert!(fix(&adapter).contains("lower rank"));
    adapter.sites.clear();
    assert_eq!(codes(&adapter, Runtime::Peft), ["no-effect"]);
}

#[test]
fn formats_that_a_runtime_does_not_read_are_named_with_the_conversion() {
    let mut adapter = fixtures::small_adapter(22, false);
    adapter.format = "mlx";
    for runtime in Runtime::ALL {
        let expected: &[&str] = match runtime {
            Runtime::Mlx => &[],
            _ => &["format"],
        };
        assert_eq!(codes(&adapter, runtime), expected, "{runtime}");
    }
    adapter.format = "gguf-lora";
    for runtime in Runtime::ALL {
        let expected: &[&str] = match runtime {
            Runtime::LlamaCpp => &[],
            _ => &["format"],
        };
        assert_eq!(codes(&adapter, runtime), expected, "{runtime}");
    }
}

/// A plain export, with `rename` applied to every tensor name.
fn write_renamed(dir: &Path, rename: impl Fn(&str) -> String) {
    let (plain, _) = fixtures::small_adapter(23, false)
        .to_lora(None)
        .expect("float");
    plain.write_peft(dir, true).expect("written");
    let path = dir.join(peft_read::WEIGHTS_FILE);
    let file = crate::SafetensorsFile::open(&path).expect("our own output");
    let tensors: Vec<_> = file
        .names()
        .filter_map(|name| Some((rename(name), file.get(name)?)))
        .collect();
    crate::write_safetensors(&path, tensors, &Default::default()).expect("written");
}

fn codes_at(dir: &Path, runtime: Runtime) -> Vec<&'static str> {
    let problems = validate_path(dir, None, &[runtime]).expect("readable");
    problems.iter().map(|problem| problem.code).collect()
}

#[test]
fn the_form_of_the_files_counts_too() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_renamed(dir.path(), str::to_owned);
    for runtime in Runtime::OF_PEFT {
        assert_eq!(codes_at(dir.path(), runtime), [""; 0], "{runtime}");
    }
    write_renamed(dir.path(), |name| {
        name.replace(".weight", ".default.weight")
    });
    assert_eq!(codes_at(dir.path(), Runtime::Peft), [""; 0]);
    assert_eq!(codes_at(dir.path(), Runtime::Mistralrs), ["adapter-name"]);
    write_renamed(dir.path(), |name| name.replace(".weight", ".other.weight"));
    assert_eq!(codes_at(dir.path(), Runtime::Mistralrs09), [""; 0]);
    assert_eq!(codes_at(dir.path(), Runtime::Peft), ["adapter-name"]);
    let whole = dir.path().join(peft_read::WEIGHTS_FILE);
    std::fs::rename(
        whole,
        dir.path().join("adapter_model-00001-of-00001.safetensors"),
    )
    .expect("there");
    assert_eq!(
        codes_at(dir.path(), Runtime::Vllm),
        ["sharded", "adapter-name"]
    );
}

#[test]
fn what_cannot_be_read_is_reported_with_its_fate_in_each_runtime() {
    for case in fixtures::must_be_refused() {
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let here = validate_path(&case.dir, Some(&base), &[]).expect("a report");
        assert!(!here.is_empty(), "{}", case.name);
        let all = validate_path(&case.dir, Some(&base), &Runtime::ALL).expect("a report");
        assert!(all.starts_with(&here), "{}", case.name);
    }
    assert!(
        validate_path(Path::new("absent"), None, &[])
            .expect_err("nothing there")
            .is_not_found()
    );
}
