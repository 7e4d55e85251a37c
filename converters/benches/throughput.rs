//! Copying, collapsing and converting an adapter in turns: time of each against `cp` and sync, and the anonymous memory.
//!
//! `MONTECLORA_BENCH_MB` is the adapter's size (1024), `MONTECLORA_BENCH_ROUNDS` the number of rounds (3) and
//! `MONTECLORA_BENCH_DIR` the disk to measure (the temporary directory). Nothing is left behind.
#![cfg(target_os = "linux")]
#![expect(clippy::print_stdout, reason = "the figures are the result")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use monteclora_converters::{Adapter, DType, LoraOptions, Tensor, format_named, write_safetensors};
use serde_json::json;

/// Two factors of 4 MB a site.
const WIDTH: usize = 16_384;
const RANK: usize = 64;

fn setting(name: &str, default: usize) -> usize {
    let given = std::env::var(name).ok().and_then(|text| text.parse().ok());
    given.unwrap_or(default)
}

/// A MonteCLoRA adapter of about `n_megabytes`.
fn write_adapter(dir: &Path, n_megabytes: usize) {
    fs::create_dir_all(dir).expect("a writable disk");
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["up_proj"],
        "monteclora_config": {"num_samples": 4}});
    fs::write(dir.join("adapter_config.json"), config.to_string()).expect("a writable disk");
    let values = |seed: usize| {
        let value = move |n: usize| {
            (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8 & 0xffff) as f32 / 65_536.0
        };
        (0..WIDTH * RANK).map(value).collect()
    };
    let a = Tensor::from_f32(&[RANK, WIDTH], values(1)).expect("sized");
    let b = Tensor::from_f32(&[WIDTH, RANK], values(2)).expect("sized");
    let log_std = Tensor::from_f32(&[RANK], vec![-3.0; RANK]).expect("sized");
    let log_concentration = Tensor::from_f32(&[4], vec![1.0; 4]).expect("sized");
    let n_sites = (n_megabytes << 20).div_ceil(2 * WIDTH * RANK * 4);
    let tensors = (0..n_sites).flat_map(|layer| {
        let name = format!("base_model.model.model.layers.{layer}.mlp.up_proj");
        [
            (format!("{name}.lora_A.weight"), a.clone()),
            (format!("{name}.lora_B.weight"), b.clone()),
            (
                format!("{name}.lora_monteclora_sampler.std_prior"),
                log_std.clone(),
            ),
            (
                format!("{name}.lora_monteclora_sampler.expert_weights_prior"),
                log_concentration.clone(),
            ),
        ]
    });
    write_safetensors(
        dir.join("adapter_model.safetensors"),
        tensors,
        &Default::default(),
    )
    .expect("a writable disk");
}

fn anonymous_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// Seconds, and the largest anonymous memory in KiB meanwhile.
fn measure(job: impl FnOnce()) -> (f64, u64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(anonymous_kib());
                std::thread::sleep(Duration::from_millis(2));
            }
            peak
        });
        let start = Instant::now();
        job();
        let seconds = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        (seconds, watch.join().unwrap_or(0))
    })
}

fn copy(input: &Path, out: &Path) {
    let script = r#"cp --reflink=never "$0" "$1" && sync "$1""#;
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(input)
        .arg(out)
        .status();
    assert!(status.expect("a shell").success());
}

fn main() {
    let n_megabytes = setting("MONTECLORA_BENCH_MB", 1024);
    let rounds = setting("MONTECLORA_BENCH_ROUNDS", 3).max(1);
    let disk = std::env::var_os("MONTECLORA_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(disk).expect("a writable disk");
    let (input, out) = (dir.path().join("in"), dir.path().join("out"));
    write_adapter(&input, n_megabytes);
    let weights = input.join("adapter_model.safetensors");
    let options = |dtype| LoraOptions {
        dtype,
        ..LoraOptions::default()
    };
    let read = || {
        let adapter = Adapter::read(&input).expect("our own adapter");
        assert!(adapter.has_effect().expect("real"));
        adapter
    };
    type Job<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let jobs: [Job<'_>; 5] = [
        ("cp and sync", Box::new(|| copy(&weights, &out))),
        (
            "collapse",
            Box::new(|| drop(read().write_lora(&out, &options(None)).expect("written"))),
        ),
        (
            "convert to peft",
            Box::new(|| read().write_peft(&out, false).expect("written")),
        ),
        (
            "convert to mlx",
            Box::new(|| {
                drop(
                    format_named("mlx")
                        .expect("listed")
                        .write(&read(), &out, &options(None), None)
                        .expect("written"),
                )
            }),
        ),
        (
            "convert to bf16",
            Box::new(|| {
                drop(
                    read()
                        .write_lora(&out, &options(Some(DType::BF16)))
                        .expect("written"),
                )
            }),
        ),
    ];
    let mut times = vec![Vec::new(); jobs.len()];
    let mut peaks = vec![0; jobs.len()];
    for _ in 0..rounds {
        for (at, (_, job)) in jobs.iter().enumerate() {
            let (seconds, peak) = measure(job);
            times[at].push(seconds);
            peaks[at] = peak.max(peaks[at]);
            if out.is_dir() {
                fs::remove_dir_all(&out).expect("ours");
            } else {
                fs::remove_file(&out).expect("ours");
            }
        }
    }
    let median = |times: &[f64]| {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    println!("{n_megabytes} MB, medians of {rounds} rounds");
    println!(
        "{:<16} {:>8} {:>12} {:>14}",
        "", "seconds", "speed of cp", "anonymous MiB"
    );
    for (at, (name, _)) in jobs.iter().enumerate() {
        let seconds = median(&times[at]);
        println!(
            "{name:<16} {seconds:>8.2} {:>11.0}% {:>14}",
            100.0 * median(&times[0]) / seconds,
            peaks[at] >> 10
        );
    }
}
