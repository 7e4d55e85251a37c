//! The gradient audit: it checks that every trainable parameter gets a gradient. Otherwise training would be wrong
//! without any error.

use monteclora_adapters::Result;
use monteclora_adapters::device::each;
use monteclora_adapters::methods::{Storage, Value};
use monteclora_converters::{Problem, files};

use super::list;
use super::state::AdapterState;

/// Checks that no gradient is missing at `step`, which is 0 or 1.
///
/// # Errors
/// Returns an error that names every parameter whose gradient must not be zero at this step but is zero.
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

/// SHA-256 of all values, in hexadecimal.
pub fn sha256(state: &AdapterState) -> Result<String> {
    let mut bytes = Vec::new();
    for value in state.owners.iter().flat_map(|owner| &owner.values) {
        bytes.extend_from_slice(&value.to_format()?.bytes());
    }
    Ok(files::sha256(&bytes))
}

/// The names of all owners with a value in `values` that is not finite.
pub fn non_finite<'a>(
    state: &AdapterState,
    values: impl Fn(usize) -> &'a [Value] + Sync,
) -> Result<Vec<String>> {
    let bad = each(&state.device(), 0..state.owners.len(), |idx| {
        for value in values(idx) {
            if !value.is_finite()? {
                return Ok(true);
            }
        }
        Ok(false)
    })?;
    let owners = state.owners.iter().zip(bad);
    Ok(owners
        .filter(|(_, bad)| *bad)
        .map(|(owner, _)| owner.name.clone())
        .collect())
}

/// The three owners with the largest weights. The error for a loss that is not finite names them.
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
