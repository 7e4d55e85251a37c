//! The OpenAI-compatible server: binds, loads every model, answers, and drains when told to stop.

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

/// What every handler sees.
pub(crate) type App = Arc<AppState>;

pub(crate) struct AppState {
    registry: Registry,
    /// What it was started with; models and keys may have changed since.
    config: ServeConfig,
    keys: RwLock<Arc<Keys>>,
    /// Address that is bound; the configured port may be 0.
    address: SocketAddr,
    /// Where a changed configuration comes from.
    source: OnceLock<Arc<ConfigSource>>,
    reloading: Mutex<()>,
    places: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    tls: Option<Arc<TlsAcceptor>>,
    draining: AtomicBool,
    /// Becomes true when the time to drain is over: answers then end where they are.
    cut: watch::Sender<bool>,
}

/// Who may ask.
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

/// A server that has its address and its models, and waits to be run.
pub struct Server {
    listener: TcpListener,
    app: App,
}

impl Server {
    /// Binds the address, waiting up to 3 s for a port in use, then loads every model and adapter of `config`.
    ///
    /// Must be called on a multi-threaded runtime.
    ///
    /// # Errors
    /// [`Error::Problem`] before anything is loaded; otherwise the first model's or adapter's error.
    pub async fn start(config: &ServeConfig) -> Result<Self> {
        // A worker of a distributed model listens to its first process only, and must not take that one's port.
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

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.app.address
    }

    /// Takes `source` for where SIGHUP and `POST /v1/reload` find the configuration to change to.
    #[must_use]
    pub fn with_source(self, source: Arc<ConfigSource>) -> Self {
        // A second one is not expected; the first stays.
        self.app.source.get_or_init(|| source);
        self
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

    /// Answers until `stop` completes, then lets requests in flight finish, for at most `limits.drain_timeout_s`.
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

/// Serves `config` until SIGTERM or an interrupt from the keyboard, on a runtime of its own.
///
/// `ready` is called with the address once every model is loaded. The first signal drains, a second one ends at once.
/// With a `source`, SIGHUP reads the configuration again.
///
/// # Errors
/// Those of [`Server::start`]; [`Error::Problem`], whose exit code is 130, after a second signal.
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
        // Listening for signals starts before loading, so that a stop during a long load is not lost.
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
            // A dropped sender is as good as a message.
            let _ = receiver.await;
        });
        tokio::pin!(running);
        let reloading = async {
            match &mut hangups {
                Some(hangups) => loop {
                    hangups.next().await;
                    // The outcome is in the log.
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
