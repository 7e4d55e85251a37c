//! Modules of a decoder and their active updates.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_adapters::device::{to_device, to_host};
use monteclora_adapters::methods::{DoraUpdate, ScaleShift, SparseUpdate};
use monteclora_adapters::{LowRank, Update};
use monteclora_converters::architecture::{ModelShape, Module};
use monteclora_converters::{Beyond, Problem, places};

use monteclora_adapters::Result;

use crate::distributed::Communicator;

/// A linear module of a decoder: its index in [`ModelShape::modules`], blocks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(pub(super) usize);

impl ModuleId {
    /// Every module of a decoder, in order.
    pub fn all(shape: &ModelShape) -> impl Iterator<Item = (Self, Module)> + '_ {
        let modules = shape.modules().enumerate();
        modules.map(|(index, module)| (Self(index), module))
    }
}

/// The updates that are active in a forward pass.
#[derive(Debug, Clone, Default)]
pub struct ActiveAdapter {
    modules: BTreeMap<ModuleId, Arc<dyn Update>>,
}

impl ActiveAdapter {
    /// An adapter with the given updates.
    pub fn new<U: Into<Arc<dyn Update>>>(modules: impl IntoIterator<Item = (ModuleId, U)>) -> Self {
        let modules = modules.into_iter();
        Self {
            modules: modules.map(|(id, update)| (id, update.into())).collect(),
        }
    }

    /// The posterior mean of `adapter` on `device`. It is an error if a module does not exist in the base model or has
    /// another shape there.
    pub fn from_adapter(
        adapter: &monteclora_converters::Adapter,
        config: &ModelShape,
        device: &Device,
    ) -> Result<Self> {
        let modules = updates(adapter, config, device)?.into_iter();
        Ok(Self::new(modules.filter_map(|(id, update)| {
            Some((id, update?.into_update()))
        })))
    }

    /// A posterior draw of the adapter that `mean` comes from. Draws differ only in A, so all of them share the B of
    /// `mean`.
    pub(crate) fn from_draw(
        drawn: &monteclora_converters::Adapter,
        mean: &Self,
        config: &ModelShape,
        device: &Device,
    ) -> Result<Self> {
        let mut modules = updates(drawn, config, device)?;
        for (id, update) in &mut modules {
            if let Some(Loaded::LowRank(low_rank)) = update
                && let Some([_, b]) = mean.get(*id).map(Update::factors).as_deref()
            {
                low_rank.b = Tensor::clone(b);
            }
        }
        let modules = modules.into_iter();
        Ok(Self::new(modules.filter_map(|(id, update)| {
            Some((id, update?.into_update()))
        })))
    }

    /// The update of a module.
    pub fn get(&self, id: ModuleId) -> Option<&dyn Update> {
        self.modules.get(&id).map(Arc::as_ref)
    }
}

/// The update of a module as a file has it.
enum Loaded {
    LowRank(LowRank),
    Other(Arc<dyn Update>),
}

impl Loaded {
    fn into_update(self) -> Arc<dyn Update> {
        match self {
            Self::LowRank(low_rank) => Arc::new(low_rank),
            Self::Other(update) => update,
        }
    }
}

/// The low-rank matrices of `adapter` on `device`, per module. It is an error if a module does not exist in the base
/// model or has another shape there.
fn updates(
    adapter: &monteclora_converters::Adapter,
    config: &ModelShape,
    device: &Device,
) -> Result<BTreeMap<ModuleId, Option<Loaded>>> {
    let known: BTreeMap<String, (ModuleId, Module)> = ModuleId::all(config)
        .map(|(id, module)| (module.name.clone(), (id, module)))
        .collect();
    let mut problems = Vec::new();
    let mut modules = BTreeMap::new();
    let is_beside = |name: &str| {
        let wrapper = config.wrapper;
        wrapper.is_some_and(|wrapper| wrapper.is_beside(name))
    };
    // Modules for other media (images, audio) are left out, since text does not use them.
    for site in adapter.sites.iter().filter(|site| !is_beside(&site.name)) {
        let Some((id, module)) = known.get(&site.name) else {
            let what = match config.family.is_in_mixture(&site.name) {
                true => {
                    "is part of a mixture of experts, which carries no adapter here; merge the adapter into the base"
                }
                false => "the base has no such projection",
            };
            problems.push(format!("{}: {what}", site.name));
            continue;
        };
        let found = (site.in_features(), site.out_features());
        let expected = (module.in_features, module.out_features);
        if found != expected {
            problems.push(format!(
                "{}: the adapter is for {} -> {}, the base has {} -> {}",
                site.name, found.0, found.1, expected.0, expected.1
            ));
            continue;
        }
        let tensor = |values: &monteclora_converters::Tensor| -> Result<Tensor> {
            to_device(values.to_f32()?, values.shape(), device)
        };
        let low_rank = || -> Result<LowRank> {
            Ok(LowRank {
                a: tensor(&site.lora_a)?,
                b: tensor(&site.lora_b)?,
                scaling: site.scaling,
            })
        };
        let update = match &site.beyond {
            None if site.rank == 0 => None,
            None => Some(Loaded::LowRank(low_rank()?)),
            Some(Beyond::Magnitude(magnitude)) => {
                let update = DoraUpdate::new(low_rank()?, tensor(magnitude)?, None);
                Some(Loaded::Other(Arc::new(update)))
            }
            Some(Beyond::Scale { scale, shift }) => {
                let shift = shift.as_ref().map(tensor).transpose()?;
                let scale = tensor(scale)?;
                Some(Loaded::Other(Arc::new(ScaleShift { scale, shift })))
            }
            Some(Beyond::Sparse { indices, values }) => {
                let places = places(indices, &site.name)?.into_iter();
                let shape = [site.out_features(), site.in_features()];
                let places = places.map(|place| place as usize).collect();
                let update = SparseUpdate::new(shape, places, tensor(values)?);
                Some(Loaded::Other(Arc::new(update)))
            }
        };
        modules.insert(*id, update);
    }
    if problems.is_empty() {
        Ok(modules)
    } else {
        let problems = problems.join("; ");
        let message = format!("the adapter does not fit this base: {problems}");
        Err(Problem::sentence("adapter", message).into())
    }
}

/// Gradients of the loss with respect to the factors of each module's update.
#[derive(Debug, Clone, Default)]
pub struct AdapterGradients {
    modules: BTreeMap<ModuleId, Vec<Tensor>>,
}

impl AdapterGradients {
    /// Adds the gradients of a module's factors, in the order of [`Update::factors`]. They are empty for a module
    /// without an update.
    pub(crate) fn add(&mut self, id: ModuleId, gradients: Vec<Tensor>) -> Result<()> {
        if !gradients.is_empty() {
            let before = self.modules.remove(&id).unwrap_or_default();
            self.modules.insert(id, sum_of_factors(before, gradients)?);
        }
        Ok(())
    }

    /// Adds all gradients of `other`, another micro-batch of the same step.
    pub fn add_all(&mut self, other: Self) -> Result<()> {
        for (id, gradients) in other.modules {
            self.add(id, gradients)?;
        }
        Ok(())
    }

    /// Replaces the gradients by their sums over `ranks`, all of which have gradients for the same modules.
    pub fn sum_over(&mut self, ranks: &dyn Communicator) -> Result<()> {
        if ranks.size() == 1 {
            return Ok(());
        }
        let mut values: Vec<f32> = Vec::new();
        for gradient in self.modules.values().flatten() {
            values.extend(to_host::<f32>(gradient)?);
        }
        ranks.sum(&mut values);
        let mut rest = values.as_slice();
        for gradient in self.modules.values_mut().flatten() {
            let (sums, after) = rest.split_at(gradient.elem_count());
            let sums = to_device(sums.to_vec(), gradient.shape(), gradient.device())?;
            (*gradient, rest) = (sums, after);
        }
        Ok(())
    }

    /// Gradients of a module's factors, in the order of [`Update::factors`].
    pub fn get(&self, id: ModuleId) -> Option<&[Tensor]> {
        self.modules.get(&id).map(Vec::as_slice)
    }
}

/// Adds the gradients of one update's factors to `before`, which may be empty.
pub(crate) fn sum_of_factors(before: Vec<Tensor>, more: Vec<Tensor>) -> Result<Vec<Tensor>> {
    if before.is_empty() {
        return Ok(more);
    }
    let sums = before.iter().zip(&more).map(|(sum, more)| sum + more);
    Ok(sums.collect::<candle_core::Result<_>>()?)
}
