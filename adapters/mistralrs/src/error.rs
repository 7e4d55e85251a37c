//! The error type of this crate, and the process exit code of each error.

use std::io;
use std::path::{Path, PathBuf};

use monteclora_converters::{Error as FormatError, MISTRALRS, Problem, Problems};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong when an adapter is prepared for mistral.rs, loaded and served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The adapter or the base model's files are missing, malformed or do not fit each other.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// One problem, identified by its [`code`](Error::code).
    #[error(transparent)]
    Problem(#[from] Problem),
    /// mistral.rs would refuse the base model or answer wrongly with it; every reason is listed.
    #[error(transparent)]
    Unsupported(Problems),
    /// The operating system refused an operation.
    #[error("cannot {action} `{}`: {source}", .path.display())]
    Io {
        /// The failed operation: "read", "write", ...
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// An engine refused a request or stopped.
    #[error("mistral.rs: {0}")]
    Engine(String),
    /// One of several models or adapters failed.
    #[error("`{name}`: {problem}")]
    Of {
        /// Public name of the model or adapter.
        name: String,
        /// The problem. It is not a source of the error, since the text contains it already.
        problem: Box<Error>,
    },
    /// Several errors together.
    #[error("{}", join(.0))]
    Several(Vec<Error>),
}

/// Codes that identify problems.
pub(crate) mod code {
    /// A setting with a value that cannot be used.
    pub(crate) const SETTING: &str = "setting";
    /// A file or directory does not exist.
    pub(crate) const NOT_FOUND: &str = "not-found";
    /// A configuration file that cannot be understood.
    pub(crate) const CONFIG: &str = "config";
    /// mistral.rs failed to load a model whose files passed every check of this crate.
    pub(crate) const LOAD: &str = "load";
    /// Files that changed while they were checked and loaded.
    pub(crate) const FILES_CHANGED: &str = "files_changed";
    /// The record of adapters loaded at run time cannot be written.
    pub(crate) const STATE_FILE: &str = "state_file";
    /// A name that is already served.
    pub(crate) const NAME_TAKEN: &str = "name_taken";
    /// A name that is not served.
    pub(crate) const MODEL_NOT_FOUND: &str = "model_not_found";
    /// A compare-and-swap whose expected generation is no longer served.
    pub(crate) const GENERATION_MOVED: &str = "generation_moved";
    /// A load that would take more memory than the configuration allows.
    pub(crate) const OVER_BUDGET: &str = "over_memory_budget";
    /// The server could not listen on its address.
    pub(crate) const LISTEN: &str = "listen";
    /// A stop that did not wait for running requests.
    pub(crate) const INTERRUPTED: &str = "interrupted";
    /// An engine that cannot be started or does not answer.
    pub(crate) const ENGINE_UNAVAILABLE: &str = "engine_unavailable";
    /// An adapter whose update is zero at every site.
    pub(crate) const ZERO_EFFECT: &str = "zero-effect";
}

impl Error {
    /// Stable name of a problem; empty for errors without one.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Problem(problem) => problem.code,
            Self::Format(error) => error.code(),
            _ => "",
        }
    }

    /// The exit code that a command line should return.
    ///
    /// It is 2 for configuration, usage and missing paths, 4 for malformed or incompatible adapters and models, and 1
    /// for the rest.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Format(error) => monteclora_converters::exit_code(error, |_| None),
            Self::Problem(problem) => problem.exit,
            Self::Unsupported(problems) => problems.exit(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => 2,
            Self::Io { .. } | Self::Engine(_) => 1,
            Self::Of { problem, .. } => problem.exit_code(),
            Self::Several(errors) => errors.first().map_or(1, Self::exit_code),
        }
    }

    /// The problems behind a refusal; empty for other errors.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Format(error) => error.problems(),
            Self::Unsupported(problems) => &problems.list,
            Self::Of { problem, .. } => problem.problems(),
            _ => &[],
        }
    }

    /// Makes the error for a setting with a value that cannot be used.
    pub fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        let problem = Problem::new(code::SETTING, key, message, "");
        problem.exit(2).into()
    }

    /// Makes the error for a file or directory that does not exist.
    pub fn not_found(path: &Path, message: impl Into<String>) -> Self {
        Self::at(code::NOT_FOUND, path, message)
    }

    /// Makes the error for a configuration file that cannot be understood.
    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Self::at(code::CONFIG, path, message)
    }

    fn at(code: &'static str, path: &Path, message: impl Into<String>) -> Self {
        let problem = Problem::new(code, format!("`{}`", path.display()), message, "");
        problem.exit(2).into()
    }

    /// Makes the error for a request that cannot be fulfilled now, or for wrong usage. The exit code is 2.
    pub(crate) fn refused(code: &'static str, message: impl Into<String>) -> Self {
        Problem::sentence(code, message).exit(2).into()
    }

    /// Makes the error for an engine that cannot be started, or does not answer, because of `cause`.
    pub(crate) fn engine_unavailable(cause: &str) -> Self {
        let message = format!(
            "no engine for it: {cause}; look at the log, and at what the system lets this process have (memory, `ulimit -u`, \
             a container's limit of pids), then try again"
        );
        let problem = Problem::sentence(code::ENGINE_UNAVAILABLE, message);
        problem.exit(1).into()
    }

    /// Makes the error for a system that starts no more threads.
    pub(crate) fn no_threads(cause: &io::Error) -> Self {
        Self::engine_unavailable(&format!("the system starts no more threads ({cause})"))
    }

    pub(crate) fn unknown_name(name: &str) -> Self {
        let message = format!("the model `{name}` does not exist");
        Self::refused(code::MODEL_NOT_FOUND, message)
    }

    pub(crate) fn unsupported(base: &Path, list: Vec<Problem>) -> Self {
        let heading = format!("{MISTRALRS} cannot serve `{}` correctly", base.display());
        Self::Unsupported(Problems::under(heading, list))
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// Returns success if there is no error, else all errors as one.
    pub(crate) fn all(mut errors: Vec<Self>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

fn join(errors: &[Error]) -> String {
    let lines: Vec<String> = errors.iter().map(Error::to_string).collect();
    format!("{} problems:\n- {}", errors.len(), lines.join("\n- "))
}
