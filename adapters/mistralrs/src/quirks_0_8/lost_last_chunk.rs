//! The last chunk of a stream, which mistral.rs 0.8.1 leaves out where the last token adds no text.

/// Why an answer of `n_tokens` ended, of at most `max_tokens`, where the engine has not said so.
pub(crate) fn finish_reason(n_tokens: usize, max_tokens: usize) -> &'static str {
    if n_tokens >= max_tokens {
        "length"
    } else {
        "stop"
    }
}
