//! The last chunk of a stream, which mistral.rs 0.8.1 omits if the last token adds no text.

/// Why an answer of `n_tokens` tokens, with the limit `max_tokens`, ended if the engine has not reported it.
pub(crate) fn finish_reason(n_tokens: usize, max_tokens: usize) -> &'static str {
    if n_tokens >= max_tokens {
        "length"
    } else {
        "stop"
    }
}
