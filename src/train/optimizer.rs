//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), and gradient clipping.

use candle_core::{Device, Tensor};
use monteclora_adapters::linalg::on_cpu;
use monteclora_adapters::{Spread, SpreadGradient};
use rayon::prelude::*;

use super::Result;
use super::state::{AdapterState, SiteGradient, round_spread};

/// Hyperparameters; the learning rates come with each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of A and B; the variational parameters have none, it would pull them to an arbitrary value.
    pub weight_decay: f64,
    /// Whether A is trained (LoRA-FA freezes it).
    pub train_a: bool,
    /// Learning rate of B over that of A, at least 1 in LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
    pub loraplus_lr_ratio: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            train_a: true,
            loraplus_lr_ratio: 1.0,
        }
    }
}

/// First and second moments of one site.
#[derive(Debug, Clone)]
pub struct SiteMoments {
    /// Of A.
    pub a: (Tensor, Tensor),
    /// Of B.
    pub b: (Tensor, Tensor),
    /// Of `s` and `theta`.
    pub spread: Option<(Spread, Spread)>,
}

/// Optimiser state.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Hyperparameters.
    pub settings: AdamWSettings,
    /// Updates made so far.
    pub step: u64,
    /// Moments, in the order of the sites.
    pub moments: Vec<SiteMoments>,
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
        let moments = state
            .sites
            .iter()
            .map(|site| {
                let zeros = |t: &Tensor| -> Result<(Tensor, Tensor)> {
                    Ok((t.zeros_like()?, t.zeros_like()?))
                };
                let spread = site.spread.as_ref().map(|s| {
                    let zero = Spread {
                        log_std: vec![0.0; s.log_std.len()],
                        log_concentration: vec![0.0; s.log_concentration.len()],
                    };
                    (zero.clone(), zero)
                });
                Ok(SiteMoments {
                    a: zeros(&site.a)?,
                    b: zeros(&site.b)?,
                    spread,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            settings,
            step: 0,
            moments,
        })
    }

    /// Moves every parameter of `state` against its gradient; `spread_rate` is the learning rate of `s` and `theta`.
    pub fn step(
        &mut self,
        state: &mut AdapterState,
        gradients: &[SiteGradient],
        learning_rate: f64,
        spread_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        let step = self.step as i32;
        let update = Update {
            settings: self.settings,
            correction1: 1.0 - self.settings.beta1.powi(step),
            correction2: 1.0 - self.settings.beta2.powi(step),
            learning_rate,
            weight_decay: self.settings.weight_decay,
        };
        let b_update = Update {
            learning_rate: learning_rate * self.settings.loraplus_lr_ratio,
            ..update
        };
        let spread_update = Update {
            learning_rate: spread_rate,
            weight_decay: 0.0,
            ..update
        };
        state
            .sites
            .par_iter_mut()
            .zip(&mut self.moments)
            .zip(gradients)
            .try_for_each(|((site, moments), gradient)| {
                if self.settings.train_a {
                    update.apply(&mut site.a, &mut moments.a, &gradient.a)?;
                }
                b_update.apply(&mut site.b, &mut moments.b, &gradient.b)?;
                if let (Some(spread), Some(moments), Some(gradient)) =
                    (&mut site.spread, &mut moments.spread, &gradient.spread)
                {
                    spread_update.apply_spread(spread, moments, gradient);
                }
                Ok(())
            })
    }
}

impl Update {
    /// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, `x = (1 - lr wd) x - lr m / c1 / (sqrt(v / c2) + eps)`.
    fn apply(
        &self,
        value: &mut Tensor,
        (m, v): &mut (Tensor, Tensor),
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

    fn apply_spread(
        &self,
        value: &mut Spread,
        (m, v): &mut (Spread, Spread),
        gradient: &SpreadGradient,
    ) {
        self.apply_slice(
            &mut value.log_std,
            &mut m.log_std,
            &mut v.log_std,
            &gradient.log_std,
        );
        self.apply_slice(
            &mut value.log_concentration,
            &mut m.log_concentration,
            &mut v.log_concentration,
            &gradient.log_concentration,
        );
        let rounded = round_spread(std::mem::replace(
            value,
            Spread {
                log_std: Vec::new(),
                log_concentration: Vec::new(),
            },
        ));
        *value = rounded;
    }

    fn apply_slice(&self, x: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64]) {
        let Update { settings, .. } = *self;
        for (((x, m), v), g) in x.iter_mut().zip(m).zip(v).zip(g) {
            *m = settings.beta1 * *m + (1.0 - settings.beta1) * g;
            *v = settings.beta2 * *v + (1.0 - settings.beta2) * g * g;
            *x -= self.learning_rate / self.correction1 * *m
                / ((*v / self.correction2).sqrt() + settings.epsilon);
        }
    }
}

/// Euclidean norm of all gradients together, in double precision.
pub fn global_norm(gradients: &[SiteGradient]) -> Result<f64> {
    let squares = gradients
        .par_iter()
        .map(|gradient| {
            let spread = gradient.spread.as_ref().map_or(0.0, |s| {
                s.log_std
                    .iter()
                    .chain(&s.log_concentration)
                    .map(|g| g * g)
                    .sum()
            });
            Ok(sum_of_squares(&gradient.a)? + sum_of_squares(&gradient.b)? + spread)
        })
        .collect::<Result<Vec<f64>>>()?;
    Ok(squares.iter().sum::<f64>().sqrt())
}

fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let fast = on_cpu([tensor], |[values]| {
        values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
    })?;
    match fast {
        Some(sum) => Ok(sum),
        None => Ok(f64::from(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?)),
    }
}

/// Scales all gradients so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does; returns the norm
/// before. A `max_norm` of 0 leaves them alone.
pub fn clip(gradients: &mut [SiteGradient], max_norm: f64) -> Result<f64> {
    let norm = global_norm(gradients)?;
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        gradients
            .par_iter_mut()
            .try_for_each(|gradient| -> Result<()> {
                gradient.a = (&gradient.a * factor)?;
                gradient.b = (&gradient.b * factor)?;
                if let Some(spread) = &mut gradient.spread {
                    for value in spread
                        .log_std
                        .iter_mut()
                        .chain(&mut spread.log_concentration)
                    {
                        *value *= factor;
                    }
                }
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
        let (mut x, mut moments) = (start.clone(), (start.zeros_like()?, start.zeros_like()?));
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
            update.apply(&mut x, &mut moments, &gradient)?;
        }
        let difference = (&x - var.as_tensor())?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{difference}");
        Ok(())
    }
}
