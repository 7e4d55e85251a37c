//! Stop texts and tokens. mistral.rs 0.8.1 computes the position of the cut in the bytes before invalid UTF-8 was
//! replaced, and panics if that position is inside a character. It also refuses a stop token whose text is a prefix of
//! another token's text.

use mistralrs_core::StopTokens;

use super::split_models::samples_in_step;

/// The stop texts that mistral.rs gets: none, unless the hooks of this crate cannot end an answer.
pub(crate) fn told(texts: &[String]) -> Option<StopTokens> {
    let needed = samples_in_step() && !texts.is_empty();
    needed.then(|| StopTokens::Seqs(texts.to_vec()))
}
