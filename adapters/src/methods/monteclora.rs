//! MonteCLoRA (Seth et al. 2025, arXiv:2411.04358): LoRA whose A is drawn anew at every step from a Gaussian scale mixture
//! around its mean; B is deterministic.

mod divergence;
mod draw;
mod mixture;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_converters::{Adapter, MonteCloraSettings, Problem, Site, SitePosterior};
use serde::{Deserialize, Serialize};

use super::lora::LORA;
use super::parameter::unlike;
use super::{DIVERGENCES, Drawn, Group, Kind, Method, Module, Parameter, Storage, Value, owners};
use crate::error::Result;
use crate::noise::{Key, Noise, Purpose};
use crate::update::Update;

use draw::{Draw, StandardNoise};

/// Its place in the registry.
pub static KIND: Kind = Kind {
    name: "monteclora",
    about: "LoRA with a variational posterior over A.",
    metrics: DIVERGENCES,
    new: |section| {
        let settings = MonteCloraConfig::deserialize(section)
            .map_err(|e| Problem::usage(format!("[lora.monteclora]: {e}")))?;
        Ok(Arc::new(MonteClora(settings)))
    },
};

/// The names of `s` and `theta` in PEFT's files.
const STD: &str = "lora_monteclora_sampler.std_prior";
const CONCENTRATION: &str = "lora_monteclora_sampler.expert_weights_prior";

/// Which form a draw takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Form {
    /// One Gaussian a module.
    #[default]
    Collapsed,
    /// PEFT's literal `N` Gaussians: the plain reference.
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
    /// Equal to `paper`.
    #[default]
    Recommended,
}

impl Preset {
    /// Learning rate of the variational parameters over that of A and B, where none is given.
    ///
    /// Adam moves a value by about the learning rate a step, whatever the gradient's size. The variational parameters start
    /// as U[0, 1), so that at A's rate of a few 1e-4 a run of a thousand steps barely moves them; ten times the
    /// rate lets them cross their own range. PEFT has one rate for all.
    pub fn variational_rate_ratio(self) -> f64 {
        match self {
            Self::Peft => 1.0,
            Self::Paper | Self::Recommended => 10.0,
        }
    }
}

/// Which divergences are minimised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The divergences themselves.
    #[default]
    Exact,
    /// PEFT's formulas, for parity with it.
    Peft,
}

/// `[lora.monteclora]`, with PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MonteCloraConfig {
    /// The preset that the other values started from.
    pub preset: Preset,
    /// Which divergences are minimised.
    pub objective: Objective,
    /// Components of the mixture N, at least 1.
    pub num_samples: usize,
    /// Scale of the noise on A, above 0.
    pub sample_scaler: f64,
    /// Weight of the divergences in the loss, at least 0.
    pub kl_loss_weight: f64,
    /// Concentration of the Dirichlet prior, above 0.
    pub dirichlet_prior: f64,
    /// Whether the sum of squared mixture weights is added to the loss.
    pub use_entropy: bool,
    /// Share of the steps over which the weight of the divergences rises from 0 to `kl_loss_weight`, in [0, 1].
    pub kl_warmup_ratio: f64,
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
    /// A draw of A at a module whose parameters have these `values`.
    fn draw_a(&self, values: &[&Value], noise: &dyn Noise, weight: f64) -> Result<Draw> {
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
        Draw::new(&self.0, weight, a, (log_std, log_concentration), noise)
    }
}

impl Method for MonteClora {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn summary(&self) -> String {
        format!("{}, N {}", KIND.name, self.0.num_samples)
    }

    /// LoRA's, with the variational parameters: `s` `[r]`, the log of the Wishart scale's standard deviation, and `theta` `[N]`,
    /// the log of the Dirichlet concentration.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let variational = |name, peft, len| Parameter {
            name,
            peft: Some(peft),
            shape: vec![len],
            storage: Storage::Vector,
            group: Group::Variational,
            reached: None,
        };
        let mut parameters = LORA.parameters(module);
        parameters.push(variational("log_std", STD, module.rank));
        let n = self.0.num_samples;
        parameters.push(variational("log_concentration", CONCENTRATION, n));
        parameters
    }

    /// LoRA's, and the variational parameters uniform in `[0, 1)` as in PEFT.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let mut initial = LORA.initial(module, key);
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
        weight: f64,
    ) -> Result<Box<dyn Drawn>> {
        let draw = self.draw_a(values, noise, weight)?;
        let mut factors = values.to_vec();
        let a = Value::Tensor(draw.effective_a.clone());
        factors.splice(..1, [&a]);
        let update = self.mean(module, &factors)?;
        Ok(Box::new(DrawnA { draw, update }))
    }

    fn warmup_ratio(&self) -> f64 {
        self.0.kl_warmup_ratio
    }

    /// The draw and its noise.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.rank * module.in_features
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
#[derive(Debug)]
struct DrawnA {
    draw: Draw,
    update: Arc<dyn Update>,
}

impl Drawn for DrawnA {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    fn metrics(&self) -> Vec<f64> {
        let draw = &self.draw;
        vec![
            draw.weighted_kl,
            draw.dirichlet,
            draw.wishart,
            draw.gaussian,
            draw.sum_of_squares,
        ]
    }

    /// The gradient with respect to A is that of the drawn A: A enters with weight one, the mixture weights summing to one.
    fn pullback(&self, upstream: &[Tensor], weight: f64) -> Result<Vec<Value>> {
        let [a, b] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        let (log_std, log_concentration) = self.draw.backward(Some(a), weight)?;
        Ok(vec![
            Value::Tensor(a.clone()),
            Value::Tensor(b.clone()),
            Value::Vector(log_std),
            Value::Vector(log_concentration),
        ])
    }
}

/// Draw `index` of `adapter`'s posterior under `seed`: a plain LoRA adapter whose A is `A + E` at every module.
///
/// # Errors
/// When the adapter is plain LoRA, or a draw is not finite.
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
        let draw = method.draw_a(&values, &key, 1.0)?;
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
