//! Models split over several processes: mistral.rs 0.8.1 gives its workers neither a second model nor the hooks of sampling steps.

use std::collections::HashMap;

use mistralrs_core::distributed;
use monteclora_converters::MISTRALRS;

use crate::error::{Error, Result};
use crate::server::api_error::ApiError;
use crate::server::seeded::SeededDraw;

/// Whether this process only computes for another one that mistral.rs started it from.
///
/// Such a process never returns from loading its model, and must not take the address of the first.
pub(crate) fn is_worker() -> bool {
    distributed::is_daemon()
}

/// Whether several processes sample the tokens of one model, each on its own.
///
/// Workers get a request as JSON, without the hooks of its sampling steps, and draw from generators of one seed. Whatever a hook
/// changes in the first process alone puts them out of step: they then wait for each other, or compute on other tokens.
pub(crate) fn samples_in_step() -> bool {
    distributed::use_nccl() || distributed::use_ring()
}

/// Refuses a second model: workers load the first one and serve it for ever, so that loading another waits for them in vain.
pub(crate) fn allow_another_model() -> Result<()> {
    if samples_in_step() {
        let message = format!(
            "{MISTRALRS} runs one model in each set of processes under NCCL or a ring; merge the adapter with \
             `monteclora merge` and serve the result alone, or set MISTRALRS_NO_NCCL=1"
        );
        return Err(Error::setting("models", message));
    }
    Ok(())
}

/// Refuses what only a hook into sampling steps does, where `in_step`.
pub(crate) fn refuse_hooks(
    in_step: bool,
    bias: &HashMap<u32, f32>,
    seeded: Option<&SeededDraw>,
) -> Result<(), ApiError> {
    let key = match (bias.is_empty(), seeded) {
        (false, _) => "logit_bias",
        (true, Some(_)) => "seed",
        (true, None) => return Ok(()),
    };
    if !in_step {
        return Ok(());
    }
    let message = format!("`{key}` is not supported where a model is split over several processes");
    Err(ApiError::invalid(key, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_processes_would_not_do_is_refused() {
        let (none, bias) = (HashMap::new(), HashMap::from([(1, 1.0)]));
        let draw = SeededDraw {
            seed: 1,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
        };
        refuse_hooks(true, &none, None).expect("nothing to refuse");
        refuse_hooks(false, &bias, Some(&draw)).expect("one process");
        for (bias, draw, key) in [(&none, Some(&draw), "seed"), (&bias, None, "logit_bias")] {
            let error = refuse_hooks(true, bias, draw).expect_err("refused");
            assert_eq!(error.body()["error"]["param"], key);
        }
    }
}
