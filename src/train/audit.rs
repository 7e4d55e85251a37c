//! The gradient audit: every trainable matrix must receive a gradient when it should, or training is silently wrong.

use candle_core::Tensor;

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
        if spread || !largest(&gradient.a)?.is_finite() || !largest(&gradient.b)?.is_finite() {
            names.push(site.name.clone());
        }
    }
    Ok(names)
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(largest(tensor)? == 0.0)
}

/// Sum of absolute values: zero only if all are, and not finite if any is not.
fn largest(tensor: &Tensor) -> Result<f32> {
    Ok(tensor.abs()?.sum_all()?.to_scalar::<f32>()?)
}
