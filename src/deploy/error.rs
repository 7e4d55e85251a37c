//! What can go wrong between a command line and a server.

use std::path::PathBuf;

/// A failed deployment, rollback or enquiry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address is not one of a server.
    #[error("--server {url}: {problem}")]
    Url {
        /// As given, without what may be a secret.
        url: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// Nobody answers.
    #[error("{url} does not answer: {reason}")]
    Unreachable {
        /// The endpoint.
        url: String,
        /// Why.
        reason: String,
    },
    /// The key is missing, wrong, or not good for administration.
    #[error(
        "{endpoint}: the server wants another key ({message}); give the administrator's with --key-file or MONTECLORA_KEY"
    )]
    Unauthorized {
        /// The endpoint.
        endpoint: String,
        /// The server's words.
        message: String,
    },
    /// The server does not offer what is needed.
    #[error("{endpoint}: there is no such endpoint; {remedy}")]
    NoEndpoint {
        /// The endpoint.
        endpoint: String,
        /// How to get it.
        remedy: &'static str,
    },
    /// The server looked at the adapter and declined.
    #[error("the server refuses the adapter (status {status}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's words, with every problem.
        message: String,
    },
    /// A name that is no adapter's.
    #[error("`{0}` is a base model of the server; give the adapter another --alias")]
    BaseName(String),
    /// Somebody else changed the alias meanwhile.
    #[error("the alias changed while this ran: {0}; look with `monteclora status`, and try again")]
    Conflict(String),
    /// Another answer than the protocol knows.
    #[error("{endpoint}: {problem}")]
    Protocol {
        /// The endpoint.
        endpoint: String,
        /// What came instead.
        problem: String,
    },
    /// An answer that does not pass; nothing, or what is said, was changed.
    #[error("{stage}: {reason}; {outcome}")]
    Check {
        /// Which check.
        stage: &'static str,
        /// What was wrong with the answer.
        reason: String,
        /// What is served now.
        outcome: String,
    },
    /// No generation to go back to.
    #[error("{0}")]
    NothingToRestore(String),
    /// A release directory or its history cannot be used.
    #[error("`{}`: {problem}", .path.display())]
    Release {
        /// The path.
        path: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// A file operation failed.
    #[error("cannot {action} `{}`", .path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The adapter itself is wrong.
    #[error(transparent)]
    Format(#[from] monteclora_converters::Error),
}

impl Error {
    /// Exit code: 2 for usage and configuration, 4 for the adapter, 1 for what the server or the network did.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Url { .. }
            | Self::Unauthorized { .. }
            | Self::NoEndpoint { .. }
            | Self::BaseName(_)
            | Self::NothingToRestore(_)
            | Self::Release { .. } => 2,
            Self::Refused { .. } | Self::Format(_) => 4,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 2,
            _ => 1,
        }
    }

    pub(super) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
