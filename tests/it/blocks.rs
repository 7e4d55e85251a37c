//! Bases in blocks of quantised values: to the bit what their float32 import computes, trains and records.

mod cache;
mod mlx;

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use monteclora::gguf_import::{ImportOptions, import_gguf, refer_to_gguf};
use monteclora::model::{
    ActiveAdapter, Decoder, GenerationSettings, ModuleId, PassOptions, Sequences,
};
use monteclora_adapters::weights::{AUTO, AUTO_BF16, BF16, F32, Kind};
use monteclora_adapters::{LowRank, Precision};
use monteclora_converters::{BLOCK_FORMATS, ModelFiles, base_fingerprint};

use crate::cli::{Run, monteclora, ok, outcome, run_toml, text};

fn below_data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(path)
}

/// A model with a matrix in blocks of every format.
fn every_type() -> PathBuf {
    below_data("gguf/llama-every-type.gguf")
}

/// The same model with all of its matrices in blocks of one format, tied or with a head of its own.
fn in_blocks_of(format: GgmlDType, has_head: bool, dir: &Path) -> PathBuf {
    let mut file = File::open(every_type()).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    for name in names {
        let held = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let values = held.dequantize(&Device::Cpu).unwrap();
        let to = match values.rank() {
            1 => GgmlDType::F32,
            _ => format,
        };
        if name == "token_embd.weight" && has_head {
            let head = (values.affine(-0.7, 0.01)).unwrap();
            tensors.push((
                "output.weight".to_owned(),
                QTensor::quantize(&head, to).unwrap(),
            ));
        }
        tensors.push((name.clone(), QTensor::quantize(&values, to).unwrap()));
    }
    let path = dir.join(format!("{format:?}-{has_head}.gguf"));
    let metadata: Vec<(&str, &gguf_file::Value)> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut out = File::create(&path).unwrap();
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
    path
}

/// Files of every kind: one with all formats, and one for each.
fn files(dir: &Path) -> Vec<PathBuf> {
    use GgmlDType::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let formats = [
        F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K,
    ];
    assert_eq!(formats.len(), BLOCK_FORMATS.len());
    let each = formats.into_iter().enumerate();
    let mut files: Vec<PathBuf> = each
        .map(|(idx, format)| in_blocks_of(format, idx % 2 == 0, dir))
        .collect();
    files.push(every_type());
    files
}

/// What refers to `file`, and its import.
fn both(file: &Path, dir: &Path) -> [PathBuf; 2] {
    let [described, imported] = ["described", "imported"].map(|name| dir.join(name));
    refer_to_gguf(file, &described, &mut |_, _| {}).unwrap();
    import_gguf(file, &imported, &ImportOptions::default(), &mut |_, _| {}).unwrap();
    [described, imported]
}

fn values(seed: f32, rows: usize, columns: usize) -> candle_core::Tensor {
    let values: Vec<f32> = (0..rows * columns)
        .map(|idx| ((idx as f32 + seed) * 0.37).sin() * 0.1)
        .collect();
    candle_core::Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

fn bits(tensor: &candle_core::Tensor) -> Vec<u32> {
    let flat = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat.iter().map(|value| value.to_bits()).collect()
}

/// What a decoder computes whose weights are held so.
fn load(dir: &Path, kind: &'static Kind, precision: Precision) -> (Vec<Vec<u32>>, Vec<u32>) {
    let decoder = Decoder::load_as(dir, &Device::Cpu, kind).unwrap();
    computed(&decoder.with_precision(precision))
}

/// Losses, gradients and logits of a decoder with an adapter on every module, as bits, and the tokens that it goes on with.
fn computed(decoder: &Decoder) -> (Vec<Vec<u32>>, Vec<u32>) {
    let modules: Vec<_> = ModuleId::all(decoder.config()).collect();
    let adapter = ActiveAdapter::new(modules.iter().enumerate().map(|(idx, (id, module))| {
        let low_rank = LowRank {
            a: values(idx as f32, 3, module.in_features),
            b: values(idx as f32 + 0.5, module.out_features, 3),
            scaling: 2.0,
        };
        (*id, low_rank)
    }));
    let sequences = Sequences::new(&[(5..45).collect::<Vec<u32>>(), vec![1, 2, 3]]);
    let targets: Vec<(usize, u32)> = (0..39).map(|at| (at, at as u32 + 6)).collect();
    let mut all = vec![bits(&decoder.logits(&sequences, &adapter).unwrap())];
    for checkpointing in [false, true] {
        let options = PassOptions {
            dropout: None,
            checkpointing,
        };
        let loss = decoder
            .loss_and_gradients(&sequences, &targets, &adapter, 0.1, options)
            .unwrap();
        all.push(loss.nll.iter().map(|value| value.to_bits()).collect());
        let gradients = loss.gradients.unwrap();
        for (id, module) in &modules {
            let of_factors = gradients.get(*id);
            let of_factors = of_factors.unwrap_or_else(|| panic!("{}", module.name));
            all.extend(of_factors.iter().map(bits));
        }
    }
    let settings = GenerationSettings {
        max_new_tokens: 12,
        stop_tokens: Vec::new(),
        batch_size: 1,
    };
    let generated = decoder
        .generate(&[vec![9, 8, 7]], &adapter, &settings, |_| {})
        .unwrap();
    (all, generated[0].tokens.clone())
}

#[test]
fn blocks_compute_what_their_float32_import_does_to_the_bit() {
    let scratch = tempfile::tempdir().unwrap();
    for file in files(scratch.path()) {
        let dir = tempfile::tempdir().unwrap();
        let name = file.display();
        let [described, imported] = both(&file, dir.path());
        let [blocks, dense] = [&described, &imported].map(|dir| ModelFiles::open(dir).unwrap());
        assert!(blocks.check().unwrap().is_empty(), "{name}");
        assert!(blocks.blocks().is_some() && dense.blocks().is_none());
        assert_eq!(
            base_fingerprint(&blocks),
            base_fingerprint(&dense),
            "{name}"
        );
        let (single, bf16) = (Precision::Single, Precision::Bf16);
        let found = load(&described, &AUTO, single);
        assert_eq!(found, load(&imported, &AUTO, single), "{name}");
        assert_eq!(
            found,
            load(&described, &F32, single),
            "{name}: decoded at once"
        );
        assert!(found.0.iter().all(|of| of.iter().any(|bits| *bits != 0)));
        let found = load(&described, &AUTO_BF16, bf16);
        assert_eq!(found, load(&imported, &BF16, bf16), "{name}: bf16");
        assert_eq!(found, load(&imported, &AUTO_BF16, bf16), "{name}: bf16");
    }
}

/// A command with a cache of its own.
fn with_cache(cache: &Path, arguments: &[&str]) -> Run {
    let mut command = monteclora();
    command.env("MONTECLORA_CACHE", cache).args(arguments);
    outcome(&mut command)
}

/// As [`with_cache`], of a command that succeeds.
fn ok_with_cache(cache: &Path, arguments: &[&str]) -> Run {
    let done = with_cache(cache, arguments);
    assert_eq!(
        done.code, 0,
        "{arguments:?}: {}{}",
        done.stdout, done.stderr
    );
    done
}

/// A run of `model`; its adapter and what run.json says of the base.
fn trained(dir: &Path, model: &Path, set: &[&str]) -> (Vec<u8>, serde_json::Value) {
    let out = dir.join("out");
    let config = run_toml(dir, "", "", "learning_rate = 1e-2");
    let model = format!("model.model_id={:?}", text(model));
    let mut arguments = vec!["train", "-c", text(&config), "--set", &model];
    arguments.extend(set.iter().flat_map(|set| ["--set", set]));
    ok_with_cache(&dir.join("cache"), &arguments);
    let adapter = std::fs::read(out.join("adapter_model.safetensors")).unwrap();
    let record = std::fs::read_to_string(out.join("run.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    (adapter, record["base"].clone())
}

#[test]
fn a_gguf_file_trains_to_the_adapter_that_its_import_trains_to() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = ["blocks", "dense"].map(|name| dir.path().join(name));
    dirs.iter()
        .for_each(|dir| std::fs::create_dir(dir).unwrap());
    let imported = dir.path().join("imported");
    import_gguf(
        &every_type(),
        &imported,
        &ImportOptions::default(),
        &mut |_, _| {},
    )
    .unwrap();
    for set in [
        &[][..],
        &["train.bf16=true", "train.gradient_checkpointing=true"],
    ] {
        let (adapter, base) = trained(&dirs[0], &every_type(), set);
        let (expected, of_import) = trained(&dirs[1], &imported, set);
        assert!(adapter == expected, "{set:?}");
        assert_eq!(base["fingerprint"], of_import["fingerprint"]);
        assert_eq!(base["sample"], of_import["sample"]);
        assert_eq!(base["model_id"], text(&every_type()));
        // No weight was copied into the cache.
        let cached = files_below(&dirs[0].join("cache"));
        assert!(cached.iter().all(|path| !path.ends_with("safetensors")));
        for out in &dirs {
            std::fs::remove_dir_all(out.join("out")).unwrap();
        }
    }
}

fn files_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path.display().to_string()),
        }
    }
    found
}

/// Every command that reads a base says of the file what it says of its import.
#[test]
fn commands_take_the_file_as_they_take_its_import() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (cache, imported, rows) = (at("cache"), at("imported"), at("rows.jsonl"));
    ok(&["import-gguf", text(&every_type()), "-o", text(&imported)]);
    let (adapter, _) = trained(dir.path(), &imported, &[]);
    assert!(!adapter.is_empty());
    let out = at("out");
    let mut compared = 0;
    for command in [
        &["eval", "--data", text(&rows), "-a", text(&out)][..],
        &["eval", "--data", text(&rows), "--dtype", "bf16"],
        &[
            "predict",
            "--prompt",
            "what is red",
            "-a",
            text(&out),
            "--max-tokens",
            "4",
        ],
        &["data", "stats", text(&rows)],
        &["validate", text(&out)],
    ] {
        let said = [&every_type(), &imported].map(|model| {
            let done = ok_with_cache(&cache, &[command, &["-m", text(model), "--json"]].concat());
            let mut said: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
            forget(&mut said);
            said
        });
        assert_eq!(said[0], said[1], "{command:?}");
        compared += 1;
    }
    assert_eq!(compared, 5);
    // The GGUF file is the base of a GGUF LoRA without an import.
    let [ours, theirs] = [(&every_type(), "a.gguf"), (&imported, "b.gguf")].map(|(model, name)| {
        let (base, written) = (text(model), at(name));
        let arguments = ["convert", text(&out), "--to", "gguf", "-m", base, "-o"];
        ok_with_cache(&cache, &[&arguments[..], &[text(&written)]].concat());
        std::fs::read(written).unwrap()
    });
    assert!(ours == theirs);
    assert!(
        files_below(&cache)
            .iter()
            .all(|path| !path.ends_with("safetensors"))
    );
    let merged = at("merged");
    let (base, adapter, into) = (every_type(), text(&out), text(&merged));
    let refused = with_cache(
        &cache,
        &["merge", "-m", text(&base), "-a", adapter, "-o", into],
    );
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    let file = every_type();
    let named = [
        text(&file),
        "monteclora import-gguf",
        "--to gguf -m",
        "Q4_K",
    ];
    for named in named {
        assert!(
            refused.stderr.contains(named),
            "{named}: {}",
            refused.stderr
        );
    }
    assert!(!merged.exists());
    // What the refusal advises; the other half of it is done above.
    let base = text(&imported);
    ok(&["merge", "-m", base, "-a", text(&out), "-o", text(&merged)]);
}

/// Leaves out how long things took, and the path of the base.
fn forget(said: &mut serde_json::Value) {
    match said {
        serde_json::Value::Object(entries) => {
            entries.retain(|key, _| !key.ends_with("_s") && key != "seconds" && key != "model");
            entries.values_mut().for_each(forget);
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(forget),
        _ => {}
    }
}

#[test]
fn blocks_that_are_not_read_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (number, name) in [(20u32, "IQ4_NL"), (39, "MXFP4")] {
        let file = dir.path().join("model.gguf");
        let mut bytes = std::fs::read(in_blocks_of(GgmlDType::Q4_0, false, dir.path())).unwrap();
        // The type of a tensor stands behind its name, its number of dimensions and these.
        let at = b"blk.0.ffn_up.weight";
        let found = bytes.windows(at.len()).position(|window| window == at);
        let at = found.unwrap() + at.len() + 4 + 2 * 8;
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let cache = dir.path().join("cache");
        let done = with_cache(&cache, &["eval", "-m", text(&file), "--data", "rows.jsonl"]);
        assert!(
            done.code != 0 && done.stderr.contains(name),
            "{}",
            done.stderr
        );
        assert!(
            done.stderr.contains("blk.0.ffn_up.weight"),
            "{}",
            done.stderr
        );
    }
}

#[test]
fn the_plan_of_a_run_counts_blocks_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "");
    let file = in_blocks_of(GgmlDType::Q4K, true, dir.path());
    let model = format!("model.model_id={:?}", text(&file));
    let plan = |dtype: &str| {
        let dtype = format!("model.dtype={dtype:?}");
        let arguments = [
            "train",
            "-c",
            text(&config),
            "--set",
            &model,
            "--set",
            &dtype,
        ];
        let arguments = [&arguments[..], &["--dry-run", "--json"]].concat();
        let done = ok_with_cache(&dir.path().join("cache"), &arguments);
        serde_json::from_str::<serde_json::Value>(&done.stdout).unwrap()
    };
    let weights = |plan: &serde_json::Value| plan["memory"]["weights"].as_u64().unwrap();
    let (blocks, dense) = (plan("auto"), plan("f32"));
    let size = file.metadata().unwrap().len();
    assert!(weights(&blocks) < size && weights(&blocks) > size / 2);
    assert!(weights(&dense) > 6 * weights(&blocks));
}
