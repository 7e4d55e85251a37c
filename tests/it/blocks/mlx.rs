//! Directories that mlx-lm has quantised are bases as they are.

use std::path::{Path, PathBuf};

use monteclora_adapters::Precision;
use monteclora_adapters::weights::{AUTO, AUTO_BF16, BF16};
use monteclora_converters::{
    ModelFiles, SafetensorsFile, Tensor, base_fingerprint, write_safetensors,
};

use super::{below_data, load, trained};
use crate::cli::{copy, json, ok, run, text};
use crate::fixtures::floats;

/// Directories that mlx-lm has quantised, with the values of their weights and its logits.
fn of_mlx() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(below_data("mlx")).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.join("base").is_dir());
    found.sort();
    assert!(found.len() >= 2);
    found
}

/// The model as a directory of float32 weights.
fn decoded(from: &Path, to: &Path) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    let files = ModelFiles::open(from).unwrap();
    let mut config = files.config().clone();
    config.retain(|key, _| !key.starts_with("quantization"));
    let config = serde_json::to_string(&config).unwrap();
    std::fs::write(to.join("config.json"), config).unwrap();
    let tensors = files.names().map(|name| {
        let tensor = files.get(name).unwrap();
        let values = Tensor::from_f32(tensor.shape(), tensor.to_f32().unwrap()).unwrap();
        (name.to_owned(), values)
    });
    let path = to.join("model.safetensors");
    write_safetensors(path, tensors, &Default::default()).unwrap();
    to.to_owned()
}

#[test]
fn what_mlx_lm_quantised_is_a_base_as_it_is() {
    for dir in of_mlx() {
        let name = dir.display().to_string();
        let scratch = tempfile::tempdir().unwrap();
        let (case, dir) = (&dir, dir.join("base"));
        let files = ModelFiles::open(&dir).unwrap();
        assert!(files.check().unwrap().is_empty(), "{name}");
        assert!(files.blocks().unwrap().contains("MLX"), "{name}");
        let reference = SafetensorsFile::open(case.join("reference.safetensors")).unwrap();
        let mut n_blocks = 0;
        for weight in reference.names() {
            let found = files
                .get(weight)
                .unwrap_or_else(|| panic!("{name}: {weight}"));
            assert_eq!(
                found.to_f32().unwrap(),
                floats(&reference, weight),
                "{weight}"
            );
            n_blocks += usize::from(found.blocks().is_some());
        }
        assert!(n_blocks >= 7, "{name}");
        let dense = decoded(&dir, scratch.path());
        assert_eq!(
            base_fingerprint(&files),
            base_fingerprint(&ModelFiles::open(&dense).unwrap())
        );
        let (single, bf16) = (Precision::Single, Precision::Bf16);
        assert_eq!(
            load(&dir, &AUTO, single),
            load(&dense, &AUTO, single),
            "{name}"
        );
        assert_eq!(
            load(&dir, &AUTO_BF16, bf16),
            load(&dense, &BF16, bf16),
            "{name}"
        );
        // The logits of mlx-lm itself, whose sums are rounded to the type of its scales.
        let expected = case.join("expected.safetensors");
        let parity = json(&[
            "parity",
            "-m",
            text(&dir),
            "--engine",
            "ours",
            "--reference",
            text(&expected),
        ]);
        let apart = parity["ours"]["max_abs_diff"].as_f64().unwrap();
        assert!(apart < 1e-4, "{name}: {apart}");
    }
}

#[test]
fn a_base_of_mlx_is_not_merged_into_and_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let base = of_mlx().remove(0).join("base");
    trained(dir.path(), &base, &[]);
    let (adapter, merged) = (dir.path().join("out"), dir.path().join("merged"));
    let adapter = text(&adapter);
    let refused = run(&[
        "merge",
        "-m",
        text(&base),
        "-a",
        adapter,
        "-o",
        text(&merged),
    ]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    for part in ["MLX, 4 bits", "mlx_lm.fuse", "--to mlx"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    let written = dir.path().join("for-mlx");
    ok(&["convert", adapter, "--to", "mlx", "-o", text(&written)]);
    if cfg!(feature = "mistralrs") {
        let refused = run(&["serve", "-m", text(&base)]);
        assert_eq!(refused.code, 4, "{}", refused.stderr);
        assert!(refused.stderr.contains("MLX, 4 bits"), "{}", refused.stderr);
    }
}

#[test]
fn scales_of_mlx_that_are_not_finite_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    copy(&of_mlx()[0].join("base"), &base);
    let path = base.join("model.safetensors");
    let stored = SafetensorsFile::open(&path).unwrap();
    let name = "model.layers.0.mlp.up_proj.scales";
    let tensors: Vec<(String, Tensor)> = stored
        .names()
        .map(|known| {
            let tensor = stored.get(known).unwrap();
            let mut bytes = tensor.bytes().into_owned();
            if known == name {
                bytes[..2].copy_from_slice(&[0xc0, 0x7f]);
            }
            let owned = Tensor::from_bytes(tensor.dtype(), tensor.shape(), bytes).unwrap();
            (known.to_owned(), owned)
        })
        .collect();
    drop(stored);
    write_safetensors(&path, tensors, &Default::default()).unwrap();
    let refused = run(&[
        "predict",
        "--prompt",
        "a",
        "--max-tokens",
        "1",
        "-m",
        text(&base),
    ]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    for part in [
        "model.layers.0.mlp.up_proj.weight",
        "scales are not finite in row 0",
    ] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
}
