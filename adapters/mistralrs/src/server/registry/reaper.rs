//! The removal of engines that nobody needs any more.

use std::sync::{Weak, mpsc};
use std::time::{Duration, Instant};

use mistralrs_core::MistralRs;

use super::memory::Reservation;
use crate::error::{Error, Result};
use crate::loader::WeakPipeline;

/// What freeing the weights may take once nobody holds them: a count of zero says that the destructor begins.
const DESTRUCTION: Duration = Duration::from_millis(200);

/// A generation that nobody needs any more.
pub(super) struct Retired {
    pub(super) engine_id: String,
    pub(super) pipeline: WeakPipeline,
    /// Counted as in use until the weights are gone.
    pub(super) _memory: Option<Reservation>,
}

impl Retired {
    /// Whether the engine, which ends at its next step, or the destructor of its weights may still be at it; `released` is when
    /// nobody held the weights any more.
    fn is_in_memory(&self, released: &mut Option<Instant>) -> bool {
        if self.pipeline.strong_count() > 0 {
            return true;
        }
        let is_gone = released.get_or_insert_with(Instant::now).elapsed() >= DESTRUCTION;
        if is_gone {
            tracing::info!(engine_id = self.engine_id, "engine removed");
        }
        !is_gone
    }
}

/// Removes engines whose last lease has gone, on a thread of its own: removal blocks, which a task must not do.
#[derive(Clone)]
pub(super) struct Reaper(mpsc::Sender<Retired>);

impl Reaper {
    pub(super) fn spawn(host: Weak<MistralRs>) -> Result<Self> {
        let (sender, receiver) = mpsc::channel::<Retired>();
        std::thread::Builder::new()
            .name("engine-reaper".to_owned())
            .spawn(move || {
                let mut leaving = Vec::new();
                loop {
                    let retired = if leaving.is_empty() {
                        receiver
                            .recv()
                            .map_err(|_| mpsc::RecvTimeoutError::Disconnected)
                    } else {
                        receiver.recv_timeout(DESTRUCTION)
                    };
                    let Some(host) = host.upgrade() else {
                        return;
                    };
                    match retired {
                        Ok(retired) => match host.remove_model(&retired.engine_id) {
                            Ok(()) => leaving.push((retired, None)),
                            Err(error) => {
                                tracing::debug!(retired.engine_id, error, "engine kept");
                            }
                        },
                        Err(mpsc::RecvTimeoutError::Timeout) => {
                            leaving
                                .retain_mut(|(retired, released)| retired.is_in_memory(released));
                        }
                        Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    }
                }
            })
            .map_err(|error| Error::Engine(format!("cannot start a thread: {error}")))?;
        Ok(Self(sender))
    }

    pub(super) fn remove(&self, retired: Retired) {
        // With the reaper gone the whole host is going.
        let _ = self.0.send(retired);
    }
}
