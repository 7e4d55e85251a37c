//! The step after the last. mistral.rs 0.8.1 makes one more step with a sequence whose raw logits it has already
//! returned, because the state of the computed prompt overwrites the state "done".

/// Number of questions that an engine must answer, one after the other, before it has certainly dropped all sequences
/// that it has answered. It answers them between steps: the late step is over at the second question, and the sequence
/// is dropped by the third.
pub(crate) const QUESTIONS: usize = 3;
