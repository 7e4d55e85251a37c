//! Batches on a CPU, which mistral.rs 0.8.1 decodes wrongly.

use std::sync::Arc;

use candle_core::DeviceLocation;
use tokio::sync::Semaphore;

/// The one turn at an engine on `device`, to be held while it works on a request; none where it may take several at a time.
///
/// Its attention for single queries (`flash_attn_cpu_single_q`) has scratch space for every head but not for every sequence, so
/// all sequences get the attention of the last one. Its scheduler does not keep to `max_seqs` when waiting sequences take over,
/// so the turn is taken before it.
pub(crate) fn turns(device: DeviceLocation) -> Option<Arc<Semaphore>> {
    (device == DeviceLocation::Cpu).then(|| Arc::new(Semaphore::new(1)))
}
