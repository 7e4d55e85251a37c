//! Errors in the format of OpenAI, without file paths.

use std::path::Path;

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Response};
use monteclora_converters::Problem;
use serde_json::{Value, json};

use super::context::RequestContext;
use crate::error::{Error, code};

/// Seconds after which a refused client may try again.
const SECONDS: &str = "1";

/// An error response: `{"error": {message, type, param, code}}`.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    param: Option<String>,
    problems: Vec<Problem>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::about_urls(status, code, without_paths(&message.into()))
    }

    /// Makes an error whose message may name URL paths, which are not secret, but no file paths.
    pub(crate) fn about_urls(status: StatusCode, code: &'static str, message: String) -> Self {
        Self {
            status,
            code,
            message,
            param: None,
            problems: Vec::new(),
        }
    }

    /// Makes an error for an invalid value of `param`.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_request", message);
        error.param = Some(param.to_owned());
        error
    }

    /// Makes an error for a missing or wrong key; `key` says which kind of key is needed.
    pub(crate) fn unauthorized(key: &str) -> Self {
        let message = format!("{key} is needed, sent as `Authorization: Bearer KEY`");
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    pub(crate) fn unknown_model(name: &str) -> Self {
        let message =
            format!("the model `{name}` does not exist; the list of models shows what is served");
        let mut error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        error.param = Some("model".to_owned());
        error
    }

    /// Makes an error for a failure of the server. The cause goes to the log, not to the client.
    pub(crate) fn internal(cause: impl Into<String>) -> Self {
        let context = RequestContext::current();
        let request_id = context.as_ref().map(|context| &context.id);
        tracing::error!(request_id, cause = cause.into(), "internal error");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "something went wrong in the server; its log has the cause under this request's id",
        )
    }

    /// Makes an error for a request that cannot be accepted now.
    pub(crate) fn unavailable(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
    }

    pub(crate) fn timed_out() -> Self {
        let message = "the answer took longer than this server allows; ask for fewer tokens, or of a score for fewer choices or draws";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    /// Converts `error`; paths below `root` are shown relative to it.
    pub(crate) fn below(root: &Path, error: &Error) -> Self {
        let prefix = format!("{}/", root.display());
        Self::of(error, |text| text.replace(&prefix, ""))
    }

    /// Converts `error`; `show` converts its texts.
    fn of(error: &Error, show: impl Fn(&str) -> String) -> Self {
        let bad_request = (StatusCode::BAD_REQUEST, "invalid_request");
        let (status, code) = match (error, error.code()) {
            (Error::Engine(_) | Error::Io { .. }, _) | (_, code::LOAD) => {
                return Self::internal(error.to_string());
            }
            (Error::Problem(_), code::SETTING | code::NOT_FOUND) => bad_request,
            (_, code @ (code::NAME_TAKEN | code::GENERATION_MOVED | code::FILES_CHANGED)) => {
                (StatusCode::CONFLICT, code)
            }
            (_, code @ code::MODEL_NOT_FOUND) => (StatusCode::NOT_FOUND, code),
            (_, code @ code::ENGINE_UNAVAILABLE) => (StatusCode::SERVICE_UNAVAILABLE, code),
            (_, code @ code::STATE_FILE) => (StatusCode::INSUFFICIENT_STORAGE, code),
            (_, code @ code::OVER_BUDGET) => (StatusCode::UNPROCESSABLE_ENTITY, code),
            _ => (StatusCode::UNPROCESSABLE_ENTITY, "adapter_refused"),
        };
        let mut answer = Self::new(status, code, show(&error.to_string()));
        let shown = |text: &str| without_paths(&show(text));
        let problems = error.problems().iter().map(|problem| {
            let (at, message) = (shown(&problem.at), shown(&problem.message));
            Problem::new(problem.code, at, message, shown(&problem.fix))
        });
        answer.problems = problems.collect();
        answer
    }

    pub(crate) fn is_timeout(&self) -> bool {
        self.status == StatusCode::GATEWAY_TIMEOUT
    }

    pub(crate) fn is_server_error(&self) -> bool {
        self.status.is_server_error()
    }

    pub(crate) fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let mut error = json!({
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        });
        if !self.problems.is_empty() {
            error["problems"] = json!(self.problems);
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let header = match self.status {
            StatusCode::UNAUTHORIZED => Some([(WWW_AUTHENTICATE, "Bearer")]),
            StatusCode::SERVICE_UNAVAILABLE => Some([(RETRY_AFTER, SECONDS)]),
            _ => None,
        };
        let answer = (self.status, Json(self.body()));
        match header {
            Some(header) => (header, answer).into_response(),
            None => answer.into_response(),
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self::of(&error, str::to_owned)
    }
}

impl ApiError {
    /// Converts the error of a reload. It is 422 if the configuration file itself is wrong.
    pub(crate) fn from_reload(error: Error) -> Self {
        match (&error, error.code()) {
            (Error::Of { .. } | Error::Several(_), _)
            | (Error::Problem(_), code::SETTING | code::NOT_FOUND | code::CONFIG) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "configuration_refused",
                error.to_string(),
            ),
            _ => error.into(),
        }
    }
}

/// Returns `problem` with every path shortened.
pub(crate) fn without_paths_in(problem: &Problem) -> Problem {
    let [at, message, fix] =
        [&problem.at, &problem.message, &problem.fix].map(|text| without_paths(text));
    Problem::new(problem.code, at, message, fix)
}

/// Shortens every absolute path in a message to its last part, and removes a stack trace.
pub(crate) fn without_paths(message: &str) -> String {
    let message = without_trace(message);
    let is_boundary = |c: char| c.is_whitespace() || "`'\"(,;:=".contains(c);
    let mut cleaned = String::with_capacity(message.len());
    let mut rest = message;
    let mut before = None;
    while let Some(next) = rest.chars().next() {
        if next == '/' && before.is_none_or(is_boundary) {
            // A quoted path may hold spaces.
            let quoted = before.filter(|c| "`'\"".contains(*c));
            let end = match quoted {
                Some(quote) => rest.find(quote),
                None => rest.find(|c: char| is_boundary(c) || c == ')'),
            };
            let (path, tail) = rest.split_at(end.unwrap_or(rest.len()));
            cleaned.push_str(path.trim_end_matches('/').rsplit('/').next().unwrap_or(""));
            rest = tail;
            before = Some('/');
            continue;
        }
        cleaned.push(next);
        rest = &rest[next.len_utf8()..];
        before = Some(next);
    }
    cleaned
}

/// The message without the stack frames that candle and anyhow append if RUST_BACKTRACE is set.
fn without_trace(message: &str) -> &str {
    let is_frame = |line: &str| {
        let line = line.trim_start();
        let digits = line.trim_start_matches(|c: char| c.is_ascii_digit());
        line.starts_with("Stack backtrace")
            || (digits.len() < line.len() && digits.starts_with(": "))
    };
    let mut end = 0;
    for line in message.split_inclusive('\n') {
        if end > 0 && is_frame(line) {
            return message[..end].trim_end();
        }
        end += line.len();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_paths_lose_their_directories_and_nothing_else_changes() {
        let cases = [
            (
                "`/srv/adapters/x/adapter_config.json`: bad",
                "`adapter_config.json`: bad",
            ),
            ("cannot read /etc/passwd: no", "cannot read passwd: no"),
            (
                "in (/tmp/monteclora-1/overlay.safetensors)",
                "in (overlay.safetensors)",
            ),
            ("1/2 of a/b, and org/model", "1/2 of a/b, and org/model"),
            ("tokens/s", "tokens/s"),
            ("é /ü/ß", "é ß"),
            ("`/srv/my adapters/x y/a.json`: bad", "`a.json`: bad"),
            ("path=/srv/x", "path=x"),
            ("bad\n   0: candle::error\n      at /x/y.rs:1", "bad"),
            ("bad\n\nStack backtrace:\n   0: f", "bad"),
            ("two\nlines", "two\nlines"),
        ];
        for (message, expected) in cases {
            assert_eq!(without_paths(message), expected);
        }
    }
}
