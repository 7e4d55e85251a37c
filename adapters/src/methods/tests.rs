//! Properties that every registered method has.

use candle_core::{Device, Tensor};
use monteclora_converters::Site;

use super::*;

/// The weighting of a step with two modules.
const WEIGHTING: Weighting = Weighting {
    factor: 1.0,
    n_modules: 2,
    epoch_tokens: 40,
};

fn module(name: &str) -> Module {
    Module {
        name: name.to_owned(),
        in_features: 5,
        out_features: 3,
        rank: 2,
        alpha: 4.0,
        scaling: 2.0,
    }
}

/// All methods, with settings that give every part of them weight; a method with several objectives appears with each.
fn made() -> Vec<Arc<dyn Method>> {
    let section = serde_json::json!({"kl_loss_weight": 1e-3, "sample_scaler": 0.5});
    let of_evidence = serde_json::json!({
        "objective": "elbo", "num_samples": 1, "sample_scaler": 0.5, "prior_std": 0.4, "use_entropy": false,
    });
    let kinds = METHODS.iter().map(|kind| (*kind, &section));
    kinds
        .chain([(&monteclora::KIND, &of_evidence)])
        .map(|(kind, section)| (kind.new)(section).expect("its settings"))
        .collect()
}

/// The owners of two modules, with everything moved off its initial zeros.
fn moved(method: &dyn Method) -> Vec<Owner> {
    let modules = [module("a"), module("b")];
    let mut owners = owners(method, &modules, |_| None, 7, &Device::Cpu).expect("made");
    for value in owners.iter_mut().flat_map(|owner| &mut owner.values) {
        if let Value::Tensor(tensor) = value {
            *tensor = (&*tensor + 0.1).expect("adds");
        }
    }
    owners
}

/// The values that a module's method receives: its own, then the shared ones.
fn values(owners: &[Owner], at: usize) -> Vec<&Value> {
    let handed = owners[at..=at].iter().chain(&owners[2..]);
    handed.flat_map(|owner| &owner.values).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    let stored = value.to_format().expect("float");
    stored.to_f32().expect("float")
}

/// The pullback is the slope of the loss, for every parameter of every method.
#[test]
fn gradients_are_finite_differences() {
    for method in made() {
        let kind = method.kind();
        let key = Key::new(3, "a", 1);
        let owners = moved(method.as_ref());
        let draw = |owners: &[Owner]| {
            let values = values(owners, 0);
            let drawn = method.draw(&module("a"), &values, &key, &WEIGHTING);
            drawn.expect("draws")
        };
        let drawn = draw(&owners);
        let upstream: Vec<Tensor> = drawn
            .update()
            .factors()
            .into_iter()
            .map(|factor| (factor.sin().expect("sine") * 1.5).expect("scales"))
            .collect();
        let loss = |owners: &[Owner]| -> f64 {
            let drawn = draw(owners);
            let update = drawn.update();
            let task = update.factors().into_iter().zip(&upstream).map(|(f, g)| {
                let product = (f * g).and_then(|p| p.sum_all());
                f64::from(product.and_then(|s| s.to_scalar::<f32>()).expect("a sum"))
            });
            task.sum::<f64>() + 0.5 * in_loss(kind.metrics, &drawn.metrics())
        };
        let gradients = drawn.pullback(&upstream, 0.5).expect("pulls back");
        let n_own = owners[0].values.len();
        assert_eq!(gradients.len(), values(&owners, 0).len(), "{}", kind.name);
        for (idx, gradient) in gradients.iter().enumerate() {
            let (owner, at) = if idx < n_own {
                (0, idx)
            } else {
                (2, idx - n_own)
            };
            assert_eq!(gradient.shape(), owners[owner].values[at].shape());
            if owners[owner].parameters[at].group == Group::Own {
                continue;
            }
            let ours = numbers(gradient);
            for (entry, ours) in ours.iter().enumerate() {
                let shifted = |delta: f64| {
                    let mut owners = owners.clone();
                    let value = &mut owners[owner].values[at];
                    match value {
                        Value::Vector(values) => values[entry] += delta,
                        Value::Tensor(_) => {
                            let mut moved = numbers(value);
                            moved[entry] += delta as f32;
                            let (shape, held) = (value.shape(), Storage::Tensor);
                            *value = Value::new(held, &shape, moved, &Device::Cpu).expect("sized");
                        }
                    }
                    loss(&owners)
                };
                let numeric = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
                assert!(
                    (f64::from(*ours) - numeric).abs() < 5e-3 * numeric.abs().max(1.0),
                    "{} {} [{entry}]: {ours} {numeric}",
                    kind.name,
                    owners[owner].parameters[at].name
                );
            }
        }
    }
}

/// Parameters that are written and read again equal those in training; new ones depend only on the seed and the
/// module's name.
#[test]
fn parameters_survive_their_file_and_depend_on_seed_and_name() {
    for method in made() {
        let owners_of = |sites: &[Site], seed| {
            let modules = [module("a"), module("b")];
            let stored = |module: &Module| sites.iter().find(|site| site.name == module.name);
            owners(method.as_ref(), &modules, stored, seed, &Device::Cpu).expect("made")
        };
        let all = |owners: &[Owner]| -> Vec<Vec<f32>> {
            let values = owners.iter().flat_map(|owner| &owner.values);
            values.map(numbers).collect()
        };
        assert_eq!(all(&owners_of(&[], 7)), all(&owners_of(&[], 7)));
        assert_ne!(all(&owners_of(&[], 7)), all(&owners_of(&[], 8)));
        let trained = moved(method.as_ref());
        assert_ne!(all(&trained[..1]), all(&trained[1..2]), "{method:?}");
        let sites: Vec<Site> = ["a", "b"]
            .iter()
            .enumerate()
            .map(|(at, name)| {
                let site = method.export(&module(name), &values(&trained, at));
                site.expect("a plain LoRA")
            })
            .collect();
        let read = owners_of(&sites, 9);
        for (read, trained) in read.iter().zip(&trained) {
            for (parameter, values) in read
                .parameters
                .iter()
                .zip(read.values.iter().zip(&trained.values))
            {
                if parameter.peft.is_some() {
                    assert_eq!(numbers(values.0), numbers(values.1), "{}", parameter.name);
                }
            }
        }
    }
}

#[test]
fn names_are_unique_and_unknown_ones_refused() {
    let mut names: Vec<_> = METHODS.iter().map(|kind| kind.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), METHODS.len());
    for kind in METHODS.iter().copied() {
        assert_eq!(find(kind.name).expect("registered").name, kind.name);
    }
    for method in made() {
        assert_eq!(
            find(method.kind().name).expect("registered").name,
            method.kind().name
        );
    }
    assert!(find("dora").is_err());
}
