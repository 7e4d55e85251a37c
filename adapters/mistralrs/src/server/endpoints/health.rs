//! `GET /healthz`, or `/health` as probes of mistral.rs and vLLM have it: whether the process runs.

use axum::Json;
use serde::Serialize;

/// What a probe is told.
#[derive(Serialize)]
pub(super) struct Status {
    pub(super) status: &'static str,
}

pub(super) async fn handle() -> Json<Status> {
    Json(Status { status: "ok" })
}
