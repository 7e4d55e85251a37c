//! `doctor`: shows what this build and this machine support.

use anyhow::Result;
use serde_json::json;

use super::{print, print_json};
use crate::cli::DoctorArgs;
use crate::{hub, system};

pub(super) fn run(args: &DoctorArgs) -> Result<()> {
    let features = [
        ("mistralrs", cfg!(feature = "mistralrs")),
        ("mpi", cfg!(feature = "mpi")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("flash-attn", cfg!(feature = "flash-attn")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
        ("mkl", cfg!(feature = "mkl")),
        ("nccl", cfg!(feature = "nccl")),
        ("ring", cfg!(feature = "ring")),
        ("parquet", cfg!(feature = "parquet")),
    ];
    let enabled: Vec<&str> = features
        .iter()
        .filter(|(_, on)| *on)
        .map(|(name, _)| *name)
        .collect();
    let device = super::device(false);
    let (device, device_problem) = match device {
        Ok(device) => (format!("{:?}", device.location()), None),
        Err(error) => ("unusable".to_owned(), Some(format!("{error:#}"))),
    };
    let cache = hub::cache_dir();
    let cache_problem = writable(&cache).err().map(|error| error.to_string());
    let threads = rayon::current_num_threads();
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "features": enabled,
        "device": device,
        "device_problem": device_problem,
        "threads": threads,
        "memory_bytes": system::total_memory_bytes(),
        "available_memory_bytes": system::available_memory_bytes(),
        "cache": cache,
        "cache_problem": cache_problem,
    });
    if args.json {
        return print_json(&report);
    }
    let gb = |bytes: Option<u64>| {
        bytes.map_or("unknown".to_owned(), |b| {
            format!("{:.1} GB", b as f64 / 1e9)
        })
    };
    let memory = format!(
        "{}, {} available",
        gb(system::total_memory_bytes()),
        gb(system::available_memory_bytes())
    );
    let note =
        |problem: Option<String>| problem.map_or(String::new(), |p| format!("  PROBLEM: {p}"));
    print(&format!(
        "monteclora  {}\nfeatures    {}\ndevice      {device}{}\nthreads     {threads}\nmemory      {memory}\ncache       {}{}",
        env!("CARGO_PKG_VERSION"),
        if enabled.is_empty() {
            "none".to_owned()
        } else {
            enabled.join(", ")
        },
        note(device_problem),
        cache.display(),
        note(cache_problem),
    ))
}

fn writable(dir: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    tempfile::tempfile_in(dir).map(|_| ())
}
