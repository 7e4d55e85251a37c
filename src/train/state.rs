//! The trainable adapter: A, B and the variational parameters of every site, a posterior draw of it, and its gradients.

use candle_core::{Device, Tensor};
use monteclora_adapters::noise::Key;
use monteclora_adapters::{
    Draw, LowRank, Noise, Objective, Regulariser, Spread, SpreadGradient, initial_a, initial_spread,
};
use monteclora_converters as formats;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{Adapter, AdapterConfig, MonteCloraSettings, SitePosterior};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::model::{ActiveAdapter, AdapterGradients, ModuleId, low_rank};

/// Trainable parameters of one site.
#[derive(Debug, Clone)]
pub struct SiteState {
    /// Where it is.
    pub id: ModuleId,
    /// Module path.
    pub name: String,
    /// Alpha of this site.
    pub alpha: f64,
    /// Factor on `B A`.
    pub scaling: f64,
    /// Mean of A, `[r, in]`.
    pub a: Tensor,
    /// B, `[out, r]`.
    pub b: Tensor,
    /// Variational parameters; none for plain LoRA. Every value is representable in f32, so that a file holds it exactly.
    pub spread: Option<Spread>,
}

/// Gradient of the whole loss at one site.
#[derive(Debug, Clone)]
pub struct SiteGradient {
    /// With respect to A, `[r, in]`.
    pub a: Tensor,
    /// With respect to B, `[out, r]`.
    pub b: Tensor,
    /// With respect to the variational parameters.
    pub spread: Option<SpreadGradient>,
}

/// The whole adapter in training.
#[derive(Debug, Clone)]
pub struct AdapterState {
    /// Sites, blocks first.
    pub sites: Vec<SiteState>,
    /// Settings of the posterior; none for plain LoRA.
    pub settings: Option<MonteCloraSettings>,
    /// Formulas of the divergences.
    pub objective: Objective,
}

/// Which form the posterior draw takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrawForm {
    /// One Gaussian a site.
    Collapsed,
    /// PEFT's literal `N` Gaussians: the plain reference.
    Literal,
}

/// One posterior draw of the whole adapter with its regulariser.
#[derive(Debug)]
pub struct DrawnAdapter {
    /// What the forward pass runs with.
    pub active: ActiveAdapter,
    draws: Vec<Option<(Draw, Regulariser)>>,
}

/// Means over sites of the regulariser's parts, nats; all zero for plain LoRA.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RegulariserMeans {
    /// Dirichlet divergence.
    pub dirichlet: f64,
    /// Wishart divergence.
    pub wishart: f64,
    /// Gaussian divergence.
    pub gaussian: f64,
    /// Weighted divergences.
    pub weighted_kl: f64,
    /// Sum of squared mixture weights.
    pub sum_of_squares: f64,
}

impl RegulariserMeans {
    /// What is added to the task loss.
    pub fn total(&self) -> f64 {
        self.weighted_kl + self.sum_of_squares
    }
}

impl AdapterState {
    /// A fresh adapter at `names`: A uniform, B zero, spread uniform as in PEFT, all functions of `seed` and site name.
    pub fn initial(
        config: &AdapterConfig,
        names: &[String],
        model: &ModelShape,
        objective: Objective,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let sites = ModuleId::all(model)
            .filter(|(_, module)| names.contains(&module.name))
            .map(|(id, module)| {
                let (in_features, out_features) = (module.in_features, module.out_features);
                let name = module.name;
                let rank = config.rank_for(&name)?;
                let a = Tensor::from_vec(
                    initial_a(seed, &name, rank, in_features),
                    (rank, in_features),
                    &Device::Cpu,
                )?;
                Ok(SiteState {
                    alpha: config.alpha_for(&name)?,
                    scaling: config.scaling_for(&name)?,
                    a: a.to_device(device)?,
                    b: Tensor::zeros((out_features, rank), candle_core::DType::F32, device)?,
                    spread: config.monteclora.as_ref().map(|settings| {
                        round_spread(initial_spread(seed, &name, rank, settings.num_samples))
                    }),
                    id,
                    name,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            sites,
            settings: config.monteclora.clone(),
            objective,
        })
    }

    /// Continues from `adapter`; a site of plain LoRA gets a fresh spread when `settings` ask for a posterior.
    pub fn from_adapter(
        adapter: &Adapter,
        settings: Option<&MonteCloraSettings>,
        model: &ModelShape,
        objective: Objective,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut sites = Vec::with_capacity(adapter.sites.len());
        let mut low_rank = low_rank(adapter, model, device)?;
        for (id, module) in ModuleId::all(model) {
            let Some(low_rank) = low_rank.remove(&id) else {
                continue;
            };
            let name = module.name;
            let site = adapter
                .sites
                .iter()
                .find(|s| s.name == name)
                .ok_or_else(|| Error::Site { site: name.clone() })?;
            let spread = match (settings, &site.posterior) {
                (None, _) => None,
                (Some(_), Some(posterior)) => Some(Spread {
                    log_std: widen(&posterior.log_std)?,
                    log_concentration: widen(&posterior.log_concentration)?,
                }),
                (Some(settings), None) => Some(round_spread(initial_spread(
                    seed,
                    &name,
                    site.rank,
                    settings.num_samples,
                ))),
            };
            sites.push(SiteState {
                id,
                name,
                alpha: site.alpha,
                scaling: low_rank.scaling,
                a: low_rank.a,
                b: low_rank.b,
                spread,
            });
        }
        Ok(Self {
            sites,
            settings: settings.cloned(),
            objective,
        })
    }

    /// Number of trainable values.
    pub fn n_parameters(&self) -> usize {
        self.sites
            .iter()
            .map(|site| {
                let spread = site
                    .spread
                    .as_ref()
                    .map_or(0, |s| s.log_std.len() + s.log_concentration.len());
                site.a.elem_count() + site.b.elem_count() + spread
            })
            .sum()
    }

    /// The same adapter with the weight of its divergences multiplied by `factor`; tensors are shared.
    pub(super) fn with_kl_factor(&self, factor: f64) -> Self {
        let mut state = self.clone();
        if let Some(settings) = &mut state.settings {
            settings.kl_loss_weight *= factor;
        }
        state
    }

    /// The posterior mean, for evaluation.
    pub fn mean(&self) -> ActiveAdapter {
        ActiveAdapter::new(
            self.sites
                .iter()
                .map(|site| (site.id, site.low_rank(site.a.clone()))),
        )
    }

    /// Draws every site with its own noise at optimiser step `step` of `seed`.
    pub fn draw(&self, seed: u64, step: u64, form: DrawForm) -> Result<DrawnAdapter> {
        self.draw_with(|site, spread| {
            let (rank, in_features) = site.a.dims2()?;
            let key = Key::new(seed, &site.name, step);
            let num_samples = spread.log_concentration.len();
            Ok(match form {
                DrawForm::Collapsed => {
                    Noise::collapsed(key, rank, in_features, num_samples, &site.a)?
                }
                DrawForm::Literal => Noise::literal(key, rank, in_features, num_samples),
            })
        })
    }

    /// Draws every site with the noise that `noise` gives for it.
    pub fn draw_with(
        &self,
        noise: impl Fn(&SiteState, &Spread) -> Result<Noise> + Sync,
    ) -> Result<DrawnAdapter> {
        let draws = self
            .sites
            .par_iter()
            .map(|site| {
                let (Some(settings), Some(spread)) = (&self.settings, &site.spread) else {
                    return Ok(None);
                };
                let draw = Draw::new(
                    &site.a,
                    spread,
                    settings.sample_scaler,
                    noise(site, spread)?,
                )?;
                let regulariser = Regulariser::new(&draw, spread, settings, self.objective);
                Ok(Some((draw, regulariser)))
            })
            .collect::<Result<Vec<_>>>()?;
        let active = self.sites.iter().zip(&draws).map(|(site, draw)| {
            let a = draw.as_ref().map_or(&site.a, |(draw, _)| &draw.effective_a);
            (site.id, site.low_rank(a.clone()))
        });
        Ok(DrawnAdapter {
            active: ActiveAdapter::new(active),
            draws,
        })
    }

    /// The adapter as it is written to disk.
    pub fn to_adapter(&self, config: &AdapterConfig) -> Result<Adapter> {
        let narrow = |values: &[f64]| {
            formats::Tensor::from_f32(&[values.len()], values.iter().map(|v| *v as f32).collect())
        };
        let matrix = |tensor: &Tensor| -> Result<formats::Tensor> {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            Ok(formats::Tensor::from_f32(tensor.dims(), values)?)
        };
        let mut sites = self
            .sites
            .iter()
            .map(|site| {
                Ok(formats::Site {
                    name: site.name.clone(),
                    rank: site.a.dims2()?.0,
                    alpha: site.alpha,
                    scaling: site.scaling,
                    lora_a: matrix(&site.a)?,
                    lora_b: matrix(&site.b)?,
                    posterior: site
                        .spread
                        .as_ref()
                        .map(|spread| -> Result<SitePosterior> {
                            Ok(SitePosterior {
                                log_std: narrow(&spread.log_std)?,
                                log_concentration: narrow(&spread.log_concentration)?,
                            })
                        })
                        .transpose()?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        sites.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Adapter {
            config: config.clone(),
            sites,
            format: config.peft_format(),
            metadata: std::iter::once(("format".to_owned(), "pt".to_owned())).collect(),
        })
    }
}

impl SiteState {
    fn low_rank(&self, a: Tensor) -> LowRank {
        LowRank {
            a,
            b: self.b.clone(),
            scaling: self.scaling,
        }
    }
}

impl DrawnAdapter {
    /// Means of the regulariser's parts over the sites.
    pub fn regulariser(&self) -> RegulariserMeans {
        let mut means = RegulariserMeans::default();
        let weight = 1.0 / self.draws.len().max(1) as f64;
        for (_, part) in self.draws.iter().flatten() {
            means.dirichlet += weight * part.dirichlet;
            means.wishart += weight * part.wishart;
            means.gaussian += weight * part.gaussian;
            means.weighted_kl += weight * part.weighted_kl;
            means.sum_of_squares += weight * part.sum_of_squares;
        }
        means
    }

    /// Gradients of task loss plus regulariser for the task's gradients at the active matrices, in the order of the sites.
    pub fn backward(
        &self,
        state: &AdapterState,
        task: &AdapterGradients,
    ) -> Result<Vec<SiteGradient>> {
        let weight = 1.0 / self.draws.len().max(1) as f64;
        state
            .sites
            .par_iter()
            .zip(&self.draws)
            .map(|(site, draw)| {
                let Some([a, b]) = task.get(site.id) else {
                    let site = site.name.clone();
                    return Err(Error::Site { site });
                };
                let spread = draw
                    .as_ref()
                    .map(|(draw, regulariser)| draw.backward(Some(a), regulariser, weight))
                    .transpose()?;
                Ok(SiteGradient {
                    a: a.clone(),
                    b: b.clone(),
                    spread,
                })
            })
            .collect()
    }
}

fn widen(values: &formats::Tensor) -> Result<Vec<f64>> {
    Ok(values.to_f32()?.into_iter().map(f64::from).collect())
}

pub(super) fn round_spread(spread: Spread) -> Spread {
    let round = |values: Vec<f64>| values.into_iter().map(|v| f64::from(v as f32)).collect();
    Spread {
        log_std: round(spread.log_std),
        log_concentration: round(spread.log_concentration),
    }
}
