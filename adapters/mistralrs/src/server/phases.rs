//! The phases of a connection: the time for a request's head, the time between two requests, and closing with an unread
//! body.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Maximum number of bytes of an unread body that are read and dropped, so that the connection can take the next
/// request.
const SMALL_REST: usize = 64 << 10;

/// Time for such a rest of a body to arrive.
const REST_PATIENCE: Duration = Duration::from_millis(200);

/// Time for which a connection that closes with an unread body continues to read. Otherwise a client that still sends
/// would get a connection reset and lose the answer.
const LINGER: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The head of a request must be complete at this time.
    Head(Instant),
    /// A request is being answered; other limits apply.
    Busy,
    /// The connection is idle; it may stay idle until this time.
    Idle(Instant),
}

/// The phase of one connection.
pub(super) struct Phases {
    phase: Mutex<Phase>,
    head_limit: Duration,
    idle_limit: Duration,
    unread: AtomicBool,
    /// The task that tried to read while the connection was busy. hyper does not try again until it is woken.
    reader: Mutex<Option<Waker>>,
}

impl Phases {
    /// Makes the phases of a connection that was just accepted.
    pub(super) fn new(head_limit: Duration, idle_limit: Duration) -> Arc<Self> {
        Arc::new(Self {
            phase: Mutex::new(Phase::Head(Instant::now() + head_limit)),
            head_limit,
            idle_limit,
            unread: AtomicBool::new(false),
            reader: Mutex::new(None),
        })
    }

    /// Records that the head of a request is complete.
    pub(super) fn answer(&self) {
        *self.phase.lock() = Phase::Busy;
    }

    /// Records that the connection closes after the answer, with an unread body.
    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    fn rest(&self) {
        *self.phase.lock() = Phase::Idle(Instant::now() + self.idle_limit);
        if let Some(reader) = self.reader.lock().take() {
            reader.wake();
        }
    }

    fn arrived(&self) {
        let mut phase = self.phase.lock();
        if matches!(*phase, Phase::Idle(_)) {
            *phase = Phase::Head(Instant::now() + self.head_limit);
        }
    }
}

/// Wraps `stream` so that a read takes no longer than its phase allows.
pub(super) struct Phased<S> {
    stream: S,
    phases: Arc<Phases>,
    alarm: Pin<Box<Sleep>>,
    is_shut: bool,
}

impl<S> Phased<S> {
    pub(super) fn new(stream: S, phases: Arc<Phases>) -> Self {
        Self {
            stream,
            phases,
            alarm: Box::pin(sleep_until(Instant::now())),
            is_shut: false,
        }
    }

    fn poll_alarm(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        if self.alarm.deadline() != deadline {
            self.alarm.as_mut().reset(deadline);
        }
        self.alarm.as_mut().poll(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Phased<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if let Poll::Ready(outcome) = Pin::new(&mut self.stream).poll_read(cx, buffer) {
            if buffer.filled().len() > before {
                self.phases.arrived();
            }
            return Poll::Ready(outcome);
        }
        let phase = *self.phases.phase.lock();
        match phase {
            Phase::Busy => {
                *self.phases.reader.lock() = Some(cx.waker().clone());
                Poll::Pending
            }
            Phase::Head(deadline) => {
                ready!(self.poll_alarm(deadline, cx));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            // The same result as if the other end had closed.
            Phase::Idle(deadline) => self.poll_alarm(deadline, cx).map(Ok),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Phased<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.is_shut {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.is_shut = true;
            self.alarm.as_mut().reset(Instant::now() + LINGER);
        }
        if !self.phases.unread.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let mut scratch = [0; 16 << 10];
        while self.alarm.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut scratch);
            let outcome = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer));
            if outcome.is_err() || buffer.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The body of a request, shared by two holders: each sees what the other has left.
#[derive(Clone)]
pub(super) struct SharedBody(Arc<Mutex<Shared>>);

struct Shared {
    body: Incoming,
    has_ended: bool,
}

impl SharedBody {
    pub(super) fn new(body: Incoming) -> Self {
        let has_ended = false;
        Self(Arc::new(Mutex::new(Shared { body, has_ended })))
    }

    /// Reads a small rest of the body, unless the client waits to be asked for it. Returns whether nothing is left.
    pub(super) async fn is_used_up(&mut self, is_waiting: bool) -> bool {
        if self.is_end_stream() {
            return true;
        }
        let upper = self.size_hint().upper();
        if is_waiting || upper.is_some_and(|length| length > SMALL_REST as u64) {
            return false;
        }
        let rest = async {
            let mut n_read = 0;
            while n_read <= SMALL_REST {
                match std::future::poll_fn(|cx| Pin::new(&mut *self).poll_frame(cx)).await {
                    None => return true,
                    Some(Ok(frame)) => n_read += frame.data_ref().map_or(0, |data| data.len()),
                    Some(Err(_)) => return false,
                }
            }
            false
        };
        tokio::time::timeout(REST_PATIENCE, rest)
            .await
            .unwrap_or(false)
    }
}

impl Body for SharedBody {
    type Data = <Incoming as Body>::Data;
    type Error = <Incoming as Body>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut shared = self.0.lock();
        let frame = ready!(Pin::new(&mut shared.body).poll_frame(cx));
        shared.has_ended |= frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.0.lock();
        shared.has_ended || shared.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().body.size_hint()
    }
}

/// The body of an answer; after it the connection is idle.
pub(super) struct UntilIdle<B> {
    pub(super) body: B,
    pub(super) phases: Arc<Phases>,
}

impl<B: Body + Unpin> Body for UntilIdle<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for UntilIdle<B> {
    fn drop(&mut self) {
        self.phases.rest();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const HEAD: Duration = Duration::from_millis(60);
    const IDLE: Duration = Duration::from_millis(240);

    #[tokio::test]
    async fn a_head_has_less_time_than_a_pause() {
        let (near, mut far) = tokio::io::duplex(64);
        let phases = Phases::new(HEAD, IDLE);
        let mut stream = Phased::new(near, phases.clone());
        let mut bytes = [0; 8];
        let begun = Instant::now();
        let error = stream.read(&mut bytes).await.expect_err("no head came");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!((HEAD..IDLE).contains(&begun.elapsed()));

        phases.rest();
        let begun = Instant::now();
        assert_eq!(stream.read(&mut bytes).await.expect("closed"), 0);
        assert!(begun.elapsed() >= IDLE);

        phases.rest();
        far.write_all(b"G").await.expect("sent");
        assert_eq!(stream.read(&mut bytes).await.expect("read"), 1);
        let begun = Instant::now();
        stream
            .read(&mut bytes)
            .await
            .expect_err("the head goes no further");
        assert!((HEAD..IDLE).contains(&begun.elapsed()));

        phases.answer();
        let late = tokio::time::timeout(IDLE * 2, stream.read(&mut bytes));
        assert!(late.await.is_err(), "a busy connection waits");
    }

    #[tokio::test]
    async fn what_is_still_sent_is_read_before_a_connection_closes() {
        for unread in [true, false] {
            let (near, mut far) = tokio::io::duplex(16);
            let phases = Phases::new(HEAD, IDLE);
            if unread {
                phases.leave_unread();
            }
            let mut stream = Phased::new(near, phases);
            let sending = tokio::spawn(async move {
                let sent = far.write_all(&[0; 1000]).await;
                far.shutdown().await.map(|()| sent)
            });
            stream.shutdown().await.expect("closed");
            drop(stream);
            let sent = sending.await.expect("no panic").and_then(|sent| sent);
            assert_eq!(sent.is_ok(), unread);
        }
    }
}
