//! Every endpoint, and what stands before it.

use axum::Router;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::answer::ApiError;
use super::{App, admin, chat, completions, guard, models};

/// Every route there is: mistral.rs's own router, with its unguarded administration, is not mounted.
pub(super) fn router(app: App) -> Router {
    let inference = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .layer(from_fn_with_state(app.clone(), guard::require_key));
    let mut admin = Router::new().route("/metrics", get(models::metrics));
    if app.adapter_root.is_some() {
        admin = admin
            .route("/v1/load_lora_adapter", post(admin::load))
            .route("/v1/unload_lora_adapter", post(admin::unload))
            .route("/v1/lora_adapters", get(admin::list));
        if app.source.get().is_some() {
            admin = admin.route("/v1/reload", post(admin::reload));
        }
    }
    let admin = admin.layer(from_fn_with_state(app.clone(), guard::require_admin_key));
    let router = inference
        .merge(admin)
        .route("/healthz", get(models::healthz))
        // The name that probes of mistral.rs and vLLM have.
        .route("/health", get(models::healthz))
        .route("/readyz", get(models::readyz))
        .fallback(|| async {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "not_found",
                "there is no such endpoint",
            )
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this endpoint takes another method",
            )
        })
        .layer(from_fn_with_state(app.clone(), guard::guard));
    match cors(&app.allowed_origins) {
        Some(cors) => router.layer(cors),
        None => router,
    }
    .with_state(app)
}

/// What browsers are told about `origins`; nothing, which they take for a no, where there are none.
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
            .allow_methods([Method::GET, Method::POST])
            .allow_headers([
                header::AUTHORIZATION,
                header::CONTENT_TYPE,
                guard::REQUEST_ID,
            ])
            .expose_headers([guard::REQUEST_ID]),
    )
}
