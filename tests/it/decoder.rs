//! Our decoder against what PEFT computed, and its gradients against finite differences.

use candle_core::{Device, Tensor};
use monteclora::model::{
    ActiveAdapter, Decoder, GenerationSettings, PassOptions, Sequences, SiteId,
};
use monteclora_adapters::LowRank;
use monteclora_converters::{Adapter, SafetensorsFile};

use crate::fixtures::{adapters, floats, integers, largest_difference, usable};

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
    for case in adapters() {
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
    let mut seen = std::collections::BTreeSet::new();
    for case in usable() {
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

/// The whole hand-written backward, every site of every family present, against central differences of the loss along a
/// random direction; with and without recomputed activations.
#[test]
fn gradients_are_finite_differences() {
    let mut seen = std::collections::BTreeSet::new();
    for case in usable() {
        if !seen.insert(case.model.clone()) {
            continue;
        }
        let decoder = Decoder::load(&case.model, &Device::Cpu).unwrap();
        let config = decoder.config().clone();
        let wave = |n: usize, phase: f64, size: f64| -> Vec<f32> {
            (0..n)
                .map(|i| (((i as f64 + phase) * 1.7).sin() * size) as f32)
                .collect()
        };
        let sites: Vec<(SiteId, LowRank)> = SiteId::all(&config)
            .enumerate()
            .map(|(index, site)| {
                let (n_in, n_out) = site.shape(&config);
                let (a, b) = (
                    wave(3 * n_in, index as f64, 0.1),
                    wave(n_out * 3, index as f64 + 0.5, 0.1),
                );
                let a = Tensor::from_vec(a, (3, n_in), &Device::Cpu).unwrap();
                let b = Tensor::from_vec(b, (n_out, 3), &Device::Cpu).unwrap();
                (site, LowRank { a, b, scaling: 0.7 })
            })
            .collect();
        let rows: Vec<Vec<u32>> = vec![
            (0..13).map(|i| (i * 19 % 250) as u32).collect(),
            (0..70).map(|i| (i * 7 % 250) as u32).collect(),
        ];
        let sequences = Sequences::new(&rows);
        let targets: Vec<(usize, u32)> =
            vec![(0, 4), (5, 9), (11, 200), (13, 7), (40, 31), (80, 90)];
        let active = ActiveAdapter::new(sites.clone());
        let gradients = |checkpointing| {
            let options = PassOptions {
                dropout: None,
                checkpointing,
            };
            decoder
                .loss_and_gradients(&sequences, &targets, &active, 1.0, options)
                .unwrap()
                .gradients
                .unwrap()
        };
        let (kept, recomputed) = (gradients(false), gradients(true));
        for (site, _) in &sites {
            let (Some([a, b]), Some([a2, b2])) = (kept.get(*site), recomputed.get(*site)) else {
                panic!("{} has no gradients", site.name());
            };
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(a), flat(a2), "{}: {}", case.name, site.name());
            assert_eq!(flat(b), flat(b2), "{}: {}", case.name, site.name());
            for (which, gradient) in [("A", a), ("B", b)] {
                let gradient = flat(gradient);
                let direction = wave(gradient.len(), 0.3, 1.0);
                let slope: f64 = gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(*g) * f64::from(*d))
                    .sum();
                let at = |step: f64| {
                    let moved = sites.iter().map(|(id, low_rank)| {
                        let mut low_rank = low_rank.clone();
                        if id == site {
                            let target = if which == "A" {
                                &mut low_rank.a
                            } else {
                                &mut low_rank.b
                            };
                            let shift =
                                Tensor::from_vec(direction.clone(), target.dims(), &Device::Cpu)
                                    .unwrap();
                            *target = (&*target + (shift * step).unwrap()).unwrap();
                        }
                        (*id, low_rank)
                    });
                    decoder
                        .evaluate(&sequences, &targets, &ActiveAdapter::new(moved))
                        .unwrap()
                        .total()
                };
                // Losses of about 30 nats carry 1e-5 of rounding; the step balances it against curvature.
                let numeric = (at(4e-3) - at(-4e-3)) / 8e-3;
                let bound = 2e-2 * numeric.abs() + 2e-2;
                assert!(
                    (numeric - slope).abs() < bound,
                    "{}: {} {which}: {slope} against {numeric}",
                    case.name,
                    site.name()
                );
            }
        }
    }
}
