//! Errors as OpenAI clients expect them, free of paths.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use monteclora_converters::Problem;
use serde_json::{Value, json};

use crate::error::Error;

/// An error answer: `{"error": {message, type, param, code}}`.
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
        Self {
            status,
            code,
            message: without_paths(&message.into()),
            param: None,
            problems: Vec::new(),
        }
    }

    /// A request that is wrong at `param`.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_request", message);
        error.param = Some(param.to_owned());
        error
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "a valid key is needed, sent as `Authorization: Bearer KEY`",
        )
    }

    pub(crate) fn unknown_model(name: &str) -> Self {
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "model_not_found",
            format!("the model `{name}` does not exist; the list of models shows what is served"),
        );
        error.param = Some("model".to_owned());
        error
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
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
            let listed = self.problems.iter().map(|problem| {
                json!({
                    "code": problem.code,
                    "where": without_paths(&problem.location),
                    "message": without_paths(&problem.message),
                    "fix": without_paths(&problem.fix),
                })
            });
            error["problems"] = Value::Array(listed.collect());
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = axum::http::HeaderValue::from_static("Bearer");
            response
                .headers_mut()
                .insert(axum::http::header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let (status, code) = match &error {
            Error::NameTaken(_) => (StatusCode::CONFLICT, "name_taken"),
            Error::GenerationMoved { .. } => (StatusCode::CONFLICT, "generation_moved"),
            Error::UnknownName(_) => (StatusCode::NOT_FOUND, "model_not_found"),
            Error::Engine(_) | Error::Io { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
            }
            Error::Setting { .. } | Error::NotFound { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_request")
            }
            _ => (StatusCode::UNPROCESSABLE_ENTITY, "adapter_refused"),
        };
        let problems = error.problems().to_vec();
        let mut answer = Self::new(status, code, error.to_string());
        answer.problems = problems;
        answer
    }
}

/// Shortens every absolute path in a message to its last part.
pub(crate) fn without_paths(message: &str) -> String {
    let is_boundary = |c: char| c.is_whitespace() || "`'\"(,;:".contains(c);
    let mut cleaned = String::with_capacity(message.len());
    let mut rest = message;
    let mut at_boundary = true;
    while let Some(next) = rest.chars().next() {
        if next == '/' && at_boundary {
            let end = rest
                .find(|c: char| is_boundary(c) || c == ')')
                .unwrap_or(rest.len());
            let (path, tail) = rest.split_at(end);
            cleaned.push_str(path.trim_end_matches('/').rsplit('/').next().unwrap_or(""));
            rest = tail;
            at_boundary = false;
            continue;
        }
        at_boundary = is_boundary(next);
        cleaned.push(next);
        rest = &rest[next.len_utf8()..];
    }
    cleaned
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
        ];
        for (message, expected) in cases {
            assert_eq!(without_paths(message), expected);
        }
    }
}
