//! Ranks as threads of one process, for tests.

use std::sync::{Arc, Barrier, Mutex};

use super::Communicator;

/// One of several ranks that are threads of this process.
#[derive(Debug, Clone)]
pub(crate) struct Threads {
    rank: usize,
    given: Arc<Vec<Mutex<Vec<u8>>>>,
    barrier: Arc<Barrier>,
}

impl Threads {
    /// Runs `work` as each of `size` ranks, and returns what they return, in order of the ranks.
    ///
    /// # Panics
    /// Panics if `work` panics as one of the ranks. If others wait for it, they wait for ever.
    pub(crate) fn run<T: Send>(
        size: usize,
        work: impl Fn(&dyn Communicator) -> T + Sync,
    ) -> Vec<T> {
        let given: Arc<Vec<Mutex<Vec<u8>>>> =
            Arc::new((0..size).map(|_| Mutex::default()).collect());
        let barrier = Arc::new(Barrier::new(size));
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..size)
                .map(|rank| {
                    let of_rank = Self {
                        rank,
                        given: given.clone(),
                        barrier: barrier.clone(),
                    };
                    let work = &work;
                    scope.spawn(move || work(&of_rank))
                })
                .collect();
            let ended = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
            ended.collect()
        })
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.given.len()
    }

    fn all_gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        *self.given[self.rank].lock().expect("no panic") = own.to_vec();
        self.barrier.wait();
        let all = self
            .given
            .iter()
            .map(|of| of.lock().expect("no panic").clone());
        let all = all.collect();
        // Nobody may give again before all have read.
        self.barrier.wait();
        all
    }

    fn sum(&self, values: &mut [f32]) {
        let own: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        values.fill(0.0);
        for of_rank in self.all_gather(&own) {
            for (sum, term) in values.iter_mut().zip(of_rank.as_chunks::<4>().0) {
                *sum += f32::from_le_bytes(*term);
            }
        }
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        *bytes = self.all_gather(bytes).swap_remove(0);
    }
}
