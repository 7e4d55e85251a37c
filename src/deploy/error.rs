//! Errors of commands that talk to a server. Exit code 2 means usage and configuration, 4 the adapter, 1 the server or
//! the network.

use std::path::Path;

use monteclora_converters::Problem;

pub use monteclora_converters::Error;

/// The server's answer does not follow the protocol, or there is none.
pub(super) fn protocol(endpoint: &str, problem: &str) -> Error {
    Problem::new("protocol", endpoint, problem, "")
        .exit(1)
        .into()
}

/// An answer fails the check; `outcome` says what is served now.
pub(super) fn failed(stage: &str, reason: String, outcome: String) -> Error {
    Problem::new("check", stage, reason, outcome).exit(1).into()
}

/// There is no generation to go back to.
pub(super) fn nothing_to_restore(message: String) -> Error {
    Problem::sentence("nothing-to-restore", message)
        .exit(2)
        .into()
}

/// A release directory or its history cannot be used.
pub(super) fn release(path: &Path, problem: impl Into<String>) -> Error {
    let at = format!("`{}`", path.display());
    Problem::new("release", at, problem, "").exit(2).into()
}
