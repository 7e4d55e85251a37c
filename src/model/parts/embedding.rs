//! Tokens as vectors. The table is frozen, so that nothing goes back through it.

use std::sync::Arc;

use candle_core::Tensor;
use monteclora_adapters::weights::Weight;
use monteclora_converters::Problem;

use monteclora_adapters::Result;

/// The table of vectors, `[vocabulary, hidden]`.
#[derive(Debug)]
pub(crate) struct Embedding(pub(crate) Arc<dyn Weight>);

impl Embedding {
    /// The vectors of `tokens`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// For one outside of the vocabulary.
    pub(crate) fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let vocab_size = self.0.dims()?.0;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            let message = format!(
                "token id {token} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?"
            );
            return Err(Problem::sentence("token", message).into());
        }
        self.0.gather(tokens)
    }
}
