//! Laws of the formats, over random adapters with random configurations: what is written is read again, as far as the
//! format can hold it, and a merge gives the same weights whatever format the adapter went through.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::adapter::{Adapter, Site, SitePosterior};
use crate::config::{AdapterConfig, ExcludeModules, MonteCloraSettings, TargetModules};
use crate::fixtures::Stream;
use crate::formats::Format;
use crate::formats::gguf_lora::GgufLora;
use crate::formats::lora::LoraOptions;
use crate::formats::mlx::Mlx;
use crate::merge::merge_dir;
use crate::model_files::ModelFiles;
use crate::targets::Matcher;
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::safetensors_write::write_safetensors;
use crate::tensors::tensor::Tensor;
use crate::validate::runtime::Runtime;
use crate::validate::validate_path;

const N_LAYERS: usize = 3;
const HIDDEN: usize = 6;
const VOCABULARY: usize = 11;
/// Leaf, inputs, outputs; two heads of four rows for q, one for k and v.
const LEAVES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, 8),
    ("self_attn.k_proj", HIDDEN, 4),
    ("self_attn.v_proj", HIDDEN, 4),
    ("self_attn.o_proj", 8, HIDDEN),
    ("mlp.gate_proj", HIDDEN, 10),
    ("mlp.up_proj", HIDDEN, 10),
    ("mlp.down_proj", 10, HIDDEN),
];
const WEIGHTS: &str = "adapter_model.safetensors";

fn modules() -> Vec<(String, usize, usize)> {
    let mut modules = vec![("lm_head".to_owned(), HIDDEN, VOCABULARY)];
    for layer in 0..N_LAYERS {
        for (leaf, n_in, n_out) in LEAVES {
            modules.push((format!("model.layers.{layer}.{leaf}"), n_in, n_out));
        }
    }
    modules.sort();
    modules
}

fn base_config(model_type: &str) -> Map<String, Value> {
    let config = json!({
        "model_type": model_type, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": false,
    });
    config.as_object().expect("an object").clone()
}

/// A base with every module and an embedding.
fn write_base(dir: &Path, model_type: &str, seed: u64, dtype: DType) -> ModelFiles {
    let mut stream = Stream(seed);
    let mut tensors: BTreeMap<String, Tensor> = modules()
        .into_iter()
        .map(|(name, n_in, n_out)| {
            (
                format!("{name}.weight"),
                stream.tensor(&[n_out, n_in], dtype),
            )
        })
        .collect();
    let embedding = stream.tensor(&[VOCABULARY, HIDDEN], dtype);
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    fs::create_dir(dir).expect("writable");
    let config = Value::Object(base_config(model_type)).to_string();
    fs::write(dir.join("config.json"), config).expect("writable");
    write_safetensors(dir.join("model.safetensors"), tensors, &BTreeMap::new()).expect("written");
    ModelFiles::open(dir).expect("our own output")
}

fn leaf_names() -> impl Strategy<Value = Vec<String>> {
    prop::sample::subsequence(&LEAVES[..], 1..=LEAVES.len()).prop_map(|leaves| {
        let mut names: Vec<String> = leaves
            .iter()
            .map(|(leaf, _, _)| leaf.rsplit('.').next().unwrap_or(leaf).to_owned())
            .collect();
        names.sort();
        names
    })
}

fn targets() -> impl Strategy<Value = TargetModules> {
    prop_oneof![
        leaf_names().prop_map(TargetModules::List),
        leaf_names().prop_map(|mut names| {
            names.push("lm_head".into());
            names.sort();
            TargetModules::List(names)
        }),
        prop::sample::subsequence(modules(), 1..6).prop_map(|some| {
            TargetModules::List(some.into_iter().map(|(name, _, _)| name).collect())
        }),
        leaf_names().prop_map(|names| TargetModules::Regex(format!(
            r".*\.[02]\..*\.(?:{})",
            names.join("|")
        ))),
        Just(TargetModules::AllLinear),
    ]
}

fn pattern_keys() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(&["q_proj", "up_proj", "lm_head", "mlp.down_proj"][..])
            .prop_map(str::to_owned),
        (0..N_LAYERS).prop_map(|layer| format!(r"model\.layers\.{layer}\..*")),
        Just(r"model\.layers\.1\.self_attn\.(?!q_proj).*".to_owned()),
    ]
}

prop_compose! {
    fn configs()(
        r in 1usize..6,
        lora_alpha in prop_oneof![(1u8..40).prop_map(f64::from), 0.1f64..9.0],
        lora_dropout in 0f64..1.0,
        target_modules in targets(),
        exclude_modules in prop::option::of(prop_oneof![
            leaf_names().prop_map(|mut names| {
                names.truncate(2);
                ExcludeModules::List(names)
            }),
            Just(ExcludeModules::Regex(r".*\.1\.mlp\..*".into())),
        ]),
        layers in prop::option::of((
            prop::collection::vec(0..N_LAYERS, 1..3),
            prop::option::of(Just(vec!["layers".to_owned()])),
        )),
        rank_pattern in prop::collection::vec((pattern_keys(), 1usize..6), 0..3),
        alpha_pattern in prop::collection::vec(
            (pattern_keys(), prop_oneof![(1u8..40).prop_map(f64::from), 0.1f64..9.0]),
            0..3,
        ),
        use_rslora in any::<bool>(),
        num_samples in prop::option::of(1usize..5),
    ) -> AdapterConfig {
        let layers = layers.filter(|_| matches!(target_modules, TargetModules::List(_)));
        AdapterConfig {
            base_model_name_or_path: Some("base".into()),
            task_type: Some("CAUSAL_LM".into()),
            r,
            lora_alpha,
            lora_dropout,
            target_modules,
            exclude_modules,
            layers_to_transform: layers.clone().map(|(numbers, _)| numbers),
            layers_pattern: layers.and_then(|(_, pattern)| pattern),
            rank_pattern: rank_pattern.into_iter().collect(),
            alpha_pattern: alpha_pattern.into_iter().collect(),
            use_rslora,
            inference_mode: true,
            monteclora: num_samples.map(|num_samples| MonteCloraSettings {
                num_samples,
                ..MonteCloraSettings::default()
            }),
            ..AdapterConfig::default()
        }
    }
}

/// The adapter that `config` asks for, with values and element types from `seed`; none if it targets nothing.
fn adapter(config: &AdapterConfig, seed: u64) -> Option<Adapter> {
    let mut stream = Stream(seed);
    let matcher = Matcher::new(config).expect("valid patterns");
    let mut sites = Vec::new();
    for (name, n_in, n_out) in modules() {
        if !matcher.matches(&name).expect("valid patterns") {
            continue;
        }
        let rank = config.rank_for(&name).expect("valid patterns");
        let mut any_type = || [DType::F32, DType::F16, DType::BF16][stream.below(3)];
        let (type_a, type_b) = (any_type(), any_type());
        sites.push(Site {
            rank,
            alpha: config.alpha_for(&name).expect("valid patterns"),
            scaling: config.scaling_for(&name).expect("valid patterns"),
            lora_a: stream.tensor(&[rank, n_in], type_a),
            lora_b: stream.tensor(&[n_out, rank], type_b),
            beyond: None,
            triplets: None,
            posterior: config.monteclora.as_ref().map(|settings| SitePosterior {
                log_std: stream.tensor(&[rank], DType::F32),
                log_concentration: stream.tensor(&[settings.num_samples], DType::F32),
            }),
            name,
        });
    }
    let names: Vec<&str> = sites.iter().map(|site: &Site| site.name.as_str()).collect();
    let notes = config.without_effect(&names).expect("plain patterns");
    (!sites.is_empty()).then(|| Adapter {
        config: config.clone(),
        sites,
        format: config.peft_format(),
        metadata: BTreeMap::from([
            ("format".into(), "pt".into()),
            ("note".into(), "kept".into()),
        ]),
        notes,
    })
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).expect("readable")
}

/// Largest difference of two models' weights.
fn worst_difference(left: &ModelFiles, right: &ModelFiles) -> f32 {
    let mut worst = 0f32;
    for name in left.names() {
        let values = |files: &ModelFiles| {
            let tensor = files.get(name).expect("the same tensors");
            tensor.to_f32().expect("float")
        };
        for (x, y) in values(left).iter().zip(&values(right)) {
            worst = worst.max((x - y).abs());
        }
    }
    worst
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn peft_holds_everything(config in configs(), seed in any::<u64>()) {
        let Some(adapter) = adapter(&config, seed) else { return Ok(()) };
        let dir = tempfile::tempdir().expect("temporary directory");
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        adapter.write_peft(&first, false).expect("written");
        let read = Adapter::read(&first).expect("our own output");
        prop_assert_eq!(&read, &adapter);
        // The sampler's last draw is no part of the posterior: with another one the file is written as before.
        let file = SafetensorsFile::open(first.join(WEIGHTS)).expect("our own output");
        let mut stream = Stream(seed);
        let redrawn: Vec<(String, Tensor)> = file
            .names()
            .map(|name| {
                let tensor = file.get(name).expect("listed");
                let is_state = name.ends_with("gaussian_var_prior") || name.ends_with("expert_weights");
                let tensor = if is_state { stream.tensor(tensor.shape(), DType::F32) } else { tensor };
                (name.to_owned(), tensor)
            })
            .collect();
        let metadata = file.metadata().clone();
        let original = bytes(&first.join(WEIGHTS));
        write_safetensors(first.join(WEIGHTS), redrawn, &metadata).expect("written");
        Adapter::read(&first).expect("good").write_peft(&second, false).expect("written");
        prop_assert_eq!(original, bytes(&second.join(WEIGHTS)));
    }

    #[test]
    fn plain_forms_hold_the_mean_and_merge_alike(
        config in configs(),
        seed in any::<u64>(),
        model_type in prop::sample::select(&["llama", "mistral", "qwen2", "qwen3"][..]),
        base_type in prop::sample::select(&[DType::F32, DType::BF16][..]),
    ) {
        let Some(adapter) = adapter(&config, seed) else { return Ok(()) };
        let dir = tempfile::tempdir().expect("temporary directory");
        let at = |name: &str| dir.path().join(name);
        let base = write_base(&at("base"), model_type, seed, base_type);
        let (plain, report) = adapter.to_lora(None).expect("float");

        let options = LoraOptions::default();
        adapter.write_lora(&at("lora"), &options).expect("written");
        let lora = Adapter::read(&at("lora")).expect("our own output");
        prop_assert_eq!(&lora, &plain);
        lora.write_lora(&at("lora-again"), &options).expect("written");
        for file in ["adapter_config.json", WEIGHTS] {
            prop_assert_eq!(bytes(&at("lora").join(file)), bytes(&at("lora-again").join(file)));
        }
        for (before, after) in adapter.sites.iter().zip(&lora.sites) {
            let is_changed = report.baked.contains(&before.name) || report.padded.contains(&before.name);
            if !is_changed {
                prop_assert_eq!(before.lora_a.bytes(), after.lora_a.bytes());
                prop_assert_eq!(before.lora_b.bytes(), after.lora_b.bytes());
            }
        }
        // mistral.rs 0.9 and vLLM may object to the head, the others and everything else must be content.
        let problems = validate_path(&at("lora"), Some(&base), &Runtime::OF_PEFT).expect("readable");
        prop_assert!(problems.iter().all(|problem| problem.code == "lm-head"), "{:?}", problems);

        Mlx.write(&adapter, &at("mlx"), &options, None).expect("written");
        let mlx = Adapter::read(&at("mlx")).expect("our own output");
        prop_assert_eq!(&mlx.sites, &plain.sites);
        prop_assert_eq!(&mlx.metadata["note"], "kept");

        let gguf_path = at("adapter.gguf");
        GgufLora.write(&adapter, &gguf_path, &LoraOptions::default(), Some(base.config())).expect("written");
        let gguf = Adapter::read_for(&gguf_path, base.config()).expect("our own output");
        prop_assert_eq!(&gguf.sites, &plain.sites);

        // With the merge's own float32 arithmetic on both sides, only a baked scale may differ, by one rounding of B.
        merge_dir(&base, &adapter, &at("merged"), Some(DType::F32), &Default::default()).expect("it fits");
        let direct = ModelFiles::open(at("merged")).expect("our own output");
        let largest = adapter.sites.iter().map(|site| site.scaling.abs() as f32 * site.rank as f32).fold(1.0, f32::max);
        for (name, read) in [("lora", lora), ("mlx", mlx), ("gguf", gguf)] {
            prop_assert_eq!(read.check_against(&base).expect("plain names"), []);
            let out = at(&format!("merged-{name}"));
            merge_dir(&base, &read, &out, Some(DType::F32), &Default::default()).expect("it fits");
            let worst = worst_difference(&direct, &ModelFiles::open(&out).expect("our own output"));
            prop_assert!(worst <= 4e-7 * largest, "{}: {} with scaling {}", name, worst, largest);
        }
    }
}
