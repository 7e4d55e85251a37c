//! What is trained at a module: named parameters, how they become the update of its frozen weight, and what of the update's
//! gradient is theirs.
//!
//! A method is a file of this folder and a line of [`METHODS`]. The trainer moves, clips, audits, saves and counts named
//! parameters; only the method knows what they are for. Its mathematics takes noise as an argument.

mod lora;
mod lora_fa;
pub mod monteclora;
mod parameter;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_converters::{Problem, Site};

pub use parameter::{Group, Owner, Parameter, Storage, Value};

use crate::error::Result;
use crate::noise::{Key, Noise};
use crate::update::Update;

/// Every method, the default first.
pub static METHODS: &[&Kind] = &[&monteclora::KIND, &lora::KIND, &lora_fa::KIND];

/// A method as the registry knows it.
#[derive(Debug)]
pub struct Kind {
    /// What `lora.method` calls it; its settings are the section `[lora.<name>]`.
    pub name: &'static str,
    /// What it is, in a sentence.
    pub about: &'static str,
    /// What a run reports of it beside the task loss, in this order.
    pub metrics: &'static [Metric],
    /// Makes it from its section; from null where there is none.
    pub new: fn(&serde_json::Value) -> Result<Arc<dyn Method>>,
}

/// The method that `lora.method` calls `name`.
///
/// # Errors
/// If there is none.
pub fn find(name: &str) -> Result<&'static Kind> {
    let found = METHODS.iter().find(|kind| kind.name == name);
    Ok(found.ok_or_else(|| Problem::usage(format!("`{name}` is no method")))?)
}

/// A number that a method reports of every step: a mean over the modules.
#[derive(Debug)]
pub struct Metric {
    /// Its key in `metrics.jsonl`.
    pub key: &'static str,
    /// Its key in a checkpoint.
    pub stored: &'static str,
    /// Its TensorBoard tag.
    pub tag: &'static str,
    /// Its name in the report.
    pub label: &'static str,
    /// The report's chart that shows it.
    pub chart: Chart,
    /// Its colour there, 1 to 5; the lines of a chart are in this order.
    pub colour: u8,
    /// For a part of the loss, what the progress line calls it.
    pub in_loss: Option<&'static str>,
}

/// A chart of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chart {
    /// Divergences from the priors, nats, before their weights.
    Divergences,
    /// What is added to the task loss, nats.
    Regulariser,
    /// Where the posterior stands.
    Posterior,
}

macro_rules! metrics {
    ($($key:literal $stored:literal $tag:literal $label:literal $chart:ident $colour:literal $in_loss:expr;)*) => {
        &[$(Metric {
            key: $key,
            stored: $stored,
            tag: $tag,
            label: $label,
            chart: Chart::$chart,
            colour: $colour,
            in_loss: $in_loss,
        }),*]
    };
}

/// What runs of the LoRA family report, each of them all, so that their lines compare; zero for a method that has no posterior.
///
/// `posterior_std` is the root of the mean over the rows of A of the noise's variance `v_k`, `posterior_log_spread` the standard
/// deviation of `ln v_k` over the rows.
pub const DIVERGENCES: &[Metric] = metrics! {
    "kl_loss" "weighted_kl" "divergence/weighted" "weighted divergences" Regulariser 1 Some("kl");
    "kl_dirichlet" "dirichlet" "divergence/dirichlet" "Dirichlet" Divergences 3 None;
    "kl_wishart" "wishart" "divergence/wishart" "Wishart" Divergences 2 None;
    "kl_gaussian" "gaussian" "divergence/gaussian" "Gaussian" Divergences 1 None;
    "entropy_loss" "sum_of_squares" "divergence/sum_of_squared_weights" "sum of squared weights" Regulariser 4 Some("mixture");
    "posterior_std" "std" "posterior/std" "standard deviation of A" Posterior 1 None;
    "posterior_log_spread" "log_spread" "posterior/log_spread" "spread of ln v over rows" Posterior 2 None;
};

/// What is added to the task loss where `metrics` have these values; absent ones are zero.
pub fn in_loss(metrics: &[Metric], values: &[f64]) -> f64 {
    let parts = metrics.iter().zip(values);
    parts
        .filter(|(metric, _)| metric.in_loss.is_some())
        .map(|(_, value)| value)
        .sum()
}

/// The owner of what all modules share; no module's path.
const SHARED: &str = "shared";

/// A module that carries an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// Its path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Length of its input.
    pub in_features: usize,
    /// Length of its output.
    pub out_features: usize,
    /// Rank r of its update.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Factor on its update.
    pub scaling: f64,
}

impl From<&Site> for Module {
    fn from(site: &Site) -> Self {
        Self {
            name: site.name.clone(),
            in_features: site.in_features(),
            out_features: site.out_features(),
            rank: site.rank,
            alpha: site.alpha,
            scaling: site.scaling,
        }
    }
}

/// A method with its settings.
///
/// Wherever a method is handed `values`, they are those of the module's own parameters, in the order of
/// [`Method::parameters`], and then of the shared ones, in the order of [`Method::shared`].
pub trait Method: Debug + Send + Sync {
    /// Its place in the registry.
    fn kind(&self) -> &'static Kind;

    /// The method and what matters of its settings, in a few words.
    fn summary(&self) -> String {
        self.kind().name.to_owned()
    }

    /// The parameters of one module.
    fn parameters(&self, module: &Module) -> Vec<Parameter>;

    /// Their values at the start, in their order; `key` is the module's at step 0.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>>;

    /// Parameters that `modules`, all of the adapter, have in common.
    fn shared(&self, _modules: &[Module]) -> Vec<Parameter> {
        Vec::new()
    }

    /// Their values at the start, in their order.
    fn initial_shared(&self, _modules: &[Module], _key: Key) -> Vec<Vec<f32>> {
        Vec::new()
    }

    /// The update that stands for the whole posterior: it is evaluated, exported and served.
    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>>;

    /// The update of one training step under `noise`, with its regulariser weighed as `weighting` says.
    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        noise: &dyn Noise,
        weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>>;

    /// Share of a run's steps over which the regulariser's weight rises to one.
    fn warmup_ratio(&self) -> f64 {
        0.0
    }

    /// Float32 values that a draw holds at a module besides parameters, gradients and moments.
    fn working_values(&self, _module: &Module) -> usize {
        0
    }

    /// What `step` does besides following the gradient, after it has: `gradients` are those of the whole loss before clipping,
    /// in the order of `owners` and their values.
    fn after_step(
        &self,
        _owners: &mut [Owner],
        _gradients: &[Vec<Value>],
        _step: Step,
    ) -> Result<()> {
        Ok(())
    }

    /// The module as it is written: the plain LoRA that is exactly the mean, with whatever PEFT has a place for besides.
    ///
    /// # Errors
    /// For a method whose update is of no low rank and can only be merged.
    fn export(&self, module: &Module, _values: &[&Value]) -> Result<Site> {
        let message = format!("the update of {} is no LoRA", self.kind().name);
        let fix = "merge it into the base";
        Err(Problem::new("merge-only", &module.name, message, fix).into())
    }
}

/// How a regulariser is weighed in a step.
#[derive(Debug, Clone, Copy)]
pub struct Weighting {
    /// Factor on the regulariser's own weights: the warm-up's.
    pub factor: f64,
    /// Modules that carry the adapter, over which the trainer averages the regulariser.
    pub n_modules: usize,
    /// Tokens with a loss per pass over the training rows.
    pub epoch_tokens: u64,
}

/// An optimiser step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Steps made before it.
    pub index: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Tokens with a loss in its batches.
    pub trained_tokens: usize,
    /// Tokens with a loss per pass over the training rows.
    pub epoch_tokens: u64,
}

/// One module's update in one training step, and the way back from its gradient.
pub trait Drawn: Debug + Send + Sync {
    /// What the forward pass runs with.
    fn update(&self) -> Arc<dyn Update>;

    /// The values of [`Kind::metrics`]; none where all are zero.
    fn metrics(&self) -> Vec<f64> {
        Vec::new()
    }

    /// The gradient of every value that [`Method::draw`] was given: that of the task loss, from `upstream` on the factors of
    /// the update, plus `weight` times that of the regulariser.
    fn pullback(&self, upstream: &[Tensor], weight: f64) -> Result<Vec<Value>>;
}

/// The parameters of all `modules` at the start of a run under `seed`, one owner a module and one for what they share, if
/// anything; `stored` gives what is already known of a module.
pub fn owners<'a>(
    method: &dyn Method,
    modules: &[Module],
    stored: impl Fn(&Module) -> Option<&'a Site>,
    seed: u64,
    device: &Device,
) -> Result<Vec<Owner>> {
    let mut owners = modules
        .iter()
        .map(|module| {
            let initial = || method.initial(module, Key::new(seed, &module.name, 0));
            let parameters = method.parameters(module);
            Owner::new(&module.name, parameters, stored(module), initial, device)
        })
        .collect::<Result<Vec<_>>>()?;
    let shared = method.shared(modules);
    if !shared.is_empty() {
        let initial = || method.initial_shared(modules, Key::new(seed, SHARED, 0));
        owners.push(Owner::new(SHARED, shared, None, initial, device)?);
    }
    Ok(owners)
}
