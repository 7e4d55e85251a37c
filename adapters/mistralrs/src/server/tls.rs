//! HTTPS: reads certificate and key from PEM files, and reloads them without dropping a connection.

use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::Accept;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsFiles;
use crate::error::{Error, Result};

/// Accepts TLS 1.2 and 1.3 with the certificate that was read last.
pub(crate) struct TlsAcceptor(RwLock<tokio_rustls::TlsAcceptor>);

impl TlsAcceptor {
    /// Reads certificate and key.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] for a file that is not PEM or a key that does not belong to the certificate, and
    /// [`Error::Io`] for a file that cannot be read.
    pub(crate) fn read(files: &TlsFiles) -> Result<Self> {
        Ok(Self(RwLock::new(server_config(files)?.into())))
    }

    /// Uses the certificate of `fresh` for new connections.
    pub(crate) fn replace(&self, fresh: Self) {
        *self.0.write() = fresh.0.into_inner();
    }

    pub(crate) fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> Accept<S> {
        self.0.read().accept(stream)
    }
}

fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let bad = |path: &Path, message: String| Error::config(path, message);
    let cert = std::fs::read(&files.cert).map_err(Error::io("read", &files.cert))?;
    let key = std::fs::read(&files.key).map_err(Error::io("read", &files.key))?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&cert)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(&files.cert, format!("not a PEM certificate chain: {error}")))?;
    if chain.is_empty() {
        return Err(bad(&files.cert, "holds no certificate".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_slice(&key)
        .map_err(|error| bad(&files.key, format!("holds no PEM private key: {error}")))?;
    // Two providers may be compiled in, so the provider is set here and not by the process default.
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| bad(&files.cert, format!("cannot be used with its key: {error}")))?;
    // Not h2: refusing a request before its body is read resets the stream in h2, and clients report the reset instead
    // of the answer.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
