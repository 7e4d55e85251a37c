//! Initial values of a site, and whole-adapter posterior draws as plain LoRA.

use candle_core::{Device, Tensor};
use monteclora_converters::{Adapter, Site};

use crate::draw::{Draw, Noise, Spread};
use crate::error::{Error, Result};
use crate::noise::{Key, Purpose};

/// Initial A, `[r, in]`: uniform in `(-1/sqrt(in), 1/sqrt(in))`, PEFT's `kaiming_uniform(a = sqrt 5)`.
pub fn initial_a(seed: u64, site: &str, rank: usize, in_features: usize) -> Vec<f32> {
    let bound = (in_features as f64).sqrt().recip();
    Key::new(seed, site, 0)
        .uniforms(Purpose::InitialA, rank * in_features)
        .into_iter()
        .map(|u| ((2.0 * u - 1.0) * bound) as f32)
        .collect()
}

/// Initial variational parameters, uniform in `[0, 1)` as in PEFT.
pub fn initial_spread(seed: u64, site: &str, rank: usize, num_samples: usize) -> Spread {
    let mut values = Key::new(seed, site, 0).uniforms(Purpose::InitialSpread, rank + num_samples);
    let log_concentration = values.split_off(rank);
    Spread {
        log_std: values,
        log_concentration,
    }
}

/// Draw `index` of `adapter`'s posterior under `seed`: a plain LoRA adapter whose A is `A + E` at every site.
///
/// # Errors
/// [`Error::NoPosterior`] when the adapter is plain LoRA, [`Error::NonFinite`] when a draw is not finite.
pub fn sample(adapter: &Adapter, seed: u64, index: u64) -> Result<Adapter> {
    let scaler = adapter
        .config
        .monteclora
        .as_ref()
        .map(|settings| settings.sample_scaler);
    let mut drawn = adapter.collapse();
    for (site, target) in adapter.sites.iter().zip(&mut drawn.sites) {
        let scaler = scaler.ok_or_else(|| Error::NoPosterior {
            site: site.name.clone(),
        })?;
        target.lora_a = sample_site(site, scaler, Key::new(seed, &site.name, index))?;
    }
    Ok(drawn)
}

fn sample_site(site: &Site, sample_scaler: f64, key: Key) -> Result<monteclora_converters::Tensor> {
    let posterior = site.posterior.as_ref().ok_or_else(|| Error::NoPosterior {
        site: site.name.clone(),
    })?;
    let widen = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    let spread = Spread {
        log_std: widen(posterior.log_std.to_f32()?),
        log_concentration: widen(posterior.log_concentration.to_f32()?),
    };
    let shape = (site.rank, site.in_features());
    let mean = Tensor::from_vec(site.lora_a.to_f32()?, shape, &Device::Cpu)?;
    let noise = Noise::collapsed(key, shape.0, shape.1, spread.log_concentration.len(), &mean)?;
    let draw = Draw::new(&mean, &spread, sample_scaler, noise)?;
    let values = draw.effective_a.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            site: site.name.clone(),
            what: "a posterior draw",
        });
    }
    Ok(monteclora_converters::Tensor::from_f32(
        &[shape.0, shape.1],
        values,
    )?)
}
