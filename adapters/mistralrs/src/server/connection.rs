//! Connections: accepting, HTTPS, time limits, and draining.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, EXPECT, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutWriter;

use super::metrics::{Counted, Metrics};
use super::phases::{Phased, Phases, SharedBody, UntilIdle};
use super::tls::TlsAcceptor;
use crate::config::LimitsSection;

/// Pause after an error of accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time to send an error to clients whose answers are cut.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Address of the client, as a request extension.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

pub(crate) struct Acceptor {
    pub(crate) listener: TcpListener,
    pub(crate) router: Router,
    pub(crate) tls: Option<Arc<TlsAcceptor>>,
    pub(crate) limits: Arc<LimitsSection>,
    pub(crate) metrics: Arc<Metrics>,
    /// Becomes true when the time to drain is over.
    pub(crate) cut: watch::Sender<bool>,
}

impl Acceptor {
    /// Answers requests until `stop` completes, then lets running requests finish, for at most the drain limit.
    ///
    /// Returns the number of connections that had to be cut.
    pub(crate) async fn run(self, stop: impl Future<Output = ()>) -> usize {
        let limits = &self.limits;
        let (stopping, stopped) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(limits.max_connections));
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let accepted = async {
                // The semaphore is never closed.
                let slot = slots.clone().acquire_owned().await.ok();
                (slot, self.listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                () = &mut stop => break,
                accepted = accepted => accepted,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = Connection {
                service: TowerToHyperService::new(self.router.clone()),
                peer,
                limits: limits.clone(),
                stopped: stopped.clone(),
            };
            let (tls, counted) = (self.tls.clone(), Counted::new(&self.metrics.connections));
            connections.spawn(async move {
                let _held = (slot, counted);
                connection.serve(stream, tls.as_deref()).await;
            });
        }
        drop(self.listener);
        // Receivers that are gone have nothing to stop.
        let _ = stopping.send(true);
        let drained = async { while connections.join_next().await.is_some() {} };
        if timeout(Duration::from_secs(limits.drain_timeout_s), drained)
            .await
            .is_ok()
        {
            return 0;
        }
        let n_cut = connections.len();
        self.cut.send_replace(true);
        let told = async { while connections.join_next().await.is_some() {} };
        if timeout(LAST_WORDS, told).await.is_err() {
            connections.shutdown().await;
        }
        n_cut
    }
}

struct Connection {
    service: TowerToHyperService<Router>,
    peer: SocketAddr,
    limits: Arc<LimitsSection>,
    stopped: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(self, stream: TcpStream, tls: Option<&TlsAcceptor>) {
        let peer = self.peer;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "cannot turn off Nagle's algorithm");
        }
        let stream = with_write_timeout(stream, Duration::from_secs(self.limits.write_timeout_s));
        let Some(tls) = tls else {
            return self.http1(stream).await;
        };
        match timeout(
            Duration::from_secs(self.limits.header_timeout_s),
            tls.accept(stream),
        )
        .await
        {
            Ok(Ok(stream)) => self.http1(stream).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
        }
    }

    async fn http1(mut self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let (peer, limits) = (self.peer, &self.limits);
        let phases = Phases::new(
            Duration::from_secs(limits.header_timeout_s),
            Duration::from_secs(limits.keep_alive_timeout_s),
        );
        let stream = Phased::new(stream, phases.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            phases.answer();
            let is_waiting = request.headers().contains_key(EXPECT);
            let mut request = request.map(SharedBody::new);
            let mut body = request.body().clone();
            // Tells the router the address of the client.
            request.extensions_mut().insert(Peer(peer));
            let (answer, phases) = (self.service.call(request), phases.clone());
            async move {
                let mut response = answer.await?;
                if !body.is_used_up(is_waiting).await {
                    phases.leave_unread();
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, Infallible>(response.map(|body| UntilIdle { body, phases }))
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // hyper has a single limit for request heads and for pauses between requests.
            .header_read_timeout(None)
            .max_buf_size(limits.max_header_bytes)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let outcome = tokio::select! {
            outcome = connection.as_mut() => outcome,
            () = told_to_stop(&mut self.stopped) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%peer, %error, "connection ended early");
        }
    }
}

async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    // A dropped sender means the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Wraps `stream` so that writes fail if the other end has not read for `limit`.
fn with_write_timeout<S: AsyncWrite>(stream: S, limit: Duration) -> Pin<Box<TimeoutWriter<S>>> {
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(limit));
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_write_that_nobody_reads_fails_after_the_limit_and_one_that_is_read_does_not() {
        let (near, mut far) = tokio::io::duplex(16);
        let mut stream = with_write_timeout(near, Duration::from_millis(50));
        stream.write_all(&[0; 16]).await.expect("there is room");
        let error = stream.write_all(&[0; 1]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);

        let (near, reader) = tokio::io::duplex(16);
        let mut stream = with_write_timeout(near, Duration::from_secs(5));
        let read = tokio::spawn(async move {
            let mut reader = reader;
            let mut sink = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut sink)
                .await
                .map(|_| sink.len())
        });
        stream.write_all(&[0; 1000]).await.expect("somebody reads");
        drop(stream);
        assert_eq!(read.await.expect("no panic").expect("readable"), 1000);
        far.shutdown().await.expect("still open");
    }
}
