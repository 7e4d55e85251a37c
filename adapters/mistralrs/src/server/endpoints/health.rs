//! `GET /healthz`, or `/health` as in the probes of mistral.rs and vLLM: whether the process runs.

use axum::Json;
use serde_json::{Value, json};

pub(super) async fn handle() -> Json<Value> {
    Json(json!({"status": "ok"}))
}
