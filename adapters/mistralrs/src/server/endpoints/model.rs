//! `GET /v1/models/NAME`: one of the served names.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::Value;

use super::models::{draw, model};
use crate::server::App;
use crate::server::api_error::ApiError;
use crate::server::request::named;

pub(super) async fn handle(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let found = named(&app, Some(&name));
    let (lease, index) = found.ok_or_else(|| ApiError::unknown_model(&name))?;
    Ok(Json(match index {
        Some(index) => draw(&lease, index),
        None => model(&lease),
    }))
}
