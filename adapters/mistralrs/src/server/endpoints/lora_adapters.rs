//! `GET /v1/lora_adapters`: the served adapters, and their paths below the root.

use std::path::Path;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::models::list;
use crate::server::App;
use crate::server::registry::Generation;

fn adapter(generation: &Generation, root: Option<&Path>) -> Value {
    // The path is relative to the root; a path outside the root is not revealed.
    let source = || {
        let path = generation.source()?.canonicalize().ok()?;
        Some(path.strip_prefix(root?).ok()?.display().to_string())
    };
    json!({
        "id": generation.name,
        "object": "lora_adapter",
        "lora_name": generation.name,
        "source": source(),
        "parent": generation.parent,
        "generation": generation.hash,
        "content": generation.content,
        "created": generation.created,
        "weight_bytes": generation.weight_bytes(),
    })
}

pub(super) async fn handle(State(app): State<App>) -> Json<Value> {
    let root = app.config.adapter_root.as_deref();
    let served = app.registry.list();
    let adapters = served.iter().filter(|lease| lease.parent.is_some());
    list(adapters.map(|lease| adapter(lease, root)))
}
