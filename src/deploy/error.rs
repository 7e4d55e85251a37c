//! What can go wrong between a command line and a server. Exit code 2 is for usage and configuration, 4 for the adapter, 1 for
//! what the server or the network did.

use std::path::Path;

use monteclora_converters::Problem;

pub use monteclora_converters::Error;

/// Another answer than the protocol knows, or none.
pub(super) fn protocol(endpoint: &str, problem: &str) -> Error {
    Problem::new("protocol", endpoint, problem, "")
        .exit(1)
        .into()
}

/// An answer that does not pass; `outcome` says what is served now.
pub(super) fn failed(stage: &str, reason: String, outcome: String) -> Error {
    Problem::new("check", stage, reason, outcome).exit(1).into()
}

/// No generation to go back to.
pub(super) fn nothing_to_restore(message: String) -> Error {
    Problem::sentence("nothing-to-restore", message)
        .exit(2)
        .into()
}

/// A release directory or its history that cannot be used.
pub(super) fn release(path: &Path, problem: impl Into<String>) -> Error {
    let at = format!("`{}`", path.display());
    Problem::new("release", at, problem, "").exit(2).into()
}
