//! Recorded PEFT training runs, step by step: the literal draw, PEFT's objective and AdamW from the recorded values and noise.

use std::path::Path;

use candle_core::{Device, Tensor};
use monteclora::model::{ActiveAdapter, Decoder, ModuleId, PassOptions, Sequences};
use monteclora::train::{AdamW, AdamWSettings, AdapterState, SiteState};
use monteclora_adapters::{Noise, Objective, Spread};
use monteclora_converters::{MonteCloraSettings, SafetensorsFile};

use crate::fixtures::{floats, integers, largest_difference, walk};

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

    fn tensor(&self, name: &str) -> Tensor {
        let shape = self.file.info(name).unwrap().1.to_vec();
        Tensor::from_vec(floats(&self.file, name), shape, &Device::Cpu).unwrap()
    }

    fn wide(&self, name: &str) -> Vec<f64> {
        floats(&self.file, name)
            .into_iter()
            .map(f64::from)
            .collect()
    }

    fn state(&self, decoder: &Decoder) -> AdapterState {
        let settings = &self.case["monteclora_config"];
        let (r, alpha) = (
            self.case["r"].as_f64().unwrap(),
            self.case["lora_alpha"].as_f64().unwrap(),
        );
        let sites = ModuleId::all(decoder.config())
            .map(|(id, module)| (id, module.name))
            .filter(|(_, name)| {
                self.file
                    .names()
                    .any(|n| n.starts_with("init.") && n.contains(&format!("{name}.lora_A")))
            })
            .map(|(id, name)| {
                let [a, b, s, theta] = self.names("init", &name);
                SiteState {
                    id,
                    alpha,
                    scaling: alpha / r,
                    a: self.tensor(&a),
                    b: self.tensor(&b),
                    spread: Some(Spread {
                        log_std: self.wide(&s),
                        log_concentration: self.wide(&theta),
                    }),
                    name,
                }
            })
            .collect();
        AdapterState {
            sites,
            settings: Some(MonteCloraSettings {
                num_samples: settings["num_samples"].as_u64().unwrap() as usize,
                sample_scaler: settings["sample_scaler"].as_f64().unwrap(),
                kl_loss_weight: settings["kl_loss_weight"].as_f64().unwrap(),
                dirichlet_prior: settings["dirichlet_prior"].as_f64().unwrap(),
                use_entropy: settings["use_entropy"].as_bool().unwrap(),
                ..MonteCloraSettings::default()
            }),
            objective: Objective::Peft,
        }
    }

    fn noise(&self, step: usize, site: &SiteState) -> Noise {
        let rank = site.a.dims()[0];
        let name = |leaf: &str| self.name(&format!("noise.{step}"), &site.name, leaf);
        let wishart = self.wide(&name("z_wishart"));
        Noise::Literal {
            gaussian: floats(&self.file, &name("z_mvn")),
            wishart_diagonal: (0..rank).map(|k| wishart[k * rank + k]).collect(),
            mixture: self.wide(&name("z_dirichlet")),
        }
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

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

fn replay(dir: &Path) {
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
        &Device::Cpu,
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
    assert!(!state.sites.is_empty());
    let mut optimizer = AdamW::new(AdamWSettings::default(), &state).unwrap();
    let scale = 1.0 / targets.len() as f64;
    for (step, expected) in losses.chunks_exact(3).enumerate() {
        let drawn = state
            .draw_with(|site, _| Ok(recorded.noise(step, site)))
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
        let (task, regulariser) = (loss.total() * scale, drawn.regulariser().total());
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
            for (site, gradient) in state.sites.iter().zip(&gradients) {
                let spread = gradient.spread.as_ref().unwrap();
                let ours = [
                    flat(&gradient.a),
                    flat(&gradient.b),
                    narrow(&spread.log_std),
                    narrow(&spread.log_concentration),
                ];
                for (name, ours) in recorded.names("grad0", &site.name).iter().zip(ours) {
                    close(name, &ours, &floats(&recorded.file, name), 1e-3);
                }
            }
        }
        optimizer.step(&mut state, &gradients, 1e-2, 1e-2).unwrap();
    }
    for site in &state.sites {
        let spread = site.spread.as_ref().unwrap();
        let ours = [
            flat(&site.a),
            flat(&site.b),
            narrow(&spread.log_std),
            narrow(&spread.log_concentration),
        ];
        for (name, ours) in recorded.names("final", &site.name).iter().zip(ours) {
            let difference = largest_difference(&ours, &floats(&recorded.file, name));
            assert!(difference < 1e-3, "{name}: {difference}");
        }
    }
    let mean: ActiveAdapter = state.mean();
    let difference = largest_difference(
        &flat(&decoder.logits(&sequences, &mean).unwrap()),
        &floats(&recorded.file, "final_logits"),
    );
    assert!(difference < 1e-3, "final logits differ by {difference}");
}

#[test]
fn every_recorded_run_is_reproduced() {
    for dir in walk("trajectory") {
        replay(&dir);
    }
}
