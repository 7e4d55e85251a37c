//! The bytes that the converters write: SHA-256 of every file that each command makes of the project's fixtures,
//! in `tests/data/hashes`.
//!
//! A change of these bytes is a change that users see, so it is made on purpose: `UPDATE_HASHES=1` writes the lists anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use monteclora_converters::Adapter;
use sha2::{Digest, Sha256};

use crate::cli::ok;
use crate::fixtures::{AdapterCase, own_usable};

/// File below a scratch directory: hash.
type Hashes = BTreeMap<String, String>;

/// Runs every command that writes files from an adapter; the output is called after the case and the command.
fn write(case: &AdapterCase, scratch: &Path) {
    let at = |name: &str| {
        scratch
            .join(format!("{}-{name}", case.name))
            .display()
            .to_string()
    };
    let (adapter, model) = (
        case.dir.display().to_string(),
        case.model.display().to_string(),
    );
    let (mlx, gguf) = (at("mlx"), at("gguf"));
    let convert = |source: &str, to: &str, output: &str, more: &[&str]| {
        let arguments = ["convert", source, "--to", to, "-o", output, "-m", &model];
        ok(&[&arguments[..], more].concat());
    };
    let read = Adapter::read(&case.dir).unwrap();
    convert(&adapter, "peft", &at("peft"), &[]);
    convert(&adapter, "peft", &at("peft-bf16"), &["--dtype", "bf16"]);
    if read.sites.iter().all(|site| site.beyond.is_none()) {
        ok(&["collapse", &adapter, "-o", &at("collapse")]);
        convert(&adapter, "lora", &at("lora-f16"), &["--dtype", "f16"]);
        convert(&adapter, "mlx", &mlx, &[]);
        convert(&adapter, "gguf", &gguf, &[]);
        convert(&adapter, "gguf", &at("gguf-bf16"), &["--dtype", "bf16"]);
        convert(&mlx, "lora", &at("lora-of-mlx"), &[]);
        convert(&gguf, "lora", &at("lora-of-gguf"), &[]);
    }
    for dtype in ["auto", "f32", "bf16", "f16"] {
        let output = at(&format!("merge-{dtype}"));
        ok(&[
            "merge", "-m", &model, "-a", &adapter, "-o", &output, "--dtype", dtype,
        ]);
    }
    if read.sites.iter().any(|site| site.posterior.is_some()) {
        ok(&[
            "sample",
            &adapter,
            "-k",
            "2",
            "--seed",
            "7",
            "-o",
            &at("sample"),
        ]);
    }
}

/// Adds the files below `root/inside`.
fn add(hashes: &mut Hashes, root: &Path, inside: &Path) {
    for entry in std::fs::read_dir(root.join(inside)).unwrap() {
        let name = inside.join(entry.unwrap().file_name());
        let path = root.join(&name);
        if path.is_dir() {
            add(hashes, root, &name);
            continue;
        }
        // The model card tells versions.
        if name.file_name() == Some("README.md".as_ref()) {
            continue;
        }
        let digest = Sha256::digest(std::fs::read(&path).unwrap());
        let digest = digest.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        });
        hashes.insert(name.display().to_string(), digest);
    }
}

/// The hashes of what `make` writes into a scratch directory.
fn hashes(make: impl FnOnce(&Path)) -> Hashes {
    let scratch = tempfile::tempdir().unwrap();
    make(scratch.path());
    let mut hashes = Hashes::new();
    add(&mut hashes, scratch.path(), Path::new(""));
    assert!(!hashes.is_empty());
    hashes
}

/// Compares with the list of that name, or writes it.
fn hold(list: &str, found: &Hashes) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/hashes")
        .join(list);
    if std::env::var_os("UPDATE_HASHES").is_some() {
        let lines = found.iter().map(|(name, hash)| format!("{hash}  {name}\n"));
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        return;
    }
    let text = std::fs::read_to_string(&path).unwrap();
    let lines = text.lines().map(|line| line.split_once("  ").unwrap());
    let recorded: Hashes = lines
        .map(|(hash, name)| (name.to_owned(), hash.to_owned()))
        .collect();
    let names: BTreeSet<&String> = found.keys().chain(recorded.keys()).collect();
    let differing: Vec<&&String> = names
        .iter()
        .filter(|name| found.get(**name) != recorded.get(**name))
        .collect();
    assert!(
        differing.is_empty(),
        "{list}: other bytes, or other files, than recorded: {differing:#?}"
    );
}

#[test]
fn adapters_are_written_as_recorded() {
    let found = hashes(|scratch| {
        for case in own_usable() {
            write(&case, scratch);
        }
    });
    hold("adapters.txt", &found);
}

#[test]
fn gguf_bases_are_imported_as_recorded() {
    let found = hashes(|scratch| {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gguf"));
        for entry in std::fs::read_dir(folder).unwrap() {
            let source = entry.unwrap().path();
            let output = scratch.join(source.file_stem().unwrap());
            ok(&[
                "import-gguf",
                source.to_str().unwrap(),
                "-o",
                output.to_str().unwrap(),
            ]);
        }
    });
    hold("import-gguf.txt", &found);
}
