//! What lies beside an adapter's files, through the commands: carried along, left out by name, refused.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::{copy, json as answer, ok, own_adapter, run, text, tiny};

/// The folder of a case, below the root that `MONTECLORA_CASES` names, or the project's copy.
fn case(name: &str) -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cases");
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(own, PathBuf::from);
    let path = root.join("formats").join(name);
    assert!(path.is_dir(), "no case `{}`", path.display());
    path
}

/// Whether the list of a report has an entry of this name.
fn left_out(report: &Value, name: &str) -> bool {
    let list = report["left_out"].as_array().unwrap();
    list.iter().any(|left| left["name"] == name)
}

#[test]
fn every_command_refuses_an_adapter_with_trained_weights_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (name, file) in [
        ("new-embeddings", "new_embeddings.safetensors"),
        ("value-head", "value_head.safetensors"),
    ] {
        let (path, base) = (case(name), tiny());
        let (path, out) = (text(&path), text(&out));
        for arguments in [
            &["validate", path][..],
            &["collapse", path, "-o", out],
            &["convert", path, "-o", out, "--to", "mlx"],
            &["convert", path, "-o", out, "--to", "gguf", "-m", &base],
            &["sample", path, "-o", out],
            &["merge", "-m", &base, "-a", path, "-o", out],
            &["predict", "-m", &base, "-a", path, "--prompt", "x"],
        ] {
            let refused = run(arguments);
            let said = refused.stdout + &refused.stderr;
            assert_eq!(refused.code, 4, "{arguments:?}: {said}");
            assert!(said.contains(file), "{arguments:?}: {said}");
            assert!(!Path::new(out).exists());
        }
        let found = answer(&["inspect", path]);
        assert_eq!(found["problems"][0]["code"], "trained-weights");
    }
}

#[test]
fn a_named_file_is_read_by_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let run_dir = case("mlx-two-checkpoints");
    let earlier = run_dir.join("0000100_adapters.safetensors");
    let norms = |path: &Path| answer(&["inspect", text(path)])["sites"][0]["norm_b"].clone();
    assert_ne!(norms(&run_dir), norms(&earlier));
    for (name, source) in [("last", &run_dir), ("earlier", &earlier)] {
        let report = answer(&["collapse", text(source), "-o", text(&at(name))]);
        assert_eq!(norms(&at(name)), norms(source), "{report}");
        ok(&[
            "convert",
            text(source),
            "-o",
            text(&at(&format!("{name}-2"))),
            "--to",
            "lora",
            "--from",
            "mlx",
        ]);
        let written = |dir: &str| std::fs::read(at(dir).join("adapter_model.safetensors")).unwrap();
        assert_eq!(written(name), written(&format!("{name}-2")));
    }
    let report = answer(&["collapse", text(&earlier), "-o", text(&at("again"))]);
    assert!(left_out(&report, "adapters.safetensors"), "{report}");
    ok(&["validate", text(&earlier)]);
}

#[test]
fn tokenizer_and_template_are_carried_along_and_the_rest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = at("source");
    copy(&case("own-chat-template"), &source);
    for name in ["README.md", "calibration.json", "optimizer.pt", "notes.txt"] {
        std::fs::write(source.join(name), "{}").unwrap();
    }
    let carried = [
        "README.md",
        "added_tokens.json",
        "calibration.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    for (command, name) in [("collapse", "lora"), ("convert", "mlx")] {
        let out = at(name);
        let mut arguments = vec![command, text(&source), "-o", text(&out)];
        if command == "convert" {
            arguments.extend(["--to", name]);
        }
        let report = answer(&arguments);
        assert_eq!(report["carried"], json!(carried), "{report}");
        for left in ["optimizer.pt", "notes.txt"] {
            assert!(left_out(&report, left), "{report}");
        }
        for name in carried {
            let bytes = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
            assert_eq!(bytes(&out), bytes(&source), "{name}");
        }
        assert!(!out.join("optimizer.pt").exists());
    }
    let told = ok(&["collapse", text(&source), "-o", text(&at("text"))]).stdout;
    assert!(
        told.contains("carried   README.md, added_tokens.json"),
        "{told}"
    );
    let line = "left out  by-products of training (optimizer.pt), files of the repository (README), not known (notes.txt)";
    assert!(told.contains(line), "{told}");
    // One file has no place for them.
    let (gguf, base) = (at("adapter.gguf"), tiny());
    let report = answer(&[
        "convert",
        text(&source),
        "-o",
        text(&gguf),
        "--to",
        "gguf",
        "-m",
        &base,
    ]);
    assert_eq!(report["carried"], json!([]));
    assert!(left_out(&report, "chat_template.jinja"), "{report}");
    let listed = ok(&["inspect", text(&source)]).stdout;
    assert!(
        listed.contains("carried along by collapse, convert and merge: README.md"),
        "{listed}"
    );
    assert!(
        ok(&["validate", text(&source)])
            .stdout
            .contains("beside it, not read: by-products")
    );

    // The added token stands beside tokenizer.json alone, which has the base's.
    let merged = at("merged");
    let merge = [
        "merge",
        "-m",
        &base,
        "-a",
        text(&source),
        "-o",
        text(&merged),
    ];
    let checked = ok(&["validate", text(&source), "-m", &base]).stdout;
    assert!(
        checked.contains("added tokens that tokenizer.json does not have (added_tokens.json 259)"),
        "{checked}"
    );
    let report = answer(&merge);
    assert!(
        left_out(&report, "README.md") && left_out(&report, "calibration.json"),
        "{report}"
    );
    for name in ["chat_template.jinja", "tokenizer_config.json"] {
        assert!(
            report["replaced"]
                .as_array()
                .unwrap()
                .contains(&json!(name)),
            "{report}"
        );
        let bytes = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(bytes(&merged), bytes(&source));
    }
    // What it is asked with otherwise is the base's, which is said.
    let asked = ok(&[
        "predict",
        "-m",
        &base,
        "-a",
        text(&source),
        "--prompt",
        "x",
        "--max-tokens",
        "1",
    ]);
    assert!(
        asked.stderr.contains("chat template of its own"),
        "{}",
        asked.stderr
    );
    let template = source.join("chat_template.jinja");
    let asked = ok(&[
        "predict",
        "-m",
        &base,
        "-a",
        text(&source),
        "--prompt",
        "x",
        "--max-tokens",
        "1",
        "--chat-template",
        text(&template),
    ]);
    assert!(
        !asked.stderr.contains("chat template of its own"),
        "{}",
        asked.stderr
    );
}

#[test]
fn what_a_directory_held_before_is_told_where_it_is_written_into() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let source = own_adapter("plain-lora");
    std::fs::create_dir(&out).unwrap();
    for name in ["tokenizer.json", "value_head.bin", "notes.txt"] {
        std::fs::write(out.join(name), "{}").unwrap();
    }
    let arguments = ["collapse", &source, "-o", text(&out), "--force"];
    let report = answer(&arguments);
    assert_eq!(report["kept"], json!(["tokenizer.json", "value_head.bin"]));
    let told = ok(&arguments).stdout;
    assert!(
        told.contains("kept      tokenizer.json, value_head.bin: there before"),
        "{told}"
    );
}

#[test]
fn what_was_measured_with_a_posterior_does_not_stay_with_its_mean() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    copy(Path::new(&own_adapter("monteclora")), &source);
    std::fs::write(source.join("fit.json"), "{}").unwrap();
    let out = |name: &str| dir.path().join(name);
    let report = answer(&["collapse", text(&source), "-o", text(&out("mean"))]);
    assert!(
        left_out(&report, "fit.json") && !out("mean").join("fit.json").exists(),
        "{report}"
    );
    let report = answer(&[
        "convert",
        text(&source),
        "-o",
        text(&out("whole")),
        "--to",
        "peft",
    ]);
    assert_eq!(report["carried"], json!(["fit.json"]));
    let report = answer(&[
        "sample",
        text(&source),
        "-k",
        "2",
        "-o",
        text(&out("draws")),
    ]);
    assert!(left_out(&report, "fit.json"), "{report}");
}
