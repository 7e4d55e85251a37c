//! `POST /v1/load_lora_adapter`: loads an adapter at run time, confined to the adapter root.

use std::path::{Component, Path, PathBuf};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{detached, parse};
use crate::server::App;
use crate::server::api_error::{ApiError, without_paths_in};
use crate::server::guard::Payload;
use crate::server::metrics::count_outcome;
use crate::server::registry::{AdapterLoad, Lease};

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

pub(super) async fn handle(
    State(app): State<App>,
    Payload(body): Payload,
) -> Result<Json<Value>, ApiError> {
    let request: LoadRequest = parse(&body)?;
    let outcome = detached(async move {
        let outcome = load_confined(&app, &request).await;
        let how = match &outcome {
            Ok(_) => "success",
            Err(error) if error.is_server_error() => "failure",
            Err(_) => "refused",
        };
        count_outcome(&app.metrics.adapter_loads, how);
        outcome
    });
    let lease = outcome.await?;
    Ok(Json(json!({
        "status": "success",
        "lora_name": lease.name,
        "generation": lease.hash,
        "parent": lease.parent,
        "weight_bytes": lease.weight_bytes(),
        "warnings": lease.warnings().iter().map(without_paths_in).collect::<Vec<_>>(),
    })))
}

async fn load_confined(app: &App, request: &LoadRequest) -> Result<Lease, ApiError> {
    let root = app.config.adapter_root.as_ref();
    let root = root.ok_or_else(|| ApiError::internal("there is no adapter root"))?;
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
        .map_err(|error| ApiError::below(root, &error))
}

/// Returns the canonical form of `path` if it is below the canonical `root`.
fn confine(root: &Path, path: &Path) -> Result<PathBuf, ApiError> {
    let outside = || {
        ApiError::new(
            StatusCode::FORBIDDEN,
            "outside_adapter_root",
            "lora_path must lie below the adapter root",
        )
    };
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(outside());
    }
    let full = root.join(path).canonicalize().map_err(|_| {
        // The error does not reveal what exists elsewhere.
        if path.is_absolute() && !path.starts_with(root) {
            return outside();
        }
        let message = "there is no such adapter below the adapter root";
        ApiError::invalid("lora_path", message)
    })?;
    // Symlinks are resolved at this point, so a symlink that leaves the root is found.
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
