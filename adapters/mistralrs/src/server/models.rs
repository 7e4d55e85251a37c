//! What there is to see: `/v1/models`, the two health endpoints, and `/metrics`.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::answer::ApiError;
use super::metrics::CONTENT_TYPE;
use super::registry::Generation;

/// Every name served: bases, and adapters with their `parent`; each with its generation.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    let data: Vec<Value> = app
        .registry
        .list()
        .iter()
        .map(|lease| object(lease))
        .collect();
    Json(json!({"object": "list", "data": data}))
}

/// One name.
pub(crate) async fn one(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match app.registry.lease(Some(&name)) {
        Some(lease) => Ok(Json(object(&lease))),
        None => Err(ApiError::unknown_model(&name)),
    }
}

fn object(generation: &Generation) -> Value {
    json!({
        "id": generation.name,
        "object": "model",
        "created": generation.created,
        "owned_by": "monteclora",
        "root": generation.parent.as_ref().unwrap_or(&generation.name),
        "parent": generation.parent,
        "generation": generation.hash,
        "max_model_len": generation.max_sequence_length,
    })
}

/// Whether the process runs.
pub(crate) async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Whether it takes requests: not while it drains.
pub(crate) async fn readyz(State(app): State<App>) -> (StatusCode, Json<Value>) {
    if app.draining.load(Ordering::SeqCst) {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({"status": "draining"})),
        )
    } else {
        (StatusCode::OK, Json(json!({"status": "ready"})))
    }
}

/// Counters and gauges for Prometheus.
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let text = app
        .metrics
        .render(&app.registry.resident())
        .map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
