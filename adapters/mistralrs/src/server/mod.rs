//! The OpenAI-compatible server: it binds, loads every model, answers requests, and drains when it stops.

mod admission;
pub(crate) mod answers;
pub(crate) mod api_error;
mod chat;
mod common_keys;
mod connection;
mod context;
mod effort;
mod endpoints;
pub(crate) mod fields;
mod guard;
mod job;
mod listen;
mod logprobs;
mod messages;
mod metrics;
mod phases;
mod registry;
mod reload;
mod request;
pub(crate) mod sampling;
pub(crate) mod seeded;
mod signals;
pub(crate) mod steps;
pub(crate) mod stop;
mod structured;
mod tls;
mod tools;
pub(crate) mod vocabulary;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use monteclora_converters::Problem;
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, watch};

use crate::config::ServeConfig;
use crate::error::{Error, Result, code};
use crate::keys::KeySet;
use crate::quirks_0_8::logger_threads::threads_of_a_server;
use crate::quirks_0_8::split_models::is_worker;
use connection::Acceptor;
use metrics::Metrics;
use registry::Registry;
pub use registry::{Applied, generation_of};
pub use reload::{ConfigSource, Reloaded};
use signals::Signals;
use tls::TlsAcceptor;

/// The state that every handler gets.
pub(crate) type App = Arc<AppState>;

pub(crate) struct AppState {
    registry: Registry,
    /// The configuration at the start; models and keys may have changed since.
    config: ServeConfig,
    keys: RwLock<Arc<Keys>>,
    /// The bound address; the configured port may be 0.
    address: SocketAddr,
    /// Where a reload reads the new configuration.
    source: OnceLock<Arc<ConfigSource>>,
    reloading: Mutex<()>,
    places: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    tls: Option<Arc<TlsAcceptor>>,
    draining: AtomicBool,
    /// Becomes true when the time to drain is over; unfinished answers then end.
    cut: watch::Sender<bool>,
}

/// The keys that clients may use.
pub(crate) struct Keys {
    api: KeySet,
    admin: KeySet,
}

impl Keys {
    fn of(config: &ServeConfig) -> Arc<Self> {
        Arc::new(Self {
            api: config.api_keys.clone(),
            admin: config.admin_keys.clone(),
        })
    }
}

impl AppState {
    fn keys(&self) -> Arc<Keys> {
        self.keys.read().clone()
    }
}

/// A server with a bound address and loaded models, ready to run.
pub struct Server {
    listener: TcpListener,
    app: App,
}

impl Server {
    /// Binds the address, then loads every model and adapter of `config`. It waits up to 3 s for a port that is in use.
    ///
    /// Must be called on a multi-threaded runtime.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] before anything is loaded, or else the error of the first model or adapter that
    /// fails.
    pub async fn start(config: &ServeConfig) -> Result<Self> {
        // A worker of a distributed model listens only to the first process of the model, and must not take its port.
        let wanted = match is_worker() {
            true => SocketAddr::from(([127, 0, 0, 1], 0)),
            false => config.address,
        };
        let listener = listen::bind(wanted, listen::PATIENCE).await?;
        let address = listener
            .local_addr()
            .map_err(|error| listen::listen_error(config.address, &error))?;
        let tls = config.tls.as_ref().map(TlsAcceptor::read).transpose()?;
        let registry = Registry::load(config).await?;
        let app = AppState {
            registry,
            keys: RwLock::new(Keys::of(config)),
            config: config.clone(),
            address,
            source: OnceLock::new(),
            reloading: Mutex::new(()),
            places: Arc::new(Semaphore::new(config.limits.max_concurrent_requests)),
            metrics: Arc::new(Metrics::new()),
            tls: tls.map(Arc::new),
            draining: AtomicBool::new(false),
            cut: watch::Sender::new(false),
        };
        Ok(Self {
            listener,
            app: Arc::new(app),
        })
    }

    /// The address on which the server listens.
    pub fn address(&self) -> SocketAddr {
        self.app.address
    }

    /// Sets the source from which SIGHUP and `POST /v1/reload` read the new configuration.
    #[must_use]
    pub fn with_source(self, source: Arc<ConfigSource>) -> Self {
        // A second call is not expected; the first source stays.
        self.app.source.get_or_init(|| source);
        self
    }

    /// Applies `config`: loads what is new or has changed, removes what is gone, and leaves the rest alone.
    ///
    /// Running requests finish on the models they began with. Address, keys and limits stay as they were at the start.
    ///
    /// # Errors
    /// Returns every problem of the new configuration; the served models are then unchanged.
    pub async fn apply(&self, config: &ServeConfig) -> Result<Applied> {
        self.app.registry.apply(config).await
    }

    /// Answers requests until `stop` completes, then lets running requests finish, for at most
    /// `limits.drain_timeout_s`.
    pub async fn run_until(self, stop: impl Future<Output = ()> + Send + 'static) {
        let Self { listener, app } = self;
        let acceptor = Acceptor {
            listener,
            router: endpoints::router(app.clone()),
            tls: app.tls.clone(),
            limits: Arc::new(app.config.limits.clone()),
            metrics: app.metrics.clone(),
            cut: app.cut.clone(),
        };
        let stopping = async {
            stop.await;
            app.draining.store(true, Ordering::SeqCst);
            tracing::info!("stopping; waiting for requests in flight");
        };
        let n_cut = acceptor.run(stopping).await;
        if n_cut > 0 {
            let limit = app.config.limits.drain_timeout_s;
            tracing::warn!(n_cut, "connections still busy after {limit} s are cut");
        }
    }
}

/// Serves `config` until SIGTERM or a keyboard interrupt, on its own runtime.
///
/// `ready` is called with the address once every model is loaded. The first signal starts to drain, a second signal
/// ends at once. With a `source`, SIGHUP reads the configuration again.
///
/// # Errors
/// Returns an error as [`Server::start`], or [`Error::Problem`] with exit code 130 after a second signal.
pub fn serve(
    config: &ServeConfig,
    source: Option<Arc<ConfigSource>>,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let runtime = threads_of_a_server(&mut tokio::runtime::Builder::new_multi_thread())
        .enable_all()
        .build()
        .map_err(|error| Error::Engine(format!("cannot start a runtime: {error}")))?;
    let outcome: Result<()> = runtime.block_on(async {
        // Signals are handled before loading starts, so that a stop during a long load is not lost.
        let mut signals = Signals::of_stop()?;
        let mut hangups = source.as_ref().map(|_| Signals::of_reload()).transpose()?;
        let mut server = tokio::select! {
            server = Server::start(config) => server?,
            () = signals.next() => return Ok(()),
        };
        if let Some(source) = source {
            server = server.with_source(source);
        }
        let app = server.app.clone();
        ready(server.address());
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let running = server.run_until(async move {
            // A dropped sender has the same effect as a message.
            let _ = receiver.await;
        });
        tokio::pin!(running);
        let reloading = async {
            match &mut hangups {
                Some(hangups) => loop {
                    hangups.next().await;
                    // The log has the outcome.
                    let _ = app.reload().await;
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = &mut running => return Ok(()),
            () = signals.next() => drop(sender),
            () = reloading => {}
        }
        tokio::select! {
            () = running => Ok(()),
            () = signals.next() => {
                let message = "stopped by a second signal while requests were in flight";
                Err(Problem::sentence(code::INTERRUPTED, message).exit(130).into())
            }
        }
    });
    let grace = match &outcome {
        Err(error) if error.code() == code::INTERRUPTED => Duration::ZERO,
        _ => Duration::from_secs(5),
    };
    runtime.shutdown_timeout(grace);
    outcome
}
