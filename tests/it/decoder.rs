//! Our decoder against what PEFT computed, and its gradients against finite differences.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use monteclora::model::{
    ActiveAdapter, Decoder, GenerationSettings, ModuleId, PassOptions, Sequences,
};
use monteclora_adapters::LowRank;
use monteclora_converters::{Adapter, SafetensorsFile};

use crate::fixtures::{
    adapters, floats, integers, largest_difference, supported_architectures, usable, with_own,
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
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let rows = rows(&expected);
        let base = logits(&decoder, &rows, &ActiveAdapter::default());
        let difference = largest_difference(&base, &floats(&expected, "base_logits"));
        assert!(
            difference <= case.tolerance(),
            "{}: base differs by {difference}",
            case.name
        );
        let active =
            ActiveAdapter::from_adapter(&adapter.unwrap(), decoder.config(), &Device::Cpu).unwrap();
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

/// Sequences in one batch do not see each other, and decoding with a cache gives what the whole forward gives.
#[test]
fn batches_are_independent_and_the_cache_is_exact() {
    let mut seen = BTreeSet::new();
    for case in usable().into_iter().chain(supported_architectures()) {
        if !seen.insert(case.model.clone()) {
            continue;
        }
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let adapter = Adapter::read(&case.dir).unwrap();
        let active = ActiveAdapter::from_adapter(&adapter, decoder.config(), &Device::Cpu).unwrap();
        let vocab = decoder.config().vocab_size;
        let prompts: Vec<Vec<u32>> = [9usize, 3, 17]
            .iter()
            .map(|n| (0..*n).map(|i| ((i * 37 + n) % vocab) as u32).collect())
            .collect();
        let together = logits(&decoder, &prompts, &active);
        let apart: Vec<f32> = prompts
            .iter()
            .flat_map(|p| logits(&decoder, std::slice::from_ref(p), &active))
            .collect();
        assert!(
            largest_difference(&together, &apart) < 1e-5,
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
    fn new(model: &Path) -> Self {
        let decoder = Decoder::load(model, &Device::Cpu).unwrap();
        let sites = ModuleId::all(decoder.config())
            .enumerate()
            .map(|(index, (site, module))| {
                let (n_in, n_out) = (module.in_features, module.out_features);
                let (a, b) = (
                    wave(3 * n_in, index as f64, 0.1),
                    wave(n_out * 3, index as f64 + 0.5, 0.1),
                );
                let a = Tensor::from_vec(a, (3, n_in), &Device::Cpu).unwrap();
                let b = Tensor::from_vec(b, (n_out, 3), &Device::Cpu).unwrap();
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

    /// Of A and of B, for each of the sites.
    fn gradients(&self, checkpointing: bool) -> Vec<(ModuleId, Vec<f32>, Vec<f32>)> {
        let options = PassOptions {
            dropout: None,
            checkpointing,
        };
        let active = ActiveAdapter::new(self.sites.clone());
        let loss =
            self.decoder
                .loss_and_gradients(&self.sequences, &self.targets, &active, 1.0, options);
        let gradients = loss.unwrap().gradients.unwrap();
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
                    let shift = Tensor::from_slice(direction, target.dims(), &Device::Cpu).unwrap();
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

#[test]
fn recomputed_activations_give_the_same_gradients() {
    for model in models() {
        let backward = Backward::new(&model);
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
        let backward = Backward::new(&model);
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
