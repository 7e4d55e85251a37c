//! NEAT (Zhong et al. 2024, arXiv:2410.01870): the update is a small network of the frozen weight, `Delta W = s f(W)` with
//! `f(W) = relu(W A_1) B_1`.
//!
//! In the paper's terms (section 3.2) `A_1` is `Theta_1` and `B_1` is `Theta_2`, with no layer between. `relu(W A_1)` is
//! `[out, r]`, so the update has rank r: it is exported exactly, as the plain LoRA with `lora_B = relu(W A_1)` and
//! `lora_A = B_1`. What a run needs to go on, `A_1`, is in its checkpoints. The paper starts from an update of zero; that `A_1`
//! is drawn as LoRA's A and `B_1` is the factor that starts at zero could not be verified from the paper.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::Site;

use super::lora::LORA;
use super::parameter::{tensors, unlike};
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, Parameter, Storage, Value, Weighting,
};
use crate::error::Result;
use crate::noise::{Key, Noise};
use crate::product::{Factor, Product, matmul_nt, sum_of_products};
use crate::update::{LowRank, Update};
use crate::weights::Weight;

pub(super) static KIND: Kind = Kind {
    name: "neat",
    about: "The update is a small network of the frozen weight. Exported as a plain LoRA.",
    metrics: DIVERGENCES,
    export: Export::PlainLora,
    unread: &[],
    new: |_| Ok(Arc::new(Neat)),
};

#[derive(Debug)]
struct Neat;

impl Neat {
    /// `relu(W A_1)`, `[out, r]`, for `A_1` as it is held, transposed `[r, in]`.
    fn hidden(weight: &dyn Weight, first: &Tensor) -> Result<Tensor> {
        let through = matmul_nt(first, weight)?.t()?.contiguous()?;
        Ok(through.relu()?)
    }

    fn low_rank(module: &Module, values: &[&Value]) -> Result<LowRank> {
        let [first, second] = tensors(values)?;
        Ok(LowRank {
            a: second.clone(),
            b: Self::hidden(module.weight()?.as_ref(), first)?,
            scaling: module.scaling,
        })
    }
}

impl Method for Neat {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    /// `A_1`, transposed `[r, in]`, and `B_1` `[r, in]`; `B_1` starts at zero.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let parameter = |name, group, reached| Parameter {
            name,
            peft: None,
            shape: vec![module.rank, module.in_features],
            storage: Storage::Tensor,
            group,
            reached: Some(reached),
        };
        vec![
            parameter("neat_first", Group::Weight, 1),
            parameter("neat_second", Group::Output, 0),
        ]
    }

    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let mut initial = LORA.initial(module, key);
        initial[1] = vec![0.0; module.rank * module.in_features];
        initial
    }

    fn needs_base(&self) -> bool {
        true
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        Ok(Arc::new(Self::low_rank(module, values)?))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        Ok(Box::new(DrawnNetwork {
            update: Arc::new(Self::low_rank(module, values)?),
            weight: module.weight()?.clone(),
        }))
    }

    /// The hidden layer and its gradient.
    fn working_values(&self, module: &Module) -> usize {
        2 * module.rank * module.out_features
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let LowRank { a, b, .. } = Self::low_rank(module, values)?;
        LORA.export(module, &[&Value::Tensor(a), &Value::Tensor(b)])
    }
}

#[derive(Debug)]
struct DrawnNetwork {
    update: Arc<LowRank>,
    weight: Arc<dyn Weight>,
}

impl Drawn for DrawnNetwork {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    /// `dB_1` is the gradient of `lora_A`; `dA_1^T = (dP relu'(W A_1))^T W` with `dP` that of `lora_B`.
    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], _weight: f64) -> Result<Vec<Value>> {
        let [second, hidden] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        let active = self.update.b.gt(0f64)?.to_dtype(hidden.dtype())?;
        let inner = (hidden * active)?;
        let through = Product::new(
            Factor::Transposed(&inner),
            Factor::Plain(self.weight.as_ref()),
        );
        let first = sum_of_products(None, &[through])?;
        Ok(vec![Value::Tensor(first), Value::Tensor(second.clone())])
    }
}
