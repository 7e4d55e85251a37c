//! The one error type of this crate.

use monteclora_converters::Problem;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or vector does not have the expected shape.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// What has the shape.
        what: String,
        /// The expected shape.
        expected: Vec<usize>,
        /// The shape that was found.
        found: Vec<usize>,
    },
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A problem that the user can fix, or a failure to read or write an adapter.
    #[error(transparent)]
    Format(#[from] monteclora_converters::Error),
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::Format(problem.into())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Returns [`Error::Shape`] with the name `what` if the shapes differ.
pub(crate) fn expect_shape(what: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape {
        what: what.to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    })
}
