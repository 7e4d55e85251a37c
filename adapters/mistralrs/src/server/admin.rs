//! Loading and unloading adapters at run time, confined to the adapter root.

use std::future::Future;
use std::path::{Component, Path, PathBuf};
use std::pin::Pin;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::App;
use super::answer::ApiError;
use super::context::RequestContext;
use super::guard::Payload;
use super::registry::{AdapterLoad, Lease};
use super::reload::Reloaded;

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with lora_name and lora_path"
)]
struct LoadRequest {
    lora_name: String,
    lora_path: PathBuf,
    #[serde(default)]
    load_inplace: bool,
    expected_generation: Option<String>,
    model: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with lora_name")]
struct UnloadRequest {
    lora_name: String,
    expected_generation: Option<String>,
}

/// `POST /v1/load_lora_adapter`.
pub(crate) async fn load(
    State(app): State<App>,
    Payload(body): Payload,
) -> Result<Json<Value>, ApiError> {
    let request: LoadRequest = parse(&body)?;
    let outcome = detached(async move {
        let outcome = load_confined(&app, &request).await;
        app.metrics.load(match &outcome {
            Ok(_) => "success",
            Err(error) if error.is_server_error() => "failure",
            Err(_) => "refused",
        });
        outcome
    });
    let lease = outcome.await?;
    Ok(Json(json!({
        "status": "success",
        "lora_name": lease.name,
        "generation": lease.hash,
        "parent": lease.parent,
        "weight_bytes": lease.weight_bytes(),
    })))
}

async fn load_confined(app: &App, request: &LoadRequest) -> Result<Lease, ApiError> {
    let root = app
        .adapter_root
        .as_ref()
        .ok_or_else(|| ApiError::internal("there is no adapter root"))?;
    let source = confine(root, &request.lora_path)?;
    let load = AdapterLoad {
        name: &request.lora_name,
        source: &source,
        model: request.model.as_deref(),
        in_place: request.load_inplace,
        expected: request.expected_generation.as_deref(),
    };
    app.registry
        .load_adapter(load)
        .await
        .map_err(|error| ApiError::below(root, error))
}

/// Runs `work` to its end even if the client leaves: half a change is none that anybody asked for.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let work: Pin<Box<dyn Future<Output = _> + Send>> = match RequestContext::current() {
        Some(context) => Box::pin(context.scope(work)),
        None => Box::pin(work),
    };
    tokio::spawn(work)
        .await
        .map_err(|error| ApiError::internal(error.to_string()))?
}

/// `POST /v1/unload_lora_adapter`.
pub(crate) async fn unload(
    State(app): State<App>,
    Payload(body): Payload,
) -> Result<Json<Value>, ApiError> {
    let request: UnloadRequest = parse(&body)?;
    app.registry
        .unload_adapter(&request.lora_name, request.expected_generation.as_deref())
        .await?;
    Ok(Json(
        json!({"status": "success", "lora_name": request.lora_name}),
    ))
}

/// `POST /v1/reload`.
pub(crate) async fn reload(State(app): State<App>) -> Result<Json<Reloaded>, ApiError> {
    let reloaded = detached(async move { app.reload().await.map_err(ApiError::from_reload) });
    Ok(Json(reloaded.await?))
}

/// `GET /v1/lora_adapters`.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    let leases = app.registry.list();
    let root = app.adapter_root.as_deref();
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
                "weight_bytes": lease.weight_bytes(),
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
    if climbs {
        return Err(outside());
    }
    let full = root.join(path).canonicalize().map_err(|_| {
        // What exists elsewhere is nobody's business.
        if path.is_absolute() && !path.starts_with(root) {
            return outside();
        }
        ApiError::invalid(
            "lora_path",
            "there is no such adapter below the adapter root",
        )
    })?;
    // Symlinks are resolved by now, so one that leaves the root shows.
    if full == root || !full.starts_with(root) {
        return Err(outside());
    }
    let unreadable = |_| ApiError::invalid("lora_path", "cannot be read as a directory");
    for entry in full.read_dir().map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        if file.is_symlink() && !file.canonicalize().is_ok_and(|file| file.starts_with(root)) {
            return Err(outside());
        }
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
        {
            std::fs::write(secret.join("file"), "").expect("written");
            std::os::unix::fs::symlink(&secret, root.join("link")).expect("linked");
            for (dir, to) in [("leaves", secret.join("file")), ("stays", root.join("a"))] {
                std::fs::create_dir(root.join(dir)).expect("created");
                std::os::unix::fs::symlink(to, root.join(dir).join("file")).expect("linked");
            }
            confine(&root, Path::new("stays")).expect("a link within the root");
        }
        for path in [
            "..",
            "../secret",
            "a/../../secret",
            "/etc",
            ".",
            "",
            "link",
            "leaves",
        ] {
            let error = confine(&root, Path::new(path)).expect_err("outside");
            assert_eq!(
                error.body()["error"]["code"],
                "outside_adapter_root",
                "{path}"
            );
        }
        std::fs::write(root.join("a/file"), "").expect("written");
        for wrong in ["a/c", "a/file"] {
            let error = confine(&root, Path::new(wrong)).expect_err("no directory");
            assert_eq!(error.body()["error"]["param"], "lora_path");
        }
    }
}
