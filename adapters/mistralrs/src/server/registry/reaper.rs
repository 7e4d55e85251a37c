//! The thread that takes models away from engines when nobody needs them any more.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::memory::Reservation;
use super::scored::Scored;
use super::slots::{Occupied, Slots};
use crate::error::{Error, Result};
use crate::loader::WeakPipeline;

/// What freeing the weights may take once nobody holds them: a count of zero says that the destructor begins.
const DESTRUCTION: Duration = Duration::from_millis(200);

/// How often it is looked whether an idle engine has become superfluous.
const LOOK: Duration = Duration::from_secs(5);

/// A generation that nobody needs any more.
pub(super) struct Retired {
    pub(super) name: String,
    pub(super) generation: String,
    pub(super) engine: Occupied,
    pub(super) scored: Option<Scored>,
    /// Counted as in use until the weights are gone.
    pub(super) memory: Option<Reservation>,
}

/// A model whose engine does not give it away, but ends with it.
struct Leaving {
    pipeline: WeakPipeline,
    /// When nobody held the weights any more.
    released: Option<Instant>,
    _memory: Option<Reservation>,
}

impl Leaving {
    /// Whether the engine, which ends at its next step, or the destructor of its weights may still be at it.
    fn is_in_memory(&mut self) -> bool {
        if self.pipeline.strong_count() > 0 {
            return true;
        }
        self.released.get_or_insert_with(Instant::now).elapsed() < DESTRUCTION
    }
}

/// Empties engines whose last lease has gone, on a thread of its own: that blocks, which a task must not do.
#[derive(Clone)]
pub(super) struct Reaper(mpsc::Sender<Retired>);

impl Reaper {
    pub(super) fn spawn(slots: Arc<Slots>) -> Result<Self> {
        let (sender, receiver) = mpsc::channel::<Retired>();
        std::thread::Builder::new()
            .name("engine-reaper".to_owned())
            .spawn(move || {
                let mut leaving: Vec<Leaving> = Vec::new();
                let mut has_more_than_needed = false;
                loop {
                    let retired = match (leaving.is_empty(), has_more_than_needed) {
                        (false, _) => receiver.recv_timeout(DESTRUCTION),
                        (true, true) => receiver.recv_timeout(LOOK),
                        (true, false) => receiver
                            .recv()
                            .map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                    };
                    match retired {
                        Ok(retired) => leaving.extend(empty(retired, &slots)),
                        Err(mpsc::RecvTimeoutError::Timeout) => {
                            leaving.retain_mut(Leaving::is_in_memory);
                        }
                        Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    }
                    has_more_than_needed = slots.trim();
                }
            })
            .map_err(|error| Error::no_threads(&error))?;
        Ok(Self(sender))
    }

    pub(super) fn remove(&self, retired: Retired) {
        // With the reaper gone all the engines are going.
        let _ = self.0.send(retired);
    }
}

/// Frees the model of `retired` and makes its engine an idle one of `slots`; what is not free at once is returned.
fn empty(retired: Retired, slots: &Slots) -> Option<Leaving> {
    let (name, generation) = (retired.name, retired.generation);
    drop(retired.scored);
    match retired.engine.vacate() {
        Ok(slot) => {
            // Before the engine is there for the next model, which may need the memory.
            drop(retired.memory);
            slots.put(slot);
            tracing::info!(name, generation, "removed");
            None
        }
        Err(pipeline) => {
            tracing::warn!(name, generation, "removed together with its engine");
            Some(Leaving {
                pipeline,
                released: None,
                _memory: retired.memory,
            })
        }
    }
}
