//! The step after the last: mistral.rs 0.8.1 takes one more with a sequence whose raw logits it has given already, because the state of a
//! prompt that was computed overwrites that of one that is done.

/// Questions that an engine has to answer, one after the other, before it is known to be at nothing any more once every answer has been
/// given. It answers them between steps, so that there has been a whole step between two.
pub(crate) const QUESTIONS: usize = 2;
