//! A training step off the CPU: what it reads from the device, and its numbers. Tests run it in a process of its own, where
//! no loop of this project computes on tensors, so that the CPU stands for any other device.

use std::path::PathBuf;
use std::process::Command;

use monteclora_adapters::device::{Traffic, has_loops, traffic};

use super::*;

/// Settings that reach every kind of copy, by method.
const RUNS: [&[&str]; 3] = [
    &[
        "lora.lora_dropout=0.2",
        "train.gradient_accumulation_steps=2",
    ],
    &[
        "lora.lora_dropout=0.2",
        "train.gradient_checkpointing=true",
        "lora.method=lora",
    ],
    &["lora.monteclora.objective=elbo"],
];

/// Losses of the steps of a run, and the copies so far after each.
fn steps(keys: &[&str]) -> Vec<(f64, Traffic)> {
    let setup = setup(keys);
    let out = tempfile::tempdir().unwrap();
    let settings = setup.settings();
    let identity = Identity::default();
    let trainer = setup.trainer(&settings, out.path(), &identity);
    let mut steps = Vec::new();
    let from = Checkpoint::fresh(setup.state()).unwrap();
    let watch = |event: &Event| {
        if let Event::Step(_, loss) = event {
            steps.push((*loss, traffic()));
        }
    };
    trainer.run(from, watch).unwrap();
    steps
}

/// In that process: prints the losses, and counts.
#[test]
#[ignore = "runs in a process of its own"]
#[expect(
    clippy::print_stdout,
    reason = "the test that starts this one reads it"
)]
fn without_loops() {
    assert!(
        !has_loops(&Device::Cpu),
        "see the test that starts this one"
    );
    for (run, keys) in RUNS.iter().enumerate() {
        let steps = steps(keys);
        for (loss, _) in &steps {
            println!("loss {run} {loss}");
        }
        let micro_batches = 1 + u64::from(keys.contains(&"train.gradient_accumulation_steps=2"));
        // The elbo's divergence is a number of every module's A.
        let of_draws = match keys.contains(&"lora.monteclora.objective=elbo") {
            true => setup(keys).sites.len() as u64,
            false => 0,
        };
        // The first two steps are audited.
        for pair in steps[2..].windows(2) {
            let reads = pair[1].1.reads - pair[0].1.reads;
            // Losses of each micro-batch; inner products of the pullback, if there are any; the norm; whether all is finite.
            let of_pullback = u64::from(!keys.contains(&"lora.method=lora"));
            assert_eq!(
                reads,
                micro_batches + of_pullback + 2 + of_draws,
                "{keys:?}"
            );
        }
    }
}

#[test]
fn a_step_reads_little_from_the_device_and_computes_the_same() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "training::traffic::without_loops",
            "--ignored",
            "--nocapture",
        ])
        .env("MONTECLORA_WITHOUT_LOOPS", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let found: Vec<(usize, f64)> = text
        .lines()
        .filter_map(|line| line.split_once("loss ")?.1.split_once(' '))
        .map(|(run, loss)| (run.parse().unwrap(), loss.parse().unwrap()))
        .collect();
    let expected = RUNS.iter().enumerate().flat_map(|(run, keys)| {
        let losses = steps(keys).into_iter();
        losses.map(move |(loss, _)| (run, loss))
    });
    let expected: Vec<(usize, f64)> = expected.collect();
    assert_eq!(found.len(), expected.len(), "{text}");
    for ((run, loss), (of, expected)) in found.into_iter().zip(expected) {
        assert_eq!(run, of);
        assert!(
            (loss - expected).abs() < 1e-4 * expected,
            "{run}: {loss} {expected}"
        );
    }
}

/// Only [`monteclora_adapters::device`] copies to the host, so that every copy is counted.
#[test]
fn tensors_are_read_in_one_place() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = ["src/model", "src/train", "adapters/src"]
        .map(|folder| root.join(folder))
        .to_vec();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    assert!(files.len() > 50);
    let mut found = Vec::new();
    for path in files {
        let name = path
            .strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .replace('\\', "/");
        let is_test = ["tests", "testing.rs", "across_ranks.rs"]
            .iter()
            .any(|part| name.contains(part));
        // Frozen weights are read once, when they are loaded or first needed.
        if is_test || name == "adapters/src/device.rs" || name.starts_with("adapters/src/weights/")
        {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let code = code
            .split("#[cfg(test)]\npub(crate) mod testing {")
            .next()
            .unwrap_or_default();
        for copy in [
            ".to_vec0",
            ".to_vec1",
            ".to_vec2",
            ".to_vec3",
            ".to_scalar",
            "to_device(&Device::Cpu)",
        ] {
            if code.contains(copy) {
                found.push(format!("{name}: {copy}"));
            }
        }
    }
    assert!(
        found.is_empty(),
        "use device::to_host, which counts: {found:#?}"
    );
}
