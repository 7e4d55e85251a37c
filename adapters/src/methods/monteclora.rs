//! MonteCLoRA (Seth et al. 2025, arXiv:2411.04358): LoRA whose A is drawn anew at every step from a Gaussian scale mixture
//! around its mean; B is deterministic.

mod divergence;
mod draw;
mod evidence;
mod mixture;
mod scaled;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_converters::{Adapter, MonteCloraSettings, Problem, Site, SitePosterior};
use serde::{Deserialize, Serialize};

use super::lora::LORA;
use super::parameter::unlike;
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, Owner, Parameter, Step, Storage,
    Value, Weighting, owners,
};
use crate::error::Result;
use crate::noise::{Key, Noise, Purpose};
use crate::numbers::Numbers;
use crate::update::Update;

pub use scaled::{Geometry, ScaledPosterior};

use draw::{Draw, StandardNoise};
use evidence::Evidence;

/// The registry entry of MonteCLoRA.
pub static KIND: Kind = Kind {
    name: "monteclora",
    about: "LoRA with a variational posterior over A.",
    metrics: DIVERGENCES,
    export: Export::PlainLora,
    unread: &[],
    new: |section| {
        let settings = MonteCloraConfig::deserialize(section)
            .map_err(|e| Problem::usage(format!("[lora.monteclora]: {e}")))?;
        Ok(Arc::new(MonteClora(settings)))
    },
};

/// The names of `s` and `theta` in PEFT's files.
const STD: &str = "lora_monteclora_sampler.std_prior";
const CONCENTRATION: &str = "lora_monteclora_sampler.expert_weights_prior";

/// How a draw of A is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Form {
    /// One Gaussian per module.
    #[default]
    Collapsed,
    /// `N` Gaussians per module, as in PEFT: the plain reference.
    Literal,
}

/// A named set of [`MonteCloraConfig`] values; explicit keys win.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// PEFT 0.21's defaults.
    Peft,
    /// The values of the paper's GLUE experiments (arXiv:2411.04358).
    Paper,
    /// Same as `paper`.
    #[default]
    Recommended,
}

impl Preset {
    /// Default ratio of the variational parameters' learning rate to that of A and B.
    ///
    /// Adam moves a value by about the learning rate per step, whatever the gradient's size. The variational parameters
    /// start uniform in [0, 1). At A's rate of a few 1e-4, a run of a thousand steps barely moves them; ten times that
    /// rate lets them cross their range. PEFT uses one rate for all parameters.
    pub fn variational_rate_ratio(self) -> f64 {
        match self {
            Self::Peft => 1.0,
            Self::Paper | Self::Recommended => 10.0,
        }
    }
}

/// Divergences to minimise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The divergences themselves.
    #[default]
    Exact,
    /// PEFT's formulas, for parity with it.
    Peft,
    /// The divergence from a Gaussian prior on A, weighted as in the evidence lower bound. The variances are updated in
    /// closed form.
    Elbo,
}

/// `[lora.monteclora]`, with PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MonteCloraConfig {
    /// Preset that sets the defaults of the other keys.
    pub preset: Preset,
    /// Divergences to minimise.
    pub objective: Objective,
    /// Number of mixture components N, at least 1.
    pub num_samples: usize,
    /// Scale of the noise on A, above 0.
    pub sample_scaler: f64,
    /// Weight of the divergences in the loss, at least 0.
    pub kl_loss_weight: f64,
    /// Concentration of the Dirichlet prior, above 0.
    pub dirichlet_prior: f64,
    /// Add the sum of squared mixture weights to the loss.
    pub use_entropy: bool,
    /// Share of the steps over which the weight of the divergences rises from 0 to `kl_loss_weight`, in [0, 1].
    pub kl_warmup_ratio: f64,
    /// Standard deviation of the prior on the entries of A, above 0. Only for `elbo`.
    pub prior_std: f64,
    /// Temperature of the bound, above 0, only for `elbo`. 1 is the bound itself; below 1 the posterior is colder.
    pub temperature: f64,
    /// The form of the draw; not a key.
    #[serde(skip)]
    pub form: Form,
}

impl MonteCloraConfig {
    /// The values of a preset.
    pub fn preset(preset: Preset) -> Self {
        let recommended = Self {
            preset,
            objective: Objective::Exact,
            num_samples: 4,
            sample_scaler: 5e-3,
            kl_loss_weight: 1e-5,
            dirichlet_prior: 1.0,
            use_entropy: true,
            kl_warmup_ratio: 0.0,
            prior_std: 0.2,
            temperature: 1.0,
            form: Form::Collapsed,
        };
        match preset {
            Preset::Paper | Preset::Recommended => recommended,
            Preset::Peft => Self {
                num_samples: 8,
                sample_scaler: 1e-4,
                dirichlet_prior: 0.1,
                use_entropy: false,
                ..recommended
            },
        }
    }
}

impl MonteCloraConfig {
    /// Returns the settings for `objective = "elbo"` at rank `r`, where the prior determines the other keys: one
    /// component, a noise scale `c = tau / sqrt r` so that `s = 0` is as wide as the prior, and neither PEFT's
    /// divergences nor its sum of squares.
    pub fn of_evidence(self, r: usize) -> Self {
        Self {
            num_samples: 1,
            sample_scaler: self.prior_std / (r as f64).sqrt(),
            kl_loss_weight: 0.0,
            use_entropy: false,
            kl_warmup_ratio: 0.0,
            ..self
        }
    }

    /// Returns the prior and the temperature of the evidence bound, if the objective is `elbo`.
    fn evidence(&self) -> Option<Evidence> {
        (self.objective == Objective::Elbo).then_some(Evidence {
            prior_std: self.prior_std,
            temperature: self.temperature,
            sample_scaler: self.sample_scaler,
        })
    }
}

impl Default for MonteCloraConfig {
    fn default() -> Self {
        Self::preset(Preset::default())
    }
}

impl From<&MonteCloraSettings> for MonteCloraConfig {
    fn from(stored: &MonteCloraSettings) -> Self {
        Self {
            num_samples: stored.num_samples,
            sample_scaler: stored.sample_scaler,
            kl_loss_weight: stored.kl_loss_weight,
            dirichlet_prior: stored.dirichlet_prior,
            use_entropy: stored.use_entropy,
            ..Self::preset(Preset::Peft)
        }
    }
}

impl From<&MonteCloraConfig> for MonteCloraSettings {
    fn from(config: &MonteCloraConfig) -> Self {
        Self {
            num_samples: config.num_samples,
            sample_scaler: config.sample_scaler,
            kl_loss_weight: config.kl_loss_weight,
            dirichlet_prior: config.dirichlet_prior,
            use_entropy: config.use_entropy,
            buffer_size: Self::EXPORT_BUFFER_SIZE,
        }
    }
}

/// MonteCLoRA with its settings.
#[derive(Debug)]
pub struct MonteClora(pub MonteCloraConfig);

impl MonteClora {
    /// Draws A at a module whose parameters have these `values`.
    fn draw_a(&self, values: &[&Value], noise: &dyn Noise, weighting: &Weighting) -> Result<Draw> {
        let [
            Value::Tensor(a),
            _,
            Value::Vector(log_std),
            Value::Vector(log_concentration),
        ] = values
        else {
            return Err(unlike(&[4], &[values.len()]));
        };
        let noise = StandardNoise::new(self.0.form, noise, log_concentration.len(), a)?;
        Draw::new(&self.0, weighting, a, (log_std, log_concentration), noise)
    }
}

impl Method for MonteClora {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn summary(&self) -> String {
        match self.0.evidence() {
            Some(evidence) => format!("{}, evidence bound, tau {}", KIND.name, evidence.prior_std),
            None => format!("{}, N {}", KIND.name, self.0.num_samples),
        }
    }

    /// LoRA's parameters and two variational ones: `s` `[r]`, the log of the Wishart scale's standard deviation, and
    /// `theta` `[N]`, the log of the Dirichlet concentration.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let variational = |name, peft, len| Parameter {
            name,
            peft: Some(peft),
            shape: vec![len],
            storage: Storage::Vector,
            group: match self.0.evidence() {
                Some(_) => Group::Own,
                None => Group::Variational,
            },
            reached: None,
        };
        let mut parameters = LORA.parameters(module);
        parameters.push(variational("log_std", STD, module.rank));
        let n = self.0.num_samples;
        parameters.push(variational("log_concentration", CONCENTRATION, n));
        parameters
    }

    /// LoRA's initial values, and variational parameters uniform in `[0, 1)` as in PEFT; for `elbo`, those of the
    /// prior.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let mut initial = LORA.initial(module, key);
        if let Some(evidence) = self.0.evidence() {
            let log_std = evidence.log_std_of_prior(module.rank) as f32;
            initial.push(vec![log_std; module.rank]);
            initial.push(vec![0.0; self.0.num_samples]);
            return initial;
        }
        let n_values = module.rank + self.0.num_samples;
        let values = key.uniforms(Purpose::InitialVariational, n_values);
        let (log_std, log_concentration) = values.split_at(module.rank);
        initial.extend([log_std, log_concentration].map(|v| v.iter().map(|v| *v as f32).collect()));
        initial
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        let [factors @ .., _, _] = values else {
            return Err(unlike(&[4], &[values.len()]));
        };
        LORA.mean(module, factors)
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        noise: &dyn Noise,
        weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        let draw = self.draw_a(values, noise, weighting)?;
        let mut factors = values.to_vec();
        let a = Value::Tensor(draw.effective_a.clone());
        factors.splice(..1, [&a]);
        let update = self.mean(module, &factors)?;
        let mean = self.0.evidence().map(|_| values[0].clone());
        Ok(Box::new(DrawnA { draw, update, mean }))
    }

    fn warmup_ratio(&self) -> f64 {
        self.0.kl_warmup_ratio
    }

    /// The draw and its noise.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.rank * module.in_features
    }

    /// For `elbo`, makes the closed-form step of the variances. The gradient of `s` then holds the mean squares of the
    /// rows of A's gradient.
    fn after_step(
        &self,
        _modules: &[Module],
        owners: &mut [Owner],
        gradients: &[Vec<Value>],
        step: Step,
    ) -> Result<()> {
        let Some(evidence) = self.0.evidence() else {
            return Ok(());
        };
        for (owner, gradients) in owners.iter_mut().zip(gradients) {
            let ([.., Value::Vector(log_std), _], [.., Value::Vector(mean_squares), _]) =
                (&mut owner.values[..], &gradients[..])
            else {
                return Err(unlike(&[4], &[gradients.len()]));
            };
            evidence.step(log_std, mean_squares, &step);
        }
        Ok(())
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let [factors @ .., log_std, log_concentration] = values else {
            return Err(unlike(&[4], &[values.len()]));
        };
        Ok(Site {
            posterior: Some(SitePosterior {
                log_std: log_std.to_format()?,
                log_concentration: log_concentration.to_format()?,
            }),
            ..LORA.export(module, factors)?
        })
    }
}

/// A module with a drawn A.
///
/// For `elbo` no gradient moves `s`. The gradient of `s` holds the mean square `|g_k|^2 / in` of each row of the task
/// loss's gradient instead, from which [`Method::after_step`] takes the curvature.
#[derive(Debug)]
struct DrawnA {
    draw: Draw,
    update: Arc<dyn Update>,
    /// The mean A, if the regulariser depends on it (`elbo`).
    mean: Option<Value>,
}

impl Drawn for DrawnA {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    fn metrics(&self) -> Vec<f64> {
        let draw = &self.draw;
        let n = draw.variance.len() as f64;
        let mean_of =
            |value: &dyn Fn(f64) -> f64| draw.variance.iter().map(|v| value(*v)).sum::<f64>() / n;
        let mean_log = mean_of(&f64::ln);
        vec![
            draw.weighted_kl,
            draw.dirichlet,
            draw.wishart,
            draw.gaussian,
            draw.sum_of_squares,
            mean_of(&|v| v).sqrt(),
            mean_of(&|v| (v.ln() - mean_log).powi(2)).sqrt(),
        ]
    }

    /// For `elbo` the squared norm of each row of the gradient of A; otherwise as [`Draw::numbers`].
    fn numbers(&self, upstream: &[Tensor]) -> Result<Vec<Numbers>> {
        let [a, _] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        match &self.mean {
            Some(_) => Ok(vec![Numbers::row_dots(a, a)?]),
            None => Ok(self.draw.numbers(a)?.into_iter().collect()),
        }
    }

    /// The gradient with respect to A equals that of the drawn A: A enters with weight one, because the mixture weights
    /// sum to one.
    fn pullback(&self, upstream: &[Tensor], numbers: &[f64], weight: f64) -> Result<Vec<Value>> {
        let [a, b] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        if let Some(Value::Tensor(mean)) = &self.mean {
            let (_, in_features) = a.dims2()?;
            let squares = numbers.iter();
            return Ok(vec![
                Value::Tensor((a + (mean * (weight * self.draw.decay))?)?),
                Value::Tensor(b.clone()),
                Value::Vector(squares.map(|sum| sum / in_features as f64).collect()),
                Value::Vector(vec![0.0; self.draw.mixture.weights.len()]),
            ]);
        }
        let (log_std, log_concentration) = self.draw.backward(Some((a, numbers)), weight)?;
        Ok(vec![
            Value::Tensor(a.clone()),
            Value::Tensor(b.clone()),
            Value::Vector(log_std),
            Value::Vector(log_concentration),
        ])
    }
}

/// Returns draw number `index` of `adapter`'s posterior under `seed`: a plain LoRA adapter whose A is `A + E` at every
/// module.
///
/// # Errors
/// Returns an error if the adapter is plain LoRA or a draw is not finite.
pub fn sample(adapter: &Adapter, seed: u64, index: u64) -> Result<Adapter> {
    let mut drawn = adapter.collapse();
    for (site, target) in adapter.sites.iter().zip(&mut drawn.sites) {
        let (Some(settings), Some(_)) = (&adapter.config.monteclora, &site.posterior) else {
            let message = "plain LoRA has no posterior to sample";
            let fix = "give a MonteCLoRA adapter";
            return Err(Problem::new("no-posterior", &site.name, message, fix).into());
        };
        let method = MonteClora(MonteCloraConfig::from(settings));
        let module = Module::from(site);
        let owners = owners(&method, &[module], |_| Some(site), seed, &Device::Cpu)?;
        let values: Vec<&Value> = owners.iter().flat_map(|owner| &owner.values).collect();
        let key = Key::new(seed, &site.name, index);
        let weighting = Weighting {
            factor: 1.0,
            n_modules: 1,
            epoch_tokens: 1,
        };
        let draw = method.draw_a(&values, &key, &weighting)?;
        let a = Value::Tensor(draw.effective_a);
        if !a.is_finite()? {
            let message = "a posterior draw is not finite";
            let fix = "lower the learning rate or sample_scaler";
            let problem = Problem::new("not-finite", &site.name, message, fix);
            return Err(problem.exit(5).into());
        }
        target.lora_a = a.to_format()?;
    }
    Ok(drawn)
}
