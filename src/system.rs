//! The memory of the machine, or of the container if that has a limit.

use std::path::Path;

/// Memory of the machine or of the container, in bytes; `None` if the system does not report it.
pub fn total_memory_bytes() -> Option<u64> {
    let machine = meminfo("MemTotal:")?;
    Some(container("memory.max").map_or(machine, |limit| machine.min(limit)))
}

/// Memory that a new process can use without swapping, in bytes; `None` if the system does not report it.
pub fn available_memory_bytes() -> Option<u64> {
    let machine = meminfo("MemAvailable:")?;
    let container = container("memory.max").zip(container("memory.current"));
    Some(container.map_or(machine, |(limit, used)| {
        machine.min(limit.saturating_sub(used))
    }))
}

fn meminfo(key: &str) -> Option<u64> {
    bytes_in("/proc/meminfo", key)
}

/// The value of `key` in this process's status, in bytes; `None` if the system does not report it.
pub(crate) fn status_bytes(key: &str) -> Option<u64> {
    bytes_in("/proc/self/status", key)
}

fn bytes_in(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// A value of the container's own control group; `None` if it is `max`, which means no limit.
fn container(file: &str) -> Option<u64> {
    let path = Path::new("/sys/fs/cgroup").join(file);
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
