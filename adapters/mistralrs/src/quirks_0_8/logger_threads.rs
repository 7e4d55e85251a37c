//! The thread that each engine leaves behind. mistral.rs 0.8.1 starts a thread for the throughput log with every
//! engine, and nothing ends its loop (`IntervalLogger::new`). An engine per load would therefore leave a thread per
//! load.
//!
//! So engines are kept: an engine whose model is no longer needed gets another model. mistral.rs has no function for
//! this, but an engine's model is behind a lock, and the contents of two locks can be exchanged. An engine without a
//! real model has a [`placeholder`], so that it holds no weights.

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

/// Time for which an engine without a request may still run a step.
pub(crate) const LAST_STEP: Duration = Duration::from_secs(10);

/// A model that mistral.rs's `NormalLoader` or `MultimodalLoader` has loaded.
#[derive(Clone)]
pub(crate) struct NormalModel(SharedPipeline);

/// Why two models could not be exchanged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotExchanged {
    /// An engine runs a step with one of them and does not finish in time.
    Busy,
    /// The two models have different types.
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

    /// Exchanges the contents of the two models: an engine that had the one now has the other. It blocks.
    ///
    /// No engine of either model may be working on a sequence, because it would continue with the other model.
    ///
    /// # Errors
    /// Returns [`NotExchanged::Busy`] if either model is in use for longer than `patience`, and
    /// [`NotExchanged::Unlike`] if their types differ.
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
        // SAFETY: By the condition of `new`, each is a `NormalPipeline` or a `MultimodalPipeline`: the loaders make no
        // others, each at one place of its source. Size, alignment and vtable, compared above, agree, so both have the
        // same type. Both are `size` bytes long. They do not overlap, because two locks are held. Nothing else refers
        // to either meanwhile: the locks hand out no reference that outlives a guard, and the values are not pinned.
        // Exchanging the bytes of two values of one type is what `mem::swap` does, which is valid for every value that
        // is not pinned.
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

/// Whether both have the vtable of one type. The comparison is between pointers with the same address, so it depends on
/// the vtables only.
fn have_one_type(first: *const Content, second: *const Content) -> bool {
    let distance = second.addr().wrapping_sub(first.addr());
    #[expect(
        ambiguous_wide_pointer_comparisons,
        reason = "the tables of methods are what is compared; they are made at one place, so equal types have one"
    )]
    let are_equal = first.wrapping_byte_add(distance) == second;
    are_equal
}

/// Number of threads of one engine: its own, those of its runtime, that of its log, and one that exists only during the
/// start.
pub(crate) fn threads_of_an_engine() -> usize {
    let wanted = std::env::var(WORKERS).ok();
    let wanted = wanted.and_then(|number| number.parse().ok());
    wanted.unwrap_or_else(cores) + 3
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// The environment variable with which tokio sets the number of threads of a runtime.
const WORKERS: &str = "TOKIO_WORKER_THREADS";

/// Whether [`spare_engine_threads`] has set this variable.
static IS_SPARED: AtomicBool = AtomicBool::new(false);

/// Gives the runtime of every engine made from now on one thread, unless the environment sets the number. Otherwise it
/// has one thread per core and uses none of them.
///
/// # Safety
/// As for [`std::env::set_var`]: no other thread may read or write the environment meanwhile. Call it first in the
/// program.
pub unsafe fn spare_engine_threads() {
    if std::env::var_os(WORKERS).is_none() {
        // SAFETY: the caller guarantees the condition of this function.
        unsafe { std::env::set_var(WORKERS, "1") };
        IS_SPARED.store(true, Ordering::SeqCst);
    }
}

/// Sets the number of threads of a runtime that is not an engine's: one per core, or the number that the environment
/// sets.
pub(crate) fn threads_of_a_server(
    builder: &mut tokio::runtime::Builder,
) -> &mut tokio::runtime::Builder {
    match IS_SPARED.load(Ordering::SeqCst) {
        true => builder.worker_threads(cores()),
        false => builder,
    }
}
