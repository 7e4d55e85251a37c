//! `GET /v1/models`: every served name (bases, and adapters with their `parent`), each with its generation.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::server::App;
use crate::server::registry::Generation;
use crate::server::request::draw_name;

/// Formats `data` as a list.
pub(super) fn list(data: impl Iterator<Item = Value>) -> Json<Value> {
    Json(json!({"object": "list", "data": Value::from_iter(data)}))
}

/// Formats one name.
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
        "weight_bytes": generation.weight_bytes(),
        "has_chat_template": generation.template.is_some(),
        "uncertainty": generation.scored.as_ref().map(|scored| scored.scorer.about()),
    })
}

/// Formats a posterior draw of an adapter.
pub(super) fn draw(generation: &Generation, index: usize) -> Value {
    let mut draw = model(generation);
    draw["id"] = json!(draw_name(&generation.name, index));
    draw["root"] = json!(generation.name);
    draw["parent"] = json!(generation.name);
    draw["uncertainty"] = Value::Null;
    // A draw shares the memory of its adapter.
    draw["weight_bytes"] = json!(0);
    draw
}

pub(super) async fn handle(State(app): State<App>) -> Json<Value> {
    let served = app.registry.list();
    let named = served.iter().flat_map(|lease| {
        let draws = (0..lease.n_draws()).map(|index| draw(lease, index));
        std::iter::once(model(lease)).chain(draws)
    });
    list(named)
}
