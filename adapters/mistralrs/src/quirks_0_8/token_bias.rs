//! `logit_bias`, which mistral.rs 0.8.1 reads and never applies.

use candle_core::Tensor;

/// `logits` with something added to those of some tokens; what is not in the vocabulary is passed over.
pub(crate) fn add(
    logits: &Tensor,
    additions: impl Iterator<Item = (u32, f32)>,
) -> candle_core::Result<Tensor> {
    let n = logits.elem_count();
    let mut bonus = vec![0f32; n];
    for (token, addition) in additions {
        if let Some(value) = usize::try_from(token).ok().and_then(|at| bonus.get_mut(at)) {
            *value = addition;
        }
    }
    let bonus = Tensor::from_vec(bonus, n, logits.device())?.to_dtype(logits.dtype())?;
    logits + bonus
}
