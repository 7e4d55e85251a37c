//! Recorded PEFT training runs, step by step: the literal draw, PEFT's objective and AdamW from the recorded values and noise.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use monteclora::config::TrainConfig;
use monteclora::model::{ActiveAdapter, Decoder, ModuleId, PassOptions, Sequences};
use monteclora::train::{AdamW, AdapterState};
use monteclora_adapters::methods::monteclora::{
    Form, MonteClora, MonteCloraConfig, Objective, Preset,
};
use monteclora_adapters::methods::{Method, Module, Owner, Value, in_loss};
use monteclora_adapters::noise::{Noise, Purpose};
use monteclora_converters::SafetensorsFile;

use crate::fixtures::{devices, floats, integers, largest_difference, walk};

const PREFIX: &str = "base_model.model.";

struct Recorded {
    file: SafetensorsFile,
    case: serde_json::Value,
}

impl Recorded {
    fn names(&self, kind: &str, site: &str) -> [String; 4] {
        [
            "lora_A.weight",
            "lora_B.weight",
            "lora_monteclora_sampler.std_prior",
            "lora_monteclora_sampler.expert_weights_prior",
        ]
        .map(|leaf| self.name(kind, site, leaf))
    }

    /// Recorders write names with or without PEFT's prefix.
    fn name(&self, kind: &str, site: &str, leaf: &str) -> String {
        [
            format!("{kind}.{site}.{leaf}"),
            format!("{kind}.{PREFIX}{site}.{leaf}"),
        ]
        .into_iter()
        .find(|name| self.file.info(name).is_some())
        .unwrap_or_else(|| panic!("{kind} {site} {leaf}"))
    }

    fn wide(&self, name: &str) -> Vec<f64> {
        floats(&self.file, name)
            .into_iter()
            .map(f64::from)
            .collect()
    }

    fn state(&self, decoder: &Decoder) -> AdapterState {
        let device = decoder.device();
        let settings = &self.case["monteclora_config"];
        let (rank, alpha) = (
            self.case["r"].as_u64().unwrap() as usize,
            self.case["lora_alpha"].as_f64().unwrap(),
        );
        let method: Arc<dyn Method> = Arc::new(MonteClora(MonteCloraConfig {
            objective: Objective::Peft,
            num_samples: settings["num_samples"].as_u64().unwrap() as usize,
            sample_scaler: settings["sample_scaler"].as_f64().unwrap(),
            kl_loss_weight: settings["kl_loss_weight"].as_f64().unwrap(),
            dirichlet_prior: settings["dirichlet_prior"].as_f64().unwrap(),
            use_entropy: settings["use_entropy"].as_bool().unwrap(),
            form: Form::Literal,
            ..MonteCloraConfig::preset(Preset::Peft)
        }));
        let modules: Vec<(ModuleId, Module)> = ModuleId::all(decoder.config())
            .filter(|(_, module)| {
                let name = &module.name;
                self.file
                    .names()
                    .any(|n| n.starts_with("init.") && n.contains(&format!("{name}.lora_A")))
            })
            .map(|(id, module)| {
                let module = Module {
                    name: module.name,
                    in_features: module.in_features,
                    out_features: module.out_features,
                    rank,
                    alpha,
                    scaling: alpha / rank as f64,
                    has_bias: false,
                    attention: None,
                    frozen: None,
                };
                (id, module)
            })
            .collect();
        let owners = modules
            .iter()
            .map(|(_, module)| {
                let parameters = method.parameters(module);
                let names = self.names("init", &module.name);
                let values = parameters.iter().zip(names).map(|(parameter, name)| {
                    let values = floats(&self.file, &name);
                    Value::new(parameter.storage, &parameter.shape, values, device).unwrap()
                });
                Owner {
                    name: module.name.clone(),
                    values: values.collect(),
                    stored: vec![true; parameters.len()],
                    parameters,
                }
            })
            .collect();
        AdapterState {
            method,
            modules,
            owners,
        }
    }
}

/// The recorded noise of one module at one step. Of the Wishart draw only the diagonal is recorded and used: one normal a row
/// whose square it is.
struct RecordedNoise<'a> {
    recorded: &'a Recorded,
    prefix: String,
    module: String,
}

impl RecordedNoise<'_> {
    fn name(&self, leaf: &str) -> String {
        self.recorded.name(&self.prefix, &self.module, leaf)
    }
}

impl Noise for RecordedNoise<'_> {
    fn normals(&self, purpose: Purpose, count: usize) -> Vec<f64> {
        match purpose {
            Purpose::Mixture => self.recorded.wide(&self.name("z_dirichlet")),
            Purpose::Wishart => {
                let rank = count.isqrt();
                let wishart = self.recorded.wide(&self.name("z_wishart"));
                let diagonal = |at: usize| at.is_multiple_of(rank + 1);
                let normal = |(at, w): (usize, &f64)| if diagonal(at) { w.sqrt() } else { 0.0 };
                wishart.iter().enumerate().map(normal).collect()
            }
            other => panic!("{other:?} is not drawn in training"),
        }
    }

    fn normals_f32(&self, purpose: Purpose, _count: usize) -> Vec<f32> {
        assert_eq!(purpose, Purpose::Gaussian);
        floats(&self.recorded.file, &self.name("z_mvn"))
    }
}

fn close(what: &str, ours: &[f32], expected: &[f32], tolerance: f64) {
    let largest = expected.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    let difference = largest_difference(ours, expected);
    assert!(
        difference <= tolerance * largest.max(1e-6),
        "{what}: differs by {difference}, largest entry {largest}"
    );
}

fn flat(value: &Value) -> Vec<f32> {
    value.to_format().unwrap().to_f32().unwrap()
}

fn replay(dir: &Path, device: &Device) {
    let recorded = Recorded {
        file: SafetensorsFile::open(dir.join("trajectory.safetensors")).unwrap(),
        case: serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap())
            .unwrap(),
    };
    let decoder = Decoder::load(
        &dir.parent()
            .unwrap()
            .join("models")
            .join(recorded.case["model"].as_str().unwrap()),
        device,
    )
    .unwrap();
    let rows: Vec<Vec<u32>> = integers(&recorded.file, "input_ids")
        .into_iter()
        .map(|row| row.into_iter().map(|id| id as u32).collect())
        .collect();
    let labels = integers(&recorded.file, "labels");
    let sequences = Sequences::new(&rows);
    let mut targets = Vec::new();
    for (index, row) in labels.iter().enumerate() {
        for position in 1..row.len() {
            if row[position] >= 0 {
                targets.push((index * row.len() + position - 1, row[position] as u32));
            }
        }
    }
    let losses = floats(&recorded.file, "losses_task_reg_total");
    let mut state = recorded.state(&decoder);
    assert!(!state.modules.is_empty());
    let mut optimizer = AdamW::new(&state).unwrap();
    let scale = 1.0 / targets.len() as f64;
    let weighting = state.weighting(1.0, targets.len() as u64);
    for (step, expected) in losses.chunks_exact(3).enumerate() {
        let drawn = state
            .draw_with(&weighting, |module| RecordedNoise {
                recorded: &recorded,
                prefix: format!("noise.{step}"),
                module: module.name.clone(),
            })
            .unwrap();
        let loss = decoder
            .loss_and_gradients(
                &sequences,
                &targets,
                &drawn.active,
                scale,
                PassOptions::default(),
            )
            .unwrap();
        let metrics = drawn.metrics(&state);
        let regulariser = in_loss(state.method.kind().metrics, &metrics);
        let task = loss.total() * scale;
        for (ours, theirs) in [task, regulariser, task + regulariser]
            .into_iter()
            .zip(expected)
        {
            assert!(
                (ours - f64::from(*theirs)).abs() < 1e-4,
                "step {step}: {ours} against {theirs}"
            );
        }
        let gradients = drawn
            .backward(&state, loss.gradients.as_ref().unwrap())
            .unwrap();
        if step == 0 {
            for (owner, gradient) in state.owners.iter().zip(&gradients) {
                for (name, ours) in recorded.names("grad0", &owner.name).iter().zip(gradient) {
                    close(name, &flat(ours), &floats(&recorded.file, name), 1e-3);
                }
            }
        }
        optimizer
            .step(&TrainConfig::default(), &mut state, &gradients, 1e-2, 1e-2)
            .unwrap();
    }
    for owner in &state.owners {
        for (name, ours) in recorded
            .names("final", &owner.name)
            .iter()
            .zip(&owner.values)
        {
            let difference = largest_difference(&flat(ours), &floats(&recorded.file, name));
            assert!(difference < 1e-3, "{name}: {difference}");
        }
    }
    let mean: ActiveAdapter = state.mean().unwrap();
    let difference = largest_difference(
        &flat(&Value::Tensor(decoder.logits(&sequences, &mean).unwrap())),
        &floats(&recorded.file, "final_logits"),
    );
    assert!(difference < 1e-3, "final logits differ by {difference}");
}

#[test]
fn every_recorded_run_is_reproduced() {
    for dir in walk("trajectory") {
        for device in devices() {
            replay(&dir, device);
        }
    }
}
