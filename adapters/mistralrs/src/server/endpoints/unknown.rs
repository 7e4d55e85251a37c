//! The error for a request that matches no endpoint. It names the endpoint that was probably meant, else all endpoints.

use axum::http::{Method, StatusCode};

use crate::field_names::nearest;
use crate::server::api_error::ApiError;

/// An endpoint that this server offers.
#[derive(Debug, Clone)]
pub(super) struct Offered {
    pub(super) method: Method,
    pub(super) path: &'static str,
}

impl Offered {
    /// The path as in the documentation.
    pub(super) fn shown(&self) -> String {
        self.path.replace("{*name}", "NAME")
    }

    fn takes(&self, path: &str) -> bool {
        match self.path.split_once("{*name}") {
            Some((before, _)) => path.len() > before.len() && path.starts_with(before),
            None => path == self.path,
        }
    }
}

/// The error 404: there is no endpoint at `path`.
pub(super) fn no_path(offered: &[Offered], method: &Method, path: &str) -> ApiError {
    let shown: String = path.chars().take(128).collect();
    let hint = match meant(offered, path) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => {
            let list = offered
                .iter()
                .map(|offered| format!("{} {}", offered.method, offered.shown()));
            format!("there are {}", list.collect::<Vec<_>>().join(", "))
        }
    };
    let message = format!("there is no endpoint {method} `{shown}`; {hint}");
    ApiError::about_urls(StatusCode::NOT_FOUND, "not_found", message)
}

/// The error 405: the endpoint at `path` has another method.
pub(super) fn no_method(offered: &[Offered], method: &Method, path: &str) -> ApiError {
    let right = offered.iter().filter(|offered| offered.takes(path));
    let right: Vec<String> = right.map(|offered| offered.method.to_string()).collect();
    let message = format!("`{path}` takes {}, not {method}", right.join(" or "));
    ApiError::about_urls(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        message,
    )
}

/// The path of the endpoint that was probably meant by `path`.
fn meant(offered: &[Offered], path: &str) -> Option<String> {
    const PREFIX: &str = "/v1";
    // Fixes doubled slashes, a slash at the end, and a doubled prefix. A client adds the prefix again if its base URL
    // has it.
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    while parts.len() > 1 && parts[0] == "v1" && parts[1] == "v1" {
        parts.remove(0);
    }
    let plain = format!("/{}", parts.join("/"));
    let candidates = [plain.clone(), format!("{PREFIX}{plain}")];
    let is_there = |path: &&String| offered.iter().any(|offered| offered.takes(path));
    if let Some(found) = candidates.iter().find(is_there) {
        return Some(found.clone());
    }
    let paths: Vec<&str> = offered.iter().map(|offered| offered.path).collect();
    let near = candidates
        .iter()
        .find_map(|path| nearest(path, &paths, 0.95))?;
    Some(near.replace("{*name}", "NAME"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered() -> Vec<Offered> {
        let entry = |method, path| Offered { method, path };
        vec![
            entry(Method::POST, "/v1/chat/completions"),
            entry(Method::GET, "/v1/models"),
            entry(Method::GET, "/v1/models/{*name}"),
            entry(Method::GET, "/healthz"),
        ]
    }

    #[test]
    fn common_mistakes_are_recognised() {
        for (path, expected) in [
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("/v1//chat/completions", Some("/v1/chat/completions")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/v1/v1/v1/models/", Some("/v1/models")),
            ("/models", Some("/v1/models")),
            ("/models/org/name", Some("/v1/models/org/name")),
            ("/v1/healthz", None),
            ("/v1/chat/completion", Some("/v1/chat/completions")),
            ("/v1/embeddings", None),
            ("/", None),
        ] {
            assert_eq!(meant(&offered(), path).as_deref(), expected, "{path}");
        }
    }

    #[test]
    fn what_there_is_is_said() {
        let error = no_path(&offered(), &Method::GET, "/docs").body();
        let message = error["error"]["message"].as_str().expect("a text");
        assert!(
            message.contains("POST /v1/chat/completions, GET /v1/models, GET /v1/models/NAME"),
            "{message}"
        );
        let error = no_method(&offered(), &Method::GET, "/v1/chat/completions").body();
        assert_eq!(
            error["error"]["message"],
            "`/v1/chat/completions` takes POST, not GET"
        );
    }
}
