//! Every architecture that is supported computes what transformers and PEFT compute: logits, loss, gradients and updates. Every
//! other one is refused by name.

use candle_core::{Device, Tensor};
use monteclora::model::{ActiveAdapter, Decoder, ModuleId, PassOptions, Sequences};
use monteclora_converters::architecture::FAMILIES;
use monteclora_converters::{Adapter, SafetensorsFile};
use serde_json::Value;

use crate::decoder::{logits, rows};
use crate::fixtures::{
    AdapterCase, architectures, floats, integers, largest_difference, own_architectures,
    supported_architectures,
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
    let is_known = FAMILIES
        .iter()
        .any(|family| family.model_type == model_type);
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
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
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
        for site in &adapter.sites {
            let delta = floats(&expected, &format!("delta.{}", site.name));
            let difference = largest_difference(&site.delta_f32().unwrap(), &delta);
            assert!(
                difference <= 1e-5,
                "{}: {}: {difference}",
                case.name,
                site.name
            );
            recorded.retain(|name| *name != site.name);
        }
        assert!(recorded.is_empty(), "{}: {recorded:?}", case.name);
    }
}

/// Loss and gradients of every A and B, with kept and with recomputed activations.
#[test]
fn loss_and_gradients_are_those_of_peft() {
    for case in supported_architectures() {
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
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

fn active(case: &AdapterCase, decoder: &Decoder) -> ActiveAdapter {
    let adapter = Adapter::read(&case.dir).unwrap();
    ActiveAdapter::from_adapter(&adapter, decoder.config(), &Device::Cpu).unwrap()
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
