//! Hostile input: every reader refuses or reads, never panics, and bounds its memory; writers leave all or nothing.

mod readers;

use std::fs;
use std::path::Path;

use monteclora_converters::{Adapter, GgufFile, LoraOptions, ModelFiles, SafetensorsFile};
use proptest::prelude::*;
use readers::{READERS, file_of, format_called, join, seed};

/// Inputs that a fuzzer or a person found to be trouble once, by reader.
fn corpus() -> Vec<(&'static str, Vec<u8>)> {
    let deep = "[".repeat(100_000);
    let weights = seed("safetensors");
    let mut cases = vec![
        ("peft", join(b"", b"")),
        ("peft", join(br#"{"peft_type":"LORA","r":1e400}"#, &weights)),
        (
            "peft",
            join(br#"{"peft_type":"LORA","r":1,"r":2}"#, &weights),
        ),
        (
            "peft",
            join(
                br#"{"peft_type":"LORA","r":18446744073709551615}"#,
                &weights,
            ),
        ),
        (
            "peft",
            join(
                br#"{"peft_type":"LORA","r":-1,"lora_alpha":1e-320}"#,
                &weights,
            ),
        ),
        (
            "peft",
            join(
                br#"{"peft_type":"LORA","target_modules":"(a*)*b"}"#,
                &weights,
            ),
        ),
        ("index_json", deep.clone().into_bytes()),
        (
            "index_json",
            format!(r#"{{"weight_map":{deep}"#).into_bytes(),
        ),
        (
            "index_json",
            br#"{"weight_map":{"a":"../../etc/passwd"}}"#.to_vec(),
        ),
        (
            "index_json",
            br#"{"weight_map":{"a":"/etc/passwd"}}"#.to_vec(),
        ),
        (
            "index_json",
            br#"{"weight_map":{"a":"..\\model.safetensors"}}"#.to_vec(),
        ),
        (
            "index_json",
            br#"{"weight_map":{"a":"model-00002-of-00002.safetensors"}}"#.to_vec(),
        ),
        ("index_json", br#"{"weight_map":[]}"#.to_vec()),
        ("safetensors", u64::MAX.to_le_bytes().to_vec()),
        ("safetensors", 100_000_000u64.to_le_bytes().to_vec()),
        (
            "gguf",
            b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\0\0".to_vec(),
        ),
    ];
    // A rank of one with no input or no output, and a name that would leave a directory.
    let config = br#"{"peft_type":"LORA","r":1,"lora_alpha":2,"target_modules":["q_proj"]}"#;
    for (name, a, b) in [
        ("base_model.model.q_proj", [1, 0], [0, 1]),
        ("base_model.model.../q_proj", [1, 2], [4, 1]),
        ("base_model.model./etc/q_proj", [1, 2], [4, 1]),
    ] {
        let (lora_a, lora_b) = (
            format!("{name}.lora_A.weight"),
            format!("{name}.lora_B.weight"),
        );
        let weights = file_of(&[(&lora_a, &a), (&lora_b, &b)], None);
        cases.push(("peft", join(config, &weights)));
    }
    for (name, _) in READERS {
        let good = seed(name);
        cases.push((name, Vec::new()));
        cases.push((name, good.clone()));
        cases.push((name, vec![0xff; 300]));
        // Every number and length of the file raised to the roof.
        for at in 0..good.len() {
            let mut changed = good.clone();
            for byte in changed.iter_mut().skip(at).take(8) {
                *byte = 0xff;
            }
            if at % 7 == 0 {
                cases.push((name, changed));
            }
        }
    }
    cases
}

fn run(name: &str, input: &[u8]) {
    for (known, reader) in READERS {
        if known == name {
            reader(input);
        }
    }
}

#[test]
fn the_corpus_is_read_or_refused() {
    for (name, input) in corpus() {
        run(name, &input);
    }
}

#[test]
fn valid_inputs_are_accepted() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("writable");
        path
    };
    SafetensorsFile::open(put("x.safetensors", &seed("safetensors"))).expect("valid");
    GgufFile::open(put("x.gguf", &seed("gguf"))).expect("valid");
    let lora = put("lora.gguf", &seed("gguf_lora"));
    Adapter::read_for(&lora, &readers::llama_config()).expect("valid");
    for (name, weights) in [
        ("peft", "adapter_model.safetensors"),
        ("mlx", "adapters.safetensors"),
    ] {
        let input = seed(name);
        let length = usize::from(u16::from_le_bytes([input[0], input[1]]));
        fs::create_dir(dir.path().join(name)).expect("writable");
        put(
            &format!("{name}/adapter_config.json"),
            &input[2..2 + length],
        );
        put(&format!("{name}/{weights}"), &input[2 + length..]);
        let adapter = Adapter::read(&dir.path().join(name)).expect("valid");
        assert!(adapter.has_effect().expect("real"));
    }
}

/// What happens to a file: bits flip, the end is lost, or a stretch of it is copied elsewhere.
#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, u8),
    Cut(usize),
    Splice(usize, usize, usize),
    Replace(usize, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<usize>(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        1 => any::<usize>().prop_map(Damage::Cut),
        1 => (any::<usize>(), any::<usize>(), 1usize..40).prop_map(|(from, to, n)| Damage::Splice(from, to, n)),
        2 => (any::<usize>(), prop::sample::select(&b"019-{}[]\",:.\0\xff"[..])).prop_map(|(at, byte)| Damage::Replace(at, byte)),
    ]
}

fn damaged(mut bytes: Vec<u8>, damages: &[Damage]) -> Vec<u8> {
    for damage in damages {
        let length = bytes.len().max(1);
        if bytes.is_empty() {
            break;
        }
        match *damage {
            Damage::Flip(at, bit) => bytes[at % length] ^= 1 << bit,
            Damage::Cut(at) => bytes.truncate(at % length),
            Damage::Replace(at, byte) => bytes[at % length] = byte,
            Damage::Splice(from, to, n) => {
                let from = from % length;
                let part = bytes[from..(from + n).min(length)].to_vec();
                let to = to % length;
                bytes.splice(to..to, part);
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(damages in prop::collection::vec(damage(), 1..5)) {
        for (name, reader) in READERS {
            reader(&damaged(seed(name), &damages));
        }
    }
}

#[test]
fn every_truncation_is_read_or_refused() {
    for (name, reader) in READERS {
        let good = seed(name);
        for length in (0..good.len()).step_by(3) {
            reader(&good[..length]);
        }
    }
}

/// Values that are no numbers are refused with the site, in every format.
#[test]
fn weights_that_are_not_numbers_are_refused_by_name() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (name, weights) in [
            ("peft", "adapter_model.safetensors"),
            ("mlx", "adapters.safetensors"),
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let mut input = seed(name);
            let length = usize::from(u16::from_le_bytes([input[0], input[1]]));
            let end = input.len();
            input[end - 4..].copy_from_slice(&bad.to_le_bytes());
            fs::write(
                dir.path().join("adapter_config.json"),
                &input[2..2 + length],
            )
            .expect("writable");
            fs::write(dir.path().join(weights), &input[2 + length..]).expect("writable");
            let error = Adapter::read(dir.path()).expect_err("no number");
            assert!(
                error
                    .problems()
                    .iter()
                    .any(|problem| problem.code == "non-finite" && problem.at.contains("q_proj")),
                "{error}"
            );
        }
    }
}

#[cfg(unix)]
#[test]
fn pipes_directories_and_dangling_links_are_refused_without_waiting() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().expect("temporary directory");
    let pipe = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    let mut paths = vec![dir.path().to_owned(), dir.path().join("link")];
    symlink("/nonexistent/target", dir.path().join("link")).expect("linked");
    if made.is_ok_and(|status| status.success()) {
        paths.push(pipe);
    }
    for path in paths {
        assert!(SafetensorsFile::open(&path).is_err(), "{}", path.display());
        assert!(GgufFile::open(&path).is_err(), "{}", path.display());
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let adapter = tempfile::tempdir().expect("temporary directory");
            let input = seed("peft");
            let length = usize::from(u16::from_le_bytes([input[0], input[1]]));
            let put = |name: &str, bytes: &[u8]| fs::write(adapter.path().join(name), bytes);
            put("adapter_config.json", &input[2..2 + length]).expect("writable");
            put("adapter_model.safetensors", &input[2 + length..]).expect("writable");
            fs::remove_file(adapter.path().join(file)).expect("there");
            symlink(&path, adapter.path().join(file)).expect("linked");
            assert!(
                Adapter::read_dir(adapter.path()).is_err(),
                "{file} -> {}",
                path.display()
            );
        }
    }
}

fn write_seed(dir: &Path) -> Adapter {
    let input = seed("peft");
    let length = usize::from(u16::from_le_bytes([input[0], input[1]]));
    fs::create_dir_all(dir).expect("writable");
    fs::write(dir.join("adapter_config.json"), &input[2..2 + length]).expect("writable");
    fs::write(dir.join("adapter_model.safetensors"), &input[2 + length..]).expect("writable");
    Adapter::read_dir(dir).expect("valid")
}

/// A file that a link in the destination points to is never written through; a link to an empty directory is followed.
#[cfg(unix)]
#[test]
fn links_in_the_destination_are_replaced_not_written_through() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().expect("temporary directory");
    let adapter = write_seed(&dir.path().join("in"));
    let precious = dir.path().join("precious");
    fs::write(&precious, "keep").expect("writable");
    let out = dir.path().join("out");
    fs::create_dir(&out).expect("writable");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        symlink(&precious, out.join(name)).expect("linked");
    }
    let overwrite = LoraOptions {
        overwrite: true,
        ..LoraOptions::default()
    };
    adapter.write_lora(&out, &overwrite).expect("written");
    assert_eq!(fs::read(&precious).expect("there"), b"keep");
    Adapter::read_dir(&out).expect("our own output");
    assert!(
        !fs::symlink_metadata(out.join("adapter_model.safetensors"))
            .expect("there")
            .is_symlink()
    );

    let gguf = dir.path().join("x.gguf");
    symlink(&precious, &gguf).expect("linked");
    format_called("gguf")
        .write(
            &adapter,
            &gguf,
            &LoraOptions {
                overwrite: true,
                ..LoraOptions::default()
            },
            Some(&readers::llama_config()),
        )
        .expect("written");
    assert_eq!(fs::read(&precious).expect("there"), b"keep");

    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("writable");
    symlink(&elsewhere, dir.path().join("linked")).expect("linked");
    adapter
        .write_lora(&dir.path().join("linked"), &LoraOptions::default())
        .expect("written");
    Adapter::read_dir(&elsewhere).expect("our own output");

    symlink("/nonexistent/target", dir.path().join("dangling")).expect("linked");
    let refused = adapter.write_lora(&dir.path().join("dangling"), &LoraOptions::default());
    assert!(
        refused
            .as_ref()
            .is_err_and(|error| ["io", "not-found"].contains(&error.code())),
        "{refused:?}"
    );
}

/// Weights of a shard set may be links, as in the Hub's cache; an index may not name a path.
#[cfg(unix)]
#[test]
fn shards_may_be_links_but_the_index_names_files_only() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let blob = dir.path().join("blob");
    fs::write(&blob, seed("safetensors")).expect("writable");
    let model = dir.path().join("model");
    fs::create_dir(&model).expect("writable");
    fs::write(model.join("config.json"), "{}").expect("writable");
    std::os::unix::fs::symlink("../blob", model.join("model.safetensors")).expect("linked");
    ModelFiles::open(&model).expect("a cached model");
    fs::write(
        model.join("model.safetensors.index.json"),
        r#"{"weight_map":{"a":"../blob"}}"#,
    )
    .expect("writable");
    let error = ModelFiles::open(&model).expect_err("outside");
    assert_eq!(error.code(), "malformed", "{error}");
}
