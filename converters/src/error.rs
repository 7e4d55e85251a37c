//! The one error type of this crate, and the exit code of any error.

use std::io;
use std::path::{Path, PathBuf};

use crate::problem::{Problem, Problems};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong when adapters and models are read, checked and written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// One thing that stops the work.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// A refusal, with every offender.
    #[error(transparent)]
    Problems(#[from] Problems),
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
}

impl Error {
    /// Stable machine-readable name: that of the problem, or of the first of several; `io` if the system refused.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Problem(problem) => problem.code,
            Self::Problems(problems) => problems.list.first().map_or("", |problem| problem.code),
            Self::Io { .. } => "io",
        }
    }

    /// Whether the cause is a path that does not exist.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Problem(problem) => problem.code == "not-found",
            Self::Problems(_) => false,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
        }
    }

    /// The problems behind a refusal, if this is one.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Problems(problems) => &problems.list,
            _ => &[],
        }
    }

    /// The system refused to `action` (read, write, ...) `path`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// A file whose structure is wrong; exit code 4.
    pub fn malformed(path: &Path, message: impl Into<String>) -> Self {
        Problem::new("malformed", quoted(path), message, "").into()
    }

    /// A file that is not the JSON it should be; exit code 4.
    pub fn json(path: &Path, source: &serde_json::Error) -> Self {
        let message = format!("{} is not valid JSON: {source}", quoted(path));
        Problem::sentence("json", message).into()
    }

    /// A file or directory that should be there is not; exit code 2.
    pub fn not_found(path: &Path, message: impl Into<String>) -> Self {
        let problem = Problem::new("not-found", quoted(path), message, "");
        problem.exit(2).into()
    }

    /// A destination that exists and may not be replaced; exit code 2.
    pub fn exists(path: &Path, fix: &str) -> Self {
        let message = format!("{} exists and is not empty; {fix}", quoted(path));
        Problem::sentence("exists", message).exit(2).into()
    }

    /// A quantised base, into which nothing can be merged exactly, and what to do; exit code 4.
    pub fn quantised(base: &Path, method: &str, fix: &str) -> Self {
        let message = format!(
            "the base {} is quantised ({method}): an update cannot be merged into quantised weights; {fix}",
            quoted(base)
        );
        Problem::sentence("quantised-base", message).into()
    }

    /// A setting with a value that cannot be used; exit code 2.
    pub fn setting(key: impl Into<String>, message: impl Into<String>) -> Self {
        Problem::new("setting", key, message, "").exit(2).into()
    }

    /// A tensor whose values cannot be used; exit code 4.
    pub fn tensor(tensor: impl Into<String>, message: impl Into<String>) -> Self {
        Problem::new("tensor", tensor, message, "").into()
    }

    /// The file or directory at `path` is not taken, for all of `problems`; exit code 4.
    pub fn refused(path: &Path, problems: Vec<Problem>) -> Self {
        let heading = format!("{} is refused", quoted(path));
        Self::Problems(Problems::under(heading, problems))
    }

    /// Fails with every one of `problems` of the file or directory at `path`, if there are any.
    ///
    /// # Errors
    /// If `problems` is not empty.
    pub fn refuse_any(path: &Path, problems: Vec<Problem>) -> Result<()> {
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Self::refused(path, problems)),
        }
    }
}

fn quoted(path: &Path) -> String {
    format!("`{}`", path.display())
}

/// The exit code of a process that ends with `error`: the first of its chain that knows one gives it, a [`Problem`] its
/// own, the first of several [`Problems`] its own, a path that does not exist 2. If none does, it is 1.
///
/// `other` is asked first at every link of the chain: an enum that holds an error transparently hides it from the chain,
/// and tells here what it holds.
pub fn exit_code(
    error: &(dyn std::error::Error + 'static),
    other: impl Fn(&(dyn std::error::Error + 'static)) -> Option<u8>,
) -> u8 {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain
        .filter_map(|error| other(error).or_else(|| own_code(error)))
        .next()
        .unwrap_or(1)
}

fn own_code(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(error) = error.downcast_ref::<Error>() {
        return match error {
            Error::Problem(problem) => Some(problem.exit),
            Error::Problems(problems) => Some(problems.exit()),
            Error::Io { .. } => None,
        };
    }
    if let Some(problem) = error.downcast_ref::<Problem>() {
        return Some(problem.exit);
    }
    if let Some(problems) = error.downcast_ref::<Problems>() {
        return Some(problems.exit());
    }
    let error = error.downcast_ref::<io::Error>()?;
    (error.kind() == io::ErrorKind::NotFound).then_some(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_chain_that_knows_an_exit_code_gives_it() {
        #[derive(Debug, thiserror::Error)]
        #[error("outside")]
        struct Outside(#[source] Error);
        let exit_code = |error: &(dyn std::error::Error + 'static)| exit_code(error, |_| None);

        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let path = Path::new("x");
        for (error, expected) in [
            (Error::io("read", path)(missing()), 2),
            (Error::io("read", path)(io::Error::other("full")), 1),
            (Error::not_found(path, "gone"), 2),
            (Error::setting("r", "0"), 2),
            (Error::exists(path, "choose another"), 2),
            (Error::malformed(path, "torn"), 4),
            (Error::from(Problem::sentence("x", "y").exit(5)), 5),
        ] {
            assert_eq!(exit_code(&error), expected, "{error}");
            assert_eq!(exit_code(&Outside(error)), expected);
        }
        assert_eq!(exit_code(&missing()), 2);
        assert_eq!(exit_code(&Problem::usage("no")), 2);
        let refused = Error::refuse_any(path, vec![Problem::new("dora", "use_dora", "", "")]);
        assert_eq!(exit_code(&refused.expect_err("one")), 4);
    }

    #[test]
    fn errors_name_the_path_and_the_condition() {
        let path = Path::new("a/b");
        assert_eq!(Error::not_found(path, "gone").to_string(), "`a/b`: gone");
        assert_eq!(
            Error::exists(path, "choose another directory").to_string(),
            "`a/b` exists and is not empty; choose another directory"
        );
        let source = serde_json::from_str::<u8>("x").expect_err("no number");
        let error = Error::json(path, &source);
        assert!(
            error
                .to_string()
                .starts_with("`a/b` is not valid JSON: expected value")
        );
        assert_eq!((error.code(), error.is_not_found()), ("json", false));
    }
}
