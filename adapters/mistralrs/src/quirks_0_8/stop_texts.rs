//! Stop texts and tokens: mistral.rs 0.8.1 cuts an answer at a place in its bytes as they were before what is no UTF-8 was replaced, and
//! panics where that is within a character; and it takes texts or tokens, not both.

use mistralrs_core::StopTokens;

use super::split_models::samples_in_step;

/// What mistral.rs is told of stop tokens and texts: of the texts nothing, unless nothing here can end an answer.
pub(crate) fn told(texts: &[String], tokens: &[u32]) -> Option<StopTokens> {
    if samples_in_step() && !texts.is_empty() {
        return Some(StopTokens::Seqs(texts.to_vec()));
    }
    (!tokens.is_empty()).then(|| StopTokens::Ids(tokens.to_vec()))
}
