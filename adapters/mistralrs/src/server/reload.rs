//! Reloads the configuration while the server runs: models and adapters, keys, and the certificate.

use serde::Serialize;

use super::metrics::count_outcome;
use super::registry::{Applied, blocking};
use super::tls::TlsAcceptor;
use super::{AppState, Keys};
use crate::config::ServeConfig;
use crate::error::{Error, Result};

/// Reads the configuration again. It is called on a thread that may block.
pub type ConfigSource = dyn Fn() -> Result<ServeConfig> + Send + Sync;

/// The result of a reload.
#[derive(Debug, Clone, Serialize)]
pub struct Reloaded {
    /// The changes of models and adapters.
    #[serde(flatten)]
    pub applied: Applied,
    /// Sections and keys that differ from the running configuration and need a restart.
    pub needs_restart: Vec<&'static str>,
}

impl AppState {
    /// Reads the configuration again and applies the difference. On failure nothing changes.
    ///
    /// # Errors
    /// Returns every problem of the new configuration.
    pub(crate) async fn reload(&self) -> Result<Reloaded> {
        let outcome = self.try_reload().await;
        match &outcome {
            Ok(reloaded) => {
                count_outcome(&self.metrics.reloads, "success");
                let needs_restart = &reloaded.needs_restart;
                tracing::info!(?needs_restart, "configuration read again");
            }
            Err(error) => {
                count_outcome(&self.metrics.reloads, "failure");
                tracing::error!(%error, "the new configuration is not used");
            }
        }
        outcome
    }

    async fn try_reload(&self) -> Result<Reloaded> {
        let _one_at_a_time = self.reloading.lock().await;
        let none = "the server was started without a file to read again";
        let source = self.source.get().cloned();
        let source = source.ok_or_else(|| Error::setting("configuration", none))?;
        let config = blocking(move || source()).await?;
        if config.api_keys.is_empty() && !self.address.ip().is_loopback() {
            return Err(Error::setting(
                "auth.api_keys_file",
                "needed while the server listens on an address that is reachable from outside",
            ));
        }
        // Read before any change, so that an invalid certificate changes nothing.
        let certificate = match (&self.tls, &config.tls) {
            (Some(_), Some(files)) => Some(TlsAcceptor::read(files)?),
            _ => None,
        };
        let applied = self.registry.apply(&config).await?;
        if let (Some(tls), Some(certificate)) = (&self.tls, certificate) {
            tls.replace(certificate);
        }
        let needs_restart = self.restart_reasons(&config);
        *self.keys.write() = Keys::of(&config);
        Ok(Reloaded {
            applied,
            needs_restart,
        })
    }

    fn restart_reasons(&self, new: &ServeConfig) -> Vec<&'static str> {
        let old = &self.config;
        [
            ("server.host or server.port", old.address != new.address),
            (
                "server.allowed_origins",
                old.allowed_origins != new.allowed_origins,
            ),
            (
                "server.ui or server.examples",
                (old.ui, &old.examples) != (new.ui, &new.examples),
            ),
            ("server.tls_cert", self.tls.is_some() != new.tls.is_some()),
            ("runtime.max_memory_mb", old.max_memory != new.max_memory),
            ("limits", old.limits != new.limits),
            ("admin", old.adapter_root != new.adapter_root),
        ]
        .into_iter()
        .filter_map(|(section, differs)| differs.then_some(section))
        .collect()
    }
}
