//! SSF (Lian et al. 2022, arXiv:2210.08823): scale and shift of the output of each projection, `y = gamma (x W^T + b) + beta`.
//!
//! Section 3.2 of the paper: `gamma` starts around one and `beta` around zero, so that the first update is almost none; here
//! it is exactly none, and so a resumed or merged run has an exact origin. The scale merges into the weight, `gamma W`. The
//! shift merges only into a bias, so it is trained only at modules that have one (section 3.3). The paper scales the output
//! of every operation, norms included; the trainer adapts linear modules alone.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_converters::{AdapterConfig, Beyond, PeftType, Problem, Site};
use serde::{Deserialize, Serialize};

use super::lora::Plain;
use super::parameter::unlike;
use super::{
    DIVERGENCES, Drawn, Export, Group, Kind, Method, Module, OF_LOW_RANK, Parameter, Storage,
    Value, Weighting, settings,
};
use crate::error::Result;
use crate::linear::FrozenLinear;
use crate::noise::{Key, Noise};
use crate::update::{Pulled, Update};

pub(super) static KIND: Kind = Kind {
    name: "ssf",
    about: "Scale and shift of each projection's output. Merged, or served by this program; no LoRA file.",
    metrics: DIVERGENCES,
    export: Export::MergeOnly,
    unread: OF_LOW_RANK,
    new: |section| Ok(Arc::new(Ssf(settings(&KIND, section)?))),
};

/// Where a shift is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shift {
    /// At modules with a bias.
    #[default]
    Auto,
    /// At every module. A module without a bias is an error.
    Always,
    /// Nowhere.
    Never,
}

/// `[lora.ssf]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SsfConfig {
    /// Where a shift is trained: a shift can be merged only into a bias.
    pub shift: Shift,
}

#[derive(Debug)]
struct Ssf(SsfConfig);

impl Ssf {
    fn shifts(&self, module: &Module) -> bool {
        self.0.shift != Shift::Never && module.has_bias
    }
}

impl Method for Ssf {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn configure(&self, config: &mut AdapterConfig, _total_steps: u64) -> Result<()> {
        config.peft_type = PeftType::Ssf;
        Ok(())
    }

    fn check(&self, modules: &[Module]) -> Result<()> {
        let without = modules.iter().filter(|module| !module.has_bias);
        let without: Vec<&str> = without.map(|module| module.name.as_str()).collect();
        match without.as_slice() {
            [first, ..] if self.0.shift == Shift::Always => {
                let n = without.len();
                let message = format!(
                    "no bias, nor at {} other modules, so a shift cannot be merged",
                    n - 1
                );
                let fix = "set lora.ssf.shift to \"auto\" or \"never\"";
                Err(Problem::new("no-bias", *first, message, fix).exit(2).into())
            }
            _ => Ok(()),
        }
    }

    /// The scale `gamma` `[out]`, and at modules with a bias the shift `beta` `[out]`.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let parameter = |name| Parameter {
            name,
            peft: Some(name),
            shape: vec![module.out_features],
            storage: Storage::Tensor,
            group: Group::Unpenalised,
            reached: Some(0),
        };
        let mut parameters = vec![parameter("ssf_scale")];
        if self.shifts(module) {
            parameters.push(parameter("ssf_shift"));
        }
        parameters
    }

    fn initial(&self, module: &Module, _key: Key) -> Vec<Vec<f32>> {
        let mut initial = vec![vec![1.0; module.out_features]];
        if self.shifts(module) {
            initial.push(vec![0.0; module.out_features]);
        }
        initial
    }

    fn mean(&self, _module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        let tensors = values.iter().map(|value| match value {
            Value::Tensor(tensor) => Ok(tensor.clone()),
            Value::Vector(_) => Err(unlike(&[1], &[values.len()])),
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let (scale, shift) = match tensors.as_slice() {
            [scale] => (scale, None),
            [scale, shift] => (scale, Some(shift)),
            _ => return Err(unlike(&[1], &[values.len()])),
        };
        Ok(Arc::new(ScaleShift {
            scale: scale.clone(),
            shift: shift.cloned(),
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

    /// The output before the scale.
    fn kept_values(&self, module: &Module) -> usize {
        module.out_features
    }

    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let Some((scale, shift)) = values.split_first() else {
            return Err(unlike(&[1], &[0]));
        };
        let beyond = Beyond::Scale {
            scale: scale.to_format()?,
            shift: shift.first().map(|shift| shift.to_format()).transpose()?,
        };
        module.beyond_low_rank(beyond)
    }
}

/// `y = gamma (x W^T + b) + beta`. Dropout does not apply: the update reads the output.
#[derive(Debug)]
pub struct ScaleShift {
    /// `gamma`, `[out]`.
    pub scale: Tensor,
    /// `beta`, `[out]`.
    pub shift: Option<Tensor>,
}

impl Update for ScaleShift {
    fn factors(&self) -> Vec<&Tensor> {
        std::iter::once(&self.scale).chain(&self.shift).collect()
    }

    /// Saves the output before the scale, `[tokens, out]`.
    fn forward(
        &self,
        linear: &FrozenLinear,
        x: &Tensor,
        _dropout: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let bias = linear.start(None)?;
        let z = linear.product(x, &[], bias.as_ref())?;
        let mut y = z.broadcast_mul(&self.scale)?;
        if let Some(shift) = &self.shift {
            y = y.broadcast_add(shift)?;
        }
        if let Some(residual) = residual {
            y = (y + residual)?;
        }
        Ok((y, vec![z]))
    }

    fn pull(&self, upstream: &Tensor, _saved: &[Tensor]) -> Result<Pulled> {
        Ok(Pulled {
            frozen: upstream.broadcast_mul(&self.scale)?,
            own: vec![upstream.clone()],
        })
    }

    /// `d gamma = sum over the tokens of u z`, `d beta = sum over the tokens of u`.
    fn gradients(&self, _x: &Tensor, saved: &[Tensor], pulled: &Pulled) -> Result<Vec<Tensor>> {
        let ([z], [upstream]) = (saved, &pulled.own[..]) else {
            return Ok(Vec::new());
        };
        let mut gradients = vec![(upstream * z)?.sum(0)?];
        if self.shift.is_some() {
            gradients.push(upstream.sum(0)?);
        }
        Ok(gradients)
    }
}
