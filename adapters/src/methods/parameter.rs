//! Named parameters and their values.

use candle_core::{Device, Tensor};
use monteclora_converters::{self as formats, Beyond, Site};

use crate::device::{to_device, to_host};
use crate::error::Result;
use crate::numbers::Numbers;

/// How a parameter is moved: its learning rate and its weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Not moved by the optimiser.
    Frozen,
    /// Moved only by [`Method::after_step`](super::Method::after_step); the optimiser and the clipping of gradients
    /// skip it.
    Own,
    /// Statistics that a method keeps and only [`Method::after_step`](super::Method::after_step) changes. They are saved
    /// as parameters are, but they are none: they have neither gradient nor moments, and are not counted.
    State,
    /// The configured learning rate and weight decay.
    Weight,
    /// The configured learning rate, without weight decay.
    Unpenalised,
    /// The learning rate times LoRA+'s ratio.
    Output,
    /// The learning rate of the variational parameters, without weight decay, which would pull them to an arbitrary
    /// value.
    Variational,
}

/// How a parameter is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// A tensor of float32, on the device.
    Tensor,
    /// A few numbers in double precision on the host, rounded to float32 after every update, so that a file holds them
    /// exactly.
    Vector,
}

/// A named parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its name within its owner, as in checkpoints.
    pub name: &'static str,
    /// PEFT's name of its tensor below the module; `None` if an adapter's files have no place for it.
    pub peft: Option<&'static str>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it is held.
    pub storage: Storage,
    /// Which group of the optimiser moves it.
    pub group: Group,
    /// The step, 0 or 1, by which it must have received a nonzero gradient; otherwise training is silently wrong.
    /// `None` if a zero gradient is valid. A factor that is multiplied by a zero factor receives its gradient at the
    /// second step.
    pub reached: Option<u64>,
}

impl Parameter {
    /// Number of values.
    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The value, a moment or the gradient of a parameter.
#[derive(Debug, Clone)]
pub enum Value {
    /// Of a parameter held as [`Storage::Tensor`].
    Tensor(Tensor),
    /// Of a parameter held as [`Storage::Vector`].
    Vector(Vec<f64>),
}

impl Value {
    /// Creates a value of this `shape`, held as `storage`.
    pub fn new(
        storage: Storage,
        shape: &[usize],
        values: Vec<f32>,
        device: &Device,
    ) -> Result<Self> {
        Ok(match storage {
            Storage::Tensor => Self::Tensor(to_device(values, shape, device)?),
            Storage::Vector => Self::Vector(values.into_iter().map(f64::from).collect()),
        })
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        match self {
            Self::Tensor(tensor) => tensor.device(),
            Self::Vector(_) => &Device::Cpu,
        }
    }

    /// The device of what is computed with `values`: that of the first which is on another device than the CPU, if there
    /// is one.
    pub fn device_of<'a>(values: impl IntoIterator<Item = &'a Self>) -> Device {
        let devices = values.into_iter().map(Self::device);
        let found = devices.into_iter().find(|device| !device.is_cpu());
        found.cloned().unwrap_or(Device::Cpu)
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Tensor(tensor) => tensor.dims().to_vec(),
            Self::Vector(values) => vec![values.len()],
        }
    }

    /// Returns zeros of the same form.
    pub fn zeros_like(&self) -> Result<Self> {
        Ok(match self {
            Self::Tensor(tensor) => Self::Tensor(tensor.zeros_like()?),
            Self::Vector(values) => Self::Vector(vec![0.0; values.len()]),
        })
    }

    /// Returns the sum with another value of the same form.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        Ok(match (self, other) {
            (Self::Tensor(a), Self::Tensor(b)) => Self::Tensor((a + b)?),
            (Self::Vector(a), Self::Vector(b)) => {
                Self::Vector(a.iter().zip(b).map(|(a, b)| a + b).collect())
            }
            _ => return Err(unlike(&self.shape(), &other.shape())),
        })
    }

    /// Returns the value times `factor`.
    pub fn scaled(&self, factor: f64) -> Result<Self> {
        Ok(match self {
            Self::Tensor(tensor) => Self::Tensor((tensor * factor)?),
            Self::Vector(values) => Self::Vector(values.iter().map(|v| v * factor).collect()),
        })
    }

    /// Whether every entry is finite.
    pub fn is_finite(&self) -> Result<bool> {
        Ok(self
            .finite()?
            .read()?
            .iter()
            .all(|number| number.is_finite()))
    }

    /// Numbers that are finite if and only if every entry is.
    pub fn finite(&self) -> Result<Numbers> {
        match self {
            Self::Tensor(tensor) => Numbers::finite(tensor),
            Self::Vector(values) => Ok(Numbers::Host(values.clone())),
        }
    }

    /// Largest magnitude of an entry: one number.
    pub fn largest(&self) -> Result<Numbers> {
        match self {
            Self::Tensor(tensor) => Numbers::largest(tensor),
            Self::Vector(values) => {
                let largest = values
                    .iter()
                    .fold(0.0, |largest: f64, v| v.abs().max(largest));
                Ok(Numbers::Host(vec![largest]))
            }
        }
    }

    /// Converts to a float32 tensor of the converters.
    pub fn to_format(&self) -> Result<formats::Tensor> {
        let values = match self {
            Self::Tensor(tensor) => to_host::<f32>(tensor)?,
            Self::Vector(values) => values.iter().map(|v| *v as f32).collect(),
        };
        Ok(formats::Tensor::from_f32(&self.shape(), values)?)
    }
}

/// The error of a method that did not receive the values of its own parameters.
pub(super) fn unlike(expected: &[usize], found: &[usize]) -> crate::Error {
    crate::Error::Shape {
        what: "the parameters of a module".to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    }
}

/// The parameters of one module, or those that all modules share, with their values.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The module's path, or `shared`.
    pub name: String,
    /// The parameters.
    pub parameters: Vec<Parameter>,
    /// Their values, in the same order.
    pub values: Vec<Value>,
    /// Which of the values came from a file, in the same order.
    pub stored: Vec<bool>,
}

impl Owner {
    /// Takes each value from `site` if `site` holds it, and otherwise from `initial`.
    pub(super) fn new(
        name: &str,
        parameters: Vec<Parameter>,
        site: Option<&Site>,
        initial: impl FnOnce() -> Vec<Vec<f32>>,
        device: &Device,
    ) -> Result<Self> {
        let stored: Vec<_> = parameters
            .iter()
            .map(|p| site.zip(p.peft).and_then(|(site, name)| stored(site, name)))
            .collect();
        let initial = match stored.iter().all(Option::is_some) {
            true => vec![Vec::new(); parameters.len()],
            false => initial(),
        };
        let known = stored.iter().map(Option::is_some).collect();
        let values = parameters.iter().zip(stored).zip(initial);
        let values = values.map(|((p, stored), initial)| match stored {
            Some(tensor) => Value::new(p.storage, tensor.shape(), tensor.to_f32()?, device),
            None => Value::new(p.storage, &p.shape, initial, device),
        });
        Ok(Self {
            name: name.to_owned(),
            values: values.collect::<Result<_>>()?,
            stored: known,
            parameters,
        })
    }

    /// Number of values of all parameters.
    pub fn n_values(&self) -> usize {
        let parameters = self.parameters.iter();
        let counted = parameters.filter(|parameter| parameter.group != Group::State);
        counted.map(Parameter::n_values).sum()
    }

    /// Numbers whose sum is the squared Euclidean norm of `gradients`, in double precision on the CPU: those of tensors
    /// first, then one of all vectors together.
    pub fn squares<'a>(gradients: impl IntoIterator<Item = &'a Value>) -> Result<Vec<Numbers>> {
        let mut numbers = Vec::new();
        let mut vectors = 0.0;
        for gradient in gradients {
            match gradient {
                Value::Tensor(tensor) => numbers.push(Numbers::squares(tensor)?),
                Value::Vector(values) => values.iter().for_each(|g| vectors += g * g),
            }
        }
        numbers.push(Numbers::Host(vec![vectors]));
        Ok(numbers)
    }
}

/// `values` as the tensors that they are held as.
pub(super) fn tensors<'a, const N: usize>(values: &[&'a Value]) -> Result<[&'a Tensor; N]> {
    let tensors = values.iter().map(|value| match value {
        Value::Tensor(tensor) => Some(tensor),
        Value::Vector(_) => None,
    });
    let tensors: Option<Vec<&Tensor>> = tensors.collect();
    let all = tensors.and_then(|tensors| <[&Tensor; N]>::try_from(tensors).ok());
    all.ok_or_else(|| unlike(&[N], &[values.len()]))
}

/// `gradients` of the first of `n` values; the others, of [`Group::State`], have none.
pub(super) fn none_of_state(gradients: Vec<Tensor>, n: usize) -> Vec<Value> {
    let mut gradients: Vec<Value> = gradients.into_iter().map(Value::Tensor).collect();
    gradients.resize(n, Value::Vector(Vec::new()));
    gradients
}

/// The tensor of `site` that PEFT calls `name`.
fn stored<'a>(site: &'a Site, name: &str) -> Option<&'a formats::Tensor> {
    let posterior = site.posterior.as_ref();
    match name {
        "lora_A.weight" => Some(&site.lora_a),
        "lora_B.weight" => Some(&site.lora_b),
        "lora_magnitude_vector" => match &site.beyond {
            Some(Beyond::Magnitude(magnitude)) => Some(magnitude),
            _ => None,
        },
        "ssf_scale" => match &site.beyond {
            Some(Beyond::Scale { scale, .. }) => Some(scale),
            _ => None,
        },
        "ssf_shift" => match &site.beyond {
            Some(Beyond::Scale { shift, .. }) => shift.as_ref(),
            _ => None,
        },
        "lora_monteclora_sampler.std_prior" => posterior.map(|p| &p.log_std),
        "lora_monteclora_sampler.expert_weights_prior" => posterior.map(|p| &p.log_concentration),
        _ => None,
    }
}
