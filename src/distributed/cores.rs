//! How the cores of a machine are divided among its ranks.

use super::Communicator;

/// The variable that sets the number of threads of matrix products and of rayon.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
const THREADS: &str = "RAYON_NUM_THREADS";

/// Limits the threads of this process to its share of the machine's cores, unless the user set their number. `local` are the ranks of
/// this machine.
///
/// A core that several ranks may run on counts for each of them as the share that it is of them: four ranks without a binding on eight
/// cores get two threads each, and so do four ranks that are bound to two cores each.
#[cfg_attr(not(feature = "mpi"), allow(dead_code))]
pub(super) fn divide(local: &dyn Communicator) {
    let own = allowed();
    let all = local.all_gather(own.join(" ").as_bytes());
    if local.size() == 1 || std::env::var_os(THREADS).is_some() {
        return;
    }
    let all: Vec<String> = all
        .into_iter()
        .map(|names| String::from_utf8_lossy(&names).into_owned())
        .collect();
    let of_ranks: Vec<Vec<&str>> = all.iter().map(|names| names.split(' ').collect()).collect();
    let threads = share(&own, &of_ranks);
    // SAFETY: no other thread of ours has been started, and MPI's threads read no variables.
    unsafe {
        std::env::set_var(THREADS, threads.to_string());
    }
}

/// The number of cores that fall to a rank with the cores `own`, at least 1. `of_ranks` are the cores of every rank, its own included.
fn share(own: &[String], of_ranks: &[Vec<&str>]) -> usize {
    let of_core = |core: &String| {
        let users = of_ranks
            .iter()
            .filter(|cores| cores.contains(&core.as_str()));
        1.0 / users.count().max(1) as f64
    };
    let cores: f64 = own.iter().map(of_core).sum();
    // Thirds do not add up to 1.
    ((cores + 1e-9) as usize).max(1)
}

/// The cores that this process may run on, by number. Where the system does not tell, as many as it counts, from 0.
fn allowed() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let listed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .map(numbers)
        .unwrap_or_default();
    if !listed.is_empty() {
        return listed;
    }
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    (0..n).map(|core| core.to_string()).collect()
}

/// The numbers of a list as the kernel writes it, such as `0-3,8`.
fn numbers(list: &str) -> Vec<String> {
    let ranges = list.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().map(|core| core.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_divide_the_cores_they_share() {
        let names = |list: &str| numbers(list);
        let share_of = |own: &str, all: &[&str]| {
            let all: Vec<Vec<String>> = all.iter().map(|list| names(list)).collect();
            let all: Vec<Vec<&str>> = all
                .iter()
                .map(|of| of.iter().map(String::as_str).collect())
                .collect();
            share(&names(own), &all)
        };
        assert_eq!(share_of("0-7", &["0-7"; 4]), 2);
        assert_eq!(share_of("0-1", &["0-1", "2-3"]), 2);
        assert_eq!(share_of("0", &["0", "1"]), 1);
        assert_eq!(share_of("0-1", &["0-1"; 3]), 1);
        assert_eq!(share_of("0-2", &["0-2"; 3]), 1);
        assert_eq!(names("0-2,5\n"), ["0", "1", "2", "5"]);
        assert!(!allowed().is_empty());
    }
}
