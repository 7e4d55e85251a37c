//! Checks around every handler: access, size of the request, logs and metrics.

use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;

use super::App;
use super::api_error::ApiError;
use super::connection::Peer;
use super::context::RequestContext;

/// Header with the id of a request; used in requests and responses.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Identifies, checks, logs and counts every request.
pub(crate) async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(REQUEST_ID);
    let context = Arc::new(RequestContext::new(
        given.and_then(|value| value.to_str().ok()),
    ));
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("unmatched", MatchedPath::as_str)
        .to_owned();
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    let refused = refuse_strangers(&app, &request).err();
    let work = async {
        match refused {
            Some(error) => error.into_response(),
            None => AssertUnwindSafe(next.run(request))
                .catch_unwind()
                .await
                .unwrap_or_else(|panic| {
                    let text = crate::loader::panic_text(panic.as_ref());
                    ApiError::internal(format!("a handler panicked: {text}")).into_response()
                }),
        }
    };
    let mut response = context.clone().scope(work).await;

    let status = response.status().as_u16();
    app.metrics.request(&route, context.model(), status);
    let duration_ms = started.elapsed().as_millis();
    let peer = peer.map(tracing::field::display);
    // Probes ask every few seconds, so they are logged at a lower level.
    if route.starts_with('/') && !route.starts_with("/v1/") {
        tracing::debug!(request_id = context.id, peer, %method, route, status, duration_ms, "request");
    } else {
        let model = Some(context.model()).filter(|model| !model.is_empty());
        tracing::info!(request_id = context.id, peer, %method, route, model, status, duration_ms, "request");
    }
    if let Ok(id) = HeaderValue::from_str(&context.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Access rights; each includes those before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Right {
    Anyone,
    /// Needs a key for inference or administration. Without keys for inference, anyone has this right.
    Inference,
    /// Needs a key for administration. Without any key, anyone has this right: the server is then on loopback, and
    /// whoever reaches it is its operator.
    Administrator,
}

/// Passes on the requests whose client has the right.
pub(crate) async fn require(
    State((app, right)): State<(App, Right)>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let keys = app.keys();
    let key = bearer(request.headers());
    let open = keys.api.is_empty();
    let is_user = open || key.is_some_and(|key| keys.api.holds(key) | keys.admin.holds(key));
    let is_admin = open && keys.admin.is_empty() || key.is_some_and(|key| keys.admin.holds(key));
    match right {
        Right::Inference if !is_user => Err(ApiError::unauthorized("a valid key")),
        Right::Administrator if !is_admin => Err(ApiError::unauthorized("an administrator's key")),
        _ => Ok(next.run(request).await),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Refuses web pages from other origins. A browser would send their requests to loopback as if they were the user's.
fn refuse_strangers(app: &App, request: &Request) -> Result<(), ApiError> {
    let named = request.headers().get(header::HOST);
    let authority = || request.uri().authority().map(Authority::as_str);
    let host = named.and_then(|host| host.to_str().ok()).or_else(authority);
    // An attacker's DNS can point a name to loopback, which makes the attacker's page same-origin. Keys prevent this;
    // without keys, the host name is checked.
    let known_host = host.is_none_or(|host| is_own_host(host, &app.config.host));
    if app.keys().api.is_empty() && !known_host {
        return Err(forbidden(
            "host_not_allowed",
            "without keys this server answers to its address, to localhost and to server.host only",
        ));
    }
    let Some(origin) = request.headers().get(header::ORIGIN) else {
        return Ok(());
    };
    let origin = origin.to_str().unwrap_or_default();
    let allowed = |known: &String| known == "*" || known == origin;
    let same = origin
        .split_once("://")
        .is_some_and(|(_, authority)| Some(authority) == host);
    if same || app.config.allowed_origins.iter().any(allowed) {
        Ok(())
    } else {
        Err(forbidden(
            "origin_not_allowed",
            "pages of this origin may not call the server; server.allowed_origins lists those that may",
        ))
    }
}

fn forbidden(code: &'static str, message: &str) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, code, message)
}

/// Whether `authority` (a host, with or without a port) is an IP address, localhost, or the `configured` host.
fn is_own_host(authority: &str, configured: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_ok()
        || host.eq_ignore_ascii_case("localhost")
        || host.eq_ignore_ascii_case(configured)
}

/// A complete request body that kept to the limits for size and time.
pub(crate) struct Payload(pub(crate) Bytes);

impl FromRequest<App> for Payload {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let limits = &app.config.limits;
        let too_large = || {
            let message = format!(
                "the request body is larger than {} bytes",
                limits.max_body_bytes
            );
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
        };
        // The gzip layer has already decoded the body.
        if let Some(encoding) = other_encoding(request.headers()) {
            let message = format!("bodies are read plain or with gzip, not with `{encoding}`");
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_encoding",
                message,
            ));
        }
        // A body whose declared length is too large is not read; the router's own limit applies to the others.
        let declared = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if declared.is_some_and(|length| length > limits.max_body_bytes) {
            return Err(too_large());
        }
        let patience = Duration::from_secs(limits.body_timeout_s);
        match tokio::time::timeout(patience, Bytes::from_request(request, app)).await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(
                _,
            )))) => Err(too_large()),
            Ok(Err(_)) => Err(ApiError::invalid(
                "body",
                "the request body broke off, or is not the gzip that it says it is",
            )),
            Err(_) => Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "body_timeout",
                "the request body took too long to arrive",
            )),
        }
    }
}

/// The encoding of a body that is still encoded.
fn other_encoding(headers: &HeaderMap) -> Option<String> {
    let encoding = headers.get(header::CONTENT_ENCODING)?;
    let name: String = encoding.to_str().unwrap_or("?").chars().take(64).collect();
    (!["", "identity"].contains(&name.as_str())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_the_configured_host_are_ones_own() {
        for own in [
            "127.0.0.1:1234",
            "127.0.0.1",
            "[::1]:80",
            "[::1]",
            "LOCALHOST:9",
            "llm.lan",
        ] {
            assert!(is_own_host(own, "llm.lan"), "{own}");
        }
        for strange in [
            "evil.example:1234",
            "evil.example",
            "localhost.evil.example",
            "",
        ] {
            assert!(!is_own_host(strange, "llm.lan"), "{strange}");
        }
    }
}
