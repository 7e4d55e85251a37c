//! The listening socket, and the wait for a port that is in use.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use crate::error::{Error, Result, code};

/// Time to wait for a port that is in use: a supervisor may start the next process while the previous one closes.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Binds `address`. While its port is in use, it tries again for `patience`.
///
/// # Errors
/// Returns [`code::LISTEN`] with the address and, if the port stays in use, the remedy. Other errors are returned at
/// once.
pub(super) async fn bind(address: SocketAddr, patience: Duration) -> Result<TcpListener> {
    let start = Instant::now();
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error)
                if error.kind() == std::io::ErrorKind::AddrInUse && start.elapsed() < patience =>
            {
                if !told {
                    tracing::warn!(
                        "{address} is in use; trying again for {} s",
                        patience.as_secs_f32()
                    );
                    told = true;
                }
                sleep(PAUSE).await;
            }
            Err(error) => return Err(listen_error(address, &error)),
        }
    }
}

/// Makes the error for an `address` that cannot be bound.
pub(super) fn listen_error(address: SocketAddr, error: &std::io::Error) -> Error {
    let message = match error.kind() {
        std::io::ErrorKind::AddrInUse => format!(
            "port {} is in use; stop the other program, or choose another port with --port",
            address.port()
        ),
        _ => error.to_string(),
    };
    let message = format!("cannot listen on {address}: {message}");
    Error::refused(code::LISTEN, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn taken() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        (listener, address)
    }

    #[tokio::test]
    async fn a_port_that_becomes_free_is_taken() {
        let (former, address) = taken().await;
        let next = tokio::spawn(bind(address, Duration::from_secs(10)));
        sleep(Duration::from_millis(300)).await;
        assert!(!next.is_finished(), "the port is still the former's");
        drop(former);
        let listener = next.await.expect("no panic").expect("bound");
        assert_eq!(listener.local_addr().expect("bound"), address);
    }

    #[tokio::test]
    async fn a_port_that_stays_taken_is_named_with_the_remedy() {
        let (_former, address) = taken().await;
        let start = Instant::now();
        let patience = Duration::from_millis(300);
        let error = bind(address, patience).await.expect_err("taken");
        assert!(start.elapsed() >= patience, "{:?}", start.elapsed());
        let text = error.to_string();
        let port = format!("port {} is in use", address.port());
        assert!(text.contains(&port) && text.contains("--port"), "{text}");
    }
}
