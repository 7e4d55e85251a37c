//! The gradient audit: it checks that every trainable parameter gets a gradient. Otherwise training would be wrong
//! without any error.

use monteclora_adapters::Result;
use monteclora_adapters::device::each;
use monteclora_adapters::methods::{Storage, Value};
use monteclora_adapters::numbers::read_groups;
use monteclora_converters::{Problem, files};

use super::list;
use super::state::AdapterState;

/// Checks that no gradient is missing at `step`, which is 0 or 1.
///
/// # Errors
/// Returns an error that names every parameter whose gradient must not be zero at this step but is zero.
pub fn first_steps(state: &AdapterState, gradients: &[Vec<Value>], step: u64) -> Result<()> {
    let (mut names, mut numbers) = (Vec::new(), Vec::new());
    for (owner, gradients) in state.owners.iter().zip(gradients) {
        for (parameter, gradient) in owner.parameters.iter().zip(gradients) {
            if parameter.reached == Some(step) {
                names.push(format!("{}.{}", owner.name, parameter.name));
                numbers.push(vec![gradient.largest()?]);
            }
        }
    }
    let largest = read_groups(numbers)?;
    let silent = names.into_iter().zip(largest);
    let silent: Vec<String> = silent
        .filter(|(_, largest)| largest.iter().all(|number| *number == 0.0))
        .map(|(name, _)| name)
        .collect();
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
    let numbers = each(&state.device(), 0..state.owners.len(), |idx| {
        values(idx).iter().map(Value::finite).collect()
    })?;
    let owners = state.owners.iter().zip(read_groups(numbers)?);
    Ok(owners
        .filter(|(_, numbers)| !numbers.iter().all(|number| number.is_finite()))
        .map(|(owner, _)| owner.name.clone())
        .collect())
}

/// The three owners with the largest weights. The error for a loss that is not finite names them.
pub fn largest_weights(state: &AdapterState) -> Result<Vec<String>> {
    let numbers = state.owners.iter().map(|owner| {
        let values = owner.parameters.iter().zip(&owner.values);
        let tensors = values.filter(|(parameter, _)| parameter.storage == Storage::Tensor);
        tensors.map(|(_, value)| value.largest()).collect()
    });
    let numbers = read_groups(numbers.collect::<Result<_>>()?)?;
    let sizes = numbers.into_iter().zip(&state.owners);
    let mut sizes: Vec<(f64, &String)> = sizes
        .map(|(sizes, owner)| (sizes.into_iter().fold(0.0, f64::max), &owner.name))
        .collect();
    sizes.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(sizes
        .into_iter()
        .take(3)
        .map(|(size, name)| format!("{name} (largest weight {size:.1e})"))
        .collect())
}
