//! Models split over several processes: mistral.rs 0.8.1 gives its workers neither a second model nor the hooks into
//! sampling steps.

use mistralrs_core::distributed;
use monteclora_converters::MISTRALRS;

use crate::error::{Error, Result};
use crate::server::api_error::ApiError;

/// Whether this process is a worker that mistral.rs started from another process.
///
/// A worker never returns from loading its model, and must not bind the address of the first process.
pub(crate) fn is_worker() -> bool {
    distributed::is_daemon()
}

/// Whether several processes sample the tokens of one model, each on its own.
///
/// Workers get a request as JSON, without the hooks into its sampling steps, and draw from generators with the same
/// seed. A change that a hook makes only in the first process breaks their agreement: they then wait for each other, or
/// compute on other tokens.
pub(crate) fn samples_in_step() -> bool {
    distributed::use_nccl() || distributed::use_ring()
}

/// Refuses a second model: workers load the first model and serve it forever, so loading another would wait for them
/// forever.
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

/// With `in_step`, refuses keys that need a hook into sampling steps. Each entry of `keys` says whether the request
/// needs the hook.
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
