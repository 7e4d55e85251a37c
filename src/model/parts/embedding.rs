//! Tokens as vectors. The table is frozen, so that nothing goes back through it.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_adapters::weights::Weight;

use crate::model::{Error, Result};

/// The table of vectors, `[vocabulary, hidden]`.
#[derive(Debug)]
pub(crate) struct Embedding(pub(crate) Arc<dyn Weight>);

impl Embedding {
    /// The vectors of `tokens`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Token`] for one outside of the vocabulary.
    pub(crate) fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let vocab_size = self.0.dims()?.0;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            return Err(Error::Token {
                token: *token,
                vocab_size,
            });
        }
        Ok(self.0.gather(tokens)?)
    }
}
