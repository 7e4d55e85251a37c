//! Loading and unloading adapters at run time, confined to the adapter root.

use std::path::{Component, Path, PathBuf};

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::App;
use super::answer::ApiError;
use super::registry::{AdapterLoad, Lease};

#[derive(Deserialize)]
struct LoadRequest {
    lora_name: String,
    lora_path: PathBuf,
    #[serde(default)]
    load_inplace: bool,
    expected_generation: Option<String>,
    model: Option<String>,
}

#[derive(Deserialize)]
struct UnloadRequest {
    lora_name: String,
    expected_generation: Option<String>,
}

/// `POST /v1/load_lora_adapter`.
pub(crate) async fn load(State(app): State<App>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let request: LoadRequest = parse(&body)?;
    let root = app
        .adapter_root
        .as_ref()
        .ok_or_else(|| ApiError::internal("there is no adapter root"))?;
    let source = confine(root, &request.lora_path)?;
    let lease = app
        .registry
        .load_adapter(AdapterLoad {
            name: &request.lora_name,
            source: &source,
            model: request.model.as_deref(),
            in_place: request.load_inplace,
            expected: request.expected_generation.as_deref(),
        })
        .await?;
    Ok(Json(json!({
        "status": "success",
        "lora_name": lease.name,
        "generation": lease.hash,
        "parent": lease.parent,
    })))
}

/// `POST /v1/unload_lora_adapter`.
pub(crate) async fn unload(State(app): State<App>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let request: UnloadRequest = parse(&body)?;
    app.registry
        .unload_adapter(&request.lora_name, request.expected_generation.as_deref())
        .await?;
    Ok(Json(
        json!({"status": "success", "lora_name": request.lora_name}),
    ))
}

/// `GET /v1/lora_adapters`.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    let leases = app.registry.list();
    let root = app.adapter_root.as_ref().map(|root| root.as_path());
    // Relative to the root; where an adapter outside it lies is nobody's business.
    let source = |lease: &Lease| {
        let path = lease.source()?.canonicalize().ok()?;
        Some(path.strip_prefix(root?).ok()?.to_path_buf())
    };
    let data: Vec<Value> = leases
        .iter()
        .filter(|lease| lease.parent.is_some())
        .map(|lease| {
            json!({
                "id": lease.name,
                "object": "lora_adapter",
                "lora_name": lease.name,
                "source": source(lease),
                "parent": lease.parent,
                "generation": lease.hash,
                "created": lease.created,
            })
        })
        .collect();
    Json(json!({"object": "list", "data": data}))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::invalid("body", error.to_string()))
}

/// The canonical form of `path` if that lies below the canonical `root`.
fn confine(root: &Path, path: &Path) -> Result<PathBuf, ApiError> {
    let outside = || {
        ApiError::new(
            StatusCode::FORBIDDEN,
            "outside_adapter_root",
            "lora_path must lie below the adapter root",
        )
    };
    let climbs = path
        .components()
        .any(|part| matches!(part, Component::ParentDir));
    if climbs || (path.is_absolute() && !path.starts_with(root)) {
        return Err(outside());
    }
    let full = root.join(path).canonicalize().map_err(|_| {
        ApiError::invalid(
            "lora_path",
            "there is no such adapter below the adapter root",
        )
    })?;
    // Symlinks are resolved by now, so one that leaves the root shows.
    if full == root || !full.starts_with(root) {
        return Err(outside());
    }
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_below_the_root_is_reached() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let root = dir.path().canonicalize().expect("it exists").join("root");
        let secret = dir.path().join("secret");
        std::fs::create_dir_all(root.join("a/b")).expect("created");
        std::fs::create_dir(&secret).expect("created");
        assert_eq!(
            confine(&root, Path::new("a/b")).expect("below"),
            root.join("a/b")
        );
        assert!(confine(&root, &root.join("a")).is_ok());
        #[cfg(unix)]
        std::os::unix::fs::symlink(&secret, root.join("link")).expect("linked");
        for path in ["..", "../secret", "a/../../secret", "/etc", ".", "", "link"] {
            let error = confine(&root, Path::new(path)).expect_err("outside");
            assert_eq!(
                error.body()["error"]["code"],
                "outside_adapter_root",
                "{path}"
            );
        }
        let missing = confine(&root, Path::new("a/c")).expect_err("missing");
        assert_eq!(missing.body()["error"]["param"], "lora_path");
    }
}
