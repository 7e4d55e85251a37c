//! Models split over several processes: mistral.rs 0.8.1 gives its workers neither a second model nor the hooks of sampling steps.

use mistralrs_core::distributed;
use monteclora_converters::MISTRALRS;

use crate::error::{Error, Result};
use crate::server::api_error::ApiError;

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

/// Refuses what only a hook into sampling steps does, where `in_step`; of each key, whether it asks for that.
pub(crate) fn refuse_hooks(in_step: bool, keys: &[(&str, bool)]) -> Result<(), ApiError> {
    let Some((key, _)) = keys.iter().find(|(_, is_asked)| in_step && *is_asked) else {
        return Ok(());
    };
    let message = format!("`{key}` is not supported where a model is split over several processes");
    Err(ApiError::invalid(key, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_processes_would_not_do_is_refused() {
        let keys = |bias, seed| [("logit_bias", bias), ("seed", seed)];
        refuse_hooks(true, &keys(false, false)).expect("nothing to refuse");
        refuse_hooks(false, &keys(true, true)).expect("one process");
        for (bias, seed, key) in [(false, true, "seed"), (true, false, "logit_bias")] {
            let error = refuse_hooks(true, &keys(bias, seed)).expect_err("refused");
            assert_eq!(error.body()["error"]["param"], key);
        }
    }
}
