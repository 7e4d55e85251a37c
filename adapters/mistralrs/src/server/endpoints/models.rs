//! `GET /v1/models`: every name served, bases and adapters with their `parent`; each with its generation.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use crate::server::App;
use crate::server::registry::Generation;

/// A list of `data`.
#[derive(Serialize)]
pub(super) struct List<T> {
    object: &'static str,
    data: Vec<T>,
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self {
            object: "list",
            data: items.into_iter().collect(),
        }
    }
}

/// One name.
#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    generation: String,
    max_model_len: usize,
}

impl Model {
    pub(super) fn of(generation: &Generation) -> Self {
        let (name, parent) = (generation.name.clone(), generation.parent.clone());
        Self {
            root: parent.clone().unwrap_or_else(|| name.clone()),
            id: name,
            object: "model",
            created: generation.created,
            owned_by: "monteclora",
            parent,
            generation: generation.hash.clone(),
            max_model_len: generation.max_sequence_length,
        }
    }
}

pub(super) async fn handle(State(app): State<App>) -> Json<List<Model>> {
    let served = app.registry.list();
    Json(served.iter().map(|lease| Model::of(lease)).collect())
}
