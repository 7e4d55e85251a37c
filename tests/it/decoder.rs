//! Our decoder against what PEFT computed, its gradients against finite differences, and an accelerator against the CPU.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use monteclora::model::{
    ActiveAdapter, Decoder, Dropout, GenerationSettings, ModuleId, PassOptions, Sequences, TaskLoss,
};
use monteclora_adapters::weights::BF16;
use monteclora_adapters::{LowRank, Precision};
use monteclora_converters::{Adapter, SafetensorsFile};

use crate::fixtures::{
    AdapterCase, adapters, devices, floats, integers, largest_difference, supported_architectures,
    tolerance, usable, with_own,
};

pub(crate) fn rows(file: &SafetensorsFile) -> Vec<Vec<u32>> {
    integers(file, "input_ids")
        .into_iter()
        .map(|row| {
            row.into_iter()
                .map(|id| u32::try_from(id).unwrap())
                .collect()
        })
        .collect()
}

pub(crate) fn logits(decoder: &Decoder, rows: &[Vec<u32>], adapter: &ActiveAdapter) -> Vec<f32> {
    let logits = decoder.logits(&Sequences::new(rows), adapter).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_adapter_case_gives_pefts_logits_or_is_refused() {
    for case in with_own(adapters(), &["must-refuse-modules-to-save"]) {
        let adapter = Adapter::read(&case.dir);
        if case.must_be_refused() {
            let error = adapter.expect_err(&case.name).to_string();
            assert!(error.contains("refused"), "{}: {error}", case.name);
            continue;
        }
        let (expected, adapter) = (
            SafetensorsFile::open(&case.expected).unwrap(),
            adapter.unwrap(),
        );
        let rows = rows(&expected);
        for device in devices() {
            let decoder = Decoder::load(&case.model, device).unwrap();
            let base = logits(&decoder, &rows, &ActiveAdapter::default());
            let difference = largest_difference(&base, &floats(&expected, "base_logits"));
            assert!(
                difference <= case.tolerance(),
                "{}: base differs by {difference}",
                case.name
            );
            let active = ActiveAdapter::from_adapter(&adapter, decoder.config(), device).unwrap();
            let adapted = logits(&decoder, &rows, &active);
            let difference = largest_difference(&adapted, &floats(&expected, "logits"));
            assert!(
                difference <= case.tolerance(),
                "{}: differs by {difference}",
                case.name
            );
            assert!(
                largest_difference(&adapted, &base) > 1e-3,
                "{}: the adapter changes nothing",
                case.name
            );
        }
    }
}

/// Sequences in one batch do not see each other, and decoding with a cache gives what the whole forward gives.
#[test]
fn batches_are_independent_and_the_cache_is_exact() {
    let mut seen = BTreeSet::new();
    for case in usable().into_iter().chain(supported_architectures()) {
        if seen.insert(case.model.clone()) {
            let on = |device| batches_and_cache(&case, device);
            devices().iter().for_each(on);
        }
    }
}

/// Prompts of different lengths.
fn prompts(vocab: usize) -> Vec<Vec<u32>> {
    [9usize, 3, 17]
        .iter()
        .map(|n| (0..*n).map(|i| ((i * 37 + n) % vocab) as u32).collect())
        .collect()
}

fn batches_and_cache(case: &AdapterCase, device: &Device) {
    let decoder = Decoder::load(&case.model, device).unwrap();
    let adapter = Adapter::read(&case.dir).unwrap();
    let active = ActiveAdapter::from_adapter(&adapter, decoder.config(), device).unwrap();
    let vocab = decoder.config().vocab_size;
    let prompts = prompts(vocab);
    let together = logits(&decoder, &prompts, &active);
    let apart: Vec<f32> = prompts
        .iter()
        .flat_map(|p| logits(&decoder, std::slice::from_ref(p), &active))
        .collect();
    assert!(
        largest_difference(&together, &apart) < tolerance(device, 1e-5, 1e-4),
        "{}",
        case.name
    );

    let settings = GenerationSettings {
        max_new_tokens: 6,
        stop_tokens: Vec::new(),
        batch_size: 2,
    };
    let answers = decoder
        .generate(&prompts, &active, &settings, |_| {})
        .unwrap();
    for (prompt, answer) in prompts.iter().zip(answers) {
        let mut tokens = prompt.clone();
        for token in answer.tokens {
            let all = logits(&decoder, std::slice::from_ref(&tokens), &active);
            let last = &all[all.len() - vocab..];
            let best = (0..vocab)
                .max_by(|a, b| last[*a].total_cmp(&last[*b]))
                .unwrap();
            assert_eq!(best as u32, token, "{}", case.name);
            tokens.push(token);
        }
    }
}

/// Losses of about 30 nats carry 1e-5 of rounding, which a longer step makes small, and curvature, which a shorter one does.
const STEPS: [f64; 2] = [4e-3, 1.6e-2];

fn wave(n: usize, phase: f64, size: f64) -> Vec<f32> {
    (0..n)
        .map(|i| (((i as f64 + phase) * 1.7).sin() * size) as f32)
        .collect()
}

/// A decoder, rows for it, and an adapter of rank 3 on every site.
struct Backward {
    decoder: Decoder,
    sites: Vec<(ModuleId, LowRank)>,
    sequences: Sequences,
    targets: Vec<(usize, u32)>,
}

impl Backward {
    fn new(model: &Path, device: &Device) -> Self {
        Self::of(Decoder::load(model, device).unwrap())
    }

    fn of(decoder: Decoder) -> Self {
        let device = decoder.device();
        let sites = ModuleId::all(decoder.config())
            .enumerate()
            .map(|(index, (site, module))| {
                let (n_in, n_out) = (module.in_features, module.out_features);
                let (a, b) = (
                    wave(3 * n_in, index as f64, 0.1),
                    wave(n_out * 3, index as f64 + 0.5, 0.1),
                );
                let a = Tensor::from_vec(a, (3, n_in), device).unwrap();
                let b = Tensor::from_vec(b, (n_out, 3), device).unwrap();
                (site, LowRank { a, b, scaling: 0.7 })
            });
        let rows: Vec<Vec<u32>> = vec![
            (0..13).map(|i| (i * 19 % 250) as u32).collect(),
            (0..70).map(|i| (i * 7 % 250) as u32).collect(),
        ];
        Self {
            sites: sites.collect(),
            sequences: Sequences::new(&rows),
            targets: vec![(0, 4), (5, 9), (11, 200), (13, 7), (40, 31), (80, 90)],
            decoder,
        }
    }

    fn name(&self, site: ModuleId) -> String {
        let mut all = ModuleId::all(self.decoder.config());
        all.find(|(id, _)| *id == site).unwrap().1.name
    }

    /// The losses, and the gradients of their sum.
    fn pass(&self, options: PassOptions<'_>) -> TaskLoss {
        let active = ActiveAdapter::new(self.sites.clone());
        let (sequences, targets) = (&self.sequences, &self.targets);
        let loss = self
            .decoder
            .loss_and_gradients(sequences, targets, &active, 1.0, options);
        loss.unwrap()
    }

    /// Of A and of B, for each of the sites.
    fn gradients(&self, checkpointing: bool) -> Vec<(ModuleId, Vec<f32>, Vec<f32>)> {
        self.of_sites(&self.pass(PassOptions {
            dropout: None,
            checkpointing,
        }))
    }

    fn of_sites(&self, loss: &TaskLoss) -> Vec<(ModuleId, Vec<f32>, Vec<f32>)> {
        let gradients = loss.gradients.as_ref().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        self.sites
            .iter()
            .map(|(site, _)| {
                let Some([a, b]) = gradients.get(*site) else {
                    panic!("{} has no gradients", self.name(*site));
                };
                (*site, flat(a), flat(b))
            })
            .collect()
    }

    /// The loss's slope when A, or B, of `site` moves along `direction`, by steps of a length.
    fn slope(&self, site: ModuleId, of_a: bool, direction: &[f32], step: f64) -> f64 {
        let at = |step: f64| {
            let moved = self.sites.iter().map(|(id, low_rank)| {
                let mut low_rank = low_rank.clone();
                if *id == site {
                    let target = if of_a {
                        &mut low_rank.a
                    } else {
                        &mut low_rank.b
                    };
                    let device = target.device();
                    let shift = Tensor::from_slice(direction, target.dims(), device).unwrap();
                    *target = (&*target + (shift * step).unwrap()).unwrap();
                }
                (*id, low_rank)
            });
            let moved = ActiveAdapter::new(moved);
            self.decoder
                .evaluate(&self.sequences, &self.targets, &moved)
                .unwrap()
                .total()
        };
        (at(step) - at(-step)) / (2.0 * step)
    }

    /// The loss where it is.
    fn loss(&self) -> f64 {
        let here = ActiveAdapter::new(self.sites.clone());
        let loss = self.decoder.evaluate(&self.sequences, &self.targets, &here);
        loss.unwrap().total()
    }
}

/// Every model that is there and can be loaded, once.
fn models() -> BTreeSet<PathBuf> {
    let cases = usable().into_iter().chain(supported_architectures());
    cases.map(|case| case.model).collect()
}

fn models_on_devices() -> impl Iterator<Item = (PathBuf, &'static Device)> {
    let on_each = |model: PathBuf| devices().iter().map(move |device| (model.clone(), device));
    models().into_iter().flat_map(on_each)
}

#[test]
fn recomputed_activations_give_the_same_gradients() {
    for (model, device) in models_on_devices() {
        let backward = Backward::new(&model, device);
        let (kept, recomputed) = (backward.gradients(false), backward.gradients(true));
        for ((site, a, b), (_, a2, b2)) in kept.iter().zip(&recomputed) {
            assert_eq!(a, a2, "{}: {}", model.display(), backward.name(*site));
            assert_eq!(b, b2, "{}: {}", model.display(), backward.name(*site));
        }
    }
}

/// The whole hand-written backward, every site of every family present, against central differences of the loss along
/// several directions; the bound is a share of the largest of their slopes.
#[test]
fn gradients_are_finite_differences() {
    for model in models() {
        let backward = Backward::new(&model, &Device::Cpu);
        // A step may send a token to another expert, where the loss jumps; the part has a test of its own.
        if backward.decoder.config().experts.is_some() {
            continue;
        }
        let (loss, mut n_visible) = (backward.loss(), 0);
        for (site, a, b) in backward.gradients(false) {
            for (which, gradient) in [("A", a), ("B", b)] {
                let directions = [0.3, 1.1, 2.2].map(|phase| wave(gradient.len(), phase, 1.0));
                let slopes = directions.each_ref().map(|direction| -> f64 {
                    let products = gradient.iter().zip(direction);
                    products.map(|(g, d)| f64::from(*g) * f64::from(*d)).sum()
                });
                let largest = slopes
                    .iter()
                    .fold(0f64, |most, slope| most.max(slope.abs()));
                // Of a loss in f32 smaller slopes are lost in rounding.
                let rounding = |step: f64| 3e-7 * loss / step;
                n_visible += usize::from(2e-2 * largest > rounding(STEPS[1]));
                for (direction, slope) in directions.iter().zip(slopes) {
                    let is_close = STEPS.iter().any(|step| {
                        let numeric = backward.slope(site, which == "A", direction, *step);
                        (numeric - slope).abs() <= (2e-2 * largest).max(rounding(*step))
                    });
                    assert!(
                        is_close,
                        "{}: {} {which}: {slope} is no difference of losses; largest {largest}",
                        model.display(),
                        backward.name(site)
                    );
                }
            }
        }
        assert!(
            n_visible > 0,
            "{}: all slopes are too small",
            model.display()
        );
    }
}

/// How far `found` is from `expected`, as a share of the largest expected entry.
fn share(found: &[f32], expected: &[f32]) -> f64 {
    let largest = expected
        .iter()
        .fold(0f64, |most, v| most.max(f64::from(v.abs())));
    largest_difference(found, expected) / largest.max(1e-6)
}

/// The accelerator computes what the CPU computes: logits, losses and gradients with dropout and recomputed activations, and
/// answers. Without an accelerator the CPU is compared with itself.
#[test]
fn devices_agree() {
    for (model, device) in models_on_devices() {
        let [cpu, other] = [&Device::Cpu, device].map(|device| Backward::new(&model, device));
        let close = |what: &str, found: &[f32], expected: &[f32]| {
            let share = share(found, expected);
            assert!(share <= 1e-4, "{}: {what}: {share}", model.display());
        };
        let rows = [cpu.sequences.sequence(0), cpu.sequences.sequence(1)].map(<[u32]>::to_vec);
        let [expected, found] = [&cpu, &other].map(|side| {
            let active = ActiveAdapter::new(side.sites.clone());
            logits(&side.decoder, &rows, &active)
        });
        close("logits", &found, &expected);
        let dropout = Dropout {
            probability: 0.2,
            seed: 3,
            step: 1,
            rows: vec![5, 8],
        };
        for (dropout, checkpointing) in [(None, true), (Some(&dropout), false)] {
            let options = PassOptions {
                dropout,
                checkpointing,
            };
            let [expected, found] = [&cpu, &other].map(|side| side.pass(options));
            close("losses", &found.nll, &expected.nll);
            let both = cpu
                .of_sites(&expected)
                .into_iter()
                .zip(other.of_sites(&found));
            for ((site, a, b), (_, found_a, found_b)) in both {
                close(&format!("A of {}", cpu.name(site)), &found_a, &a);
                close(&format!("B of {}", cpu.name(site)), &found_b, &b);
            }
        }
        let settings = GenerationSettings {
            max_new_tokens: 6,
            stop_tokens: Vec::new(),
            batch_size: 2,
        };
        let prompts = prompts(cpu.decoder.config().vocab_size);
        let [expected, found] = [&cpu, &other].map(|side| {
            let active = ActiveAdapter::new(side.sites.clone());
            let answers = side.decoder.generate(&prompts, &active, &settings, |_| {});
            answers.unwrap()
        });
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(expected.tokens, found.tokens, "{}", model.display());
            let [expected, found] = [expected, found].map(|answer| answer.log_probability as f32);
            close("an answer's probability", &[found], &[expected]);
        }
    }
}

/// The same in bfloat16, where an accelerator may round products that the CPU keeps in float32, to 8 bits of mantissa.
#[test]
fn devices_agree_in_bf16() {
    for (model, device) in models_on_devices() {
        let [cpu, other] = [&Device::Cpu, device].map(|device| {
            let decoder = Decoder::load_as(&model, device, &BF16).unwrap();
            Backward::of(decoder.with_precision(Precision::Bf16))
        });
        // Rounding may send a token to another expert.
        if cpu.decoder.config().experts.is_some() {
            continue;
        }
        let [expected, found] = [&cpu, &other].map(|side| side.pass(PassOptions::default()));
        let losses = share(&found.nll, &expected.nll);
        assert!(losses <= 2e-2, "{}: losses: {losses}", model.display());
        let both = cpu
            .of_sites(&expected)
            .into_iter()
            .zip(other.of_sites(&found));
        for ((site, a, b), (_, found_a, found_b)) in both {
            let apart = share(&found_a, &a).max(share(&found_b, &b));
            let name = cpu.name(site);
            assert!(apart <= 0.1, "{}: {name}: {apart}", model.display());
        }
    }
}
