//! `GET /v1/models/NAME`: one of the names served.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::Value;

use super::models::model;
use crate::server::App;
use crate::server::api_error::ApiError;

pub(super) async fn handle(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let lease = app.registry.lease(Some(&name));
    let lease = lease.ok_or_else(|| ApiError::unknown_model(&name))?;
    Ok(Json(model(&lease)))
}
