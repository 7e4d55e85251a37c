//! The gradient audit: every trainable parameter must receive a gradient when it should, or training is silently wrong.

use monteclora_adapters::Result;
use monteclora_adapters::methods::{Storage, Value};
use monteclora_converters::Problem;
use rayon::prelude::*;

use super::list;
use super::state::AdapterState;

/// Refuses gradients that are missing at `step`, the first or the second.
///
/// # Errors
/// With every parameter whose gradient is zero where it must not be.
pub fn first_steps(state: &AdapterState, gradients: &[Vec<Value>], step: u64) -> Result<()> {
    let mut silent = Vec::new();
    for (owner, gradients) in state.owners.iter().zip(gradients) {
        for (parameter, gradient) in owner.parameters.iter().zip(gradients) {
            if parameter.reached == Some(step) && gradient.largest()? == 0.0 {
                silent.push(format!("{}.{}", owner.name, parameter.name));
            }
        }
    }
    if silent.is_empty() {
        return Ok(());
    }
    let at = format!("step {}", step + 1);
    let message = format!("no gradient reaches {}", list(&silent));
    Err(Problem::new("no-gradient", at, message, "").exit(5).into())
}

/// Names every owner of `values` with one that is not finite.
pub fn non_finite<'a>(
    state: &AdapterState,
    values: impl Fn(usize) -> &'a [Value] + Sync,
) -> Result<Vec<String>> {
    let bad = (0..state.owners.len())
        .into_par_iter()
        .map(|idx| {
            for value in values(idx) {
                if !value.is_finite()? {
                    return Ok(true);
                }
            }
            Ok(false)
        })
        .collect::<Result<Vec<bool>>>()?;
    let owners = state.owners.iter().zip(bad);
    Ok(owners
        .filter(|(_, bad)| *bad)
        .map(|(owner, _)| owner.name.clone())
        .collect())
}

/// The three owners with the largest weights, for a loss that is not finite while every weight is.
pub fn largest_weights(state: &AdapterState) -> Result<Vec<String>> {
    let mut sizes = Vec::with_capacity(state.owners.len());
    for owner in &state.owners {
        let mut size = 0f64;
        for (parameter, value) in owner.parameters.iter().zip(&owner.values) {
            if parameter.storage == Storage::Tensor {
                size = size.max(value.largest()?);
            }
        }
        sizes.push((size, &owner.name));
    }
    sizes.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(sizes
        .into_iter()
        .take(3)
        .map(|(size, name)| format!("{name} (largest weight {size:.1e})"))
        .collect())
}
