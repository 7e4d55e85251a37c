//! The one error type of this crate.

use monteclora_converters::Problem;

/// What can go wrong in the method's mathematics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or vector has another shape than the posterior asks for.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The quantity that was looked at.
        what: String,
        /// The shape that was needed.
        expected: Vec<usize>,
        /// The shape that was given.
        found: Vec<usize>,
    },
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// What a user can mend, or reading or writing an adapter failed.
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

/// Compares shapes and names the offender.
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
