//! `GET /readyz`: whether the server takes requests; not while it drains.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::server::App;

pub(super) async fn handle(State(app): State<App>) -> (StatusCode, Json<Value>) {
    let (code, status) = match app.draining.load(Ordering::SeqCst) {
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        false => (StatusCode::OK, "ready"),
    };
    (code, Json(json!({ "status": status })))
}
