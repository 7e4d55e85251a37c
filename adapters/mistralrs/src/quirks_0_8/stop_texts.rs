//! Stop texts: mistral.rs 0.8.1 cuts an answer at a place in its bytes as they were before what is no UTF-8 was replaced, and panics
//! where that is within a character.

use mistralrs_core::{Constraint, StopTokens};

use super::split_models::samples_in_step;

/// The stop texts that mistral.rs is told of: none, unless nothing here can end an answer.
pub(crate) fn told(texts: &[String], constraint: &Constraint) -> Option<StopTokens> {
    let is_held = !matches!(constraint, Constraint::None);
    let needed = (is_held || samples_in_step()) && !texts.is_empty();
    needed.then(|| StopTokens::Seqs(texts.to_vec()))
}
