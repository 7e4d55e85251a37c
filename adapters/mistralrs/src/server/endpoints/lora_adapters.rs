//! `GET /v1/lora_adapters`: the adapters served, and where below the root they lie.

use std::path::{Path, PathBuf};

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::models::List;
use crate::server::App;
use crate::server::registry::Generation;

#[derive(Serialize)]
pub(super) struct LoraAdapter {
    id: String,
    object: &'static str,
    lora_name: String,
    /// Relative to the root; where an adapter outside it lies is nobody's business.
    source: Option<PathBuf>,
    parent: Option<String>,
    generation: String,
    created: u64,
    weight_bytes: u64,
}

impl LoraAdapter {
    fn of(generation: &Generation, root: Option<&Path>) -> Self {
        let source = || {
            let path = generation.source()?.canonicalize().ok()?;
            Some(path.strip_prefix(root?).ok()?.to_path_buf())
        };
        Self {
            id: generation.name.clone(),
            object: "lora_adapter",
            lora_name: generation.name.clone(),
            source: source(),
            parent: generation.parent.clone(),
            generation: generation.hash.clone(),
            created: generation.created,
            weight_bytes: generation.weight_bytes(),
        }
    }
}

pub(super) async fn handle(State(app): State<App>) -> Json<List<LoraAdapter>> {
    let root = app.config.adapter_root.as_deref();
    let served = app.registry.list();
    let adapters = served.iter().filter(|lease| lease.parent.is_some());
    Json(adapters.map(|lease| LoraAdapter::of(lease, root)).collect())
}
