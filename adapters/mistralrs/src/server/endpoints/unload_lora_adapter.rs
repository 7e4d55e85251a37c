//! `POST /v1/unload_lora_adapter`: stops serving an adapter; running requests finish.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::parse;
use crate::server::App;
use crate::server::api_error::ApiError;
use crate::server::guard::Payload;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with lora_name")]
struct UnloadRequest {
    lora_name: String,
    expected_generation: Option<String>,
}

pub(super) async fn handle(
    State(app): State<App>,
    Payload(body): Payload,
) -> Result<Json<Value>, ApiError> {
    let request: UnloadRequest = parse(&body)?;
    let (name, expected) = (request.lora_name, request.expected_generation.as_deref());
    app.registry.unload_adapter(&name, expected).await?;
    Ok(Json(json!({"status": "success", "lora_name": name})))
}
