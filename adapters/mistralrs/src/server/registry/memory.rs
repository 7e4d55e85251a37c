//! The memory budget: the memory that the weights of all engines take, and its limit.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, Result, code};

/// The memory in use and its limit.
#[derive(Debug)]
pub(super) struct Memory {
    /// Limit in bytes; none means no limit.
    budget: Option<u64>,
    used: Mutex<Used>,
    /// See [`ServeConfig::reclaim`](crate::ServeConfig::reclaim).
    reclaim: Option<fn()>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Used {
    n_generations: usize,
    /// Number of these generations whose memory will be freed soon.
    n_leaving: usize,
    bytes: u64,
}

impl Memory {
    pub(super) fn new(budget: Option<u64>, reclaim: Option<fn()>) -> Arc<Self> {
        Arc::new(Self {
            budget,
            reclaim,
            used: Mutex::default(),
        })
    }

    /// Checks whether `needed` bytes fit in addition to the memory in use.
    pub(super) fn check(&self, name: &str, needed: u64) -> Result<()> {
        self.fits(name, needed, self.used.lock().bytes)
    }

    /// Counts `needed` bytes as in use until the result is dropped.
    ///
    /// # Errors
    /// Returns [`code::OVER_BUDGET`] if they do not fit.
    pub(super) fn reserve(self: &Arc<Self>, name: &str, needed: u64) -> Result<Reservation> {
        self.take(name, needed, 1)
    }

    /// As [`Self::reserve`], for memory that is not a generation.
    ///
    /// # Errors
    /// Returns [`code::OVER_BUDGET`] if the bytes do not fit.
    pub(super) fn reserve_beside(self: &Arc<Self>, name: &str, needed: u64) -> Result<Reservation> {
        self.take(name, needed, 0)
    }

    fn take(
        self: &Arc<Self>,
        name: &str,
        needed: u64,
        n_generations: usize,
    ) -> Result<Reservation> {
        let mut used = self.used.lock();
        self.fits(name, needed, used.bytes)?;
        used.bytes += needed;
        used.n_generations += n_generations;
        Ok(Reservation {
            memory: self.clone(),
            bytes: needed,
            n_generations,
            is_leaving: false,
        })
    }

    /// Whether some of the memory in use will be freed soon.
    pub(super) fn is_leaving(&self) -> bool {
        self.used.lock().n_leaving > 0
    }

    /// Lets the allocator return freed pages to the system.
    pub(super) fn reclaim(&self) {
        if let Some(reclaim) = self.reclaim {
            reclaim();
        }
    }

    /// The number of generations in memory, and the bytes of their weights.
    pub(super) fn in_use(&self) -> (usize, u64) {
        let used = self.used.lock();
        (used.n_generations, used.bytes)
    }

    fn fits(&self, name: &str, needed: u64, in_use: u64) -> Result<()> {
        match self.budget {
            Some(budget) if in_use.saturating_add(needed) > budget => Err(Error::refused(
                code::OVER_BUDGET,
                format!(
                    "`{name}` needs about {} MiB for its weights; {} MiB are in use and runtime.max_memory_mb allows {} MiB; unload an adapter first, or allow more",
                    needed >> 20,
                    in_use >> 20,
                    budget >> 20
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Memory of one generation, held until its engine no longer has it; or memory that several generations share.
#[derive(Debug)]
pub(super) struct Reservation {
    memory: Arc<Memory>,
    pub(super) bytes: u64,
    n_generations: usize,
    is_leaving: bool,
}

impl Reservation {
    /// Records that nothing needs the memory any more. It is freed as soon as the engine has released the model.
    pub(super) fn leave(&mut self) {
        if !std::mem::replace(&mut self.is_leaving, true) {
            self.memory.used.lock().n_leaving += 1;
        }
    }

    /// See [`Memory::reclaim`].
    pub(super) fn reclaim(&self) {
        self.memory.reclaim();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.reclaim();
        let mut used = self.memory.used.lock();
        used.bytes -= self.bytes;
        used.n_generations -= self.n_generations;
        used.n_leaving -= usize::from(self.is_leaving);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_and_what_is_dropped_is_free_again() {
        let mb = |n: u64| n << 20;
        let memory = Memory::new(Some(mb(100)), None);
        let first = memory.reserve("a", mb(60)).expect("fits");
        let error = memory.reserve("b", mb(41)).expect_err("does not");
        assert_eq!(error.code(), code::OVER_BUDGET);
        let numbers = "needs about 41 MiB for its weights; 60 MiB are in use and runtime.max_memory_mb allows 100 MiB";
        assert!(error.to_string().contains(numbers), "{error}");
        let second = memory.reserve("b", mb(40)).expect("fits exactly");
        assert_eq!(memory.in_use(), (2, mb(100)));
        drop(first);
        assert_eq!(memory.in_use(), (1, mb(40)));
        memory.check("c", mb(60)).expect("fits");
        drop(second);
        let shared = memory.reserve_beside("d", mb(60)).expect("fits");
        assert_eq!(memory.in_use(), (0, mb(60)));
        drop(shared);
        assert_eq!(memory.in_use(), (0, 0));
        assert!(Memory::new(None, None).reserve("a", u64::MAX).is_ok());
    }

    #[test]
    fn freed_memory_is_handed_back() {
        static HANDED_BACK: AtomicUsize = AtomicUsize::new(0);
        let reclaim = || {
            HANDED_BACK.fetch_add(1, Ordering::Relaxed);
        };
        let memory = Memory::new(None, Some(reclaim));
        let first = memory.reserve("a", 1).expect("no limit");
        assert_eq!(HANDED_BACK.load(Ordering::Relaxed), 0);
        drop(first);
        assert_eq!(HANDED_BACK.load(Ordering::Relaxed), 1);
    }
}
