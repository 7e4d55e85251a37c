//! Training methods: the named parameters that a method trains at a module, how they form the update of the frozen
//! weight, and how the gradient of the update becomes their gradient.
//!
//! A method is one file in this folder and one entry of [`METHODS`]. The trainer moves, clips, audits, saves and counts
//! named parameters; only the method knows what they are for. Its mathematics takes noise as an argument.

mod adalora;
mod dora;
mod lora;
mod lora_fa;
mod lorta;
pub mod monteclora;
mod neat;
mod parameter;
mod sara;
mod second_order;
mod sparse;
mod ssf;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_converters::architecture::{ModelShape, Role};
use monteclora_converters::{self as formats, AdapterConfig, Beyond, Problem, Site};
use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use adalora::AdaLoraConfig;
pub use dora::DoraUpdate;
pub use parameter::{Group, Owner, Parameter, Storage, Value};
pub use sara::SaraConfig;
pub use second_order::SecondOrderConfig;
pub use sparse::SparseUpdate;
pub use ssf::{ScaleShift, Shift, SsfConfig};

use crate::error::Result;
use crate::noise::{Key, Noise};
use crate::numbers::Numbers;
use crate::update::Update;
use crate::weights::Weight;

/// All methods; the first is the default.
pub static METHODS: &[&Kind] = &[
    &monteclora::KIND,
    &lora::KIND,
    &lora_fa::KIND,
    &adalora::KIND,
    &dora::KIND,
    &lorta::KIND,
    &neat::KIND,
    &ssf::KIND,
    &sara::KIND,
    &second_order::KIND,
];

/// The registry entry of a method.
#[derive(Debug)]
pub struct Kind {
    /// Its name in `lora.method`; its settings are the section `[lora.<name>]`.
    pub name: &'static str,
    /// A one-sentence description.
    pub about: &'static str,
    /// The metrics that a run reports besides the task loss, in this order.
    pub metrics: &'static [Metric],
    /// What its adapters are exported as.
    pub export: Export,
    /// Keys of run.toml that it does not read, as dotted paths.
    pub unread: &'static [&'static str],
    /// Creates the method from its section, or from null if the section is absent.
    pub new: fn(&serde_json::Value) -> Result<Arc<dyn Method>>,
}

impl Kind {
    /// The name of its section below `[lora]`: its own, with underscores.
    pub fn section(&self) -> String {
        self.name.replace('-', "_")
    }
}

/// Keys that methods without an input of A do not read.
const OF_LOW_RANK: &[&str] = &[
    "lora.lora_dropout",
    "lora.r",
    "lora.lora_alpha",
    "lora.use_rslora",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "train.loraplus_lr_ratio",
];

/// Those of [`OF_LOW_RANK`] that methods without A and B do not read, which may drop inputs all the same.
const OF_RANK: &[&str] = OF_LOW_RANK.split_at(1).1;

/// The settings of a method from its section, or their defaults if the section is absent.
fn settings<T: DeserializeOwned + Default>(kind: &Kind, section: &serde_json::Value) -> Result<T> {
    let settings = Option::<T>::deserialize(section)
        .map_err(|e| Problem::usage(format!("[lora.{}]: {e}", kind.section())))?;
    Ok(settings.unwrap_or_default())
}

/// Finds the method that is named `name` in `lora.method`.
///
/// # Errors
/// Returns an error if no method has this name.
pub fn find(name: &str) -> Result<&'static Kind> {
    let found = METHODS.iter().find(|kind| kind.name == name);
    Ok(found.ok_or_else(|| Problem::usage(format!("`{name}` is no method")))?)
}

/// What the adapters of a method are exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Export {
    /// A plain LoRA that is exactly the mean.
    PlainLora,
    /// A directory that this project reads. The update is no `B A`: it can only be merged into the base.
    MergeOnly,
}

/// A number that a method reports per step: a mean over the modules.
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
    /// The chart of the report that shows it.
    pub chart: Chart,
    /// Its colour in the chart, 1 to 5. The chart orders its lines by colour.
    pub colour: u8,
    /// Its name in the progress line, if the metric is a part of the loss.
    pub in_loss: Option<&'static str>,
}

/// A chart of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chart {
    /// Unweighted divergences from the priors, in nats.
    Divergences,
    /// Terms that are added to the task loss, in nats.
    Regulariser,
    /// Width of the posterior.
    Posterior,
    /// Ranks of the updates.
    Rank,
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

use metrics;

/// Metrics of the LoRA family. Each method of the family reports all of them, so that their curves compare; they are
/// zero for a method without a posterior.
///
/// `posterior_std` is the square root of the mean noise variance `v_k` over the rows of A. `posterior_log_spread` is
/// the standard deviation of `ln v_k` over the rows.
pub const DIVERGENCES: &[Metric] = metrics! {
    "kl_loss" "weighted_kl" "divergence/weighted" "weighted divergences" Regulariser 1 Some("kl");
    "kl_dirichlet" "dirichlet" "divergence/dirichlet" "Dirichlet" Divergences 3 None;
    "kl_wishart" "wishart" "divergence/wishart" "Wishart" Divergences 2 None;
    "kl_gaussian" "gaussian" "divergence/gaussian" "Gaussian" Divergences 1 None;
    "entropy_loss" "sum_of_squares" "divergence/sum_of_squared_weights" "sum of squared weights" Regulariser 4 Some("mixture");
    "posterior_std" "std" "posterior/std" "standard deviation of A" Posterior 1 None;
    "posterior_log_spread" "log_spread" "posterior/log_spread" "spread of ln v over rows" Posterior 2 None;
};

/// Returns the sum that `metrics` with these values add to the task loss; absent values count as zero.
pub fn in_loss(metrics: &[Metric], values: &[f64]) -> f64 {
    let parts = metrics.iter().zip(values);
    parts
        .filter(|(metric, _)| metric.in_loss.is_some())
        .map(|(_, value)| value)
        .sum()
}

/// The name of the owner of the shared parameters. No module has this path.
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
    /// Rank r of the update.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// Factor on the update.
    pub scaling: f64,
    /// Whether it has a bias.
    pub has_bias: bool,
    /// Its place in attention, for the projections q, k, v and o.
    pub attention: Option<AttentionPlace>,
    /// Its weight, once the base is loaded.
    pub frozen: Option<Frozen>,
}

/// The place of an attention projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionPlace {
    /// Layer, from 0.
    pub layer: usize,
    /// What the projection computes.
    pub role: Role,
    /// Width of a head.
    pub head_dim: usize,
}

/// The frozen weight of a module.
#[derive(Debug, Clone)]
pub struct Frozen(pub Arc<dyn Weight>);

/// Modules are equal if they are described equally; their weights are not compared.
impl PartialEq for Frozen {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Module {
    /// Completes what an adapter does not say of the module, from the model's sizes.
    #[must_use]
    pub fn of_model(self, module: &formats::architecture::Module, shape: &ModelShape) -> Self {
        let attention = match (module.layer, module.projection.parts) {
            (Some(layer), &[role @ (Role::Query | Role::Key | Role::Value | Role::Output)]) => {
                Some(AttentionPlace {
                    layer,
                    role,
                    head_dim: shape.head_dim,
                })
            }
            _ => None,
        };
        Self {
            has_bias: module.has_bias,
            attention,
            ..self
        }
    }

    /// Its frozen weight, `[out, in]`.
    ///
    /// # Errors
    /// Returns an error before the base is loaded.
    pub fn weight(&self) -> Result<&Arc<dyn Weight>> {
        let unknown = || candle_core::Error::Msg(format!("{}: the base is not loaded", self.name));
        Ok(&self.frozen.as_ref().ok_or_else(unknown)?.0)
    }

    /// The error that a method cannot adapt this module.
    fn refused(&self, message: impl Into<String>, fix: &str) -> crate::Error {
        let problem = Problem::new("method-target", &self.name, message, fix);
        problem.exit(2).into()
    }

    /// The module as a file holds it whose update has no low-rank part.
    fn beyond_low_rank(&self, beyond: Beyond) -> Result<Site> {
        let empty = |shape: [usize; 2]| formats::Tensor::from_f32(&shape, Vec::new());
        Ok(Site {
            name: self.name.clone(),
            rank: 0,
            alpha: self.alpha,
            scaling: 1.0,
            lora_a: empty([0, self.in_features])?,
            lora_b: empty([self.out_features, 0])?,
            posterior: None,
            beyond: Some(beyond),
            triplets: None,
        })
    }
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
            has_bias: false,
            attention: None,
            frozen: None,
        }
    }
}

/// A method with its settings.
///
/// Every argument `values` holds the module's own parameters, in the order of [`Method::parameters`], and then the
/// shared ones, in the order of [`Method::shared`].
pub trait Method: Debug + Send + Sync {
    /// The registry entry.
    fn kind(&self) -> &'static Kind;

    /// Describes the method and its main settings in a few words.
    fn summary(&self) -> String {
        self.kind().name.to_owned()
    }

    /// Refuses modules that the method cannot adapt.
    ///
    /// # Errors
    /// Returns an error that names the first of them.
    fn check(&self, _modules: &[Module]) -> Result<()> {
        Ok(())
    }

    /// Whether `target_modules = "all-linear"` means this module, too.
    fn takes(&self, _module: &Module) -> bool {
        true
    }

    /// The number of steps of a run of `total_steps` after which the adapter has its final form. Evaluations before do not count as the
    /// best.
    fn unsettled_steps(&self, _total_steps: u64) -> u64 {
        0
    }

    /// Says in the adapter's configuration what its files hold, for a run of `total_steps`.
    ///
    /// # Errors
    /// Returns an error if the settings do not fit into so many steps.
    fn configure(&self, _config: &mut AdapterConfig, _total_steps: u64) -> Result<()> {
        Ok(())
    }

    /// The parameters of one module.
    fn parameters(&self, module: &Module) -> Vec<Parameter>;

    /// Initial values of the module's parameters, in the order of [`Method::parameters`]. `key` is the module's key at
    /// step 0.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>>;

    /// Whether [`Module::frozen`] must be known for a draw, the mean and the export.
    fn needs_base(&self) -> bool {
        false
    }

    /// Initial values that follow from the frozen weight, in the order of [`Method::parameters`]; `None` for parameters
    /// that [`Method::initial`] gives.
    ///
    /// # Errors
    /// Returns an error if the weight is not known.
    fn initial_from_base(&self, _module: &Module, _key: Key) -> Result<Vec<Option<Vec<f32>>>> {
        Ok(Vec::new())
    }

    /// The parameters that all modules share. `modules` are all modules of the adapter.
    fn shared(&self, _modules: &[Module]) -> Vec<Parameter> {
        Vec::new()
    }

    /// Initial values of the shared parameters, in the order of [`Method::shared`].
    fn initial_shared(&self, _modules: &[Module], _key: Key) -> Vec<Vec<f32>> {
        Vec::new()
    }

    /// The update at the mean of the posterior, which is evaluated, exported and served.
    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>>;

    /// Draws the update of one training step with `noise`; `weighting` weighs its regulariser.
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

    /// Number of float32 values that a draw holds per module, besides parameters, gradients and moments.
    fn working_values(&self, _module: &Module) -> usize {
        0
    }

    /// Number of float32 values per token that the forward pass keeps of a module for the backward pass.
    fn kept_values(&self, module: &Module) -> usize {
        module.rank
    }

    /// Runs after the optimiser has made `step`, and may change the values further. `gradients` are those of the whole
    /// loss before clipping, in the order of `owners` and their values. The first owners are those of `modules`.
    fn after_step(
        &self,
        _modules: &[Module],
        _owners: &mut [Owner],
        _gradients: &[Vec<Value>],
        _step: Step,
    ) -> Result<()> {
        Ok(())
    }

    /// Returns the module as an adapter file holds it: the plain LoRA that is exactly the mean, or what the update is
    /// otherwise, and everything else that a file has a place for.
    ///
    /// # Errors
    /// Returns an error if a value cannot be read.
    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site>;
}

/// Weights of the regulariser in one step.
#[derive(Debug, Clone, Copy)]
pub struct Weighting {
    /// Warm-up factor on the regulariser's own weights.
    pub factor: f64,
    /// Number of modules that carry the adapter. The trainer averages the regulariser over them.
    pub n_modules: usize,
    /// Tokens with a loss per pass over the training rows.
    pub epoch_tokens: u64,
}

/// An optimiser step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Number of steps before this one.
    pub index: u64,
    /// Number of steps of the whole run.
    pub total: u64,
    /// Tokens with a loss in the step's batches.
    pub trained_tokens: usize,
    /// Tokens with a loss per pass over the training rows.
    pub epoch_tokens: u64,
}

/// The update of one module in one training step, and the backward pass from its gradient.
pub trait Drawn: Debug + Send + Sync {
    /// The update that the forward pass uses.
    fn update(&self) -> Arc<dyn Update>;

    /// The values of [`Kind::metrics`]; empty if all are zero.
    fn metrics(&self) -> Vec<f64> {
        Vec::new()
    }

    /// The numbers that [`Drawn::pullback`] takes of `upstream` on the host. The trainer reads those of all modules
    /// together.
    fn numbers(&self, _upstream: &[Tensor]) -> Result<Vec<Numbers>> {
        Ok(Vec::new())
    }

    /// Returns the gradient of every value that [`Method::draw`] was given: the gradient of the task loss, computed
    /// from `upstream` on the factors of the update, plus `weight` times the gradient of the regulariser. `numbers` are
    /// those of [`Drawn::numbers`], in order.
    fn pullback(&self, upstream: &[Tensor], numbers: &[f64], weight: f64) -> Result<Vec<Value>>;
}

/// Creates the parameters of all `modules` at the start of a run under `seed`: one owner per module, and one more for
/// the shared parameters if there are any. `stored` returns the values of a module that are already known.
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

/// Completes the initial values of `modules`, whose frozen weights are known now: [`Method::initial_from_base`]. Values that came from
/// a file stay.
///
/// # Errors
/// As there.
pub fn complete(
    method: &dyn Method,
    modules: &[Module],
    owners: &mut [Owner],
    seed: u64,
    device: &Device,
) -> Result<()> {
    for (module, owner) in modules.iter().zip(owners) {
        let initial = method.initial_from_base(module, Key::new(seed, &module.name, 0))?;
        for (idx, initial) in initial.into_iter().enumerate() {
            if let (Some(values), false) = (initial, owner.stored[idx]) {
                let parameter = &owner.parameters[idx];
                owner.values[idx] =
                    Value::new(parameter.storage, &parameter.shape, values, device)?;
            }
        }
    }
    Ok(())
}
