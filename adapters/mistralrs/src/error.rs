//! The one error type of this crate and the process exit code that each kind stands for.

use std::io;
use std::path::{Path, PathBuf};

use monteclora_converters::{Error as FormatError, Problem, Problems, exit_code};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong when an adapter is prepared for mistral.rs, loaded and served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The adapter or the base model's files are missing, malformed or do not fit each other.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A file or directory that should be there is not.
    #[error("`{}`: {message}", .path.display())]
    NotFound {
        /// The path looked for.
        path: PathBuf,
        /// What was expected there, and the remedy.
        message: String,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`: {source}", .path.display())]
    Io {
        /// What was being done: "read", "write", ...
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A base model that mistral.rs 0.8.1 would refuse, or answer wrongly with; every reason is listed.
    #[error(transparent)]
    Unsupported(Problems),
    /// An adapter whose update is zero at every site.
    #[error(
        "the adapter `{}` changes nothing: B A = 0 at every site; train it first, or start the server with --force if that is meant",
        .path.display()
    )]
    ZeroEffect {
        /// The adapter.
        path: PathBuf,
    },
    /// A setting with a value that cannot be used.
    #[error("{key}: {message}")]
    Setting {
        /// The configuration key or builder setting.
        key: String,
        /// What is wrong with its value, and the remedy.
        message: String,
    },
    /// A configuration file that cannot be understood.
    #[error("`{}`: {message}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Position, key and remedy, one problem a line.
        message: String,
    },
    /// mistral.rs failed to load a model whose files passed every check of ours.
    #[error("mistral.rs could not load `{name}`: {message}")]
    Load {
        /// The public name of the model.
        name: String,
        /// The reason mistral.rs gave.
        message: String,
    },
    /// Files that were written to while they were checked and loaded.
    #[error(
        "the files of `{name}` changed from {checked} to {loaded} while it was loaded; load it again when nothing writes them"
    )]
    FilesChanged {
        /// The public name of the model.
        name: String,
        /// Generation that was checked.
        checked: String,
        /// Generation that was loaded.
        loaded: String,
    },
    /// An engine refused a request or stopped.
    #[error("mistral.rs: {0}")]
    Engine(String),
    /// A name that is already served.
    #[error("the name `{0}` is already served; unload it first, or load in place")]
    NameTaken(String),
    /// A name that is not served.
    #[error("the model `{0}` does not exist")]
    UnknownName(String),
    /// A compare-and-swap whose expectation no longer holds.
    #[error("`{name}` is at generation {found}, not {expected}")]
    GenerationMoved {
        /// The public name.
        name: String,
        /// The generation the caller expected.
        expected: String,
        /// The generation being served.
        found: String,
    },
    /// What is wrong with one of several models or adapters.
    #[error("`{name}`: {source}")]
    Of {
        /// Its public name.
        name: String,
        /// What is wrong.
        source: Box<Error>,
    },
    /// Several things at once.
    #[error("{}", join(.0))]
    Several(Vec<Error>),
    /// A load that would take more memory than the configuration allows.
    #[error(
        "`{name}` needs about {} MiB for its weights; {} MiB are in use and runtime.max_memory_mb allows {} MiB; unload an adapter first, or allow more",
        .needed >> 20, .in_use >> 20, .budget >> 20
    )]
    OverBudget {
        /// What was to be loaded.
        name: String,
        /// Estimated bytes of its weights.
        needed: u64,
        /// Bytes of what is loaded already.
        in_use: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// A stop that did not wait for requests in flight.
    #[error("stopped by a second signal while requests were in flight")]
    Interrupted,
    /// The server could not listen on its address.
    #[error("cannot listen on {address}: {message}")]
    Listen {
        /// The address asked for.
        address: String,
        /// Why not, and the remedy.
        message: String,
    },
}

impl Error {
    /// The exit code that a command line should end with.
    ///
    /// 2 for configuration, usage and missing paths, 4 for malformed or incompatible adapters and models, 1 for the rest.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Format(error) => exit_code(error, |_| None).into(),
            Self::NotFound { .. }
            | Self::Setting { .. }
            | Self::Config { .. }
            | Self::NameTaken(_)
            | Self::UnknownName(_)
            | Self::GenerationMoved { .. }
            | Self::OverBudget { .. }
            | Self::Listen { .. } => 2,
            Self::Unsupported(_)
            | Self::ZeroEffect { .. }
            | Self::Load { .. }
            | Self::FilesChanged { .. } => 4,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => 2,
            Self::Io { .. } | Self::Engine(_) => 1,
            Self::Interrupted => 130,
            Self::Of { source, .. } => source.exit_code(),
            Self::Several(errors) => errors.first().map_or(1, Self::exit_code),
        }
    }

    /// Success if there is no error, else all of them as one.
    pub(crate) fn all(mut errors: Vec<Self>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }

    /// The problems behind a refusal, if this is one.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Format(error) => error.problems(),
            Self::Unsupported(problems) => &problems.list,
            Self::Of { source, .. } => source.problems(),
            _ => &[],
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Setting {
            key: key.into(),
            message: message.into(),
        }
    }

    pub(crate) fn not_found(path: &Path, message: impl Into<String>) -> Self {
        Self::NotFound {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    pub(crate) fn unsupported(base: &Path, problems: Vec<Problem>) -> Self {
        Self::Unsupported(Problems {
            heading: Some(format!(
                "mistral.rs 0.8.1 cannot serve `{}` correctly",
                base.display()
            )),
            list: problems,
        })
    }
}

fn join(errors: &[Error]) -> String {
    let lines: Vec<String> = errors.iter().map(Error::to_string).collect();
    format!("{} problems:\n- {}", errors.len(), lines.join("\n- "))
}
