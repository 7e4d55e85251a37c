//! Tool calls in the format of Gemma 4. mistral.rs 0.8.1 panics on such a call with a letter that is not ASCII, because
//! it reads calls byte by byte. It looks for them in the answers of every model that gets tools.

/// The beginning of such a call. None of the supported families generates it for a call, so an answer to a request with
/// tools ends before it.
pub(crate) const BEGINNING: &str = "<|tool_call>";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixture_tests::serving::{Running, chat, parse, toml_for};
    use crate::fixture_tests::{TOOLS, with_template};

    #[test]
    fn an_answer_ends_before_a_call_that_would_end_the_engine() {
        let (case, _dir) = with_template(TOOLS);
        let (server, _dir) = Running::start(&toml_for(&case, ""));
        let mut body = chat("tuned", false);
        body["max_tokens"] = json!(60);
        body["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
        body["grammar"] = json!({"type": "regex", "value": r"x<\|tool_call>call:f\{é\}"});
        for stream in [false, true] {
            body["stream"] = json!(stream);
            let response = server.post("/v1/chat/completions", &body);
            assert_eq!(response.status(), 200);
            let text = response.text().expect("readable");
            assert!(text.contains("stop") && !text.contains(BEGINNING), "{text}");
        }
        parse(
            server.post("/v1/chat/completions", &chat("tuned", false)),
            200,
        );
        server.finish().expect("a clean stop");
    }
}
