//! The draw and its gradients against PEFT's recorded numbers, and the fast draw against the literal one.

#[path = "../../../../tests/it/fixtures/walk.rs"]
mod walk;

use std::path::Path;

use candle_core::{Device, Tensor};
use monteclora_converters::SafetensorsFile;

use super::draw::{Draw, Gaussian, StandardNoise};
use super::{Form, MonteCloraConfig, Objective};
use crate::Result;
use crate::methods::Weighting;
use crate::noise::Key;
use crate::numbers::Numbers;

/// The gradients of `draw` for the gradient `upstream` of the drawn A.
fn backward(draw: &Draw, upstream: &Tensor, weight: f64) -> Result<(Vec<f64>, Vec<f64>)> {
    let numbers = draw.numbers(upstream)?.map(Numbers::read).transpose()?;
    draw.backward(Some((upstream, &numbers.unwrap_or_default())), weight)
}

struct Case {
    file: SafetensorsFile,
    settings: MonteCloraConfig,
}

impl Case {
    fn all() -> Vec<Self> {
        let files = walk::walk("sampler/case");
        let files = files
            .iter()
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
        let cases: Vec<Self> = files.map(|path| Self::read(path)).collect();
        assert!(!cases.is_empty(), "no sampler case");
        cases
    }

    /// `caseI.safetensors`, whose settings are those of case I in `cases.json`.
    fn read(path: &Path) -> Self {
        let settings = std::fs::read_to_string(path.with_file_name("cases.json"));
        let settings: Vec<serde_json::Value> =
            serde_json::from_str(&settings.expect("cases.json")).expect("a list");
        let name = path.file_stem().expect("a file");
        let case = settings
            .iter()
            .find(|case| name == format!("case{}", case["case"]).as_str())
            .expect("its settings");
        Self {
            file: SafetensorsFile::open(path).expect("a readable case"),
            settings: MonteCloraConfig {
                num_samples: case["num_samples"].as_u64().expect("num_samples") as usize,
                sample_scaler: case["sample_scaler"].as_f64().expect("sample_scaler"),
                kl_loss_weight: case["kl_loss_weight"].as_f64().expect("kl_loss_weight"),
                dirichlet_prior: case["dirichlet_prior"].as_f64().expect("dirichlet_prior"),
                use_entropy: case["use_entropy"].as_bool().expect("use_entropy"),
                ..MonteCloraConfig::default()
            },
        }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.file.get(name).expect(name).to_f32().expect(name)
    }

    fn wide(&self, name: &str) -> Vec<f64> {
        self.values(name).into_iter().map(f64::from).collect()
    }

    fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.file.get(name).expect(name);
        Tensor::from_vec(self.values(name), tensor.shape(), &Device::Cpu).expect("shape")
    }

    /// Largest difference over the tensor's largest entry at most 1e-3: PEFT's own single precision is off by up to 3e-4.
    fn assert_close(&self, name: &str, ours: &[f64]) {
        let expected = self.wide(name);
        assert_eq!(ours.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
        // Where the exact value is zero PEFT's is rounding noise.
        let scale = largest.max(1e-4);
        for (a, b) in ours.iter().zip(&expected) {
            let path = self.file.path().display();
            assert!(
                (a - b).abs() <= 1e-3 * scale,
                "{path}: {name}: {a} against {b} (largest {largest})"
            );
        }
    }
}

#[test]
fn every_sampler_case_is_reproduced() -> Result<()> {
    for case in Case::all() {
        let (log_std, log_concentration) =
            (case.wide("std_prior"), case.wide("expert_weights_prior"));
        let rank = log_std.len();
        let draw = |objective, weight| {
            let noise = StandardNoise {
                gaussian: Gaussian::Literal(case.values("z_mvn")),
                chi_square: diagonal(&case.wide("z_wishart"), rank),
                mixture: case.wide("z_dirichlet"),
            };
            let settings = MonteCloraConfig {
                objective,
                ..case.settings.clone()
            };
            let at = (&log_std[..], &log_concentration[..]);
            Draw::new(
                &settings,
                &weighting(weight),
                &case.tensor("lora_A"),
                at,
                noise,
            )
        };
        let exact = draw(Objective::Exact, 1.0)?;
        let peft = draw(Objective::Peft, 1.0)?;
        let draw = &exact;
        case.assert_close("expert_weights", &draw.mixture.weights);
        assert_eq!(case.wide("gaussian_var").len(), rank * rank);
        let variance = diagonal(&case.wide("gaussian_var"), rank);
        for (ours, theirs) in draw.covariance.iter().zip(variance) {
            assert!((ours - theirs).abs() <= 1e-3 * theirs, "{ours} {theirs}");
        }
        let effective: Vec<f64> = draw
            .effective_a
            .flatten_all()?
            .to_vec1::<f32>()?
            .into_iter()
            .map(f64::from)
            .collect();
        case.assert_close("effective_A", &effective);

        let (log_std, log_concentration) = backward(draw, &case.tensor("upstream"), 0.0)?;
        case.assert_close("grad_std_from_upstream", &log_std);
        case.assert_close("grad_weights_from_upstream", &log_concentration);

        case.assert_close("dirichlet_kl_peft", &[peft.dirichlet]);
        case.assert_close("wishart_kl", &[peft.wishart]);
        case.assert_close("gaussian_kl", &[peft.gaussian]);
        case.assert_close("weighted_kl", &[peft.weighted_kl]);
        case.assert_close("sum_of_squares", &[peft.sum_of_squares]);
        let (log_std, log_concentration) = peft.backward(None, 1.0)?;
        case.assert_close("grad_std_from_loss", &log_std);
        case.assert_close("grad_weights_from_loss", &log_concentration);

        case.assert_close("dirichlet_kl_true", &[exact.dirichlet]);
    }
    Ok(())
}

fn weighting(factor: f64) -> Weighting {
    Weighting {
        factor,
        n_modules: 1,
        epoch_tokens: 1,
    }
}

fn diagonal(matrix: &[f64], n: usize) -> Vec<f64> {
    (0..n).map(|i| matrix[i * n + i]).collect()
}

/// The reference vector of the collapsed form.
#[test]
fn collapsed_reference_vector() -> Result<()> {
    let (rank, in_features) = (2, 3);
    let eps: Vec<f32> = (0..6).map(|i| ((i % 5) as f32 - 2.0) / 2.0).collect();
    let gaussian = Tensor::from_vec(eps, (in_features, rank), &Device::Cpu)?
        .t()?
        .contiguous()?;
    let noise = StandardNoise {
        gaussian: Gaussian::Collapsed(gaussian),
        chi_square: vec![1.5, 2.5],
        mixture: vec![0.3, -0.6, 0.9],
    };
    let zero = Tensor::zeros((rank, in_features), candle_core::DType::F32, &Device::Cpu)?;
    let settings = MonteCloraConfig {
        sample_scaler: 0.01,
        ..MonteCloraConfig::default()
    };
    let at = (&[0.25, 0.75][..], &[0.1, 0.5, 0.9][..]);
    let draw = Draw::new(&settings, &weighting(1.0), &zero, at, noise)?;
    let delta = draw
        .effective_a
        .t()?
        .contiguous()?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let expected = [
        -0.01070408,
        -0.01139176,
        0.0,
        0.01139176,
        0.01070408,
        -0.02278353,
    ];
    for (value, expected) in delta.iter().zip(expected) {
        assert!((value - expected).abs() < 1e-7, "{delta:?}");
    }
    Ok(())
}

/// `s` and `theta` of a module of rank 3 with 4 components.
const SMALL: [f64; 7] = [0.3, -0.2, 0.6, 0.2, 0.9, -0.4, 0.5];

fn small_draw(settings: &MonteCloraConfig, at: &[f64], key: Key) -> Result<Draw> {
    let a = Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu)?;
    let noise = StandardNoise::new(settings.form, &key, 4, &a)?;
    Draw::new(settings, &weighting(1.0), &a, at.split_at(3), noise)
}

#[test]
fn gradients_of_both_forms_are_finite_differences() -> Result<()> {
    let upstream = Tensor::new(&[[0.5f32, -1.0], [2.0, 0.3], [-0.7, 1.1]], &Device::Cpu)?;
    for form in [Form::Collapsed, Form::Literal] {
        for objective in [Objective::Exact, Objective::Peft] {
            let settings = MonteCloraConfig {
                objective,
                form,
                num_samples: 4,
                sample_scaler: 0.5,
                kl_loss_weight: 1e-3,
                dirichlet_prior: 0.5,
                use_entropy: true,
                ..MonteCloraConfig::default()
            };
            let loss = |at: &[f64]| -> Result<f64> {
                let draw = small_draw(&settings, at, Key::new(3, "site", 1))?;
                let task = (&draw.effective_a * &upstream)?
                    .flatten_all()?
                    .to_vec1::<f32>()?;
                let task: f64 = task.into_iter().map(f64::from).sum();
                Ok(task + 0.25 * (draw.weighted_kl + draw.sum_of_squares))
            };
            let draw = small_draw(&settings, &SMALL, Key::new(3, "site", 1))?;
            let (log_std, log_concentration) = backward(&draw, &upstream, 0.25)?;
            for (k, ours) in log_std.iter().chain(&log_concentration).enumerate() {
                let moved = |delta: f64| {
                    let mut at = SMALL;
                    at[k] += delta;
                    loss(&at)
                };
                let expected = (moved(1e-3)? - moved(-1e-3)?) / 2e-3;
                assert!(
                    (ours - expected).abs() < 2e-3,
                    "{form:?} {objective:?} [{k}]: {ours} {expected}"
                );
            }
        }
    }
    Ok(())
}

/// Fast and literal draw have the same law: two-sample Kolmogorov-Smirnov tests of an entry, of a row's norm and of the whole
/// norm over 6,000 independent draws each, at the 0.1 % level, so a correct pair fails in 0.3 % of seeds; this one was not chosen.
#[test]
fn fast_and_literal_draw_have_the_same_law() -> Result<()> {
    let n = 6000;
    let statistics = |form: Form, seed: u64| -> Result<[Vec<f64>; 3]> {
        let settings = MonteCloraConfig {
            form,
            sample_scaler: 1.0,
            ..MonteCloraConfig::default()
        };
        let mut collected = [Vec::new(), Vec::new(), Vec::new()];
        for step in 0..n {
            let draw = small_draw(&settings, &SMALL, Key::new(seed, "law", step))?;
            let v: Vec<f64> = draw
                .effective_a
                .flatten_all()?
                .to_vec1::<f32>()?
                .into_iter()
                .map(f64::from)
                .collect();
            collected[0].push(v[3]);
            collected[1].push(v[0].hypot(v[1]));
            collected[2].push(v.iter().map(|x| x * x).sum::<f64>().sqrt());
        }
        Ok(collected)
    };
    let (fast, literal) = (
        statistics(Form::Collapsed, 1)?,
        statistics(Form::Literal, 2)?,
    );
    for (index, (mut x, mut y)) in fast.into_iter().zip(literal).enumerate() {
        x.sort_by(f64::total_cmp);
        y.sort_by(f64::total_cmp);
        let distance = x
            .iter()
            .enumerate()
            .map(|(i, v)| {
                ((i + 1) as f64 / n as f64 - y.partition_point(|w| w <= v) as f64 / n as f64).abs()
            })
            .fold(0.0, f64::max);
        assert!(
            distance < 1.95 * (2.0 / n as f64).sqrt(),
            "statistic {index}: {distance}"
        );
    }
    Ok(())
}
