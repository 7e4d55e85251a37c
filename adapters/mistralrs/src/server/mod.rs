//! The OpenAI-compatible server: binds, loads every model, answers, and drains when told to stop.

mod admin;
mod answer;
mod chat;
mod completions;
mod models;
mod registry;
mod request;
mod stream;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::config::ServeConfig;
use crate::error::{Error, Result};
use crate::keys::KeySet;
use answer::ApiError;
pub use registry::Applied;
use registry::Registry;

/// Largest request body, in bytes.
const BODY_LIMIT: usize = 8 << 20;

/// How long requests in flight may take after the signal to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);

/// What every handler sees.
#[derive(Clone)]
pub(crate) struct App {
    registry: Arc<Registry>,
    api_keys: Arc<KeySet>,
    admin_keys: Arc<KeySet>,
    adapter_root: Option<Arc<std::path::PathBuf>>,
    draining: Arc<AtomicBool>,
}

/// A server that has its address and its models, and waits to be run.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: App,
}

impl Server {
    /// Binds the address, then loads every model and adapter of `config`.
    ///
    /// Must be called on a multi-threaded runtime.
    ///
    /// # Errors
    /// [`Error::Listen`] before anything is loaded; otherwise the first model's or adapter's error.
    pub async fn start(config: &ServeConfig) -> Result<Self> {
        let listener = TcpListener::bind(config.address)
            .await
            .map_err(|error| listen_error(config.address, &error))?;
        let address = listener
            .local_addr()
            .map_err(|error| listen_error(config.address, &error))?;
        let registry = Registry::load(config).await?;
        let app = App {
            registry: Arc::new(registry),
            api_keys: Arc::new(config.api_keys.clone()),
            admin_keys: Arc::new(config.admin_keys.clone()),
            adapter_root: config.adapter_root.clone().map(Arc::new),
            draining: Arc::new(AtomicBool::new(false)),
        };
        Ok(Self {
            listener,
            address,
            app,
        })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves what `config` says from now on: loads what is new or has changed, removes what is gone, leaves the rest alone.
    ///
    /// Requests in flight finish on what they began with. Address, keys and limits stay as they were at the start.
    ///
    /// # Errors
    /// Every problem of the new configuration; what is served is then unchanged.
    pub async fn apply(&self, config: &ServeConfig) -> Result<Applied> {
        self.app.registry.apply(config).await
    }

    /// Answers until `stop` completes, then lets requests in flight finish.
    ///
    /// # Errors
    /// [`Error::Listen`] if the socket fails.
    pub async fn run_until(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let Self {
            listener,
            address,
            app,
        } = self;
        let stopping = Arc::new(Notify::new());
        let draining = app.draining.clone();
        let stopped = stopping.clone();
        let signal = async move {
            stop.await;
            draining.store(true, Ordering::SeqCst);
            tracing::info!("stopping; waiting for requests in flight");
            stopped.notify_one();
        };
        let serving = axum::serve(listener, router(app)).with_graceful_shutdown(signal);
        let limit = async {
            stopping.notified().await;
            tokio::time::sleep(DRAIN_LIMIT).await;
        };
        tokio::select! {
            done = serving => done.map_err(|error| listen_error(address, &error)),
            () = limit => {
                tracing::warn!("requests still in flight after {DRAIN_LIMIT:?} are cut");
                Ok(())
            }
        }
    }
}

/// Serves `config` until SIGTERM or an interrupt from the keyboard, on a runtime of its own.
///
/// `ready` is called with the address once every model is loaded.
///
/// # Errors
/// Those of [`Server::start`] and [`Server::run_until`].
pub fn serve(config: &ServeConfig, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Engine(format!("cannot start a runtime: {error}")))?;
    let outcome = runtime.block_on(async {
        // Listening for signals starts before loading, so that a stop during a long load is not lost.
        let stop = stop_signal()?;
        tokio::pin!(stop);
        let server = tokio::select! {
            server = Server::start(config) => server?,
            () = &mut stop => return Ok(()),
        };
        ready(server.address());
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let running = server.run_until(async move {
            // A dropped sender is as good as a message.
            let _ = receiver.await;
        });
        tokio::pin!(running);
        tokio::select! {
            outcome = &mut running => return outcome,
            () = &mut stop => drop(sender),
        }
        running.await
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

#[cfg(unix)]
fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let watch = |kind| {
        signal(kind).map_err(|error| Error::Engine(format!("cannot listen for signals: {error}")))
    };
    let mut terminate = watch(SignalKind::terminate())?;
    let mut interrupt = watch(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> Result<impl Future<Output = ()>> {
    Ok(async {
        // Without a handler the only way to stop is the task manager, which needs none.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}

fn listen_error(address: SocketAddr, error: &std::io::Error) -> Error {
    let message = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "the port is in use; stop the other program, or choose another port with --port"
                .to_owned()
        }
        _ => error.to_string(),
    };
    Error::Listen {
        address: address.to_string(),
        message,
    }
}

/// Every route there is: mistral.rs's own router, with its unguarded administration, is not mounted.
fn router(app: App) -> Router {
    let inference = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .layer(from_fn_with_state(app.clone(), require_key));
    let mut router = inference;
    if app.adapter_root.is_some() {
        let admin = Router::new()
            .route("/v1/load_lora_adapter", post(admin::load))
            .route("/v1/unload_lora_adapter", post(admin::unload))
            .route("/v1/lora_adapters", get(admin::list))
            .layer(from_fn_with_state(app.clone(), require_admin_key));
        router = router.merge(admin);
    }
    router
        .route("/healthz", get(models::healthz))
        .route("/readyz", get(models::readyz))
        .fallback(|| async {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "not_found",
                "there is no such endpoint",
            )
        })
        .method_not_allowed_fallback(|| async {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this endpoint takes another method",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(app)
}

async fn require_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let key = bearer(&request);
    let known = |key: &str| app.api_keys.holds(key) || app.admin_keys.holds(key);
    if app.api_keys.is_empty() || key.is_some_and(known) {
        Ok(next.run(request).await)
    } else {
        Err(ApiError::unauthorized())
    }
}

async fn require_admin_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let key = bearer(&request);
    // Without any key the server is on loopback, and whoever reaches it is its operator.
    let open = app.admin_keys.is_empty() && app.api_keys.is_empty();
    if open || key.is_some_and(|key| app.admin_keys.holds(key)) {
        Ok(next.run(request).await)
    } else {
        Err(ApiError::unauthorized())
    }
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request
        .headers()
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}
