//! SaRA (Hu et al. 2024, arXiv:2409.06633): the entries of the weights with the smallest magnitude, which matter least to the base,
//! are trained, with a penalty on the rank of their matrix.
//!
//! The loss has `rank_weight` times the nuclear norm `||D||_*` of each module's changes D (the paper's low-rank sparse training).
//! Its gradient is the polar factor `U V^T` of D, found by Newton-Schulz iteration, so that only matrix products are needed
//! (Higham 2008, Functions of Matrices, section 8.3); along directions in which D is almost zero it is a subgradient between 0
//! and 1. At `reselect_at` of the run the entries whose weight has grown beyond the largest magnitude of the selection stay as they
//! are, and the others are trained on (progressive parameter adjustment).
//!
//! The paper selects below one magnitude for all modules; here it is a share of each weight, so that the number of parameters
//! is known before the base is read. `rank_weight` and the place of the adjustment could not be verified from the paper. The paper trains a
//! diffusion model; its sparse backward pass is not reproduced: gradients are those of whole matrices, of which entries are taken.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::{AdapterConfig, PeftType, Site};
use serde::{Deserialize, Serialize};

use super::parameter::{none_of_state, unlike};
use super::sparse::{
    self, SHARED_VALUES, SparseUpdate, best, numbers, on_device_of, rows_and_columns,
};
use super::{
    Chart, Drawn, Export, Group, Kind, Method, Metric, Module, OF_RANK, Owner, Parameter, Step,
    Storage, Value, Weighting, settings,
};
use crate::error::Result;
use crate::linalg::row_dots;
use crate::noise::{Key, Noise};
use crate::product::{Factor, Product, matmul_nt, matmul_tn, sum_of_products};
use crate::update::Update;
use crate::weights::Weight;

pub(super) static KIND: Kind = Kind {
    name: "sara",
    about: "The smallest entries of each weight are trained, with a low-rank penalty. Merged, or served by this program; no LoRA file.",
    metrics: METRICS,
    export: Export::MergeOnly,
    unread: OF_RANK,
    new: |section| Ok(Arc::new(Sara(settings(&KIND, section)?))),
};

const METRICS: &[Metric] = super::metrics! {
    "nuclear_loss" "nuclear" "sara/nuclear_norm" "nuclear norm" Regulariser 1 Some("rank");
};

/// `[lora.sara]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SaraConfig {
    /// Share of the entries of each weight that is trained, above 0 and at most 1.
    pub fraction: f64,
    /// Weight of the nuclear norm of a module's changes in the loss, at least 0.
    pub rank_weight: f64,
    /// Share of the run after which entries that have grown are held, in [0, 1]. 1 holds none.
    pub reselect_at: f64,
}

impl Default for SaraConfig {
    fn default() -> Self {
        Self {
            fraction: 0.1,
            rank_weight: 1e-4,
            reselect_at: 0.5,
        }
    }
}

#[derive(Debug)]
struct Sara(SaraConfig);

/// 1 for entries that are trained, 0 for those that are held.
const TRAINED: usize = SHARED_VALUES;
/// What held entries are held at.
const HELD: usize = SHARED_VALUES + 1;
const N_VALUES: usize = SHARED_VALUES + 2;

/// Rows of a weight that are widened at a time.
const ROWS: usize = 64;

/// Calls `each` with the rows of a weight, a few at a time.
fn each_rows(weight: &dyn Weight, mut each: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
    let (rows, columns) = weight.dims()?;
    let mut buffer = Vec::new();
    for first in (0..rows).step_by(ROWS) {
        let range = first..rows.min(first + ROWS);
        buffer.resize(range.len() * columns, 0.0);
        weight.widen(range.clone(), 0..columns, &mut buffer);
        each(range, &buffer);
    }
    Ok(())
}

impl Method for Sara {
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
        let n = sparse::n_entries(module, self.0.fraction);
        let mut parameters = sparse::parameters(n, 0);
        parameters.extend(["sparse_trained", "sparse_held"].map(|name| Parameter {
            name,
            peft: None,
            shape: vec![n],
            storage: Storage::Tensor,
            group: Group::State,
            reached: None,
        }));
        parameters
    }

    fn initial(&self, module: &Module, _key: Key) -> Vec<Vec<f32>> {
        let n = sparse::n_entries(module, self.0.fraction);
        let zeros = || vec![0.0; n];
        vec![zeros(), zeros(), zeros(), vec![1.0; n], zeros()]
    }

    fn needs_base(&self) -> bool {
        true
    }

    /// The places of the smallest entries.
    fn initial_from_base(&self, module: &Module, _key: Key) -> Result<Vec<Option<Vec<f32>>>> {
        let mut scores = Vec::with_capacity(module.in_features * module.out_features);
        each_rows(module.weight()?.as_ref(), |_, rows| {
            scores.extend(rows.iter().map(|weight| -weight.abs()));
        })?;
        let n = sparse::n_entries(module, self.0.fraction);
        let [rows, columns] = rows_and_columns(&best(&scores, n), module.in_features);
        Ok(vec![None, Some(rows), Some(columns), None, None])
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        Ok(Arc::new(sparse::update(module, values)?))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        let update = Arc::new(sparse::update(module, values)?);
        let (polar, nuclear) = match self.0.rank_weight > 0.0 {
            true => {
                let (polar, nuclear) = polar_factor(update.dense()?)?;
                (Some(update.gather(&polar)?), nuclear)
            }
            false => (None, 0.0),
        };
        let trained = match values.get(TRAINED) {
            Some(Value::Tensor(trained)) => trained.clone(),
            _ => return Err(unlike(&[N_VALUES], &[values.len()])),
        };
        Ok(Box::new(DrawnEntries {
            update,
            polar,
            nuclear,
            rank_weight: self.0.rank_weight,
            trained,
        }))
    }

    /// The changes as a whole matrix, the gradient of one, and what the penalty needs.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.in_features * module.out_features
    }

    fn kept_values(&self, _module: &Module) -> usize {
        0
    }

    fn after_step(
        &self,
        modules: &[Module],
        owners: &mut [Owner],
        _gradients: &[Vec<Value>],
        step: Step,
    ) -> Result<()> {
        let adjusts = (step.total as f64 * self.0.reselect_at).round() as u64;
        for (module, owner) in modules.iter().zip(owners) {
            if step.index + 1 == adjusts && self.0.reselect_at < 1.0 {
                hold_grown(module, &mut owner.values)?;
            } else if step.index + 1 > adjusts {
                restore_held(&mut owner.values)?;
            }
        }
        Ok(())
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        sparse::export(module, values)
    }
}

/// Holds the entries whose weight is now larger than the largest that was selected.
fn hold_grown(module: &Module, values: &mut [Value]) -> Result<()> {
    let (changes, rows, columns) = (
        numbers(&values[0])?,
        numbers(&values[1])?,
        numbers(&values[2])?,
    );
    let mut own = vec![0f32; changes.len()];
    let weight = module.weight()?.as_ref();
    let (_, n_in) = weight.dims()?;
    let mut next = 0;
    // Places are in the order of the rows.
    each_rows(weight, |range, values| {
        while next < rows.len() && range.contains(&(rows[next] as usize)) {
            let at = (rows[next] as usize - range.start) * n_in + columns[next] as usize;
            own[next] = values[at];
            next += 1;
        }
    })?;
    let largest = own
        .iter()
        .fold(0f32, |largest, weight| weight.abs().max(largest));
    let trained = own.iter().zip(&changes);
    let trained = trained.map(|(weight, change)| f32::from((weight + change).abs() <= largest));
    values[TRAINED] = on_device_of(&values[0], trained.collect())?;
    values[HELD] = values[0].clone();
    Ok(())
}

/// Puts held entries back, which the optimiser's moments go on moving.
fn restore_held(values: &mut [Value]) -> Result<()> {
    let [
        Value::Tensor(changes),
        _,
        _,
        Value::Tensor(trained),
        Value::Tensor(held),
    ] = &*values
    else {
        return Err(unlike(&[N_VALUES], &[values.len()]));
    };
    let restored = trained.ne(0f64)?.where_cond(changes, held)?;
    values[0] = Value::Tensor(restored);
    Ok(())
}

/// Iterations of [`polar_factor`]; each at least halves the distance of a singular value that is not tiny to one.
const ITERATIONS: usize = 10;

/// The polar factor `U V^T` of a matrix and its nuclear norm `<U V^T, D>`, by `X <- 1.5 X - 0.5 X X^T X` from `X = D / ||D||_F`, whose
/// singular values are at most one.
fn polar_factor(matrix: &Tensor) -> Result<(Tensor, f64)> {
    let squares: f64 = row_dots(matrix, matrix)?.iter().sum();
    let norm = squares.sqrt();
    if norm == 0.0 || !norm.is_finite() {
        return Ok((matrix.zeros_like()?, 0.0));
    }
    let (rows, columns) = matrix.dims2()?;
    let mut x = (matrix / norm)?;
    for _ in 0..ITERATIONS {
        let cubed = match rows <= columns {
            true => {
                let gram = matmul_nt(&x, &x)?; // [rows, rows]
                let gram = Product::scaled(Factor::Plain(&gram), Factor::Plain(&x), -0.5);
                sum_of_products(Some(&(&x * 1.5)?), &[gram])?
            }
            false => {
                let gram = matmul_tn(&x, &x)?; // [columns, columns]
                let gram = Product::scaled(Factor::Plain(&x), Factor::Plain(&gram), -0.5);
                sum_of_products(Some(&(&x * 1.5)?), &[gram])?
            }
        };
        x = cubed;
    }
    let nuclear = row_dots(&x, matrix)?.iter().sum();
    Ok((x, nuclear))
}

#[derive(Debug)]
struct DrawnEntries {
    update: Arc<SparseUpdate>,
    /// The polar factor of the changes, at the entries.
    polar: Option<Tensor>,
    nuclear: f64,
    rank_weight: f64,
    trained: Tensor,
}

impl Drawn for DrawnEntries {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    fn metrics(&self) -> Vec<f64> {
        vec![self.rank_weight * self.nuclear]
    }

    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], weight: f64) -> Result<Vec<Value>> {
        let [gradient] = upstream else {
            return Err(unlike(&[1], &[upstream.len()]));
        };
        let gradient = match &self.polar {
            Some(polar) => (gradient + (polar * (weight * self.rank_weight))?)?,
            None => gradient.clone(),
        };
        let gradient = (gradient * &self.trained)?;
        Ok(none_of_state(vec![gradient], N_VALUES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Of a matrix of known singular vectors, whatever its shape.
    #[test]
    fn the_polar_factor_is_that_of_the_singular_vectors() {
        // D = 3 u1 v1^T + 0.5 u2 v2^T with orthonormal u, v.
        let (u1, u2) = ([0.6f32, 0.8], [-0.8f32, 0.6]);
        let (v1, v2) = ([1f32, 0.0, 0.0], [0f32, 0.6, 0.8]);
        let entry = |s1: f32, s2: f32, i: usize, j: usize| s1 * u1[i] * v1[j] + s2 * u2[i] * v2[j];
        let matrix = |s1: f32, s2: f32| -> Tensor {
            let values: Vec<f32> = (0..6).map(|at| entry(s1, s2, at / 3, at % 3)).collect();
            Tensor::from_vec(values, (2, 3), &Device::Cpu).expect("sized")
        };
        let expected = matrix(1.0, 1.0);
        for transposed in [false, true] {
            let shaped = |tensor: Tensor| match transposed {
                true => tensor
                    .t()
                    .and_then(|tensor| tensor.contiguous())
                    .expect("turned"),
                false => tensor,
            };
            let (found, norm) = polar_factor(&shaped(matrix(3.0, 0.5))).expect("computed");
            let off = (found - shaped(expected.clone())).and_then(|off| off.abs()?.max_all());
            let off = off
                .and_then(|off| off.to_scalar::<f32>())
                .expect("a number");
            assert!(off < 1e-4, "{off}");
            assert!((norm - 3.5).abs() < 1e-4, "{norm}");
        }
        let zero = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).expect("made");
        assert_eq!(polar_factor(&zero).expect("computed").1, 0.0);
    }
}
