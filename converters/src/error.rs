//! The one error type of this crate, and the problem records that reports are made of.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// How many problems a message lists before it only counts the rest.
const LISTED: usize = 20;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One thing that is wrong with an adapter or a model, with its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Stable machine-readable name, such as `dora` or `shape`.
    pub code: &'static str,
    /// File, configuration key, tensor or module concerned.
    #[serde(rename = "where")]
    pub location: String,
    /// What is wrong.
    pub message: String,
    /// What the user can do about it.
    pub fix: String,
}

impl Problem {
    /// A problem at `location`.
    pub fn new(
        code: &'static str,
        location: impl Into<String>,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            code,
            location: location.into(),
            message: message.into(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.message)?;
        if !self.fix.is_empty() {
            write!(f, "; {}", self.fix)?;
        }
        Ok(())
    }
}

/// Problems one a line; the first 20 are spelt out and the rest counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.0.iter().take(LISTED) {
            write!(f, "\n  {problem}")?;
        }
        if self.0.len() > LISTED {
            write!(f, "\n  and {} more", self.0.len() - LISTED)?;
        }
        Ok(())
    }
}

/// One entry of `target_modules` that names nothing in the base model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnknownTarget {
    /// The entry as written.
    pub entry: String,
    /// Nearest real module names and the number of sites each has, best first.
    pub nearest: Vec<(String, usize)>,
}

/// Unknown targets one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownTargets(pub Vec<UnknownTarget>);

impl fmt::Display for UnknownTargets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for unknown in self.0.iter().take(LISTED) {
            write!(f, "\n  `{}`", unknown.entry)?;
            for (idx, (name, n_sites)) in unknown.nearest.iter().enumerate() {
                let lead = if idx == 0 { "; nearest:" } else { "," };
                let plural = if *n_sites == 1 { "site" } else { "sites" };
                write!(f, "{lead} `{name}` ({n_sites} {plural})")?;
            }
        }
        if self.0.len() > LISTED {
            write!(f, "\n  and {} more", self.0.len() - LISTED)?;
        }
        Ok(())
    }
}

/// What can go wrong when adapters and models are read, checked and written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory that should be there is not.
    #[error("`{}`: {message}", .path.display())]
    NotFound {
        /// The path looked for.
        path: PathBuf,
        /// What was expected there, and the remedy.
        message: String,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`", .path.display())]
    Io {
        /// What was being done: "read", "write", ...
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Text that is not the JSON it should be.
    #[error("`{}` is not valid JSON", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Position and reason.
        #[source]
        source: serde_json::Error,
    },
    /// A container (safetensors, GGUF, index) whose structure is wrong.
    #[error("`{}`: {message}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and where, naming the tensor if there is one.
        message: String,
    },
    /// An adapter that is not understood; every offender is listed.
    #[error("`{}` is refused:{problems}", .path.display())]
    Refused {
        /// The adapter.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Problems,
    },
    /// An adapter that does not fit the base model; every offender is listed.
    #[error("the adapter does not fit the base `{}`:{problems}", .base.display())]
    Incompatible {
        /// The base model's directory.
        base: PathBuf,
        /// All that does not fit.
        problems: Problems,
    },
    /// Entries of `target_modules` that match no linear module of the base.
    #[error("target_modules names modules that the base does not have:{0}")]
    UnknownTarget(UnknownTargets),
    /// A setting with a value that cannot be used.
    #[error("{key}: {message}")]
    Setting {
        /// The configuration key.
        key: String,
        /// What is wrong with its value.
        message: String,
    },
    /// A tensor whose values cannot be used.
    #[error("{tensor}: {message}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// A quantised base, into which nothing can be merged exactly.
    #[error(
        "the base `{}` is quantised ({method}): an update cannot be merged into quantised weights; use the full-precision model",
        .base.display()
    )]
    Quantised {
        /// The base model's directory.
        base: PathBuf,
        /// The quantisation found.
        method: String,
    },
    /// The destination exists and may not be replaced.
    #[error("`{}` exists and is not empty; choose another directory or allow overwriting", .path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
}

impl Error {
    /// Whether the cause is a path that does not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::NotFound { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// The problems behind a refusal, if this is one.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Refused { problems, .. } | Self::Incompatible { problems, .. } => &problems.0,
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

    pub(crate) fn malformed(path: &Path, message: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    pub(crate) fn not_found(path: &Path, message: impl Into<String>) -> Self {
        Self::NotFound {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    pub(crate) fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Setting {
            key: key.into(),
            message: message.into(),
        }
    }

    pub(crate) fn tensor(tensor: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tensor {
            tensor: tensor.into(),
            message: message.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_after_twenty_and_counted() {
        let problems = (0..23)
            .map(|idx| Problem::new("x", format!("t{idx}"), "bad", ""))
            .collect();
        let text = Problems(problems).to_string();
        assert!(text.contains("t19: bad") && !text.contains("t20: bad"));
        assert!(text.ends_with("and 3 more"));
    }

    #[test]
    fn a_problem_serialises_as_code_where_message_fix() {
        let json = serde_json::to_value(Problem::new("c", "w", "m", "f")).expect("plain strings");
        assert_eq!(
            json,
            serde_json::json!({"code": "c", "where": "w", "message": "m", "fix": "f"})
        );
    }
}
