//! The signals of the operating system that the server handles.

use crate::error::{Error, Result};

/// A set of signals with the same meaning.
pub(super) struct Signals {
    #[cfg(unix)]
    each: Vec<tokio::signal::unix::Signal>,
    #[cfg(not(unix))]
    ctrl_c: bool,
}

#[cfg(unix)]
impl Signals {
    /// The signals to stop: SIGTERM, and SIGINT from the keyboard.
    pub(super) fn of_stop() -> Result<Self> {
        use tokio::signal::unix::SignalKind;
        Self::of(&[SignalKind::terminate(), SignalKind::interrupt()])
    }

    /// The signal to reload the configuration: SIGHUP.
    pub(super) fn of_reload() -> Result<Self> {
        Self::of(&[tokio::signal::unix::SignalKind::hangup()])
    }

    fn of(kinds: &[tokio::signal::unix::SignalKind]) -> Result<Self> {
        let each: std::io::Result<_> = kinds
            .iter()
            .map(|kind| tokio::signal::unix::signal(*kind))
            .collect();
        let each =
            each.map_err(|error| Error::Engine(format!("cannot listen for signals: {error}")))?;
        Ok(Self { each })
    }

    /// Completes when the next signal of the set arrives.
    pub(super) async fn next(&mut self) {
        let each = self.each.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures::future::select_all(each).await;
    }
}

#[cfg(not(unix))]
impl Signals {
    /// The signal to stop: ctrl-c.
    pub(super) fn of_stop() -> Result<Self> {
        Ok(Self { ctrl_c: true })
    }

    /// There is no such signal on this system.
    pub(super) fn of_reload() -> Result<Self> {
        Ok(Self { ctrl_c: false })
    }

    /// Completes when the next signal of the set arrives.
    pub(super) async fn next(&mut self) {
        // Without a handler the only way to stop is the task manager, which needs none.
        if !self.ctrl_c || tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
