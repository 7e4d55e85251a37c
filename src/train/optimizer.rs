//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), and gradient
//! clipping.

use candle_core::{Device, Tensor};
use monteclora_adapters::Result;
use monteclora_adapters::device::each;
use monteclora_adapters::linalg::on_cpu;
use monteclora_adapters::methods::{Group, Owner, Value};
use monteclora_adapters::numbers::read_groups;

use super::state::{AdapterState, Gradients};
use crate::config::TrainConfig;

/// First and second moment of one value.
pub type Moments = (Value, Value);

/// The optimiser's state.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Number of updates so far.
    pub step: u64,
    /// Moments, in the order of the owners and their values.
    pub moments: Vec<Vec<Moments>>,
}

/// Constants of one update.
#[derive(Debug, Clone, Copy)]
struct Update<'a> {
    settings: &'a TrainConfig,
    correction1: f64,
    correction2: f64,
    learning_rate: f64,
    weight_decay: f64,
}

/// The moments of what the optimiser does not move.
pub(super) fn no_moments() -> Moments {
    (Value::Vector(Vec::new()), Value::Vector(Vec::new()))
}

impl AdamW {
    /// Zero moments for `state`.
    pub fn new(state: &AdapterState) -> Result<Self> {
        let zeros = |value: &Value| Ok((value.zeros_like()?, value.zeros_like()?));
        let moments = state
            .owners
            .iter()
            .map(|owner| {
                let values = owner.parameters.iter().zip(&owner.values);
                values
                    .map(|(parameter, value)| match parameter.group {
                        Group::State => Ok(no_moments()),
                        _ => zeros(value),
                    })
                    .collect()
            })
            .collect::<Result<_>>()?;
        Ok(Self { step: 0, moments })
    }

    /// Updates every parameter of `state` with its gradient. `variational_rate` is the learning rate of
    /// [`Group::Variational`]. `settings` contributes the constants, for example LoRA+'s ratio (Hayou et al. 2024,
    /// arXiv:2402.12354), but not the learning rates.
    pub fn step(
        &mut self,
        settings: &TrainConfig,
        state: &mut AdapterState,
        gradients: &[Vec<Value>],
        learning_rate: f64,
        variational_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        let step = self.step as i32;
        let weight = Update {
            settings,
            correction1: 1.0 - settings.adam_beta1.powi(step),
            correction2: 1.0 - settings.adam_beta2.powi(step),
            learning_rate,
            weight_decay: settings.weight_decay,
        };
        let update = |group| match group {
            Group::Frozen | Group::Own | Group::State => None,
            Group::Weight => Some(weight),
            Group::Unpenalised => Some(Update {
                weight_decay: 0.0,
                ..weight
            }),
            Group::Output => Some(Update {
                learning_rate: learning_rate * settings.loraplus_lr_ratio,
                ..weight
            }),
            Group::Variational => Some(Update {
                learning_rate: variational_rate,
                weight_decay: 0.0,
                ..weight
            }),
        };
        let device = state.device();
        let owners = state.owners.iter_mut().zip(&mut self.moments);
        let owners = owners.zip(gradients);
        each(&device, owners, |((owner, moments), gradients)| {
            let values = owner.values.iter_mut().zip(moments).zip(gradients);
            for (parameter, ((value, moments), gradient)) in owner.parameters.iter().zip(values) {
                if let Some(update) = update(parameter.group) {
                    update.apply(value, moments, gradient)?;
                }
            }
            Ok(())
        })?;
        Ok(())
    }
}

impl Update<'_> {
    /// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `x = (1 - lr wd) x - lr m / c1 / (sqrt(v / c2) + eps)`.
    fn apply(&self, value: &mut Value, moments: &mut Moments, gradient: &Value) -> Result<()> {
        match (value, moments, gradient) {
            (Value::Tensor(x), (Value::Tensor(m), Value::Tensor(v)), Value::Tensor(g)) => {
                self.apply_tensor(x, (m, v), g)
            }
            (Value::Vector(x), (Value::Vector(m), Value::Vector(v)), Value::Vector(g)) => {
                self.apply_vector(x, (m, v), g);
                Ok(())
            }
            (value, _, gradient) => Err(monteclora_adapters::Error::Shape {
                what: "a gradient or a moment".to_owned(),
                expected: value.shape(),
                found: gradient.shape(),
            }),
        }
    }

    fn apply_tensor(
        &self,
        value: &mut Tensor,
        (m, v): (&mut Tensor, &mut Tensor),
        gradient: &Tensor,
    ) -> Result<()> {
        let (beta1, beta2) = (self.settings.adam_beta1, self.settings.adam_beta2);
        let decay = 1.0 - self.learning_rate * self.weight_decay;
        let rate = self.learning_rate / self.correction1;
        let (root, epsilon) = (self.correction2.sqrt(), self.settings.adam_epsilon);
        let shape = value.shape().clone();
        let fast = on_cpu([value, m, v, gradient], |[x, m, v, g]| {
            let (b1, b2) = (beta1 as f32, beta2 as f32);
            let (c1, c2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
            let new_m: Vec<f32> = m.iter().zip(g).map(|(m, g)| b1 * m + c1 * g).collect();
            let new_v: Vec<f32> = v.iter().zip(g).map(|(v, g)| b2 * v + c2 * g * g).collect();
            let [decay, rate, root, eps] = [decay, rate, root, epsilon].map(|v| v as f32);
            let moved = x.iter().zip(&new_m).zip(&new_v);
            let new_x: Vec<f32> = moved
                .map(|((x, m), v)| x * decay - rate * m / (v.sqrt() / root + eps))
                .collect();
            [new_x, new_m, new_v]
        })?;
        if let Some(new) = fast {
            for (tensor, values) in [value, m, v].into_iter().zip(new) {
                *tensor = Tensor::from_vec(values, &shape, &Device::Cpu)?;
            }
            return Ok(());
        }
        *m = ((&*m * beta1)? + (gradient * (1.0 - beta1))?)?;
        *v = ((&*v * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = ((v.sqrt()? / root)? + epsilon)?;
        *value = ((&*value * decay)? - ((&*m * rate)? / denominator)?)?;
        Ok(())
    }

    fn apply_vector(&self, x: &mut [f64], (m, v): (&mut [f64], &mut [f64]), g: &[f64]) {
        let (beta1, beta2) = (self.settings.adam_beta1, self.settings.adam_beta2);
        let decay = 1.0 - self.learning_rate * self.weight_decay;
        for (((x, m), v), g) in x.iter_mut().zip(m).zip(v).zip(g) {
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let moved = *x * decay
                - self.learning_rate / self.correction1 * *m
                    / ((*v / self.correction2).sqrt() + self.settings.adam_epsilon);
            *x = f64::from(moved as f32);
        }
    }
}

/// Scales all gradients so that their joint norm, in double precision, is at most `max_norm`, like
/// `torch.nn.utils.clip_grad_norm_`. Returns the norm before. A `max_norm` of 0 disables the scaling. The norm includes
/// frozen values, but not those that the method updates itself ([`Group::Own`]).
pub fn clip(gradients: &mut Gradients, owners: &[Owner], max_norm: f64) -> Result<f64> {
    let device = Value::device_of(gradients.iter().flatten());
    let all = gradients.iter().zip(owners);
    let numbers = each(&device, all, |(gradients, owner)| {
        let all = owner.parameters.iter().zip(gradients);
        let skipped = [Group::Own, Group::State];
        let clipped = all.filter(|(parameter, _)| !skipped.contains(&parameter.group));
        Owner::squares(clipped.map(|(_, gradient)| gradient))
    })?;
    let of_owners = read_groups(numbers)?;
    let squares = of_owners.iter().map(|squares| squares.iter().sum::<f64>());
    let norm = squares.sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        each(&device, gradients.iter_mut().flatten(), |gradient| {
            *gradient = gradient.scaled(factor)?;
            Ok(())
        })?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares with candle's own AdamW on a quadratic function over many steps.
    #[test]
    fn equals_candle_adamw() -> Result<()> {
        use candle_nn::Optimizer;
        let start = Tensor::new(&[[1f32, -2.0, 0.5], [3.0, 0.1, -0.7]], &Device::Cpu)?;
        let target = Tensor::new(&[[0f32, 1.0, 2.0], [-1.0, 0.0, 0.3]], &Device::Cpu)?;
        let var = candle_core::Var::from_tensor(&start)?;
        let params = candle_nn::ParamsAdamW {
            lr: 0.05,
            weight_decay: 0.1,
            ..Default::default()
        };
        let mut reference = candle_nn::AdamW::new(vec![var.clone()], params)?;
        let (mut x, mut m, mut v) = (start.clone(), start.zeros_like()?, start.zeros_like()?);
        for step in 1..=20 {
            let loss = (var.as_tensor() - &target)?.sqr()?.sum_all()?;
            reference.backward_step(&loss)?;
            let gradient = ((&x - &target)? * 2.0)?;
            let update = Update {
                settings: &TrainConfig::default(),
                correction1: 1.0 - 0.9f64.powi(step),
                correction2: 1.0 - 0.999f64.powi(step),
                learning_rate: 0.05,
                weight_decay: 0.1,
            };
            update.apply_tensor(&mut x, (&mut m, &mut v), &gradient)?;
        }
        let difference = (&x - var.as_tensor())?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{difference}");
        Ok(())
    }
}
