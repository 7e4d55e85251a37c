//! The linear modules that read the same input. They are a list, so that fused modules keep their names.

use candle_core::Tensor;
use monteclora_adapters::{Branch, FrozenLinear, input_gradient};

use super::Pass;
use crate::model::adapter::{AdapterGradients, ModuleId};
use crate::model::dropout::Mask;
use monteclora_adapters::Result;

/// A linear module that can carry an update.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) id: ModuleId,
    /// The module's path. Dropout depends on it.
    pub(crate) name: String,
    pub(crate) linear: FrozenLinear,
    /// Widths of the module's outputs, in order. A fused module has more than one.
    pub(crate) parts: Vec<usize>,
}

/// Modules that read the same input.
#[derive(Debug)]
pub(crate) struct Projections(pub(crate) Vec<Projection>);

/// What a module keeps for the backward pass.
#[derive(Debug)]
pub(crate) struct SavedModule {
    /// The tensors of its update.
    tensors: Vec<Tensor>,
    /// The dropout mask of its update's input.
    mask: Option<Mask>,
}

/// What each module keeps for the backward pass.
pub(crate) type Saved = Vec<SavedModule>;

/// Modules in the backward pass.
pub(crate) struct Branches<'a> {
    ids: Vec<ModuleId>,
    branches: Vec<Branch<'a>>,
}

impl Projection {
    fn mask(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Option<Mask>> {
        match (pass.dropout, pass.adapter.get(self.id)) {
            (Some(dropout), Some(_)) => Ok(Some(dropout.mask(&self.name, pass.segments, x)?)),
            _ => Ok(None),
        }
    }
}

impl Projections {
    /// Computes the outputs of all modules for `x` `[tokens, in]`, part by part. `residual` is added to the output of a
    /// module with a single part.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        residual: Option<&Tensor>,
    ) -> Result<(Vec<Tensor>, Saved)> {
        let (mut outputs, mut saved) = (Vec::new(), Vec::with_capacity(self.0.len()));
        for Projection {
            id, linear, parts, ..
        } in &self.0
        {
            let mask = self.0[saved.len()].mask(x, pass)?;
            let dropout = mask.as_ref().map(Mask::factors).transpose()?;
            let update = pass.adapter.get(*id);
            let (y, tensors) = linear.forward(x, update, dropout.as_ref(), residual)?;
            match parts.as_slice() {
                [_] => outputs.push(y),
                fused => {
                    let mut start = 0;
                    for width in fused {
                        outputs.push(y.narrow(1, start, *width)?.contiguous()?);
                        start += width;
                    }
                }
            }
            saved.push(SavedModule { tensors, mask });
        }
        Ok((outputs, saved))
    }

    /// Starts the backward pass from `upstream`, the gradients of the parts.
    pub(crate) fn backward<'a>(
        &'a self,
        upstream: &[Tensor],
        saved: &Saved,
        pass: &Pass<'a>,
    ) -> Result<Branches<'a>> {
        let mut upstream = upstream.iter();
        let mut branches = Vec::with_capacity(self.0.len());
        for (projection, saved) in self.0.iter().zip(saved) {
            let parts: Vec<&Tensor> = upstream.by_ref().take(projection.parts.len()).collect();
            let joined = match parts.as_slice() {
                [one] => Tensor::clone(one),
                fused => Tensor::cat(fused, 1)?,
            };
            let update = pass.adapter.get(projection.id);
            let dropout = saved.mask.as_ref().map(Mask::factors).transpose()?;
            let tensors = &saved.tensors;
            branches.push((projection.linear).backward(&joined, tensors, update, dropout)?);
        }
        Ok(Branches {
            ids: self.0.iter().map(|projection| projection.id).collect(),
            branches,
        })
    }
}

impl Branches<'_> {
    /// Adds the gradients of the updates to `gradients`. `x` is the modules' input.
    pub(crate) fn finish(
        &self,
        x: &Tensor,
        saved: &Saved,
        gradients: &mut AdapterGradients,
    ) -> Result<()> {
        for ((id, branch), saved) in self.ids.iter().zip(&self.branches).zip(saved) {
            gradients.add(*id, branch.gradients(x, &saved.tensors)?)?;
        }
        Ok(())
    }

    /// Gradient of the input.
    pub(crate) fn input_gradient(&self) -> Result<Tensor> {
        input_gradient(&self.branches)
    }
}
