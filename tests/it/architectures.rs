//! Every architecture that is supported computes what transformers and PEFT compute: logits, loss, gradients and updates. Every
//! other one is refused by name.

use candle_core::{Device, Tensor};
use monteclora::data::{ChoiceSet, ChoiceTokens};
use monteclora::eval::log_likelihoods;
use monteclora::model::{
    ActiveAdapter, Decoder, GenerationSettings, ModuleId, PassOptions, Sequences,
};
use monteclora_converters::architecture::{FAMILIES, RopeKind, WRAPPERS};
use monteclora_converters::{Adapter, FORMATS, ModelFiles, ReadOptions, SafetensorsFile};
use serde_json::Value;

use crate::cli::ok;
use crate::decoder::{logits, rows};
use crate::fixtures::{
    AdapterCase, architectures, assert_updates, devices, floats, integers, largest_difference, own,
    own_architectures, supported_architectures, written_and_read,
};

/// What the model asks for that may not be supported: its `model_type`, if no family has it, and the types of its rotary embeddings.
fn asked(case: &AdapterCase) -> Vec<String> {
    let config = std::fs::read_to_string(case.model.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let rope = &config["rope_parameters"];
    // Some families have one for each type of layer.
    let each = rope
        .as_object()
        .into_iter()
        .flat_map(|kinds| kinds.values());
    let ropes = [rope].into_iter().chain(each);
    let ropes = ropes.filter_map(|rope| rope.get("rope_type")?.as_str());
    let model_type = config["model_type"].as_str().unwrap();
    let families = FAMILIES.iter().map(|family| family.model_type);
    let wrappers = WRAPPERS.iter().map(|wrapper| wrapper.model_type);
    let is_known = families.chain(wrappers).any(|known| known == model_type);
    ropes
        .filter(|rope| *rope != "default")
        .chain((!is_known).then_some(model_type))
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for case in architectures() {
        let Err(error) = Decoder::load(&case.model, &Device::Cpu) else {
            continue;
        };
        let (error, asked) = (error.to_string(), asked(&case));
        assert!(
            asked.iter().any(|name| error.contains(name)),
            "{}: {error}, where it asks for {asked:?}",
            case.name
        );
    }
}

#[test]
fn every_architecture_of_the_projects_copy_is_supported() {
    for case in own_architectures() {
        let loaded = Decoder::load(&case.model, &Device::Cpu);
        assert!(loaded.is_ok(), "{}: {:?}", case.name, loaded.err());
    }
}

#[test]
fn logits_are_those_of_transformers_and_peft() {
    for (case, decoder) in cases_on_devices() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let rows = rows(&expected);
        for (adapter, name) in [
            (ActiveAdapter::default(), "base_logits"),
            (active(&case, &decoder), "logits"),
        ] {
            let found = logits(&decoder, &rows, &adapter);
            let difference = largest_difference(&found, &floats(&expected, name));
            assert!(difference <= 1e-4, "{}: {name}: {difference}", case.name);
        }
    }
}

#[test]
fn updates_are_those_of_peft() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let adapter = Adapter::read(&case.dir).unwrap();
        let mut recorded: Vec<&str> = expected
            .names()
            .filter_map(|name| name.strip_prefix("delta."))
            .collect();
        assert_updates(&case.name, &adapter, &expected);
        recorded.retain(|name| adapter.sites.iter().all(|site| site.name != *name));
        assert!(recorded.is_empty(), "{}: {recorded:?}", case.name);
    }
}

/// Loss and gradients of every A and B, with kept and with recomputed activations.
#[test]
fn loss_and_gradients_are_those_of_peft() {
    for (case, decoder) in cases_on_devices() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let adapter = active(&case, &decoder);
        let rows = rows(&expected);
        let mut targets = Vec::new();
        for (row, labels) in integers(&expected, "labels").iter().enumerate() {
            // Position p predicts the token behind it.
            for (position, label) in labels.iter().skip(1).enumerate() {
                if let Ok(label) = u32::try_from(*label) {
                    targets.push((row * labels.len() + position, label));
                }
            }
        }
        let scale = 1.0 / targets.len() as f64;
        for checkpointing in [false, true] {
            let options = PassOptions {
                checkpointing,
                ..PassOptions::default()
            };
            let loss = decoder
                .loss_and_gradients(&Sequences::new(&rows), &targets, &adapter, scale, options)
                .unwrap();
            let recorded = f64::from(floats(&expected, "loss")[0]);
            let found = loss.total() * scale;
            assert!(
                (found - recorded).abs() <= 1e-4,
                "{}: loss {found} against {recorded}",
                case.name
            );
            let gradients = loss.gradients.as_ref().unwrap();
            let mut n_compared = 0;
            for (id, module) in ModuleId::all(decoder.config()) {
                let Some([a, b]) = gradients.get(id) else {
                    continue;
                };
                for (leaf, found) in [("lora_A", a), ("lora_B", b)] {
                    let name = format!("grad.{}.{leaf}.weight", module.name);
                    close(&case.name, &name, found, &floats(&expected, &name));
                    n_compared += 1;
                }
            }
            let n_recorded = expected
                .names()
                .filter(|name| name.starts_with("grad."))
                .count();
            assert!(n_compared > 0, "{}", case.name);
            assert_eq!(n_compared, n_recorded, "{}", case.name);
        }
    }
}

/// What `merge` writes computes what base and adapter compute together.
#[test]
fn merged_models_give_the_logits_of_base_and_adapter() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let [base, adapter, out] =
            [&case.model, &case.dir, &out].map(|path| path.to_str().unwrap());
        ok(&["merge", "-m", base, "-a", adapter, "-o", out]);
        let merged = Decoder::load(out.as_ref(), &Device::Cpu).unwrap();
        let found = logits(&merged, &rows(&expected), &ActiveAdapter::default());
        let difference = largest_difference(&found, &floats(&expected, "logits"));
        assert!(difference <= 1e-4, "{}: {difference}", case.name);
    }
}

/// Token by token from the cache is what the whole text gives, across windows and positions.
#[test]
fn decoding_from_the_cache_is_the_whole_pass() {
    const N_TOKENS: usize = 12;
    for (case, decoder) in cases_on_devices() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let ropes = decoder.config().ropes.iter();
        let grows = |kind: &RopeKind| matches!(kind, RopeKind::Dynamic { .. });
        // Its keys keep the rotation of the length at which they were made, as in transformers.
        if ropes.map(|rope| &rope.kind).any(grows) {
            continue;
        }
        let adapter = active(&case, &decoder);
        let prompts: Vec<Vec<u32>> = rows(&expected)
            .iter()
            .zip([5, 30])
            .map(|(row, length)| row[..length].to_vec())
            .collect();
        let settings = GenerationSettings {
            max_new_tokens: N_TOKENS,
            stop_tokens: Vec::new(),
            batch_size: prompts.len(),
        };
        let answers = decoder
            .generate(&prompts, &adapter, &settings, |_| {})
            .unwrap();
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let mut text = prompt.clone();
            for token in &answer.tokens {
                let all = logits(&decoder, std::slice::from_ref(&text), &adapter);
                let last = &all[all.len() - decoder.config().vocab_size..];
                let largest = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // Of equal logits either may come first.
                let behind = largest - last[*token as usize];
                assert!(behind <= 1e-4, "{}: {behind} at {}", case.name, text.len());
                text.push(*token);
            }
            assert_eq!(answer.tokens.len(), N_TOKENS, "{}", case.name);
        }
    }
}

/// Sequences that begin alike share their beginning, and have the losses that they have alone.
#[test]
fn common_beginnings_change_no_loss() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let adapter = active(&case, &decoder);
        let vocab = decoder.config().vocab_size as u32;
        let mut sequences = Vec::new();
        for row in rows(&expected) {
            let turned = |from: usize| -> Vec<u32> {
                let tail = row[from..].iter().map(|token| (token + 1) % vocab);
                row[..from].iter().copied().chain(tail).collect()
            };
            let half = row.len() / 2;
            sequences.extend([
                turned(half),
                row[..half].to_vec(),
                turned(half + 2),
                turned(0),
            ]);
            sequences.push(row);
        }
        let losses = |sequences: &[Vec<u32>]| -> Vec<f32> {
            let batch = Sequences::new(sequences);
            let tokens = batch.tokens.iter().enumerate();
            let targets: Vec<(usize, u32)> = tokens.map(|(row, token)| (row, *token)).collect();
            let one = decoder.evaluate(&batch, &targets, &adapter).unwrap().nll;
            let both = [adapter.clone(), adapter.clone()];
            let shared = decoder.shared(&batch, &targets, &both).unwrap();
            let average = shared.average(&both).unwrap();
            assert!(largest_difference(&one, &average.loss.nll) < 1e-4);
            one
        };
        let together = losses(&sequences);
        let alone = sequences.iter().map(std::slice::from_ref);
        let alone: Vec<f32> = alone.flat_map(losses).collect();
        let difference = largest_difference(&together, &alone);
        assert!(difference < 1e-4, "{}: {difference}", case.name);
    }
}

/// What adapters share below the lowest module that one of them changes leads to the losses of each alone.
#[test]
fn shared_blocks_change_no_loss() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let whole = active(&case, &decoder);
        let mut upper = Adapter::read(&case.dir).unwrap();
        upper.sites.retain(|site| !site.name.contains(".0."));
        let upper = ActiveAdapter::from_adapter(&upper, decoder.config(), &Device::Cpu).unwrap();
        let base = ActiveAdapter::default();
        let sequences = rows(&expected);
        let batch = Sequences::new(&sequences);
        let vocab = decoder.config().vocab_size;
        let tokens = batch.tokens.iter().enumerate();
        let all: Vec<(usize, u32)> = tokens.map(|(row, token)| (row, *token)).collect();
        // Out of order, and rows with several labels.
        let some: Vec<(usize, u32)> = [5, 2, 9, 2, 5].into_iter().zip([1, 2, 3, 4, 5]).collect();
        for targets in [all, some, Vec::new()] {
            let listed: [&[&ActiveAdapter]; 3] = [&[&upper, &base], &[&base], &[&whole, &upper]];
            for adapters in listed {
                let shared = decoder.shared(&batch, &targets, adapters.iter().copied());
                let shared = shared.unwrap();
                // An adapter that was not listed is computed all the same.
                for adapter in [&upper, &base, &whole] {
                    let logits = logits(&decoder, &sequences, adapter);
                    let nll = |(row, label): &(usize, u32)| -> f32 {
                        let row = &logits[row * vocab..][..vocab];
                        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        let sum: f32 = row.iter().map(|logit| (logit - most).exp()).sum();
                        most + sum.ln() - row[*label as usize]
                    };
                    let expected: Vec<f32> = targets.iter().map(nll).collect();
                    let found = shared.evaluate(adapter).unwrap().nll;
                    assert_eq!(found.len(), expected.len());
                    let difference = largest_difference(&found, &expected);
                    assert!(difference < 1e-4, "{}: {difference}", case.name);
                }
            }
        }
    }
}

/// Each format that names modules in its own way leads back to the updates that PEFT recorded, for every family.
#[test]
fn every_format_carries_the_updates_of_every_family() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let adapter = Adapter::read(&case.dir).unwrap();
        let base = ModelFiles::read_config(&case.model).unwrap();
        let options = ReadOptions {
            base_config: Some(&base),
            ..ReadOptions::default()
        };
        let written = FORMATS
            .iter()
            .filter(|format| format.about().writes.is_some());
        for format in written {
            let name = format.about().name;
            let label = format!("{}: {name}", case.name);
            let read = written_and_read(*format, &adapter, &options);
            assert_eq!(read.sites.len(), adapter.sites.len(), "{label}");
            assert_updates(&label, &read, &expected);
        }
    }
}

fn active(case: &AdapterCase, decoder: &Decoder) -> ActiveAdapter {
    let adapter = Adapter::read(&case.dir).unwrap();
    ActiveAdapter::from_adapter(&adapter, decoder.config(), decoder.device()).unwrap()
}

/// The cases, each on every device.
fn cases_on_devices() -> impl Iterator<Item = (AdapterCase, Decoder)> {
    devices().iter().flat_map(|device| {
        let cases = supported_architectures().into_iter();
        cases.map(move |case| {
            let decoder = Decoder::load(&case.model, device).unwrap();
            (case, decoder)
        })
    })
}

/// Within 1e-3 of the tensor's largest entry.
fn close(case: &str, name: &str, found: &Tensor, expected: &[f32]) {
    let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
    let largest = expected.iter().fold(0f32, |most, v| most.max(v.abs()));
    let difference = largest_difference(&found, expected);
    assert!(
        difference <= 1e-3 * f64::from(largest.max(1e-6)),
        "{case}: {name}: {difference}, largest entry {largest}"
    );
}

/// Choices of unequal lengths have the likelihoods of passes of their own, also where a rotation depends on the length.
#[test]
fn choices_of_any_lengths_are_scored_as_alone() {
    let mut n_dependent = 0;
    for case in supported_architectures() {
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let adapter = active(&case, &decoder);
        n_dependent += usize::from(decoder.depends_on_length());
        let vocab = decoder.config().vocab_size as u32;
        // Longer than any threshold of the fixtures, and shorter.
        let sets: Vec<ChoiceSet> = [3, 11, 20]
            .into_iter()
            .map(|n_prompt: u32| {
                let answers: [&[u32]; 3] =
                    [&[5], &[6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], &[6, 7, 2]];
                let prompt = (0..n_prompt).map(|at| (7 * at + 1) % vocab);
                let choice = |answer: &[u32]| ChoiceTokens {
                    tokens: prompt.clone().chain(answer.iter().copied()).collect(),
                    n_prompt: n_prompt as usize,
                };
                ChoiceSet {
                    choices: answers.into_iter().map(choice).collect(),
                    answer: 0,
                }
            })
            .collect();
        let found = log_likelihoods(&sets, &decoder, &adapter).unwrap();
        for (set, found) in sets.iter().zip(found) {
            for (choice, found) in set.choices.iter().zip(found) {
                let (input, last) = (&choice.tokens[..choice.tokens.len() - 1], choice.n_prompt);
                let logits = logits(&decoder, &[input.to_vec()], &adapter);
                let log_p = |at: usize| {
                    let row = &logits[(at - 1) * vocab as usize..][..vocab as usize];
                    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f32 = row.iter().map(|logit| (logit - most).exp()).sum();
                    f64::from(row[choice.tokens[at] as usize] - most - sum.ln())
                };
                let expected: f64 = (last..choice.tokens.len()).map(log_p).sum();
                assert!(
                    (found - expected).abs() < 2e-4,
                    "{}: {found} {expected}",
                    case.name
                );
            }
        }
    }
    assert!(n_dependent > 0, "no rotation depends on the length");
}

/// Every module of some layers: PEFT takes layers only beside a list of modules, so the adapter's config has one.
#[test]
fn adapters_of_some_layers_can_be_read_again() {
    for case in supported_architectures() {
        let model = case.model.to_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let rows = [r#"{"prompt": "a", "completion": "b"}"#; 4].join("\n");
        std::fs::write(at("rows.jsonl"), rows).unwrap();
        let (data, out) = (at("rows.jsonl"), at("out"));
        let train = ["train", "-m", model, "--data", &data, "-o", &out];
        let settings = ["--max-steps", "1", "--target-modules", "all-linear"];
        let layers = ["--set", "lora.layers_to_transform=[1]"];
        ok(&[&train[..], &settings, &layers].concat());
        ok(&["validate", &out, "-m", model]);
        ok(&["eval", "-m", model, "-a", &out, "--data", &data]);
        let adapter = Adapter::read(out.as_ref()).unwrap();
        for site in &adapter.sites {
            assert!(
                site.name.contains(".layers.1."),
                "{}: {}",
                case.name,
                site.name
            );
        }
    }
}

/// A run with `all-linear` on a mixture gives an adapter that every command takes: no name of a module reaches experts and router.
#[test]
fn adapters_of_all_linear_modules_fit_a_mixture_of_experts() {
    for kind in ["qwen3_moe", "mixtral"] {
        let model = own().join("architectures").join(kind).join("model");
        let model = model.to_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let rows = [r#"{"prompt": "a", "completion": "b"}"#; 4].join("\n");
        std::fs::write(at("rows.jsonl"), rows).unwrap();
        let run = at("run.toml");
        ok(&["init", "-m", model, "--data", &at("rows.jsonl"), "-o", &run]);
        let (out, steps) = (
            format!("train.output_dir={}", at("out")),
            "train.max_steps=2",
        );
        ok(&["train", "-c", &run, "--set", &out, "--set", steps]);
        ok(&[
            "eval",
            "-m",
            model,
            "-a",
            &at("out"),
            "--data",
            &at("rows.jsonl"),
        ]);
        ok(&["validate", &at("out"), "-m", model]);
        ok(&["merge", "-m", model, "-a", &at("out"), "-o", &at("merged")]);
        ok(&[
            "convert",
            &at("out"),
            "--to",
            "gguf",
            "-m",
            model,
            "-o",
            &at("lora.gguf"),
        ]);
    }
}
