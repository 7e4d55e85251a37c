//! What large files cost: memory of one tensor and a constant, whatever the file's size; and what is left on the disk
//! when the writer is killed or the disk is full. Each measurement runs in a process of its own.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use monteclora_converters::{
    Adapter, DType, Format, LoraOptions, ModelFiles, Tensor, format_named, merge_dir,
};
use serde_json::json;

const JOB: &str = "MONTECLORA_TEST_JOB";
const DIR: &str = "MONTECLORA_TEST_DIR";
/// In and out features, rank and layers of the adapter: 24 sites of 2 x 2 MB, 96 MB in all.
const WIDTH: usize = 32768;
const RANK: usize = 16;
const SITES: usize = 24;
/// What a job may add to the memory it started with: the largest tensor and 64 MB.
const LIMIT_KIB: u64 = (WIDTH * RANK * 4 / 1024 + (64 << 10)) as u64;

/// A format by its name on the command line.
fn format_called(name: &str) -> &'static dyn Format {
    format_named(name).expect("a format that is listed")
}

/// Anonymous memory of this process now, in KiB.
fn anonymous_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    number.expect("a number of kB")
}

/// Runs `job` while another thread looks at the memory; the largest increase in KiB.
fn peak_increase(job: impl FnOnce()) -> u64 {
    use std::sync::atomic::{AtomicBool, Ordering};
    let before = anonymous_kib();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak = before;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(anonymous_kib());
                std::thread::sleep(Duration::from_micros(500));
            }
            peak
        });
        job();
        done.store(true, Ordering::Relaxed);
        watch.join().expect("the watch does not panic") - before
    })
}

fn site(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.up_proj")
}

/// A plain LoRA whose alpha has to be multiplied into B, so that nothing can be copied as it is.
fn write_adapter(dir: &Path) {
    fs::create_dir_all(dir).expect("writable");
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2.5, "target_modules": ["up_proj"], "alpha_pattern": {"layers.0.mlp.up_proj": 3.5}});
    fs::write(dir.join("adapter_config.json"), config.to_string()).expect("writable");
    let values: Vec<f32> = (0..WIDTH * RANK)
        .map(|n| (n % 251) as f32 / 251.0)
        .collect();
    let a = Tensor::from_f32(&[RANK, WIDTH], values.clone()).expect("sized");
    let b = Tensor::from_f32(&[WIDTH, RANK], values).expect("sized");
    let tensors = (0..SITES).flat_map(|layer| {
        let name = format!("base_model.model.{}", site(layer));
        [
            (format!("{name}.lora_A.weight"), a.clone()),
            (format!("{name}.lora_B.weight"), b.clone()),
        ]
    });
    let path = dir.join("adapter_model.safetensors");
    monteclora_converters::write_safetensors(path, tensors, &Default::default()).expect("written");
}

/// A base of three shards, 2 MB a tensor.
fn write_base(dir: &Path) {
    fs::create_dir_all(dir).expect("writable");
    fs::write(dir.join("config.json"), r#"{"model_type":"llama"}"#).expect("writable");
    let values: Vec<f32> = (0..1024 * 512).map(|n| (n % 97) as f32 / 97.0).collect();
    let weight = Tensor::from_f32(&[1024, 512], values).expect("sized");
    for shard in 0..3 {
        let tensors = (0..32).map(|n| (format!("{}.weight", site(shard * 32 + n)), weight.clone()));
        let path = dir.join(format!("model-0000{}-of-00003.safetensors", shard + 1));
        monteclora_converters::write_safetensors(path, tensors, &Default::default())
            .expect("written");
    }
    let a = Tensor::from_f32(&[4, 512], vec![0.5; 2048]).expect("sized");
    let b = Tensor::from_f32(&[1024, 4], vec![0.25; 4096]).expect("sized");
    let tensors = (0..96).flat_map(|layer| {
        let name = format!("base_model.model.{}", site(layer));
        [
            (format!("{name}.lora_A.weight"), a.clone()),
            (format!("{name}.lora_B.weight"), b.clone()),
        ]
    });
    let adapter = dir.join("adapter");
    fs::create_dir_all(&adapter).expect("writable");
    let config =
        json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]});
    fs::write(adapter.join("adapter_config.json"), config.to_string()).expect("writable");
    monteclora_converters::write_safetensors(
        adapter.join("adapter_model.safetensors"),
        tensors,
        &Default::default(),
    )
    .expect("written");
}

fn gguf_config() -> serde_json::Map<String, serde_json::Value> {
    let config = json!({"model_type": "llama", "num_attention_heads": 2});
    config.as_object().cloned().expect("an object")
}

/// The work of a child process; does nothing in an ordinary run.
#[test]
fn child() {
    let (Some(job), Some(dir)) = (std::env::var_os(JOB), std::env::var_os(DIR)) else {
        return;
    };
    let dir = PathBuf::from(dir);
    let (input, out) = (dir.join("in"), dir.join("out"));
    let options = LoraOptions::default();
    let read = || Adapter::read(&input).expect("valid");
    let increase = peak_increase(|| match job.to_str().expect("a name") {
        "lora" => drop(read().write_lora(&out, &options).expect("written")),
        "mlx" => drop(
            format_called("mlx")
                .write(&read(), &out, &options, None)
                .expect("written"),
        ),
        "gguf" => drop(
            format_called("gguf")
                .write(&read(), &out, &LoraOptions::default(), Some(&gguf_config()))
                .expect("written"),
        ),
        "from_mlx" => read().write_peft(&out, false).expect("written"),
        "summary" => {
            assert!(read().has_effect().expect("real"));
            assert_eq!(read().summary().expect("real").sites.len(), SITES);
        }
        "merge" => {
            let base = ModelFiles::open(&input).expect("valid");
            let adapter = Adapter::read(&input.join("adapter")).expect("valid");
            let report = merge_dir(
                &base,
                &adapter,
                &out,
                Some(DType::BF16),
                &Default::default(),
            )
            .expect("written");
            assert_eq!(report.n_merged, 96);
        }
        "full" => {
            let error = read().write_lora(&out, &options).expect_err("a full disk");
            assert!(!out.exists(), "{error}");
        }
        other => panic!("no job called {other}"),
    });
    fs::write(dir.join("increase"), increase.to_string()).expect("writable");
}

fn command(job: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test binary"));
    command
        .args(["child", "--exact", "--nocapture"])
        .env(JOB, job)
        .env(DIR, dir)
        .stdout(Stdio::null());
    command
}

/// Runs a job in a process of its own; its increase of anonymous memory in KiB.
fn increase_of(job: &str, dir: &Path) -> u64 {
    let status = command(job, dir).status().expect("a child process");
    assert!(status.success(), "{job}");
    let text = fs::read_to_string(dir.join("increase")).expect("written by the child");
    text.parse().expect("a number")
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("readable")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .into_string()
                .expect("utf-8")
        })
        .collect();
    names.sort();
    names
}

#[test]
fn conversions_hold_one_tensor_at_a_time() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_adapter(&dir.path().join("in"));
    for job in ["lora", "gguf", "summary", "mlx"] {
        let increase = increase_of(job, dir.path());
        assert!(
            increase <= LIMIT_KIB,
            "{job}: {increase} KiB of {LIMIT_KIB}"
        );
        let out = dir.path().join("out");
        if job == "mlx" {
            fs::remove_dir_all(dir.path().join("in")).expect("there");
            fs::rename(&out, dir.path().join("in")).expect("there");
        } else if out.is_dir() {
            fs::remove_dir_all(&out).expect("there");
        } else if out.is_file() {
            fs::remove_file(&out).expect("there");
        }
    }
    let increase = increase_of("from_mlx", dir.path());
    assert!(
        increase <= LIMIT_KIB,
        "from_mlx: {increase} KiB of {LIMIT_KIB}"
    );
}

#[test]
fn a_merge_holds_one_tensor_at_a_time() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_base(&dir.path().join("in"));
    let increase = increase_of("merge", dir.path());
    let limit = (1024 * 512 * 4 / 1024) + (64 << 10);
    assert!(increase <= limit, "{increase} KiB of {limit}");
    let merged = ModelFiles::open(dir.path().join("out")).expect("our own output");
    assert_eq!((merged.files().len(), merged.names().count()), (3, 96));
}

/// A limit on the size of files stands for the end of the disk.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_adapter(&dir.path().join("in"));
    let exe = std::env::current_exe().expect("a test binary");
    // Without the trap the kernel's signal would end the process before it sees the error.
    let script = r#"trap '' XFSZ; ulimit -f 10000; exec "$0" child --exact --nocapture"#;
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(exe)
        .env(JOB, "full")
        .env(DIR, dir.path())
        .stdout(Stdio::null())
        .status()
        .expect("a shell");
    assert!(status.success());
    assert_eq!(names(dir.path()), ["in", "increase"]);
}

/// A killed writer leaves a temporary sibling at most, and the next run is not disturbed by it.
#[test]
fn a_killed_writer_leaves_no_destination() {
    let dir = tempfile::tempdir().expect("temporary directory");
    write_adapter(&dir.path().join("in"));
    let mut child = command("lora", dir.path())
        .spawn()
        .expect("a child process");
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_partial = |name: &String| name.starts_with(".partial-");
    while !names(dir.path()).iter().any(is_partial) {
        assert!(Instant::now() < deadline, "the child never wrote");
        assert!(
            child.try_wait().expect("ours").is_none(),
            "the child was too quick"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().expect("running");
    child.wait().expect("ours");
    let left = names(dir.path());
    assert!(
        left.iter().all(|name| name == "in" || is_partial(name)),
        "{left:?}"
    );
    increase_of("lora", dir.path());
    let adapter = Adapter::read_dir(&dir.path().join("out")).expect("complete");
    assert_eq!(adapter.sites.len(), SITES);
}
