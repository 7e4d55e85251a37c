//! The trainable adapter: a method's parameters for every module, draws of all updates, and their gradients.

use monteclora_adapters::Result;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_adapters::Update;
use monteclora_adapters::device::each;
use monteclora_adapters::methods::{self, Drawn, Frozen, Method, Module, Owner, Value, Weighting};
use monteclora_adapters::noise::{Key, Noise};
use monteclora_adapters::numbers::read_groups;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{Adapter, AdapterConfig, Problem, Site};

use crate::model::{ActiveAdapter, AdapterGradients, Decoder, ModuleId};

/// The trainable adapter.
#[derive(Debug, Clone)]
pub struct AdapterState {
    /// The training method.
    pub method: Arc<dyn Method>,
    /// The adapted modules with their ids, blocks first.
    pub modules: Vec<(ModuleId, Module)>,
    /// Parameters with their values: first those of every module, in the order of `modules`, then the shared ones, if
    /// any.
    pub owners: Vec<Owner>,
}

/// One gradient per value of an [`AdapterState`], in the same order.
pub type Gradients = Vec<Vec<Value>>;

/// One draw of the whole adapter with its regulariser.
#[derive(Debug)]
pub struct DrawnAdapter {
    /// The updates of the forward pass.
    pub active: ActiveAdapter,
    draws: Vec<Box<dyn Drawn>>,
}

/// The modules `names` of `model` with rank and scaling of `config`, blocks first.
pub fn modules(
    config: &AdapterConfig,
    names: &[String],
    model: &ModelShape,
) -> Result<Vec<(ModuleId, Module)>> {
    ModuleId::all(model)
        .filter(|(_, module)| names.contains(&module.name))
        .map(|(id, module)| {
            let name = module.name.clone();
            let adapted = Module {
                in_features: module.in_features,
                out_features: module.out_features,
                rank: config.rank_for(&name)?,
                alpha: config.alpha_for(&name)?,
                scaling: config.scaling_for(&name)?,
                has_bias: false,
                attention: None,
                frozen: None,
                name,
            };
            Ok((id, adapted.of_model(&module, model)))
        })
        .collect()
}

impl AdapterState {
    /// A new adapter for the modules `names`. Its values depend only on `seed` and the modules' names.
    pub fn initial(
        method: Arc<dyn Method>,
        config: &AdapterConfig,
        names: &[String],
        model: &ModelShape,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        Self::new(method, modules(config, names, model)?, &[], seed, device)
    }

    /// Starts from the values of `adapter`. Parameters that it does not contain start as in a new adapter.
    pub fn from_adapter(
        method: Arc<dyn Method>,
        adapter: &Adapter,
        model: &ModelShape,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        // Checks that the base model has every module with its shape.
        ActiveAdapter::from_adapter(adapter, model, device)?;
        let modules = ModuleId::all(model)
            .filter_map(|(id, module)| {
                let site = adapter.sites.iter().find(|site| site.name == module.name)?;
                Some((id, Module::from(site).of_model(&module, model)))
            })
            .collect();
        Self::new(method, modules, &adapter.sites, seed, device)
    }

    /// The same modules with the values of `sites`.
    pub(super) fn with_values_of(&self, sites: &[Site], device: &Device) -> Result<Self> {
        Self::new(self.method.clone(), self.modules.clone(), sites, 0, device)
    }

    fn new(
        method: Arc<dyn Method>,
        modules: Vec<(ModuleId, Module)>,
        sites: &[Site],
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let described: Vec<Module> = modules.iter().map(|(_, module)| module.clone()).collect();
        let stored = |module: &Module| sites.iter().find(|site| site.name == module.name);
        let owners = methods::owners(method.as_ref(), &described, stored, seed, device)?;
        Ok(Self {
            method,
            modules,
            owners,
        })
    }

    /// Gives the modules their frozen weights. A new adapter gets the initial values that follow from them.
    ///
    /// # Errors
    /// As [`methods::complete`].
    pub fn attach(&mut self, decoder: &Decoder, is_new: bool, seed: u64) -> Result<()> {
        if !self.method.needs_base() {
            return Ok(());
        }
        for (id, module) in &mut self.modules {
            module.frozen = decoder.weight(*id).map(Frozen);
        }
        if is_new {
            let modules = self.described();
            let device = decoder.device();
            methods::complete(
                self.method.as_ref(),
                &modules,
                &mut self.owners,
                seed,
                device,
            )?;
        }
        Ok(())
    }

    /// The adapted modules, without their places.
    pub fn described(&self) -> Vec<Module> {
        self.modules
            .iter()
            .map(|(_, module)| module.clone())
            .collect()
    }

    /// Number of values, including those that the method does not train.
    pub fn n_parameters(&self) -> usize {
        self.owners.iter().map(Owner::n_values).sum()
    }

    /// The device that holds the tensors.
    pub fn device(&self) -> Device {
        Value::device_of(self.owners.iter().flat_map(|owner| &owner.values))
    }

    /// The values for module `idx`: its own, then the shared ones.
    fn values(&self, idx: usize) -> Vec<&Value> {
        let shared = self.owners[self.modules.len()..].iter();
        std::iter::once(&self.owners[idx])
            .chain(shared)
            .flat_map(|owner| &owner.values)
            .collect()
    }

    /// Creates the update of every module with `update`.
    fn active(
        &self,
        mut update: impl FnMut(usize, &Module) -> Result<Arc<dyn Update>>,
    ) -> Result<ActiveAdapter> {
        let modules = self.modules.iter().enumerate();
        let updates = modules.map(|(idx, (id, module))| Ok((*id, update(idx, module)?)));
        Ok(ActiveAdapter::new(updates.collect::<Result<Vec<_>>>()?))
    }

    /// The mean updates, for evaluation.
    pub fn mean(&self) -> Result<ActiveAdapter> {
        self.active(|idx, module| self.method.mean(module, &self.values(idx)))
    }

    /// The weight of the regulariser: `factor`, in a run whose training rows have `epoch_tokens` trained tokens.
    pub fn weighting(&self, factor: f64, epoch_tokens: u64) -> Weighting {
        Weighting {
            factor,
            n_modules: self.modules.len(),
            epoch_tokens,
        }
    }

    /// Draws every module, with noise that depends on `seed`, the module and optimiser step `step`.
    pub fn draw(&self, seed: u64, step: u64, weighting: &Weighting) -> Result<DrawnAdapter> {
        self.draw_with(weighting, |module| Key::new(seed, &module.name, step))
    }

    /// Draws every module with the noise that `noise` returns for it.
    pub fn draw_with<N: Noise>(
        &self,
        weighting: &Weighting,
        noise: impl Fn(&Module) -> N + Sync,
    ) -> Result<DrawnAdapter> {
        let draws = each(&self.device(), 0..self.modules.len(), |idx| {
            let module = &self.modules[idx].1;
            let values = self.values(idx);
            self.method.draw(module, &values, &noise(module), weighting)
        })?;
        Ok(DrawnAdapter {
            active: self.active(|idx, _| Ok(draws[idx].update()))?,
            draws,
        })
    }

    /// The adapter in the form that is written to disk.
    pub fn to_adapter(&self, config: &AdapterConfig) -> Result<Adapter> {
        let modules = self.modules.iter().enumerate();
        let mut sites = modules
            .map(|(idx, (_, module))| self.method.export(module, &self.values(idx)))
            .collect::<Result<Vec<_>>>()?;
        sites.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Adapter {
            config: config.clone(),
            sites,
            format: config.peft_format(),
            metadata: std::iter::once(("format".to_owned(), "pt".to_owned())).collect(),
            notes: Vec::new(),
        })
    }
}

impl DrawnAdapter {
    /// The metrics of `state`'s method, as means over the modules.
    pub fn metrics(&self, state: &AdapterState) -> Vec<f64> {
        let mut means = vec![0.0; state.method.kind().metrics.len()];
        let weight = 1.0 / self.draws.len().max(1) as f64;
        for draw in &self.draws {
            for (mean, value) in means.iter_mut().zip(draw.metrics()) {
                *mean += weight * value;
            }
        }
        means
    }

    /// Gradients of task loss plus regulariser, from `task`, the task's gradients with respect to the active updates.
    pub fn backward(&self, state: &AdapterState, task: &AdapterGradients) -> Result<Gradients> {
        let weight = 1.0 / self.draws.len().max(1) as f64;
        let device = state.device();
        let upstream = state.modules.iter().map(|(id, module)| {
            let upstream = task.get(*id).ok_or_else(|| {
                let message = "no gradient was computed for this site";
                Problem::new("no-gradient", &module.name, message, "").exit(1)
            });
            Ok(upstream?)
        });
        let upstream = upstream.collect::<Result<Vec<&[Tensor]>>>()?;
        let draws = || self.draws.iter().zip(&upstream);
        let numbers = read_groups(each(&device, draws(), |(draw, up)| draw.numbers(up))?)?;
        let mut gradients: Gradients =
            each(&device, draws().zip(&numbers), |((draw, up), numbers)| {
                draw.pullback(up, numbers, weight)
            })?;
        let mut shared: Option<Vec<Value>> = None;
        for (gradient, owner) in gradients.iter_mut().zip(&state.owners) {
            let part = gradient.split_off(owner.values.len());
            shared = Some(match shared {
                None => part,
                Some(sum) => {
                    let pairs = sum.iter().zip(&part);
                    pairs.map(|(a, b)| a.plus(b)).collect::<Result<_>>()?
                }
            });
        }
        gradients.extend(shared.filter(|values| !values.is_empty()));
        Ok(gradients)
    }
}
