//! AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): `Delta W = s P Lambda Q`, whose singular values are pruned while it is trained, so that
//! modules that matter keep a higher rank.
//!
//! In PEFT's names P is `lora_B` `[out, r]`, Lambda is `lora_E` `[r, 1]` and Q is `lora_A` `[r, in]`; the scale is
//! `alpha / (init_r + 1e-5)` and stays so when values are pruned. The loss has `orth_reg_weight` times the mean over all Q and P
//! of `||Q Q^T - I||_F` and `||P^T P - I||_F`: PEFT's norms, where eq. 4 of the paper has their squares.
//!
//! The importance of an entry w is `S = I U` (eq. 8 to 11): `I` and `U` are exponential averages of `|w g|` and of
//! `| |w g| - I |`. A triplet scores the importance of its value plus the means over its row of Q and its column of P. Every
//! `delta_t` steps the values with the lowest scores are set to zero, so many that the budget remains: the initial ranks up to
//! `tinit`, and a cubic curve down to `target_r` per module at `total - tfinal` (eq. 12), where the choice is final. Pruned values
//! come back with the optimiser's next step until then, as in PEFT, whose steps count from 0.
//!
//! As in PEFT, `w` is the value after the optimiser's step. The gradient is the one before clipping, which scales it by one number
//! per step. With `tfinal = 0` PEFT never makes its final choice; here the last step makes it.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_converters::{AdaLoraSettings, AdapterConfig, PeftType, Problem, Site, Triplets};
use serde::{Deserialize, Serialize};

use super::parameter::{none_of_state, tensors, unlike};
use super::{
    Chart, Drawn, Export, Group, Kind, Method, Metric, Module, Owner, Parameter, Step, Storage,
    Value, Weighting, settings,
};
use crate::device::{to_device, to_host};
use crate::error::Result;
use crate::linalg::row_dots;
use crate::noise::{Key, Noise, Purpose};
use crate::product::{Factor, Product, matmul_nt, matmul_tn, sum_of_products};
use crate::update::{LowRank, Update};

pub(super) static KIND: Kind = Kind {
    name: "adalora",
    about: "LoRA by singular values, of which the least important are pruned during training.",
    metrics: METRICS,
    export: Export::PlainLora,
    unread: &[],
    new: |section| Ok(Arc::new(AdaLora(settings(&KIND, section)?))),
};

const METRICS: &[Metric] = super::metrics! {
    "orth_loss" "orthogonality" "adalora/orthogonality" "orthogonality" Regulariser 1 Some("orth");
    "mean_rank" "rank" "adalora/mean_rank" "rank per module" Rank 1 None;
};

/// `[lora.adalora]`, with PEFT's names. `lora.r` is the initial rank, PEFT's `init_r`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdaLoraConfig {
    /// Mean rank per module at the end, at least 1 and at most `lora.r`.
    pub target_r: usize,
    /// Steps before the first pruning, below the steps before `tfinal`. Default: a tenth of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tinit: Option<u64>,
    /// Steps at the end in which nothing is pruned any more. Default: a third of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tfinal: Option<u64>,
    /// Steps between prunings, at least 1.
    pub delta_t: u64,
    /// Decay of the average of the sensitivities, in [0, 1).
    pub beta1: f64,
    /// Decay of the average of their uncertainties, in [0, 1).
    pub beta2: f64,
    /// Weight of the orthogonality of P and Q in the loss, at least 0.
    pub orth_reg_weight: f64,
}

impl Default for AdaLoraConfig {
    /// PEFT's defaults; `tinit` and `tfinal`, which are 0 there, follow from the length of the run.
    fn default() -> Self {
        Self {
            target_r: 8,
            tinit: None,
            tfinal: None,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
        }
    }
}

impl AdaLoraConfig {
    /// `tinit` and `tfinal` of a run of `total` steps.
    pub fn phases(&self, total: u64) -> (u64, u64) {
        let tfinal = self.tfinal.unwrap_or(total / 3);
        // PEFT takes no tinit that leaves no step between.
        let most = total.saturating_sub(tfinal).saturating_sub(1);
        (self.tinit.unwrap_or(total / 10).min(most), tfinal)
    }

    /// The step, from 0, at which the choice is final.
    fn last_choice(&self, total: u64) -> u64 {
        let (_, tfinal) = self.phases(total);
        total.saturating_sub(tfinal.max(1))
    }

    /// The number of values that stay at `step`, from 0, of `total`, and whether values are pruned there (eq. 12).
    fn budget(&self, step: u64, total: u64, initial: usize, target: usize) -> (usize, bool) {
        let (tinit, last) = (self.phases(total).0, self.last_choice(total));
        if step >= last {
            return (target, true);
        }
        if step <= tinit {
            return (initial, false);
        }
        let left = 1.0 - (step - tinit) as f64 / (last - tinit) as f64;
        let budget = initial.saturating_sub(target) as f64 * left.powi(3) + target as f64;
        (budget as usize, step.is_multiple_of(self.delta_t.max(1)))
    }
}

/// The values of a module, in the order of [`Method::parameters`].
const A: usize = 0;
const B: usize = 1;
const E: usize = 2;
/// Averages of the sensitivities of A, B and E, then of their uncertainties.
const SENSITIVITY: usize = 3;
const UNCERTAINTY: usize = 6;
/// 1 where a singular value is kept, 0 where it is pruned.
const KEPT: usize = 9;
const N_VALUES: usize = 10;

/// Method with its settings.
#[derive(Debug)]
struct AdaLora(AdaLoraConfig);

/// `alpha / (init_r + 1e-5)`, whatever the rank that remains.
fn scaling(module: &Module) -> f64 {
    module.alpha / (module.rank as f64 + 1e-5)
}

fn low_rank(module: &Module, values: &[&Value]) -> Result<LowRank> {
    let [a, b, e, ..] = tensors::<N_VALUES>(values)?;
    Ok(LowRank {
        a: a.broadcast_mul(e)?,
        b: b.clone(),
        scaling: scaling(module),
    })
}

impl Method for AdaLora {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn summary(&self) -> String {
        format!("{}, target rank {}", KIND.name, self.0.target_r)
    }

    fn configure(&self, config: &mut AdapterConfig, total_steps: u64) -> Result<()> {
        let (tinit, tfinal) = self.0.phases(total_steps);
        let given = self.0.tinit.unwrap_or(tinit);
        let is_given = self.0.tinit.is_some() || self.0.tfinal.is_some();
        if is_given && given.saturating_add(tfinal) >= total_steps {
            return Err(Problem::usage(format!(
                "[lora.adalora] tinit {given} and tfinal {tfinal} leave no step for pruning in a run of {total_steps} steps; lower them, or train longer"
            ))
            .into());
        }
        config.peft_type = PeftType::AdaLora;
        config.adalora = Some(AdaLoraSettings {
            init_r: config.r,
            target_r: self.0.target_r,
            tinit,
            tfinal,
            delta_t: self.0.delta_t,
            beta1: self.0.beta1,
            beta2: self.0.beta2,
            orth_reg_weight: self.0.orth_reg_weight,
            total_step: Some(total_steps),
        });
        Ok(())
    }

    fn check(&self, modules: &[Module]) -> Result<()> {
        // PEFT has one initial rank and one alpha, and no scaling by the root of the rank.
        let first = modules.first();
        let unlike = |module: &&Module| {
            first.is_some_and(|first| module.rank != first.rank || module.alpha != first.alpha)
                || module.scaling != module.alpha / module.rank as f64
        };
        if let Some(module) = modules.iter().find(unlike) {
            let message =
                "has a rank, an alpha or a scaling of its own, and AdaLoRA has one of each";
            let fix = "leave out lora.rank_pattern, lora.alpha_pattern and lora.use_rslora";
            return Err(module.refused(message, fix));
        }
        let low = modules.iter().find(|module| module.rank < self.0.target_r);
        match low {
            Some(module) => {
                let message = format!(
                    "starts with rank {}, below lora.adalora.target_r, which is {}",
                    module.rank, self.0.target_r
                );
                let fix = "raise lora.r, 1.5 times target_r in the paper, or lower target_r";
                Err(module.refused(message, fix))
            }
            None => Ok(()),
        }
    }

    /// The steps up to the final choice.
    fn unsettled_steps(&self, total_steps: u64) -> u64 {
        self.0.last_choice(total_steps) + 1
    }

    /// Q, P and Lambda, and the statistics by which values are pruned.
    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let (a, b, e) = (
            vec![module.rank, module.in_features],
            vec![module.out_features, module.rank],
            vec![module.rank, 1],
        );
        let parameter = |name, shape: &Vec<usize>, group, reached| Parameter {
            name,
            peft: None,
            shape: shape.clone(),
            storage: Storage::Tensor,
            group,
            reached,
        };
        let state = |name, shape| parameter(name, shape, Group::State, None);
        vec![
            parameter("lora_A", &a, Group::Weight, Some(1)),
            parameter("lora_B", &b, Group::Output, Some(1)),
            parameter("lora_E", &e, Group::Weight, Some(0)),
            state("sensitivity_A", &a),
            state("sensitivity_B", &b),
            state("sensitivity_E", &e),
            state("uncertainty_A", &a),
            state("uncertainty_B", &b),
            state("uncertainty_E", &e),
            state("kept", &e),
        ]
    }

    /// PEFT's: Q and P normal with standard deviation 0.02, Lambda zero.
    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let (n_a, n_b) = (
            module.rank * module.in_features,
            module.out_features * module.rank,
        );
        let mut normals = key.normals(Purpose::InitialA, n_a + n_b).into_iter();
        let mut take = |n: usize| -> Vec<f32> {
            let values = normals.by_ref().take(n);
            values.map(|value| (0.02 * value) as f32).collect()
        };
        let (a, b) = (take(n_a), take(n_b));
        let zeros = |n: usize| vec![0.0; n];
        let n_e = module.rank;
        let mut initial = vec![a, b, zeros(n_e)];
        for _ in 0..2 {
            initial.extend([zeros(n_a), zeros(n_b), zeros(n_e)]);
        }
        initial.push(vec![1.0; n_e]);
        initial
    }

    fn mean(&self, module: &Module, values: &[&Value]) -> Result<Arc<dyn Update>> {
        Ok(Arc::new(low_rank(module, values)?))
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> Result<Box<dyn Drawn>> {
        let [a, b, e, ..] = tensors::<N_VALUES>(values)?;
        let (off_a, off_b) = (
            off_identity(&matmul_nt(a, a)?)?,
            off_identity(&matmul_tn(b, b)?)?,
        );
        let kept = e.ne(0f64)?.to_dtype(e.dtype())?.sum_all()?;
        Ok(Box::new(DrawnTriplets {
            update: low_rank(module, values)?,
            factors: [a.clone(), b.clone(), e.clone()],
            off: [off_a, off_b],
            orth_reg_weight: self.0.orth_reg_weight,
            kept: to_host::<f32>(&kept)?.into_iter().map(f64::from).sum(),
        }))
    }

    /// `E A`, and the four statistics, which are held but are no parameters.
    fn working_values(&self, module: &Module) -> usize {
        module.rank * module.in_features
    }

    /// Updates the importance and sets the values that are pruned to zero.
    fn after_step(
        &self,
        modules: &[Module],
        owners: &mut [Owner],
        gradients: &[Vec<Value>],
        step: Step,
    ) -> Result<()> {
        let settings = &self.0;
        let (now, last) = (step.index, settings.last_choice(step.total));
        if now > last {
            for owner in owners.iter_mut() {
                let all: Vec<&Value> = owner.values.iter().collect();
                let [.., kept] = tensors::<N_VALUES>(&all)?;
                let kept = to_host::<f32>(kept)?;
                keep(&mut owner.values, kept)?;
            }
            return Ok(());
        }
        if now < last {
            for (owner, gradients) in owners.iter_mut().zip(gradients) {
                settings.observe(&mut owner.values, gradients)?;
            }
        }
        let initial: usize = modules.iter().map(|module| module.rank).sum();
        let target = settings.target_r * modules.len();
        let (budget, prunes) = settings.budget(now, step.total, initial, target);
        let n_pruned = initial.saturating_sub(budget);
        if !prunes || n_pruned == 0 {
            return Ok(());
        }
        let scores = owners.iter().map(|owner| score(&owner.values));
        let scores = scores.collect::<Result<Vec<_>>>()?;
        // Of equal scores the later ones of each module are pruned first, so that the budget is kept.
        let mut order: Vec<(usize, usize)> = (scores.iter().enumerate())
            .flat_map(|(owner, scores)| (0..scores.len()).map(move |at| (owner, at)))
            .collect();
        order.sort_by(|a, b| {
            let score = |(owner, at): &(usize, usize)| scores[*owner][*at];
            score(a)
                .total_cmp(&score(b))
                .then((b.1, b.0).cmp(&(a.1, a.0)))
        });
        let mut kept: Vec<Vec<f32>> = scores.iter().map(|of| vec![1.0; of.len()]).collect();
        for (owner, at) in order.into_iter().take(n_pruned) {
            kept[owner][at] = 0.0;
        }
        for (owner, kept) in owners.iter_mut().zip(kept) {
            keep(&mut owner.values, kept)?;
        }
        Ok(())
    }

    /// The triplets that are kept, at least one per module.
    fn export(&self, module: &Module, values: &[&Value]) -> Result<Site> {
        let [a, b, e, ..] = tensors::<N_VALUES>(values)?;
        let [a, b, e] = [a, b, e].map(on_host);
        let (a, b, e) = (a?, b?, e?);
        let values = to_host::<f32>(&e)?;
        let mut kept: Vec<bool> = values.iter().map(|value| *value != 0.0).collect();
        if !kept.contains(&true) {
            kept[0] = true;
        }
        let rows = kept.iter().enumerate().filter(|(_, kept)| **kept);
        let rows: Vec<u32> = rows.map(|(row, _)| row as u32).collect();
        let rank = rows.len();
        let rows = Tensor::from_vec(rows, rank, &Device::Cpu)?;
        let (a, e) = (a.index_select(&rows, 0)?, e.index_select(&rows, 0)?);
        let b = b.index_select(&rows, 1)?.contiguous()?;
        let scaling = scaling(module);
        let stored = |tensor: Tensor| Value::Tensor(tensor).to_format();
        Ok(Site {
            name: module.name.clone(),
            rank,
            alpha: scaling * rank as f64,
            scaling,
            lora_a: stored(a.broadcast_mul(&e)?)?,
            lora_b: stored(b)?,
            posterior: None,
            beyond: None,
            triplets: Some(Triplets {
                lora_a: stored(a)?,
                lora_e: stored(e)?,
                kept,
            }),
        })
    }
}

impl AdaLoraConfig {
    /// Adds a step's `|w g|` to the averages of a module's A, B and E.
    fn observe(&self, values: &mut [Value], gradients: &[Value]) -> Result<()> {
        for part in [A, B, E] {
            let (Value::Tensor(value), Value::Tensor(gradient)) = (&values[part], &gradients[part])
            else {
                return Err(unlike(&[N_VALUES], &[values.len()]));
            };
            let sensitivity = (value * gradient)?.abs()?;
            let [Value::Tensor(mean), Value::Tensor(unsure)] =
                [&values[SENSITIVITY + part], &values[UNCERTAINTY + part]]
            else {
                return Err(unlike(&[N_VALUES], &[values.len()]));
            };
            let mean = ((mean * self.beta1)? + (&sensitivity * (1.0 - self.beta1))?)?;
            let off = (sensitivity - &mean)?.abs()?;
            let unsure = ((unsure * self.beta2)? + (off * (1.0 - self.beta2))?)?;
            values[SENSITIVITY + part] = Value::Tensor(mean);
            values[UNCERTAINTY + part] = Value::Tensor(unsure);
        }
        Ok(())
    }
}

/// The scores of a module's triplets.
fn score(values: &[Value]) -> Result<Vec<f32>> {
    let all = values.iter().collect::<Vec<_>>();
    let all = tensors::<N_VALUES>(&all)?;
    let importance = |part: usize| all[SENSITIVITY + part] * all[UNCERTAINTY + part];
    let of_a = importance(A)?.mean(1)?;
    let of_b = importance(B)?.mean(0)?;
    let of_e = importance(E)?.flatten_all()?;
    to_host::<f32>(&((of_e + of_a)? + of_b)?)
}

/// Keeps the singular values where `kept` is 1 and sets the others to zero.
fn keep(values: &mut [Value], kept: Vec<f32>) -> Result<()> {
    let Value::Tensor(e) = &values[E] else {
        return Err(unlike(&[N_VALUES], &[values.len()]));
    };
    let kept = to_device(kept, e.shape(), e.device())?;
    values[E] = Value::Tensor((e * &kept)?);
    values[KEPT] = Value::Tensor(kept);
    Ok(())
}

/// A copy on the host.
fn on_host(tensor: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(
        to_host::<f32>(tensor)?,
        tensor.shape(),
        &Device::Cpu,
    )?)
}

/// `M - I`, and its Frobenius norm.
fn off_identity(gram: &Tensor) -> Result<(Tensor, f64)> {
    let rank = gram.dim(0)?;
    let identity = Tensor::eye(rank, gram.dtype(), gram.device())?;
    let off = (gram - identity)?;
    let squares: f64 = row_dots(&off, &off)?.iter().sum();
    Ok((off, squares.sqrt()))
}

#[derive(Debug)]
struct DrawnTriplets {
    update: LowRank,
    factors: [Tensor; 3],
    /// `Q Q^T - I` and `P^T P - I`, with their norms.
    off: [(Tensor, f64); 2],
    orth_reg_weight: f64,
    /// Singular values that are not zero.
    kept: f64,
}

impl Drawn for DrawnTriplets {
    fn update(&self) -> Arc<dyn Update> {
        Arc::new(self.update.clone())
    }

    fn metrics(&self) -> Vec<f64> {
        let [(_, of_a), (_, of_b)] = &self.off;
        vec![self.orth_reg_weight * (of_a + of_b) / 2.0, self.kept]
    }

    /// With G the gradient of `E A`: `dA = E G`, `dE = sum over the inputs of A G`; the regulariser adds
    /// `(Q Q^T - I) Q / ||Q Q^T - I||` and `P (P^T P - I) / ||P^T P - I||`, times the weight: `d||M||_F = <M, dM> / ||M||_F`, and
    /// two terms for each Gram matrix over two matrices per module.
    fn pullback(&self, upstream: &[Tensor], _numbers: &[f64], weight: f64) -> Result<Vec<Value>> {
        let [through, grad_b] = upstream else {
            return Err(unlike(&[2], &[upstream.len()]));
        };
        let [a, b, e] = &self.factors;
        let [(off_a, norm_a), (off_b, norm_b)] = &self.off;
        let factor = |norm: f64| match norm > 0.0 {
            true => weight * self.orth_reg_weight / norm,
            false => 0.0,
        };
        let grad_a = through.broadcast_mul(e)?;
        let of_a = Product::scaled(Factor::Plain(off_a), Factor::Plain(a), factor(*norm_a));
        let of_b = Product::scaled(Factor::Plain(b), Factor::Plain(off_b), factor(*norm_b));
        let grad_e = row_dots(a, through)?.into_iter().map(|sum| sum as f32);
        let grad_e: Vec<f32> = grad_e.collect();
        let grad_e = to_device(grad_e, e.shape(), e.device())?;
        let gradients = vec![
            sum_of_products(Some(&grad_a), &[of_a])?,
            sum_of_products(Some(grad_b), &[of_b])?,
            grad_e,
        ];
        Ok(none_of_state(gradients, N_VALUES))
    }
}
