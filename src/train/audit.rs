//! The gradient audit: every trainable matrix must receive a gradient when it should, or training is silently wrong.

use candle_core::Tensor;
use monteclora_adapters::linalg::on_cpu;
use rayon::prelude::*;

use super::state::{AdapterState, SiteGradient};
use super::{Error, Result};

/// Refuses gradients that are missing: B's at the first step, A's from the second on (B starts at zero, which hides A's at
/// the first).
///
/// # Errors
/// [`Error::Audit`] with every site whose gradient is zero.
pub fn first_steps(
    state: &AdapterState,
    gradients: &[SiteGradient],
    step: u64,
    train_a: bool,
) -> Result<()> {
    let mut silent = Vec::new();
    for (site, gradient) in state.sites.iter().zip(gradients) {
        if step == 0 && is_zero(&gradient.b)? {
            silent.push(format!("{}.lora_B", site.name));
        }
        if step > 0 && train_a && is_zero(&gradient.a)? {
            silent.push(format!("{}.lora_A", site.name));
        }
    }
    if silent.is_empty() {
        return Ok(());
    }
    Err(Error::Audit { step, silent })
}

/// Names every site whose gradient is not finite.
pub fn non_finite_sites(state: &AdapterState, gradients: &[SiteGradient]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (site, gradient) in state.sites.iter().zip(gradients) {
        let spread = gradient.spread.as_ref().is_some_and(|s| {
            s.log_std
                .iter()
                .chain(&s.log_concentration)
                .any(|g| !g.is_finite())
        });
        if spread || !all_finite(&gradient.a)? || !all_finite(&gradient.b)? {
            names.push(site.name.clone());
        }
    }
    Ok(names)
}

/// Names every site with a weight that is not finite.
pub fn non_finite_weights(state: &AdapterState) -> Result<Vec<String>> {
    let bad = state
        .sites
        .par_iter()
        .map(|site| {
            let spread = site.spread.as_ref().is_some_and(|s| {
                s.log_std
                    .iter()
                    .chain(&s.log_concentration)
                    .any(|value| !value.is_finite())
            });
            Ok(spread || !all_finite(&site.a)? || !all_finite(&site.b)?)
        })
        .collect::<Result<Vec<bool>>>()?;
    let names = state.sites.iter().zip(bad);
    Ok(names
        .filter(|(_, bad)| *bad)
        .map(|(site, _)| site.name.clone())
        .collect())
}

/// The three sites with the largest weights, for a loss that is not finite while every weight is.
pub fn largest_weights(state: &AdapterState) -> Result<Vec<String>> {
    let mut sizes = state
        .sites
        .iter()
        .map(|site| {
            let size = |t: &Tensor| -> Result<f32> {
                Ok(t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
            };
            Ok((size(&site.a)?.max(size(&site.b)?), &site.name))
        })
        .collect::<Result<Vec<_>>>()?;
    sizes.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(sizes
        .into_iter()
        .take(3)
        .map(|(size, name)| format!("{name} (largest weight {size:.1e})"))
        .collect())
}

fn all_finite(tensor: &Tensor) -> Result<bool> {
    let fast = on_cpu([tensor], |[values]| values.iter().all(|v| v.is_finite()))?;
    match fast {
        Some(finite) => Ok(finite),
        // An infinite or missing value makes this product NaN.
        None => Ok(tensor
            .zeros_like()?
            .mul(tensor)?
            .sum_all()?
            .to_scalar::<f32>()?
            == 0.0),
    }
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.abs()?.sum_all()?.to_scalar::<f32>()? == 0.0)
}
