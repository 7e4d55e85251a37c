//! Stop texts and tokens: mistral.rs 0.8.1 cuts an answer at a place in its bytes as they were before what is no UTF-8 was replaced, and
//! panics where that is within a character; and it refuses a stop token whose text another one begins with.

use mistralrs_core::StopTokens;

use super::split_models::samples_in_step;

/// The stop texts that mistral.rs is told of: none, unless nothing here can end an answer.
pub(crate) fn told(texts: &[String]) -> Option<StopTokens> {
    let needed = samples_in_step() && !texts.is_empty();
    needed.then(|| StopTokens::Seqs(texts.to_vec()))
}
