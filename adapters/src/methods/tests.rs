//! Properties that every registered method has.

use candle_core::{Device, Tensor};
use monteclora_converters::Site;

use super::*;
use crate::numbers::read_groups;

/// The weighting of a step with two modules.
const WEIGHTING: Weighting = Weighting {
    factor: 1.0,
    n_modules: 2,
    epoch_tokens: 40,
};

fn module(name: &str) -> Module {
    let weight: Vec<f32> = (0..24).map(|at| (at as f32 * 1.7 + 0.3).sin()).collect();
    let weight = Tensor::from_vec(weight, (4, 6), &Device::Cpu).expect("sized");
    Module {
        name: name.to_owned(),
        in_features: 6,
        out_features: 4,
        rank: 2,
        alpha: 4.0,
        scaling: 2.0,
        has_bias: true,
        attention: Some(AttentionPlace {
            layer: usize::from(name == "b"),
            role: Role::Query,
            head_dim: 2,
        }),
        frozen: Some(Frozen(Arc::new(weight))),
    }
}

/// Every method, with settings under which every part of it weighs; one with several objectives, under each.
fn made() -> Vec<Arc<dyn Method>> {
    let section = |name: &str| match name {
        "monteclora" => serde_json::json!({"kl_loss_weight": 1e-3, "sample_scaler": 0.5}),
        "adalora" => serde_json::json!({"target_r": 1, "tinit": 1, "tfinal": 2}),
        "sara" => serde_json::json!({"fraction": 0.3, "rank_weight": 0.1}),
        "second-order" => serde_json::json!({"fraction": 0.3}),
        _ => serde_json::Value::Null,
    };
    let of_evidence = serde_json::json!({
        "objective": "elbo", "num_samples": 1, "sample_scaler": 0.5, "prior_std": 0.4, "use_entropy": false,
    });
    let kinds = METHODS.iter().map(|kind| (*kind, section(kind.name)));
    kinds
        .chain([(&monteclora::KIND, of_evidence)])
        .map(|(kind, section)| (kind.new)(&section).expect("its settings"))
        .collect()
}

/// The owners of two modules, with everything that is trained moved off its initial values, after a step.
fn moved(method: &dyn Method) -> Vec<Owner> {
    let modules = [module("a"), module("b")];
    method.check(&modules).expect("modules that it adapts");
    let mut owners = owners(method, &modules, |_| None, 7, &Device::Cpu).expect("made");
    complete(method, &modules, &mut owners, 7, &Device::Cpu).expect("weights are known");
    let mut number = 0.0;
    for owner in &mut owners {
        for (parameter, value) in owner.parameters.iter().zip(&mut owner.values) {
            if let (Value::Tensor(tensor), true) = (&*value, parameter.group != Group::State) {
                number += 0.37f64;
                let shift = 0.1 + 0.05 * number.sin();
                *value = Value::Tensor((tensor + shift).expect("adds"));
            }
        }
    }
    let gradients = (0..modules.len()).map(|at| {
        let key = Key::new(3, &modules[at].name, 0);
        let drawn = method.draw(&modules[at], &values(&owners, at), &key, &WEIGHTING);
        let drawn = drawn.expect("draws");
        let update = drawn.update();
        let upstream: Vec<Tensor> = update.factors().into_iter().map(some_gradient).collect();
        pullback(drawn.as_ref(), &upstream)
    });
    let gradients: Vec<_> = gradients.collect();
    let step = Step {
        index: 0,
        total: 10,
        trained_tokens: 4,
        epoch_tokens: 40,
    };
    method
        .after_step(&modules, &mut owners, &gradients, step)
        .expect("after a step");
    owners
}

/// The gradients of a draw with half the regulariser.
fn pullback(drawn: &dyn Drawn, upstream: &[Tensor]) -> Vec<Value> {
    let numbers = drawn.numbers(upstream).expect("numbers");
    let numbers = read_groups(vec![numbers]).expect("readable").concat();
    drawn.pullback(upstream, &numbers, 0.5).expect("pulls back")
}

/// A gradient of a factor that is nowhere zero.
fn some_gradient(factor: &Tensor) -> Tensor {
    let n = factor.elem_count();
    let values: Vec<f32> = (0..n)
        .map(|at| (at as f32 * 0.9 + 0.4).sin() + 0.1)
        .collect();
    Tensor::from_vec(values, factor.shape(), &Device::Cpu).expect("sized")
}

/// What a module's method is handed: its values and those that all share.
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
        let gradients = pullback(drawn.as_ref(), &upstream);
        let n_own = owners[0].values.len();
        assert_eq!(gradients.len(), values(&owners, 0).len(), "{}", kind.name);
        for (idx, gradient) in gradients.iter().enumerate() {
            let (owner, at) = if idx < n_own {
                (0, idx)
            } else {
                (2, idx - n_own)
            };
            let group = owners[owner].parameters[at].group;
            if group == Group::State {
                continue;
            }
            assert_eq!(gradient.shape(), owners[owner].values[at].shape());
            if group == Group::Own {
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
        // These start from the base, not from random numbers.
        if !["ssf", "sara", "second-order"].contains(&method.kind().name) {
            assert_ne!(
                all(&owners_of(&[], 7)),
                all(&owners_of(&[], 8)),
                "{method:?}"
            );
        }
        let trained = moved(method.as_ref());
        let sites: Vec<Site> = ["a", "b"]
            .iter()
            .enumerate()
            .map(|(at, name)| {
                let site = method.export(&module(name), &values(&trained, at));
                site.expect("an adapter")
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
    assert!(find("dora-fa").is_err());
}
