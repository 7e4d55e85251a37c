//! The one error type of this crate.

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
    /// A setting is outside its range.
    #[error("{key} = {value}: {need}")]
    Setting {
        /// The setting's name.
        key: &'static str,
        /// Its value as given.
        value: String,
        /// What is accepted.
        need: &'static str,
    },
    /// A draw or a divergence is NaN or infinite.
    #[error("{site}: {what} is not finite; lower the learning rate or sample_scaler")]
    NonFinite {
        /// Module path of the adapted projection.
        site: String,
        /// The quantity.
        what: &'static str,
    },
    /// An adapter has no posterior to sample from.
    #[error("{site}: plain LoRA has no posterior to sample; give a MonteCLoRA adapter")]
    NoPosterior {
        /// Module path of the adapted projection.
        site: String,
    },
    /// A candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Reading or writing an adapter failed.
    #[error(transparent)]
    Format(#[from] monteclora_converters::Error),
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
