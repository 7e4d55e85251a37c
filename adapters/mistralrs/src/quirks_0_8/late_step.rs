//! The step after the last: mistral.rs 0.8.1 takes one more with a sequence whose raw logits it has given already, because the state of a
//! prompt that was computed overwrites that of one that is done.

/// Questions that an engine has to answer, one after the other, before it is known to be rid of all sequences whose answers it has given.
/// It answers them between steps: the late step is over at the second, and the sequence is dropped by the third.
pub(crate) const QUESTIONS: usize = 3;
