//! Errors of data, templates and tokenizers: problems of a row, and of a whole file.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use monteclora_converters::{Error, Problem};
use serde::Serialize;

/// Code of a problem of a row.
const ROW: &str = "row";
/// Code of a conversation that the chat template refuses.
pub(super) const RENDER: &str = "render";

/// A problem of one field of a row, before the file and line are known; exit code 3.
pub fn field_problem(
    field: impl Into<String>,
    problem: impl Into<String>,
    fix: impl Into<String>,
) -> Problem {
    Problem::new(ROW, field, problem, fix).exit(3)
}

/// The problem of the row, if the row caused this encoding error.
///
/// # Errors
/// Returns `error` unchanged if the model or the tokenizer is at fault.
pub fn fault_of_row(error: Error) -> Result<Problem, Error> {
    match error {
        Error::Problem(problem) if problem.code == ROW => Ok(problem),
        Error::Problem(problem) if problem.code == RENDER => Ok(field_problem(
            "messages",
            problem.message,
            "correct the row, or give another template with --chat-template",
        )),
        other => Err(other),
    }
}

/// One problem of one row of a data file.
///
/// Displayed as `file:line: field: problem; fix`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowProblem {
    /// The data file, as the user wrote it.
    pub path: PathBuf,
    /// Line in the file, from 1.
    pub line: usize,
    /// The offending field, such as `messages[2].role`, or `row`.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// How to fix it.
    pub fix: String,
}

impl RowProblem {
    /// A problem of the row that begins at `line` of `path`.
    pub fn new(path: &Path, line: usize, problem: Problem) -> Self {
        Self {
            path: path.to_owned(),
            line,
            field: problem.at,
            problem: problem.message,
            fix: problem.fix,
        }
    }
}

impl fmt::Display for RowProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Problem::from(self.clone()).fmt(f)
    }
}

impl From<RowProblem> for Problem {
    fn from(found: RowProblem) -> Self {
        let at = format!("{}:{}: {}", found.path.display(), found.line, found.field);
        field_problem(at, found.problem, found.fix)
    }
}

/// An error for data that cannot be used, in one sentence; exit code 3.
pub(super) fn bad_data(code: &'static str, message: String) -> Error {
    Problem::sentence(code, message).exit(3).into()
}

/// The error of a data file that is missing or cannot be read.
pub(super) fn unreadable(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| {
        let path = path.display();
        let message = format!("cannot read `{path}`; give the path of a data file: {source}");
        bad_data("read", message)
    }
}

/// The error of a compressed file that cannot be unpacked.
pub(super) fn not_unpacked(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| {
        let path = path.display();
        bad_data(
            "unpack",
            format!(
                "`{path}` cannot be unpacked into a temporary file; is it whole, and is there room in TMPDIR?: {source}"
            ),
        )
    }
}

/// The error of a data file that changed after it was checked.
pub(super) fn changed(path: &Path, line: usize) -> Error {
    let at = format!("{}:{line}", path.display());
    Problem::new(
        "changed",
        at,
        "the file changed after it was checked",
        "start again",
    )
    .exit(3)
    .into()
}
