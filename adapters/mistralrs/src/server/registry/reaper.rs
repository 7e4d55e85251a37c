//! The thread that removes models from engines when nothing needs them any more.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::memory::Reservation;
use super::scored::Scored;
use super::slots::{Occupied, Slots};
use crate::error::{Error, Result};
use crate::loader::WeakPipeline;

/// Time that freeing the weights may take after the last reference is gone. A count of zero means that the destructor
/// begins.
const DESTRUCTION: Duration = Duration::from_millis(200);

/// Interval between checks for superfluous idle engines.
const LOOK: Duration = Duration::from_secs(5);

/// A generation that nothing needs any more.
pub(super) struct Retired {
    pub(super) name: String,
    pub(super) generation: String,
    pub(super) engine: Occupied,
    pub(super) scored: Option<Scored>,
    /// Counts as in use until the weights are freed.
    pub(super) memory: Option<Reservation>,
}

/// A model whose engine does not release it, so the model is freed when the engine ends.
struct Leaving {
    pipeline: WeakPipeline,
    /// When the last reference to the weights was dropped.
    released: Option<Instant>,
    _memory: Option<Reservation>,
}

impl Leaving {
    /// Whether the engine, which ends at its next step, or the destructor of the weights may still hold memory.
    fn is_in_memory(&mut self) -> bool {
        if self.pipeline.strong_count() > 0 {
            return true;
        }
        self.released.get_or_insert_with(Instant::now).elapsed() < DESTRUCTION
    }
}

/// Removes the model from engines whose last lease is gone. It blocks, so it runs on its own thread and not in a task.
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
        // If the reaper has ended, all engines are ending.
        let _ = self.0.send(retired);
    }
}

/// Frees the model of `retired` and returns its engine to the idle `slots`. Returns the model if it cannot be freed at
/// once.
fn empty(retired: Retired, slots: &Slots) -> Option<Leaving> {
    let (name, generation) = (retired.name, retired.generation);
    drop(retired.scored);
    match retired.engine.vacate() {
        Ok(slot) => {
            // The memory is freed before the engine is available: the next model may need the memory.
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
