//! The endpoints. Each has its own file and one entry in the list.

mod chat_completions;
mod completions;
mod health;
mod load_lora_adapter;
mod lora_adapters;
mod metrics;
mod model;
mod models;
mod page;
mod ready;
mod reload;
mod responses;
mod score;
#[cfg(test)]
mod tests;
mod unknown;
mod unload_lora_adapter;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::handler::Handler;
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{self, MethodRouter};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::decompression::RequestDecompressionLayer;

use super::api_error::ApiError;
use super::context::RequestContext;
use super::fields::object;
use super::guard::{self, Right};
use super::{App, AppState};
use crate::field_names::field_names;
use unknown::Offered;

/// All endpoints. mistral.rs's own router is not mounted, because its administration is not guarded.
fn endpoints() -> Vec<Endpoint> {
    use Right::{Administrator, Anyone, Inference};
    vec![
        post("/v1/chat/completions", Inference, chat_completions::handle),
        post("/v1/completions", Inference, completions::handle),
        post("/v1/responses", Inference, responses::handle),
        post("/v1/monteclora/score", Inference, score::handle),
        get("/v1/models", Inference, models::handle),
        get("/v1/models/{*name}", Inference, model::handle),
        get("/healthz", Anyone, health::handle),
        get("/health", Anyone, health::handle),
        get("/readyz", Anyone, ready::handle),
        get("/metrics", Administrator, metrics::handle),
        post(
            "/v1/load_lora_adapter",
            Administrator,
            load_lora_adapter::handle,
        )
        .when(is_administered),
        post(
            "/v1/unload_lora_adapter",
            Administrator,
            unload_lora_adapter::handle,
        )
        .when(is_administered),
        get("/v1/lora_adapters", Administrator, lora_adapters::handle).when(is_administered),
        post("/v1/reload", Administrator, reload::handle).when(is_reloadable),
        get("/", Anyone, page::index).when(has_page),
        get("/ui/style.css", Anyone, page::style).when(has_page),
        get("/ui/page.js", Anyone, page::script).when(has_page),
        get("/ui/examples.json", Anyone, page::examples).when(has_page),
    ]
}

/// One entry of the list.
struct Endpoint {
    method: Method,
    path: &'static str,
    right: Right,
    /// Whether a server offers it.
    when: fn(&AppState) -> bool,
    route: MethodRouter<App>,
}

impl Endpoint {
    fn new(method: Method, path: &'static str, right: Right, route: MethodRouter<App>) -> Self {
        Self {
            method,
            path,
            right,
            when: |_| true,
            route,
        }
    }

    fn when(mut self, when: fn(&AppState) -> bool) -> Self {
        self.when = when;
        self
    }
}

fn get<H: Handler<T, App>, T: 'static>(path: &'static str, right: Right, handler: H) -> Endpoint {
    Endpoint::new(Method::GET, path, right, routing::get(handler))
}

fn post<H: Handler<T, App>, T: 'static>(path: &'static str, right: Right, handler: H) -> Endpoint {
    Endpoint::new(Method::POST, path, right, routing::post(handler))
}

fn is_administered(app: &AppState) -> bool {
    app.config.adapter_root.is_some()
}

fn has_page(app: &AppState) -> bool {
    app.config.ui
}

fn is_reloadable(app: &AppState) -> bool {
    is_administered(app) && app.source.get().is_some()
}

/// The router of the endpoints that `app` offers, with all checks before them.
pub(super) fn router(app: App) -> Router {
    let mut router = Router::new();
    let mut offered = Vec::new();
    for endpoint in endpoints() {
        if (endpoint.when)(&app) {
            let (method, path, right) = (endpoint.method, endpoint.path, endpoint.right);
            tracing::debug!(%method, path, ?right, "endpoint");
            let rights = from_fn_with_state((app.clone(), right), guard::require);
            router = router.route(path, endpoint.route.layer(rights));
            offered.push(Offered { method, path });
        }
    }
    let offered: Arc<[Offered]> = offered.into();
    let others = offered.clone();
    let router = router
        .fallback(move |method: Method, uri: Uri| async move {
            unknown::no_path(&offered, &method, uri.path())
        })
        .method_not_allowed_fallback(move |method: Method, uri: Uri| async move {
            unknown::no_method(&others, &method, uri.path())
        })
        .layer(DefaultBodyLimit::max(app.config.limits.max_body_bytes))
        // A body in another encoding passes through, and is refused later by the name of the encoding.
        .layer(RequestDecompressionLayer::new().pass_through_unaccepted(true))
        .layer(from_fn_with_state(app.clone(), guard::guard));
    match cors(&app.config.allowed_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    }
    .with_state(app)
}

/// Time for which a browser may cache an answer about `origins`.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// The CORS headers for `origins`. Without origins there are no headers, and browsers then refuse the access.
///
/// A page may send any header. SDKs have many headers of their own, and a page that may send its user's key gains
/// nothing from another header.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        // The configuration has checked that an origin is plain ASCII.
        false => AllowOrigin::list(
            origins
                .iter()
                .filter_map(|origin| HeaderValue::from_str(origin).ok()),
        ),
    };
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([guard::REQUEST_ID, header::RETRY_AFTER])
            .max_age(PREFLIGHT_AGE),
    )
}

/// Runs `work` to its end even if the client leaves, so that no change is left half done.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let work: Pin<Box<dyn Future<Output = _> + Send>> = match RequestContext::current() {
        Some(context) => Box::pin(context.scope(work)),
        None => Box::pin(work),
    };
    tokio::spawn(work)
        .await
        .map_err(|error| ApiError::internal(error.to_string()))?
}

/// Parses the object in `body`. The error names the key that is wrong.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let fields = object(body)?;
    let read = |fields: &Map<String, Value>| T::deserialize(Value::Object(fields.clone()));
    read(&fields).map_err(|error| {
        let message = error.to_string();
        let named = |name: &&&str| message.contains(&format!("`{name}`"));
        let wrong = match message.starts_with("missing field") {
            true => field_names::<T>().iter().find(named).copied(),
            // serde does not report the key of the error. It is the key without which the error changes.
            false => fields.keys().map(String::as_str).find(|key| {
                let mut others = fields.clone();
                others.remove(*key);
                read(&others)
                    .err()
                    .is_none_or(|other| other.to_string() != message)
            }),
        };
        match wrong {
            Some(key) => ApiError::invalid(key, format!("`{key}`: {message}")),
            None => ApiError::invalid("body", message),
        }
    })
}
