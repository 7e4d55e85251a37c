//! `GET /metrics`: counters and gauges for Prometheus.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::server::App;
use crate::server::api_error::ApiError;
use crate::server::metrics::CONTENT_TYPE;

pub(super) async fn handle(State(app): State<App>) -> Result<Response, ApiError> {
    let text = app
        .metrics
        .render(&app.registry.list(), app.registry.in_use())
        .map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
