//! Problems of rows, and of the files, templates and tokenizers that they are read with.

use std::{
    fmt::{self, Display},
    path::{Path, PathBuf},
};

use monteclora_converters::Problem;
use serde::Serialize;

pub use monteclora_converters::Error as DataError;

/// One thing wrong with one row of a data file.
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
    /// What to do about it.
    pub fix: String,
}

impl RowProblem {
    pub(crate) fn new(path: &Path, line: usize, problem: Problem) -> Self {
        Self {
            path: path.to_owned(),
            line,
            field: problem.at,
            problem: problem.message,
            fix: problem.fix,
        }
    }
}

impl From<RowProblem> for Problem {
    fn from(row: RowProblem) -> Self {
        let at = format!("{}:{}: {}", row.path.display(), row.line, row.field);
        Self::new("row", at, row.problem, row.fix).exit(3)
    }
}

impl Display for RowProblem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        Problem::from(self.clone()).fmt(formatter)
    }
}

/// What is wrong with a field of a row, before file and line are known.
pub(crate) fn field_problem(
    field: impl Into<String>,
    problem: impl Into<String>,
    fix: impl Into<String>,
) -> Problem {
    Problem::new("row", field, problem, fix).exit(3)
}

/// Data that cannot be used.
pub(super) fn bad_data(code: &'static str, message: impl Into<String>) -> DataError {
    Problem::sentence(code, message).exit(3).into()
}

/// A data file that cannot be read.
pub(super) fn unreadable(path: &Path, reason: impl Display) -> DataError {
    let path = path.display();
    bad_data(
        "read",
        format!("cannot read `{path}`; give the path of a data file: {reason}"),
    )
}

/// A packed file that cannot be unpacked.
pub(super) fn packed(path: &Path, reason: impl Display) -> DataError {
    let path = path.display();
    bad_data(
        "unpack",
        format!(
            "`{path}` cannot be unpacked into a temporary file; is it whole, and is there room in TMPDIR?: {reason}"
        ),
    )
}

/// A row that is not what it was when it was checked.
pub(super) fn changed(path: &Path, line: usize) -> DataError {
    let path = path.display();
    bad_data(
        "changed",
        format!("{path}:{line}: the file changed after it was checked; start again"),
    )
}

/// A malformed file of the model.
pub(super) fn model_file(path: &Path, message: impl Into<String>) -> DataError {
    Problem::new("model", format!("`{}`", path.display()), message, "").into()
}

/// Text or tokens that the tokenizer cannot handle.
pub(super) fn tokenizer_failed(reason: impl Display) -> DataError {
    bad_data("tokenizer", format!("the tokenizer failed: {reason}"))
}
