//! Recorded PEFT training runs of AdaLoRA and DoRA, step by step: losses, gradients, what is pruned, final values and logits. And what
//! becomes of an adapter that is more than B A.

use std::path::Path;

use candle_core::Device;
use monteclora::config::TrainConfig;
use monteclora::model::{Decoder, PassOptions, Sequences};
use monteclora::train::{AdamW, AdapterState};
use monteclora_adapters::methods::{self, Step, Value, in_loss};
use monteclora_converters::{Adapter, AdapterConfig, ModelFiles, SafetensorsFile, TargetModules};
use serde_json::{Value as Json, json};

use crate::cli::{json as output, ok, run, run_toml, text, tiny};
use crate::fixtures::{floats, integers, largest_difference, own, walk};

const METHODS: &str = "methods/";

/// A run under way.
struct Replay {
    case: Json,
    file: SafetensorsFile,
    decoder: Decoder,
    state: AdapterState,
}

impl Replay {
    fn new(dir: &Path) -> Self {
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let case: Json = serde_json::from_str(&read("case.json")).unwrap();
        let file = SafetensorsFile::open(dir.join("trajectory.safetensors")).unwrap();
        let models = own().join("models");
        let decoder = Decoder::load(&models.join(case["model"].as_str().unwrap()), &Device::Cpu);
        let decoder = decoder.unwrap();
        let name = case["method"].as_str().unwrap();
        let section = match name {
            "adalora" => json!({
                "target_r": case["target_r"], "tinit": case["tinit"], "tfinal": case["tfinal"],
                "delta_t": case["deltaT"], "beta1": case["beta1"], "beta2": case["beta2"],
                "orth_reg_weight": case["orth_reg_weight"],
            }),
            _ => Json::Null,
        };
        let method = (methods::find(name).unwrap().new)(&section).unwrap();
        let config = AdapterConfig {
            r: case["init_r"].as_u64().or(case["r"].as_u64()).unwrap() as usize,
            lora_alpha: case["lora_alpha"].as_f64().unwrap(),
            target_modules: TargetModules::List(
                ["q_proj", "v_proj", "down_proj"]
                    .map(str::to_owned)
                    .to_vec(),
            ),
            ..AdapterConfig::default()
        };
        let modules = Decoder::linear_modules(decoder.config());
        let names = config.resolve_targets(&modules).unwrap();
        let state =
            AdapterState::initial(method, &config, &names, decoder.config(), 0, &Device::Cpu);
        let mut state = state.unwrap();
        state.attach(&decoder, true, 0).unwrap();
        let mut replay = Self {
            case,
            file,
            decoder,
            state,
        };
        for idx in 0..replay.state.owners.len() {
            for part in 0..replay.state.owners[idx].values.len() {
                if let Some(values) = replay.recorded("init", idx, part) {
                    let parameter = replay.state.owners[idx].parameters[part].clone();
                    let shape = &parameter.shape;
                    let value = Value::new(parameter.storage, shape, values, &Device::Cpu);
                    replay.state.owners[idx].values[part] = value.unwrap();
                }
            }
        }
        replay
    }

    /// What the file has at `kind` of a value.
    fn recorded(&self, kind: &str, owner: usize, part: usize) -> Option<Vec<f32>> {
        let owner = &self.state.owners[owner];
        let name = match owner.parameters[part].name {
            "magnitude" => "lora_magnitude_vector",
            name => name,
        };
        let leaves = ["", ".weight"].map(|end| format!("{kind}.{}.{name}{end}", owner.name));
        let found = leaves.iter().find(|name| self.file.info(name).is_some());
        found.map(|name| floats(&self.file, name))
    }

    /// Compares every value of a kind, which `of` gives; the number of values that were recorded.
    fn compare(&self, kind: &str, tolerance: f64, of: impl Fn(usize, usize) -> Vec<f32>) -> usize {
        let mut n = 0;
        for (idx, owner) in self.state.owners.iter().enumerate() {
            for part in 0..owner.values.len() {
                let Some(expected) = self.recorded(kind, idx, part) else {
                    continue;
                };
                let largest = expected
                    .iter()
                    .fold(0f32, |largest, v| largest.max(v.abs()));
                let difference = largest_difference(&of(idx, part), &expected);
                let name = owner.parameters[part].name;
                assert!(
                    difference <= tolerance * f64::from(largest.max(1e-6)),
                    "{kind} {} {name}: {difference}, largest {largest}",
                    owner.name
                );
                n += 1;
            }
        }
        n
    }
}

fn flat(value: &Value) -> Vec<f32> {
    value.to_format().unwrap().to_f32().unwrap()
}

fn replay(dir: &Path) {
    let mut run = Replay::new(dir);
    let rows: Vec<Vec<u32>> = integers(&run.file, "input_ids")
        .into_iter()
        .map(|row| row.into_iter().map(|id| id as u32).collect())
        .collect();
    let sequences = Sequences::new(&rows);
    let mut targets = Vec::new();
    for (index, row) in integers(&run.file, "labels").iter().enumerate() {
        for position in 1..row.len() {
            if row[position] >= 0 {
                targets.push((index * row.len() + position - 1, row[position] as u32));
            }
        }
    }
    let n_steps = run.case["steps"].as_u64().unwrap();
    let losses = floats(&run.file, "losses");
    let columns = losses.len() / n_steps as usize;
    let prunes = run.file.info("budgets").is_some();
    let mut optimizer = AdamW::new(&run.state).unwrap();
    let scale = 1.0 / targets.len() as f64;
    let weighting = run.state.weighting(1.0, targets.len() as u64);
    let method = run.state.method.clone();
    let modules = run.state.described();
    assert!(!modules.is_empty());
    for step in 0..n_steps {
        let drawn = run.state.draw(0, step, &weighting).unwrap();
        let options = PassOptions::default();
        let loss = run
            .decoder
            .loss_and_gradients(&sequences, &targets, &drawn.active, scale, options)
            .unwrap();
        let metrics = drawn.metrics(&run.state);
        let regulariser = in_loss(method.kind().metrics, &metrics);
        let task = loss.total() * scale;
        let expected = &losses[step as usize * columns..][..columns];
        for (ours, theirs) in [task, regulariser, task + regulariser].iter().zip(expected) {
            let off = (ours - f64::from(*theirs)).abs();
            assert!(off < 1e-4, "step {step}: {ours} against {theirs}");
        }
        let gradients = drawn
            .backward(&run.state, loss.gradients.as_ref().unwrap())
            .unwrap();
        if step == 0 {
            let n = run.compare("grad0", 1e-3, |owner, part| flat(&gradients[owner][part]));
            assert!(n >= 3 * modules.len(), "{n}");
        }
        let settings = TrainConfig {
            weight_decay: 0.0,
            ..TrainConfig::default()
        };
        optimizer
            .step(&settings, &mut run.state, &gradients, 1e-2, 1e-2)
            .unwrap();
        let made = Step {
            index: step,
            total: n_steps,
            trained_tokens: targets.len(),
            epoch_tokens: targets.len() as u64,
        };
        method
            .after_step(&modules, &mut run.state.owners, &gradients, made)
            .unwrap();
        // Singular values that are pruned are exactly zero, and the same ones.
        let n = run.compare(&format!("step{step}"), 1e-3, |owner, part| {
            flat(&run.state.owners[owner].values[part])
        });
        assert_eq!(n > 0, prunes);
        for (idx, owner) in run.state.owners.iter().enumerate().filter(|_| n > 0) {
            let part = owner
                .parameters
                .iter()
                .position(|p| p.name == "lora_E")
                .unwrap();
            let expected = run.recorded(&format!("step{step}"), idx, part).unwrap();
            for (ours, theirs) in flat(&owner.values[part]).iter().zip(expected) {
                assert_eq!(*ours == 0.0, theirs == 0.0, "step {step} {}", owner.name);
            }
        }
    }
    let n = run.compare("final", 1e-3, |owner, part| {
        flat(&run.state.owners[owner].values[part])
    });
    assert!(n >= 3 * modules.len(), "{n}");
    let mean = run.state.mean().unwrap();
    let logits = run.decoder.logits(&sequences, &mean).unwrap();
    let difference = largest_difference(
        &flat(&Value::Tensor(logits)),
        &floats(&run.file, "final_logits"),
    );
    assert!(difference < 1e-3, "final logits differ by {difference}");
}

#[test]
fn every_recorded_run_of_another_method_is_reproduced() {
    for dir in walk(METHODS) {
        replay(&dir);
    }
}

/// A run.toml of `method` on the tiny model, with dropout, and its directory.
fn config(method: &str, train: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let targets = match method {
        "lorta" => "target_modules = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]\n",
        _ => "target_modules = [\"q_proj\", \"down_proj\"]\n",
    };
    let section = match method {
        "adalora" => "[lora.adalora]\ntarget_r = 2\ntinit = 1\ntfinal = 1\n",
        "sara" => "[lora.sara]\nrank_weight = 0.01\n",
        _ => "",
    };
    let lora = format!("method = {method:?}\nlora_dropout = 0.2\n{targets}{section}");
    let train = format!("learning_rate = 5e-2\nper_device_train_batch_size = 2\n{train}");
    let path = run_toml(dir.path(), "", &lora, &train);
    (dir, path)
}

/// Every method goes on from a checkpoint to the bytes of an undisturbed run, its own statistics included.
#[test]
fn every_method_resumes_to_the_bit() {
    for method in methods::METHODS {
        let adapter =
            |dir: &Path| std::fs::read(dir.join("out/adapter_model.safetensors")).unwrap();
        let (whole, path) = config(method.name, "save_steps = 3");
        let steps = ["--set", "train.max_steps=8"];
        ok(&[&["train", "-c", text(&path)][..], &steps].concat());
        // The run ends at the checkpoint of step 3, as if it had been killed after it.
        let out = whole.path().join("out");
        let undisturbed = adapter(whole.path());
        for name in ["checkpoint-6", "checkpoint-8"] {
            std::fs::remove_dir_all(out.join(name)).unwrap();
        }
        let record = std::fs::read_to_string(out.join("run.json")).unwrap();
        let mut record: Json = serde_json::from_str(&record).unwrap();
        record["finished_step"] = Json::Null;
        std::fs::write(out.join("run.json"), record.to_string()).unwrap();
        std::fs::remove_file(out.join("adapter_model.safetensors")).unwrap();
        let resumed = [
            &["train", "-c", text(&path), "--resume", "auto"][..],
            &steps,
        ]
        .concat();
        ok(&resumed);
        assert!(adapter(whole.path()) == undisturbed, "{}", method.name);
    }
}

/// AdaLoRA ends at its budget where all scores are equal, and no adapter from before the final choice is the best.
#[test]
fn adalora_keeps_its_budget() {
    for (more, best) in [
        (&["lora.adalora.beta1=0.0"][..], None),
        (
            &[
                "lora.adalora.tinit=6",
                "train.learning_rate=0.3",
                "train.eval_steps=1",
            ],
            Some(12),
        ),
    ] {
        let (dir, path) = config("adalora", "");
        let rows = dir.path().join("valid.jsonl");
        crate::training::write_rows(&rows);
        let valid = format!("data.valid={rows:?}");
        let mut words = vec![
            "train",
            "-c",
            text(&path),
            "--set",
            "train.max_steps=12",
            "--set",
            &valid,
        ];
        for key in more {
            words.extend(["--set", key]);
        }
        let said = output(&words);
        match best {
            Some(best) => assert_eq!(said["best_step"], best, "{said}"),
            None => {
                let adapter = Adapter::read_dir(&dir.path().join("out")).unwrap();
                let ranks: Vec<usize> = adapter.sites.iter().map(|site| site.rank).collect();
                assert!(ranks.iter().all(|rank| *rank == 2), "{ranks:?}");
            }
        }
    }
}

/// "all-linear" means for LoRTA the modules that it can adapt; a name may be spelt as its paper has it; keys without effect are told.
#[test]
fn methods_take_what_they_can() {
    let (dir, path) = config("lora", "");
    let whole = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole
        .lines()
        .filter(|line| !line.starts_with("target_modules"))
        .collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    let train = |method: &str| {
        let method = format!("lora.method={method:?}");
        let found = run(&["train", "-c", text(&path), "--set", &method, "--force"]);
        assert_eq!(found.code, 0, "{}", found.stderr);
        found.stderr
    };
    train("LoRTA");
    let adapter = Adapter::read_dir(&dir.path().join("out")).unwrap();
    let leaf =
        |site: &monteclora_converters::Site| site.name.rsplit('.').next().unwrap().to_owned();
    let mut leaves: Vec<String> = adapter.sites.iter().map(leaf).collect();
    leaves.sort();
    leaves.dedup();
    assert_eq!(leaves, ["k_proj", "o_proj", "q_proj", "v_proj"]);
    let said = train("ssf");
    assert!(
        said.contains("method \"ssf\" does not read lora."),
        "{said}"
    );
    assert!(!train("second_order").contains("lora_dropout"));
    let card = std::fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    assert!(
        !card.contains("PeftModel") && card.contains("monteclora merge"),
        "{card}"
    );
}

/// What is trained answers alike as it is and merged into its base, whatever the method; and is a plain LoRA exactly where the
/// method says so.
#[test]
fn every_method_merges_and_collapses_as_it_says() {
    for method in methods::METHODS {
        let (dir, path) = config(method.name, "");
        ok(&["train", "-c", text(&path), "--set", "train.max_steps=6"]);
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (base, out, data) = (tiny(), at("out"), at("rows.jsonl"));
        let adapter = Adapter::read(Path::new(&out)).unwrap();
        assert!(adapter.has_effect().unwrap(), "{}", method.name);
        let eval = [
            "eval",
            "-a",
            &out,
            "-m",
            &base,
            "--data",
            &data,
            "--no-base",
        ];
        let loss = |value: Json| {
            value["adapter"]["loss"]
                .as_f64()
                .or(value["mean"]["loss"].as_f64())
        };
        let own_loss = output(&eval);
        let own_loss = loss(own_loss.clone()).unwrap_or_else(|| panic!("{own_loss}"));
        ok(&["merge", "-m", &base, "-a", &out, "-o", &at("merged")]);
        let merged = output(&["eval", "-m", &at("merged"), "--data", &data]);
        let merged = merged["base"]["loss"].as_f64().unwrap();
        assert!(
            (merged - own_loss).abs() < 1e-4,
            "{}: {merged} {own_loss}",
            method.name
        );
        let collapsed = run(&["collapse", &out, "-o", &at("lora")]);
        match method.export {
            methods::Export::PlainLora => {
                assert_eq!(collapsed.code, 0, "{}: {}", method.name, collapsed.stderr);
                let plain = output(&[
                    "eval",
                    "-a",
                    &at("lora"),
                    "-m",
                    &base,
                    "--data",
                    &data,
                    "--no-base",
                ]);
                let plain = loss(plain).unwrap();
                assert!(
                    (plain - own_loss).abs() < 1e-5,
                    "{}: {plain} {own_loss}",
                    method.name
                );
            }
            methods::Export::MergeOnly => {
                assert_eq!(collapsed.code, 4, "{}: {}", method.name, collapsed.stderr);
                assert!(
                    collapsed
                        .stderr
                        .contains("monteclora merge -m BASE -a ADAPTER -o DIR")
                );
                assert!(!Path::new(&at("lora")).exists());
            }
        }
        let files = ModelFiles::open(Path::new(&base)).unwrap();
        assert_eq!(
            adapter.check_against(&files).unwrap(),
            [],
            "{}",
            method.name
        );
    }
}

/// Modules that a method cannot adapt, and adapters that it cannot go on with, are refused by name before training.
#[test]
fn what_a_method_cannot_do_is_refused_by_name() {
    let (dir, path) = config("lorta", "");
    let refused = |more: &[&str], code: i32, part: &str| {
        let all = [&["train", "-c", text(&path)][..], more].concat();
        let found = run(&all);
        assert_eq!(found.code, code, "{}", found.stderr);
        assert!(found.stderr.contains(part), "{}", found.stderr);
    };
    let all = ["--set", "lora.target_modules=[\"q_proj\", \"gate_proj\"]"];
    refused(&all, 2, "mlp.gate_proj");
    let phases = [
        "--set",
        "lora.method=\"adalora\"",
        "--set",
        "lora.adalora.target_r=1",
        "--set",
        "lora.adalora.tfinal=5",
        "--set",
        "train.max_steps=5",
    ];
    refused(&phases, 2, "leave no step for pruning in a run of 5 steps");
    let always = [
        "--set",
        "lora.method=\"ssf\"",
        "--set",
        "lora.ssf.shift=\"always\"",
    ];
    refused(&always, 2, "no bias");
    let target = [
        "--set",
        "lora.method=\"adalora\"",
        "--set",
        "lora.adalora.target_r=9",
    ];
    refused(&target, 2, "lora.adalora.target_r");
    let share = [
        "--set",
        "lora.method=\"sara\"",
        "--set",
        "lora.sara.fraction=1.5",
    ];
    refused(&share, 2, "lora.sara.fraction");
    let dora = own().join("adapters/dora");
    let from = format!("lora.init_from={dora:?}");
    let unlike = ["--set", "lora.method=\"lora\"", "--set", &from];
    refused(&unlike, 2, "peft-dora");
    let neat = ["--set", "lora.method=\"neat\"", "--set", &from];
    refused(&neat, 2, "not the values that method \"neat\" trains");
    // The remedy: the adapter becomes a part of the base.
    let merged = dir.path().join("merged").display().to_string();
    ok(&["merge", "-m", &tiny(), "-a", text(&dora), "-o", &merged]);
    let base = format!("model.model_id={merged:?}");
    ok(&[
        "train",
        "-c",
        text(&path),
        "--set",
        &base,
        "--set",
        "lora.method=\"neat\"",
    ]);
}
