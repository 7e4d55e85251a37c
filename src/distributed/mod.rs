//! The processes of one run, called ranks, as `mpirun` or a cluster's scheduler starts them.
//!
//! Every rank holds the base model and all of the adapter. Rows are divided among the ranks, and sums over rows are exchanged: every
//! rank gets the same bits, so that all of them make the same update. Rank 0 writes the files and speaks to the user.
//!
//! All ranks must make the same calls of a [`Communicator`] in the same order.

mod cores;
#[cfg(feature = "mpi")]
mod mpi;
mod share;
#[cfg(test)]
pub(crate) mod threads;

use std::fmt::Debug;
use std::sync::OnceLock;
use std::time::Duration;

use monteclora_converters::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use share::{balanced, micro_batches};

/// The ranks of a run and what they exchange.
///
/// A rank that fails does not come to the next exchange. It must end the other ranks, as [`fail`] does.
pub trait Communicator: Debug + Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// The number of ranks, at least 1.
    fn size(&self) -> usize;

    /// The bytes that every rank gives, in order of the ranks.
    fn all_gather(&self, own: &[u8]) -> Vec<Vec<u8>>;

    /// Replaces each value by its sum over all ranks. Ranks are added in order, so that all ranks and all runs get the same bits.
    fn sum(&self, values: &mut [f32]);

    /// Replaces `bytes` by those of rank 0.
    fn broadcast(&self, bytes: &mut Vec<u8>);
}

impl dyn Communicator + '_ {
    /// Whether this is rank 0, which writes files and output.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether any rank gives `true`.
    pub fn any(&self, own: bool) -> bool {
        let all = self.all_gather(&[u8::from(own)]);
        all.iter().any(|flag| flag.contains(&1))
    }

    /// The sums over all ranks of `own`, added in order of the ranks.
    pub fn sums<const N: usize>(&self, own: [f64; N]) -> [f64; N] {
        if self.size() == 1 {
            return own;
        }
        let mut sums = [0.0; N];
        for of_rank in self.all_gather(&own.map(f64::to_le_bytes).concat()) {
            let values = of_rank.as_chunks::<8>().0.iter();
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += f64::from_le_bytes(*value);
            }
        }
        sums
    }

    /// The value of rank 0.
    ///
    /// # Errors
    /// Returns an error if the value cannot be written as JSON or read from it.
    pub fn of_first<T: Serialize + DeserializeOwned>(&self, own: T) -> serde_json::Result<T> {
        if self.size() == 1 {
            return Ok(own);
        }
        let mut bytes = serde_json::to_vec(&own)?;
        self.broadcast(&mut bytes);
        serde_json::from_slice(&bytes)
    }

    /// The values that every rank gives, in order of the ranks.
    ///
    /// # Errors
    /// Returns an error if a value cannot be written as JSON or read from it.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, own: T) -> serde_json::Result<Vec<T>> {
        if self.size() == 1 {
            return Ok(vec![own]);
        }
        let all = self.all_gather(&serde_json::to_vec(&own)?);
        all.iter()
            .map(|bytes| serde_json::from_slice(bytes))
            .collect()
    }
}

/// The ranks of a run of one process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        vec![own.to_vec()]
    }

    fn sum(&self, _: &mut [f32]) {}

    fn broadcast(&self, _: &mut Vec<u8>) {}
}

/// This process among those of its run.
struct World {
    ranks: Box<dyn Communicator + Send>,
    /// The number of this rank among those of its machine, from 0.
    local_rank: usize,
}

static WORLD: OnceLock<World> = OnceLock::new();

/// The ranks of this program's run. One rank unless [`start`] found more.
pub fn world() -> &'static dyn Communicator {
    WORLD.get().map_or(&Alone, |world| &*world.ranks)
}

/// The number of this rank among those of its machine, from 0: the index of its accelerator.
pub fn local_rank() -> usize {
    WORLD.get().map_or(0, |world| world.local_rank)
}

/// Variables by which `mpirun` and schedulers tell a process the number of ranks.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

/// Variables by which they tell a process its rank. A process with one of them was started as a rank.
#[cfg(feature = "mpi")]
const RANKS: [&str; 4] = [
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
];

/// Variables by which starters that this program does not read tell the number of processes, and the starter to use instead.
const OTHERS: [(&str, &str); 2] = [
    (
        "SLURM_STEP_NUM_TASKS",
        "srun started {n} tasks that do not know each other; if they are to be one run, use srun --mpi=pmix and a program built with `--features mpi`",
    ),
    (
        "WORLD_SIZE",
        "torchrun's variables are not read, so each of the {n} processes is a run of its own; start them with mpirun -n {n}",
    ),
];

/// Joins the ranks of this run, if the process was started as one of several. Must be called once, before other threads start.
///
/// The threads of the ranks of one machine are limited so that together they use each core once.
///
/// # Errors
/// Returns an error if the process was started as one of several and could not join them.
pub fn start() -> Result<(), Problem> {
    #[cfg(feature = "mpi")]
    if RANKS.iter().any(|name| std::env::var_os(name).is_some())
        && let Some((ranks, local)) = mpi::start()
    {
        let local: &dyn Communicator = &local;
        cores::divide(local);
        let local_rank = local.rank();
        let _ = WORLD.set(World {
            ranks: Box::new(ranks),
            local_rank,
        });
    }
    if world().size() > 1 {
        return Ok(());
    }
    match SIZES.iter().find_map(|name| count_in(name)) {
        None => Ok(()),
        Some(size) => Err(Problem::usage(match cfg!(feature = "mpi") {
            true => format!(
                "started as one of {size} processes, and MPI does not find the others; start them with the mpirun of the MPI that this program was built with, or with srun --mpi=pmix"
            ),
            false => format!(
                "started as one of {size} processes, and this program was built without MPI; build it with `--features mpi`, or start it without mpirun"
            ),
        })),
    }
}

/// The number in a variable, if it is above 1.
fn count_in(name: &str) -> Option<usize> {
    let count = std::env::var(name).ok()?.parse().ok()?;
    (count > 1).then_some(count)
}

/// A warning if another starter has started several processes, which are runs of their own here.
pub fn not_joined() -> Option<String> {
    if world().size() > 1 {
        return None;
    }
    OTHERS.iter().find_map(|(name, text)| {
        let n = count_in(name)?.to_string();
        Some(text.replace("{n}", &n))
    })
}

/// Checks that all ranks were started for the same work, `own` in words. Every rank must call this once, before any other exchange.
///
/// # Errors
/// Returns the same error on every rank if one of them has other work.
pub fn agree(own: &str) -> Result<(), Problem> {
    let all = world().all_gather(own.as_bytes());
    let words = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
    match all.iter().position(|work| *work != all[0]) {
        None => Ok(()),
        Some(other) => Err(Problem::usage(format!(
            "rank 0 was started for `{}`, rank {other} for `{}`; all ranks must do the same",
            words(0),
            words(other)
        ))),
    }
}

/// Checks that all ranks have the same inputs: each is named, and given in a form that is the same for the same content.
///
/// # Errors
/// Returns the same error on every rank if one of them differs from rank 0.
pub fn require_same(inputs: &[(&str, String)]) -> anyhow::Result<()> {
    let own: Vec<String> = inputs.iter().map(|(_, input)| input.clone()).collect();
    let all = world().gather(own)?;
    for (rank, of_rank) in all.iter().enumerate() {
        let pairs = inputs.iter().zip(all[0].iter().zip(of_rank));
        let unlike = pairs.filter(|(_, (first, its))| first != its);
        let unlike: Vec<&str> = unlike.map(|((name, _), _)| *name).collect();
        if !unlike.is_empty() {
            let message = format!(
                "rank {rank} does not have what rank 0 has: {}",
                unlike.join(", ")
            );
            return Err(Problem::sentence("ranks-differ", message).exit(2).into());
        }
    }
    Ok(())
}

/// Waits for the other ranks and leaves them. Must be called before a rank ends without an error.
pub fn finish() {
    #[cfg(feature = "mpi")]
    mpi::finish();
}

/// Ends all ranks after an error of this one. Returns at once if there are no others.
///
/// All ranks often have the same error. So the others wait until rank 0 could print it: `say` prints the message.
pub fn fail(code: u8, say: impl FnOnce(&str)) {
    let world = world();
    if world.size() == 1 {
        say("");
        return finish();
    }
    if !world.is_first() {
        std::thread::sleep(Duration::from_millis(1500));
    }
    say(&format!("rank {} of {}: ", world.rank(), world.size()));
    #[cfg(feature = "mpi")]
    mpi::abort(code);
    #[cfg(not(feature = "mpi"))]
    let _ = code;
}
