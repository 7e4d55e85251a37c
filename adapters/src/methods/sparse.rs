//! Single entries of a frozen weight that are trained: what the methods that select entries share.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use monteclora_converters::{self as formats, Beyond, Site};

use super::parameter::unlike;
use super::{Group, Module, Parameter, Storage, Value};
use crate::device::{to_device, to_host};
use crate::error::Result;
use crate::linear::FrozenLinear;
use crate::product::{Factor, Product, matmul_tn};
use crate::update::{Pulled, Update};

/// The values of a module that every such method has, in this order: the changes of the entries, and their rows and columns.
pub(super) const SHARED_VALUES: usize = 3;

/// Number of entries that a share of a module's weight is; at least one.
pub(super) fn n_entries(module: &Module, share: f64) -> usize {
    let all = module.in_features * module.out_features;
    ((all as f64 * share).ceil() as usize).clamp(1, all.max(1))
}

/// The changes `[k]`, and the rows and columns of the entries as float32, which holds whole numbers below 2^24 exactly.
pub(super) fn parameters(n: usize, reached: u64) -> Vec<Parameter> {
    let parameter = |name, group, reached| Parameter {
        name,
        peft: None,
        shape: vec![n],
        storage: Storage::Tensor,
        group,
        reached,
    };
    vec![
        parameter("sparse_values", Group::Weight, Some(reached)),
        parameter("sparse_rows", Group::State, None),
        parameter("sparse_columns", Group::State, None),
    ]
}

/// The numbers of a value that is held as a tensor.
pub(super) fn numbers(value: &Value) -> Result<Vec<f32>> {
    match value {
        Value::Tensor(tensor) => to_host(tensor),
        Value::Vector(_) => Err(unlike(&[SHARED_VALUES], &[1])),
    }
}

/// `values` as a tensor on the device of `like`.
pub(super) fn on_device_of(like: &Value, values: Vec<f32>) -> Result<Value> {
    let Value::Tensor(like) = like else {
        return Err(unlike(&[SHARED_VALUES], &[1]));
    };
    let n = values.len();
    let tensor = to_device(values, n, like.device())?;
    Ok(Value::Tensor(tensor))
}

/// The places of the `n` entries with the largest score, in order; of equal scores, the first.
pub(super) fn best(scores: &[f32], n: usize) -> Vec<u32> {
    let mut places: Vec<u32> = (0..scores.len() as u32).collect();
    let n = n.min(places.len());
    let order = |a: &u32, b: &u32| {
        let (a, b) = (*a as usize, *b as usize);
        scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
    };
    if n > 0 && n < places.len() {
        places.select_nth_unstable_by(n - 1, order);
        places.truncate(n);
    }
    places.sort_unstable();
    places
}

/// Rows and columns of places in a matrix of `columns` columns, as the methods hold them.
pub(super) fn rows_and_columns(places: &[u32], columns: usize) -> [Vec<f32>; 2] {
    let columns = columns.max(1) as u32;
    [
        places.iter().map(|at| (at / columns) as f32).collect(),
        places.iter().map(|at| (at % columns) as f32).collect(),
    ]
}

/// The update of a module whose first values are those of [`parameters`].
pub(super) fn update(module: &Module, values: &[&Value]) -> Result<SparseUpdate> {
    let [Value::Tensor(changes), rows, columns, ..] = values else {
        return Err(unlike(&[SHARED_VALUES], &[values.len()]));
    };
    let (rows, columns) = (numbers(rows)?, numbers(columns)?);
    let places = rows.iter().zip(&columns);
    let places = places.map(|(row, column)| *row as usize * module.in_features + *column as usize);
    Ok(SparseUpdate::new(
        [module.out_features, module.in_features],
        places.collect(),
        changes.clone(),
    ))
}

/// The module as a file holds it.
pub(super) fn export(module: &Module, values: &[&Value]) -> Result<Site> {
    let update = update(module, values)?;
    let changes = to_host::<f32>(&update.values)?;
    let mut entries: Vec<(usize, f32)> = update.places.iter().copied().zip(changes).collect();
    entries.sort_by_key(|(place, _)| *place);
    let n = entries.len();
    let indices = entries
        .iter()
        .flat_map(|(place, _)| (*place as i64).to_le_bytes());
    let indices = formats::Tensor::from_bytes(formats::DType::I64, &[n], indices.collect())?;
    let values = entries.iter().map(|(_, value)| *value).collect();
    module.beyond_low_rank(Beyond::Sparse {
        indices,
        values: formats::Tensor::from_f32(&[n], values)?,
    })
}

/// `y += x D^T` for a matrix D `[out, in]` that is zero but for a few entries.
///
/// D is held as a whole while the update exists: products with it are dense, and cost what those of the frozen weight cost.
#[derive(Debug)]
pub struct SparseUpdate {
    shape: [usize; 2],
    /// Places of the entries, row by row.
    places: Vec<usize>,
    /// Their values, `[k]`.
    values: Tensor,
    dense: OnceLock<Tensor>,
}

impl SparseUpdate {
    /// The update of a weight `[out, in]` by `values` `[k]` at `places`, which count its entries row by row.
    pub fn new(shape: [usize; 2], places: Vec<usize>, values: Tensor) -> Self {
        Self {
            shape,
            places,
            values,
            dense: OnceLock::new(),
        }
    }

    /// D.
    pub(super) fn dense(&self) -> Result<&Tensor> {
        if let Some(dense) = self.dense.get() {
            return Ok(dense);
        }
        let mut all = vec![0f32; self.shape.iter().product()];
        let values = to_host::<f32>(&self.values)?;
        for (place, value) in self.places.iter().zip(values) {
            if let Some(entry) = all.get_mut(*place) {
                *entry = value;
            }
        }
        let [out, n_in] = self.shape;
        let dense = to_device(all, (out, n_in), self.values.device())?;
        Ok(self.dense.get_or_init(|| dense))
    }

    /// The entries of `matrix` `[out, in]` at the places, `[k]`.
    pub(super) fn gather(&self, matrix: &Tensor) -> Result<Tensor> {
        let places = self.places.iter().map(|place| *place as u32);
        let n = self.places.len();
        let places = to_device(places.collect(), n, matrix.device())?;
        Ok(matrix.flatten_all()?.index_select(&places, 0)?)
    }
}

impl Update for SparseUpdate {
    fn factors(&self) -> Vec<&Tensor> {
        vec![&self.values]
    }

    /// Saves the input with dropout, if there is dropout.
    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let dropped = dropout.map(|mask| x * mask).transpose()?;
        let start = linear.start(residual)?;
        let own = Product::new(
            Factor::Plain(dropped.as_ref().unwrap_or(x)),
            Factor::Transposed(self.dense()?),
        );
        let y = match &dropped {
            None => linear.product(x, &[own], start.as_ref())?,
            Some(_) => {
                let own = crate::product::sum_of_products(start.as_ref(), &[own])?;
                linear.product(x, &[], Some(&own))?
            }
        };
        Ok((y, dropped.into_iter().collect()))
    }

    fn pull(&self, upstream: &Tensor, _saved: &[Tensor]) -> Result<Pulled> {
        self.dense()?;
        Ok(Pulled {
            frozen: upstream.clone(),
            own: Vec::new(),
        })
    }

    fn input_terms<'a>(&'a self, pulled: &'a Pulled) -> Vec<Product<'a>> {
        let dense = self.dense.get().into_iter();
        dense
            .map(|dense| Product::new(Factor::Plain(&pulled.frozen), Factor::Plain(dense)))
            .collect()
    }

    /// The entries of `u^T x` at the places.
    fn gradients(&self, x: &Tensor, saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>> {
        let whole = matmul_tn(&pulled.frozen, saved.first().unwrap_or(x))?;
        Ok(vec![self.gather(&whole)?])
    }
}

/// An update of zero that asks for the gradient of the whole weight.
#[derive(Debug)]
pub(super) struct Probe(pub(super) Tensor);

impl Update for Probe {
    fn factors(&self) -> Vec<&Tensor> {
        vec![&self.0]
    }

    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        _dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let start = linear.start(residual)?;
        Ok((linear.product(x, &[], start.as_ref())?, Vec::new()))
    }

    fn pull(&self, upstream: &Tensor, _saved: &[Tensor]) -> Result<Pulled> {
        Ok(Pulled {
            frozen: upstream.clone(),
            own: Vec::new(),
        })
    }

    fn gradients(&self, x: &Tensor, _saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>> {
        Ok(vec![matmul_tn(&pulled.frozen, x)?])
    }
}

/// A probe of a module on the device of `like`.
pub(super) fn probe(module: &Module, like: &Value) -> Result<Arc<Probe>> {
    let Value::Tensor(like) = like else {
        return Err(unlike(&[SHARED_VALUES], &[1]));
    };
    let shape = (module.out_features, module.in_features);
    Ok(Arc::new(Probe(Tensor::zeros(
        shape,
        like.dtype(),
        like.device(),
    )?)))
}
