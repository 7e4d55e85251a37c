//! `GET /readyz`: whether the server accepts requests and every engine answers. It is not ready while it drains.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::server::App;

pub(super) async fn handle(State(app): State<App>) -> (StatusCode, Json<Value>) {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    if app.draining.load(Ordering::SeqCst) {
        return (unavailable, Json(json!({"status": "draining"})));
    }
    let limit = Duration::from_secs(app.config.limits.request_timeout_s);
    let silent = app.registry.silent(limit).await;
    if silent.is_empty() {
        return (StatusCode::OK, Json(json!({"status": "ready"})));
    }
    let body = json!({"status": "unavailable", "models": silent});
    (unavailable, Json(body))
}
