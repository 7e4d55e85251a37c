//! Batches that mistral.rs 0.8.1 decodes wrongly or not at all.

use std::sync::Arc;

use candle_core::DeviceLocation;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// The turns at one engine. A request holds one while the engine works on it.
///
/// On a CPU there is one turn. The attention for single queries (`flash_attn_cpu_single_q`) has scratch space per head
/// but not per sequence, so all sequences of a batch get the attention of the last one. The scheduler exceeds
/// `max_seqs` when waiting sequences take over, so the turn is taken before the scheduler.
///
/// On other devices there are many turns, and a request for raw logits takes all of them. The engine asserts that
/// either all sequences of a batch ask for raw logits or none does, and panics otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    free: Arc<Semaphore>,
    all: u32,
}

/// More than the possible number of requests.
const MANY: u32 = 1 << 20;

impl Turns {
    pub(crate) fn new(device: DeviceLocation) -> Self {
        let all = if device == DeviceLocation::Cpu {
            1
        } else {
            MANY
        };
        let free = Arc::new(Semaphore::new(all as usize));
        Self { free, all }
    }

    /// Whether the engine takes one request at a time.
    pub(crate) fn one_by_one(&self) -> bool {
        self.all == 1
    }

    /// Takes a turn; with `alone`, takes all turns, so that nobody else has one.
    pub(crate) async fn take(&self, alone: bool) -> Result<OwnedSemaphorePermit, AcquireError> {
        let n = if alone { self.all } else { 1 };
        self.free.clone().acquire_many_owned(n).await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_cpu_has_one_turn_and_raw_logits_are_computed_alone() {
        let taken = |turns: &Turns, alone| turns.take(alone).now_or_never().map(Result::ok);
        let cpu = Turns::new(DeviceLocation::Cpu);
        let first = taken(&cpu, false);
        assert!(cpu.one_by_one() && first.is_some() && taken(&cpu, false).is_none());
        let gpu = Turns::new(DeviceLocation::Cuda { gpu_id: 0 });
        let both = (taken(&gpu, false), taken(&gpu, false));
        assert!(both.0.is_some() && both.1.is_some() && taken(&gpu, true).is_none());
        drop(both);
        let alone = taken(&gpu, true);
        assert!(alone.is_some() && taken(&gpu, false).is_none());
    }
}
