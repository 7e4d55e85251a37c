//! The thread that each engine leaves behind: mistral.rs 0.8.1 starts one for the log of throughput with every engine it makes, and
//! nothing ends its loop (`IntervalLogger::new`), so that an engine for each load is a thread for each load.
//!
//! So engines are kept: one whose model is no longer needed gets another. mistral.rs has no way to do that. What an engine steps is
//! behind a lock, though, and what two locks hold can be exchanged. An engine without a model of ours has a [`placeholder`], so
//! that it holds no weights.

mod end;
mod placeholder;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mistralrs_core::Pipeline;
use tokio::sync::MutexGuard;

use crate::loader::SharedPipeline;
pub(crate) use end::end_log_of;
pub use end::{end_throughput_log, is_throughput_log, watch_throughput_logs};
pub(crate) use placeholder::{placeholder, tiny_model};

/// How long an engine without a request may step its model.
pub(crate) const LAST_STEP: Duration = Duration::from_secs(10);

/// A model that mistral.rs's `NormalLoader` or `MultimodalLoader` has loaded.
#[derive(Clone)]
pub(crate) struct NormalModel(SharedPipeline);

/// Another one held the model for too long.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotExchanged {
    /// The engine steps it, and does not come to an end.
    Busy,
    /// The two are not of one type after all.
    Unlike,
}

type Content = dyn Pipeline + Send + Sync;

impl NormalModel {
    /// # Safety
    /// `pipeline` must be what `load_model_from_path` of `NormalLoader` or `MultimodalLoader` returned.
    pub(crate) unsafe fn new(pipeline: SharedPipeline) -> Self {
        Self(pipeline)
    }

    pub(crate) fn shared(&self) -> &SharedPipeline {
        &self.0
    }

    /// Exchanges the contents of the two: whoever steps the one steps what the other was from now on. Blocking.
    ///
    /// No sequence may be in the hands of an engine of either: it would go on with another model.
    ///
    /// # Errors
    /// If either is in use for longer than `patience`.
    pub(crate) fn exchange(&self, other: &Self, patience: Duration) -> Result<(), NotExchanged> {
        let deadline = Instant::now() + patience;
        let mut first = self.lock(deadline)?;
        let mut second = other.lock(deadline)?;
        let (first, second): (&mut Content, &mut Content) = (&mut *first, &mut *second);
        let size = size_of_val(first);
        let is_alike = size == size_of_val(second) && align_of_val(first) == align_of_val(second);
        let (first, second) = (&raw mut *first, &raw mut *second);
        if !is_alike || !have_one_type(first, second) {
            return Err(NotExchanged::Unlike);
        }
        // SAFETY: By the condition of `new` each is a `NormalPipeline` or a `MultimodalPipeline`: the loaders make no other one, each
        // at one place of its source. Size, alignment and the table of methods, compared above, agree, so that both are of one
        // type. Both are `size` bytes long. They do not
        // overlap, as two locks are held, and nothing else refers to either while they are: the locks hand out no
        // reference that outlives a guard, and they are not pinned. Exchanging the bytes of two values of one type is what
        // `mem::swap` does, which any value that is not pinned bears.
        unsafe { std::ptr::swap_nonoverlapping(first.cast::<u8>(), second.cast::<u8>(), size) };
        Ok(())
    }

    fn lock(&self, deadline: Instant) -> Result<MutexGuard<'_, Content>, NotExchanged> {
        loop {
            match self.0.try_lock() {
                Ok(guard) => return Ok(guard),
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return Err(NotExchanged::Busy),
            }
        }
    }
}

/// Whether both have the methods of one type: pointers that agree in their address are equal if these agree, too.
fn have_one_type(first: *const Content, second: *const Content) -> bool {
    let distance = second.addr().wrapping_sub(first.addr());
    #[expect(
        ambiguous_wide_pointer_comparisons,
        reason = "the tables of methods are what is compared; they are made at one place, so equal types have one"
    )]
    let are_equal = first.wrapping_byte_add(distance) == second;
    are_equal
}

/// Threads of one engine: its own, those of its runtime, that of its log, and one that is only there while it starts.
pub(crate) fn threads_of_an_engine() -> usize {
    let wanted = std::env::var(WORKERS).ok();
    let wanted = wanted.and_then(|number| number.parse().ok());
    wanted.unwrap_or_else(cores) + 3
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Where tokio looks for the number of a runtime's threads.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

/// Whether [`spare_engine_threads`] has set that number.
static IS_SPARED: AtomicBool = AtomicBool::new(false);

/// Has the runtime of every engine made from now on have one thread, unless the environment says how many: it has one for each core
/// otherwise, and uses none of them.
///
/// # Safety
/// As [`std::env::set_var`]: no other thread may read or write the environment meanwhile. Call it first thing.
pub unsafe fn spare_engine_threads() {
    if std::env::var_os(WORKERS).is_none() {
        // SAFETY: as the caller says.
        unsafe { std::env::set_var(WORKERS, "1") };
        IS_SPARED.store(true, Ordering::SeqCst);
    }
}

/// Threads of a runtime that is no engine's: as many as there are cores, or as the environment says.
pub(crate) fn threads_of_a_server(
    builder: &mut tokio::runtime::Builder,
) -> &mut tokio::runtime::Builder {
    match IS_SPARED.load(Ordering::SeqCst) {
        true => builder.worker_threads(cores()),
        false => builder,
    }
}
