//! What the machine has: memory, also within a container's limit.

use std::path::Path;

/// Memory of the machine or of the container, bytes; none where the system does not tell.
pub fn total_memory_bytes() -> Option<u64> {
    let machine = meminfo("MemTotal:")?;
    Some(container("memory.max").map_or(machine, |limit| machine.min(limit)))
}

/// Memory that a new process can have without swapping, bytes; none where the system does not tell.
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

/// What the system says of this process under `key`, bytes; none where it does not tell.
pub(crate) fn status_bytes(key: &str) -> Option<u64> {
    bytes_in("/proc/self/status", key)
}

fn bytes_in(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// A value of the control group that a container sees as its own; `max` is no limit.
fn container(file: &str) -> Option<u64> {
    let path = Path::new("/sys/fs/cgroup").join(file);
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
