//! Selective fine-tuning by second-order importance (Fu et al. 2022, arXiv:2211.15583): the entries of the weights that lower the loss
//! most are trained, and the others stay.
//!
//! With the loss to second order and a diagonal Hessian h, the best entries are those with the largest `g^2 / h` at the start
//! (section 4, the method SAM). Here h is the same for all entries, so that `g^2` decides; how the paper estimates h could not
//! be verified from it. The first step of a run measures g on its batch and moves nothing; the number of entries is a share
//! of each weight, where the paper has a share of all.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::{AdapterConfig, PeftType, Site};
use serde::{Deserialize, Serialize};

use super::parameter::{none_of_state, unlike};
use super::sparse::{self, SHARED_VALUES, SparseUpdate, best, on_device_of, rows_and_columns};
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, OF_RANK, Owner, Parameter, Step,
    Storage, Value, Weighting, settings,
};
use crate::device::to_host;
use crate::error::Result;
use crate::noise::{Key, Noise};
use crate::update::Update;

pub(super) static KIND: Kind = Kind {
    name: "second-order",
    about: "The entries of each weight with the largest gradient are trained. Merged, or served by this program; no LoRA file.",
    metrics: DIVERGENCES,
    export: Export::MergeOnly,
    unread: OF_RANK,
    new: |section| Ok(Arc::new(SecondOrder(settings(&KIND, section)?))),
};

/// `[lora.second_order]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecondOrderConfig {
    /// Share of the entries of each weight that is trained, above 0 and at most 1. The paper's is 0.005.
    pub fraction: f64,
}

impl Default for SecondOrderConfig {
    fn default() -> Self {
        Self { fraction: 0.005 }
    }
}

#[derive(Debug)]
struct SecondOrder(SecondOrderConfig);

/// Whether the entries are chosen: one number, 0 or 1.
const CHOSEN: usize = SHARED_VALUES;

fn is_chosen(values: &[&Value]) -> Result<bool> {
    let chosen = values.get(CHOSEN).map(|value| sparse::numbers(value));
    Ok(chosen.transpose()?.is_some_and(|chosen| chosen == [1.0]))
}

impl Method for SecondOrder {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn summary(&self) -> String {
        format!("{}, {} of the entries", KIND.name, self.0.fraction)
    }

    fn configure(&self, config: &mut AdapterConfig, _total_steps: u64) -> Result<()> {
        config.peft_type = PeftType::Sparse;
        Ok(())
    }

    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let mut parameters = sparse::parameters(sparse::n_entries(module, self.0.fraction), 1);
        parameters.push(Parameter {
            name: "chosen",
            peft: None,
            shape: vec![1],
            storage: Storage::Tensor,
            group: Group::State,
            reached: None,
        });
        parameters
    }

    fn initial(&self, module: &Module, _key: Key) -> Vec<Vec<f32>> {
        let n = sparse::n_entries(module, self.0.fraction);
        let mut initial = vec![vec![0.0; n]; SHARED_VALUES];
        initial.push(vec![0.0]);
        initial
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        match is_chosen(values)? {
            true => Ok(Arc::new(sparse::update(module, values)?)),
            false => Ok(sparse::probe(module, values[0])?),
        }
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        if is_chosen(values)? {
            return Ok(Box::new(DrawnEntries(Arc::new(sparse::update(
                module, values,
            )?))));
        }
        Ok(Box::new(Probing {
            update: sparse::probe(module, values[0])?,
            n: sparse::n_entries(module, self.0.fraction),
            like: values[0].clone(),
        }))
    }

    /// The changes as a whole matrix, and the gradient of one.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.in_features * module.out_features
    }

    fn kept_values(&self, _module: &Module) -> usize {
        0
    }

    /// Takes the entries that [`Probing`] chose.
    fn after_step(
        &self,
        _modules: &[Module],
        owners: &mut [Owner],
        gradients: &[Vec<Value>],
        _step: Step,
    ) -> Result<()> {
        for (owner, gradients) in owners.iter_mut().zip(gradients) {
            if let [_, rows @ Value::Tensor(_), columns, chosen] = &gradients[..] {
                owner.values[1] = rows.clone();
                owner.values[2] = columns.clone();
                owner.values[CHOSEN] = chosen.clone();
            }
        }
        Ok(())
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        sparse::export(module, values)
    }
}

/// The gradients of chosen entries; the statistics have none.
#[derive(Debug)]
struct DrawnEntries(Arc<SparseUpdate>);

impl Drawn for DrawnEntries {
    fn update(&self) -> Arc<dyn Update> {
        self.0.clone()
    }

    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], _weight: f64) -> Result<Vec<Value>> {
        let [gradient] = upstream else {
            return Err(unlike(&[1], &[upstream.len()]));
        };
        Ok(none_of_state(vec![gradient.clone()], SHARED_VALUES + 1))
    }
}

/// The first step: entries are chosen by the gradient of the whole weight.
#[derive(Debug)]
struct Probing {
    update: Arc<sparse::Probe>,
    n: usize,
    like: Value,
}

impl Drawn for Probing {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    /// No gradient moves the changes. In place of gradients of the statistics are their new values.
    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], _weight: f64) -> Result<Vec<Value>> {
        let [whole] = upstream else {
            return Err(unlike(&[1], &[upstream.len()]));
        };
        let (_, columns) = whole.dims2()?;
        let scores = to_host::<f32>(&whole.sqr()?)?;
        let [rows, columns] = rows_and_columns(&best(&scores, self.n), columns);
        Ok(vec![
            self.like.zeros_like()?,
            on_device_of(&self.like, rows)?,
            on_device_of(&self.like, columns)?,
            on_device_of(&self.like, vec![1.0])?,
        ])
    }
}
