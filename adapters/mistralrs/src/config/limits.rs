//! `[limits]`: limits for one client and for all clients together.

use serde::{Deserialize, Serialize};

/// `[limits]` as written. Sizes are in bytes, times in seconds; every one is at least 1.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Maximum request body; a larger one gets 413.
    pub max_body_bytes: usize,
    /// Maximum request head (request line and headers), at least 8192; a larger one gets 431.
    pub max_header_bytes: usize,
    /// Maximum prompt length, in tokens. Default: the model's own limit.
    pub max_prompt_tokens: Option<usize>,
    /// Maximum completion tokens per request, and the number used if the request sets none. Default: what fits after the
    /// prompt.
    pub max_completion_tokens: Option<usize>,
    /// Maximum inference requests running or queued; each choice of `n` counts. More get 503 with `Retry-After`.
    pub max_concurrent_requests: usize,
    /// Maximum open connections; more wait to be accepted.
    pub max_connections: usize,
    /// Timeout for the head of a request, and for a TLS handshake.
    pub header_timeout_s: u64,
    /// Idle timeout of a connection between two requests. Set it longer than the load balancer's timeout (often 60), so that
    /// the server never closes first.
    pub keep_alive_timeout_s: u64,
    /// Timeout for the body of a request; a slower body gets 408.
    pub body_timeout_s: u64,
    /// Timeout for a client that does not read an answer; then the connection is closed.
    pub write_timeout_s: u64,
    /// Timeout for a whole answer. Generation then stops with 504, or with a last event that reports it.
    pub request_timeout_s: u64,
    /// Timeout for running requests after SIGTERM. Unfinished requests then end with an error that reports it.
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
    /// Checks the limits and adds each fault to `errors`.
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
