//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), and gradient clipping.

use candle_core::{Device, Tensor};
use monteclora_adapters::Result;
use monteclora_adapters::linalg::on_cpu;
use monteclora_adapters::methods::{Group, Owner, Value};
use rayon::prelude::*;

use super::state::{AdapterState, Gradients};

/// Hyperparameters; the learning rates come with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Learning rate of [`Group::Output`] over that of [`Group::Weight`], at least 1 in LoRA+ (Hayou et al. 2024,
    /// arXiv:2402.12354).
    pub loraplus_lr_ratio: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            loraplus_lr_ratio: 1.0,
        }
    }
}

/// First and second moment of one value.
pub type Moments = (Value, Value);

/// Optimiser state.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Hyperparameters.
    pub settings: AdamWSettings,
    /// Updates made so far.
    pub step: u64,
    /// Moments, in the order of the owners and their values.
    pub moments: Vec<Vec<Moments>>,
}

/// One update's constants.
#[derive(Debug, Clone, Copy)]
struct Update {
    settings: AdamWSettings,
    correction1: f64,
    correction2: f64,
    learning_rate: f64,
    weight_decay: f64,
}

impl AdamW {
    /// Zero moments for `state`.
    pub fn new(settings: AdamWSettings, state: &AdapterState) -> Result<Self> {
        let zeros = |value: &Value| Ok((value.zeros_like()?, value.zeros_like()?));
        let moments = state
            .owners
            .iter()
            .map(|owner| owner.values.iter().map(zeros).collect())
            .collect::<Result<_>>()?;
        Ok(Self {
            settings,
            step: 0,
            moments,
        })
    }

    /// Moves every parameter of `state` against its gradient; `variational_rate` is the learning rate of
    /// [`Group::Variational`].
    pub fn step(
        &mut self,
        state: &mut AdapterState,
        gradients: &[Vec<Value>],
        learning_rate: f64,
        variational_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        let step = self.step as i32;
        let settings = self.settings;
        let weight = Update {
            settings,
            correction1: 1.0 - settings.beta1.powi(step),
            correction2: 1.0 - settings.beta2.powi(step),
            learning_rate,
            weight_decay: settings.weight_decay,
        };
        let update = |group| match group {
            Group::Frozen => None,
            Group::Weight => Some(weight),
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
        let owners = state.owners.par_iter_mut().zip(&mut self.moments);
        owners
            .zip(gradients)
            .try_for_each(|((owner, moments), gradients)| {
                let values = owner.values.iter_mut().zip(moments).zip(gradients);
                for (parameter, ((value, moments), gradient)) in owner.parameters.iter().zip(values)
                {
                    if let Some(update) = update(parameter.group) {
                        update.apply(value, moments, gradient)?;
                    }
                }
                Ok(())
            })
    }
}

impl Update {
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
        let Update { settings, .. } = *self;
        let decay = 1.0 - self.learning_rate * self.weight_decay;
        let rate = self.learning_rate / self.correction1;
        let root = self.correction2.sqrt();
        let shape = value.shape().clone();
        let fast = on_cpu([value, m, v, gradient], |[x, m, v, g]| {
            let (b1, b2) = (settings.beta1 as f32, settings.beta2 as f32);
            let (c1, c2) = ((1.0 - settings.beta1) as f32, (1.0 - settings.beta2) as f32);
            let new_m: Vec<f32> = m.iter().zip(g).map(|(m, g)| b1 * m + c1 * g).collect();
            let new_v: Vec<f32> = v.iter().zip(g).map(|(v, g)| b2 * v + c2 * g * g).collect();
            let (decay, rate, root, eps) = (
                decay as f32,
                rate as f32,
                root as f32,
                settings.epsilon as f32,
            );
            let moved = x.iter().zip(&new_m).zip(&new_v);
            let new_x: Vec<f32> = moved
                .map(|((x, m), v)| x * decay - rate * m / (v.sqrt() / root + eps))
                .collect();
            (new_x, new_m, new_v)
        })?;
        if let Some((new_x, new_m, new_v)) = fast {
            *value = Tensor::from_vec(new_x, shape.clone(), &Device::Cpu)?;
            *m = Tensor::from_vec(new_m, shape.clone(), &Device::Cpu)?;
            *v = Tensor::from_vec(new_v, shape, &Device::Cpu)?;
            return Ok(());
        }
        *m = ((&*m * settings.beta1)? + (gradient * (1.0 - settings.beta1))?)?;
        *v = ((&*v * settings.beta2)? + (gradient.sqr()? * (1.0 - settings.beta2))?)?;
        let denominator = ((v.sqrt()? / root)? + settings.epsilon)?;
        *value = ((&*value * decay)? - ((&*m * rate)? / denominator)?)?;
        Ok(())
    }

    fn apply_vector(&self, x: &mut [f64], (m, v): (&mut [f64], &mut [f64]), g: &[f64]) {
        let Update { settings, .. } = *self;
        let decay = 1.0 - self.learning_rate * self.weight_decay;
        for (((x, m), v), g) in x.iter_mut().zip(m).zip(v).zip(g) {
            *m = settings.beta1 * *m + (1.0 - settings.beta1) * g;
            *v = settings.beta2 * *v + (1.0 - settings.beta2) * g * g;
            let moved = *x * decay
                - self.learning_rate / self.correction1 * *m
                    / ((*v / self.correction2).sqrt() + settings.epsilon);
            *x = f64::from(moved as f32);
        }
    }
}

/// Scales all gradients so that their norm, of all together and in double precision, is at most `max_norm`, as
/// `torch.nn.utils.clip_grad_norm_` does; returns the norm before. A `max_norm` of 0 leaves them alone, and what is frozen
/// counts too.
pub fn clip(gradients: &mut Gradients, max_norm: f64) -> Result<f64> {
    let squares = gradients
        .par_iter()
        .map(|gradients| Owner::sum_of_squares(gradients))
        .collect::<Result<Vec<f64>>>()?;
    let norm = squares.iter().sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        let values = gradients.par_iter_mut().flatten();
        values.try_for_each(|gradient| -> Result<()> {
            *gradient = gradient.scaled(factor)?;
            Ok(())
        })?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against candle's own AdamW on a quadratic, many steps.
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
            let settings = AdamWSettings {
                weight_decay: 0.1,
                ..Default::default()
            };
            let update = Update {
                settings,
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
