//! `POST /v1/reload`: reads the configuration again and applies the difference.

use axum::Json;
use axum::extract::State;

use super::detached;
use crate::server::App;
use crate::server::api_error::ApiError;
use crate::server::reload::Reloaded;

pub(super) async fn handle(State(app): State<App>) -> Result<Json<Reloaded>, ApiError> {
    let reloaded = detached(async move { app.reload().await.map_err(ApiError::from_reload) });
    Ok(Json(reloaded.await?))
}
