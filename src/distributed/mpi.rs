//! The ranks as MPI connects them.

use std::sync::{Mutex, PoisonError};

use ::mpi::datatype::PartitionMut;
use ::mpi::environment::Universe;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator as _, CommunicatorCollectives, Root};

use super::Communicator;

/// Values that one exchange sums at most: MPI counts with 32 bits, and the buffers stay small.
const AT_ONCE: usize = 1 << 24;

/// Bytes that one call of MPI moves at most; MPI counts with 32 bits.
const MOST_BYTES: usize = 1 << 30;

/// Finalises MPI when it is dropped.
static UNIVERSE: Mutex<Option<Universe>> = Mutex::new(None);

/// The ranks of an MPI communicator.
pub(super) struct Mpi {
    of: SimpleCommunicator,
    rank: usize,
    size: usize,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} of MPI", self.rank, self.size)
    }
}

// SAFETY: the handle is an address that MPI does not move. The program makes its exchanges from one thread, the one that
// called `start`, as MPI was asked for.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Mpi {
    fn new(of: SimpleCommunicator) -> Self {
        let count = |n| usize::try_from(n).unwrap_or_default();
        Self {
            rank: count(of.rank()),
            size: count(of.size()),
            of,
        }
    }
}

/// Initialises MPI. Returns all ranks, and the ranks of this machine. `None` if MPI was initialised before.
///
/// Only the thread that calls this function may use the ranks.
pub(super) fn start() -> Option<(Mpi, Mpi)> {
    let (universe, _) = ::mpi::initialize_with_threading(::mpi::Threading::Funneled)?;
    let world = Mpi::new(universe.world());
    let local = Mpi::new(world.of.split_shared(world.of.rank()));
    *UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner) = Some(universe);
    Some((world, local))
}

/// Finalises MPI, which waits for all ranks.
pub(super) fn finish() {
    drop(
        UNIVERSE
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(),
    );
}

/// Ends all ranks; `mpirun` ends with `code`.
pub(super) fn abort(code: u8) -> ! {
    SimpleCommunicator::world().abort(code.into())
}

/// A length as MPI takes it. Callers limit lengths to [`MOST_BYTES`] and [`AT_ONCE`].
fn count(length: usize) -> ::mpi::Count {
    ::mpi::Count::try_from(length).unwrap_or(::mpi::Count::MAX)
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let mut lengths = vec![0u64; self.size];
        self.of.all_gather_into(&(own.len() as u64), &mut lengths);
        let lengths: Vec<usize> = lengths.iter().map(|n| *n as usize).collect();
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|n| Vec::with_capacity(*n)).collect();
        let most = (MOST_BYTES / self.size).max(1);
        let longest = lengths.iter().copied().max().unwrap_or_default();
        for begin in (0..longest).step_by(most) {
            let part = |n: usize| n.saturating_sub(begin).min(most);
            let counts: Vec<_> = lengths.iter().map(|n| count(part(*n))).collect();
            let starts = counts.iter().scan(0, |next, n| {
                let start = *next;
                *next += n;
                Some(start)
            });
            let starts: Vec<_> = starts.collect();
            let mut received = vec![0u8; lengths.iter().map(|n| part(*n)).sum()];
            let mut places = PartitionMut::new(&mut received, counts, starts);
            let sent = begin.min(own.len())..begin.min(own.len()) + part(own.len());
            self.of.all_gather_varcount_into(&own[sent], &mut places);
            let mut rest = received.as_slice();
            for (of_rank, n) in all.iter_mut().zip(&lengths) {
                let (its, after) = rest.split_at(part(*n));
                of_rank.extend_from_slice(its);
                rest = after;
            }
        }
        all
    }

    /// Each rank sums one part of the values, in order of the ranks, and gives its sums to all: every value travels to each other
    /// rank once as a term and once as a sum, divided by the number of ranks.
    fn sum(&self, values: &mut [f32]) {
        for values in values.chunks_mut(AT_ONCE) {
            let part = values.len().div_ceil(self.size);
            let mut all = values.to_vec();
            all.resize(part * self.size, 0.0);
            let mut terms = vec![0f32; part * self.size];
            self.of.all_to_all_into(&all, &mut terms);
            let mut sums = vec![0f32; part];
            for of_rank in terms.chunks(part) {
                for (sum, term) in sums.iter_mut().zip(of_rank) {
                    *sum += term;
                }
            }
            self.of.all_gather_into(&sums, &mut all);
            values.copy_from_slice(&all[..values.len()]);
        }
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let root = self.of.process_at_rank(0);
        let mut length = bytes.len() as u64;
        root.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        for part in bytes.chunks_mut(MOST_BYTES) {
            root.broadcast_into(part);
        }
    }
}
