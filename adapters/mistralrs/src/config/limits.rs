//! `[limits]`: what one client, or all of them together, may take.

use serde::{Deserialize, Serialize};

/// `[limits]` as written. Sizes are in bytes, times in seconds; every one is at least 1.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Largest request body; larger ones are answered with 413.
    pub max_body_bytes: usize,
    /// Largest request head (request line and headers); larger ones are answered with 431. At least 8192.
    pub max_header_bytes: usize,
    /// Longest prompt in tokens; the model's own limit by default.
    pub max_prompt_tokens: Option<usize>,
    /// Most tokens a request may ask for and gets where it does not say; what fits after the prompt by default.
    pub max_completion_tokens: Option<usize>,
    /// Inference requests being worked on or queued, each choice of `n` counted; beyond, 503 with `Retry-After`.
    pub max_concurrent_requests: usize,
    /// Open connections; further ones wait to be accepted.
    pub max_connections: usize,
    /// Time for the head of a request to arrive, and for a TLS handshake.
    pub header_timeout_s: u64,
    /// Time a connection may stay open between two requests. Longer than a load balancer's, which is often 60, so that it is
    /// never the server that closes first.
    pub keep_alive_timeout_s: u64,
    /// Time for the body of a request to arrive; slower ones are answered with 408.
    pub body_timeout_s: u64,
    /// Time a client may leave an answer unread before its connection is closed.
    pub write_timeout_s: u64,
    /// Time for a whole answer; generation then stops, with 504 or a last event that says so.
    pub request_timeout_s: u64,
    /// Time for requests in flight to finish after SIGTERM; what is not done then ends with an error that says so.
    pub drain_timeout_s: u64,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_header_bytes: 64 << 10,
            max_prompt_tokens: None,
            max_completion_tokens: None,
            max_concurrent_requests: 256,
            max_connections: 1024,
            header_timeout_s: 30,
            keep_alive_timeout_s: 75,
            body_timeout_s: 30,
            write_timeout_s: 60,
            request_timeout_s: 600,
            drain_timeout_s: 120,
        }
    }
}

/// hyper's own lower bound for the buffer of a request head.
const LEAST_HEADER_BYTES: usize = 8 << 10;

impl LimitsSection {
    /// What is wrong with them goes to `errors`.
    pub(super) fn check(&self, errors: &mut Vec<String>) {
        let values = serde_json::to_value(self).unwrap_or_default();
        for (key, value) in values.as_object().into_iter().flatten() {
            if *value == 0 && key != "max_header_bytes" {
                errors.push(format!("limits.{key}: must be at least 1"));
            }
        }
        if self.max_header_bytes < LEAST_HEADER_BYTES {
            errors.push(format!(
                "limits.max_header_bytes: must be at least {LEAST_HEADER_BYTES}"
            ));
        }
    }
}
