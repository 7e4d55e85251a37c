//! The embedding of tokens. The table is frozen, so there is no backward pass.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_adapters::weights::Weight;
use monteclora_converters::Problem;

use monteclora_adapters::Result;

/// The table of vectors, `[vocabulary, hidden]`, and their factor.
#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) table: Arc<dyn Weight>,
    pub(crate) scale: f32,
}

impl Embedding {
    /// The vectors of `tokens`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// Returns an error if a token is outside the vocabulary.
    pub(crate) fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let vocab_size = self.table.dims()?.0;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            let message = format!(
                "token id {token} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?"
            );
            return Err(Problem::sentence("token", message).into());
        }
        let vectors = self.table.gather(tokens)?;
        match self.scale == 1.0 {
            true => Ok(vectors),
            false => Ok((vectors * f64::from(self.scale))?),
        }
    }
}
