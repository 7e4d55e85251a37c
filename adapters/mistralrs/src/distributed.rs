//! Tensor parallelism is mistral.rs's own; this is what version 0.8.1 allows while it is in use.

use mistralrs_core::distributed;

use crate::error::{Error, Result};

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
        return Err(Error::setting(
            "models",
            "mistral.rs 0.8.1 runs one model in each set of processes under NCCL or a ring; merge the adapter with \
             `monteclora merge` and serve the result alone, or set MISTRALRS_NO_NCCL=1",
        ));
    }
    Ok(())
}
