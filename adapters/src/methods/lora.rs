//! LoRA (Hu et al. 2021, arXiv:2106.09685): the update `scaling B A` of a frozen weight.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::Site;

use super::parameter::unlike;
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, Parameter, Storage, Value, Weighting,
};
use crate::error::Result;
use crate::noise::{Key, Noise, Purpose};
use crate::update::{LowRank, Update};

pub(super) static KIND: Kind = Kind {
    name: "lora",
    about: "Plain LoRA.",
    metrics: DIVERGENCES,
    export: Export::PlainLora,
    unread: &[],
    new: |_| Ok(Arc::new(LORA)),
};

/// Plain LoRA.
pub(super) const LORA: Lora = Lora {
    kind: &KIND,
    group_of_a: Group::Weight,
};

/// LoRA, with A trained or not.
#[derive(Debug)]
pub(super) struct Lora {
    pub(super) kind: &'static Kind,
    pub(super) group_of_a: Group,
}

impl Method for Lora {
    fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// A `[r, in]` and B `[out, r]`. B starts at zero, so that A's gradient is zero at the first step.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let parameter = |name, peft, shape: [usize; 2], group, reached| Parameter {
            name,
            peft: Some(peft),
            shape: shape.into(),
            storage: Storage::Tensor,
            group,
            reached: (group != Group::Frozen).then_some(reached),
        };
        let (a, b) = (
            [module.rank, module.in_features],
            [module.out_features, module.rank],
        );
        vec![
            parameter("lora_A", "lora_A.weight", a, self.group_of_a, 1),
            parameter("lora_B", "lora_B.weight", b, Group::Output, 0),
        ]
    }

    /// A uniform in `(-1/sqrt(in), 1/sqrt(in))`, PEFT's `kaiming_uniform(a = sqrt 5)`, and B zero.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let bound = (module.in_features as f64).sqrt().recip();
        let a = key
            .uniforms(Purpose::InitialA, module.rank * module.in_features)
            .into_iter()
            .map(|u| ((2.0 * u - 1.0) * bound) as f32)
            .collect();
        vec![a, vec![0.0; module.out_features * module.rank]]
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        let [Value::Tensor(a), Value::Tensor(b)] = values else {
            return Err(unlike(&[2], &[values.len()]));
        };
        Ok(Arc::new(LowRank {
            a: a.clone(),
            b: b.clone(),
            scaling: module.scaling,
        }))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        Ok(Box::new(Plain(self.mean(module, values)?)))
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let [a, b] = values else {
            return Err(unlike(&[2], &[values.len()]));
        };
        Ok(Site {
            name: module.name.clone(),
            rank: module.rank,
            alpha: module.alpha,
            scaling: module.scaling,
            lora_a: a.to_format()?,
            lora_b: b.to_format()?,
            posterior: None,
            beyond: None,
            triplets: None,
        })
    }
}

/// A draw without noise: the mean, whose factors are the parameters.
#[derive(Debug)]
pub(super) struct Plain(pub(super) Arc<dyn Update>);

impl Drawn for Plain {
    fn update(&self) -> Arc<dyn Update> {
        self.0.clone()
    }

    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], _weight: f64) -> Result<Vec<Value>> {
        Ok(upstream.iter().cloned().map(Value::Tensor).collect())
    }
}
