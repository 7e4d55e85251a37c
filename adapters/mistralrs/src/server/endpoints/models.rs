//! `GET /v1/models`: every name served, bases and adapters with their `parent`; each with its generation.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::server::App;
use crate::server::registry::Generation;

/// A list of `data`.
pub(super) fn list(data: impl Iterator<Item = Value>) -> Json<Value> {
    Json(json!({"object": "list", "data": Value::from_iter(data)}))
}

/// One name.
pub(super) fn model(generation: &Generation) -> Value {
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

pub(super) async fn handle(State(app): State<App>) -> Json<Value> {
    list(app.registry.list().iter().map(|lease| model(lease)))
}
