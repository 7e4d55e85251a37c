//! What is said of files that are no adapters, or not whole: what it is, where, and what to do.

use std::fs;
use std::path::Path;

use crate::adapter::Adapter;
use crate::cases::case;
use crate::fixtures;
use crate::validate::validate_path;

/// The whole message of the refusal to read `path`.
fn message(path: &Path) -> String {
    Adapter::read(path).expect_err("refused").to_string()
}

#[test]
fn each_case_says_what_it_is_where_and_what_to_do() {
    for (name, expected) in [
        (
            "lfs-pointer",
            &[
                "adapter_model.safetensors",
                "a Git LFS pointer, which stands for a file of 13648688 bytes",
                "git lfs pull",
            ][..],
        ),
        (
            "metadata-number",
            &["__metadata__.step: 5 is not a text", "save it again"],
        ),
        (
            "nan-dropout",
            &[
                "adapter_config.json`:1: lora_dropout: NaN is no JSON",
                "write a number",
            ],
        ),
        (
            "mlx-no-config",
            &[
                "adapter_config.json`: missing",
                "\"rank\": 4",
                "\"scale\": SCALE",
            ],
        ),
        (
            "kohya-single",
            &["style.safetensors", "an image model", "lora_te_text_model"],
        ),
        (
            "trainer-output-dir",
            &["no adapter in this directory itself", "checkpoint-10`"],
        ),
        (
            "zero3-empty",
            &[
                "holds no tensor",
                "ZeRO-3",
                "stage3_gather_16bit_weights_on_model_save",
            ],
        ),
    ] {
        let text = message(&case(&format!("formats/{name}")));
        for part in expected {
            assert!(text.contains(part), "{name}: {part} is not in: {text}");
        }
    }
    // A file of its own gets the same words.
    let text = message(&case("formats/kohya-single").join("style.safetensors"));
    assert!(text.contains("an image model"), "{text}");
    let text = message(&case("formats/mlx-no-config").join("adapters.safetensors"));
    assert!(text.contains("SCALE"), "{text}");
    // validate lists it as a problem like any other.
    let problems = validate_path(&case("formats/lfs-pointer"), None, &[]).expect("a problem");
    assert_eq!(problems[0].code, "lfs-pointer");
}

#[test]
fn metadata_that_is_no_table_of_texts_is_refused_as_others_do() {
    let dir = tempfile::tempdir().expect("temporary directory");
    fixtures::small_adapter(43, false)
        .write_peft(dir.path(), true)
        .expect("written");
    let path = dir.path().join("adapter_model.safetensors");
    let sound = fs::read(&path).expect("readable");
    let (length, rest) = sound.split_first_chunk::<8>().expect("a header");
    let (header, data) =
        rest.split_at(usize::try_from(u64::from_le_bytes(*length)).expect("small"));
    let header = std::str::from_utf8(header).expect("JSON");
    for (metadata, expected) in [
        ("null", ""),
        ("[1]", "__metadata__: not a table of texts"),
        ("{\"a\":null}", "__metadata__.a: null is not a text"),
    ] {
        let header = header.replace("{\"format\":\"pt\"}", metadata);
        assert!(header.contains(metadata), "{header}");
        let bytes = [
            &(header.len() as u64).to_le_bytes()[..],
            header.as_bytes(),
            data,
        ]
        .concat();
        fs::write(&path, bytes).expect("written");
        match expected {
            "" => assert!(Adapter::read(dir.path()).is_ok()),
            expected => assert!(
                message(dir.path()).contains(expected),
                "{}",
                message(dir.path())
            ),
        }
    }
}

#[test]
fn the_cases_that_can_be_read_are_read() {
    for name in ["bom", "mlx-unsloth", "glora-ok/adapter.gguf"] {
        let path = case("formats").join(name);
        let summary = crate::inspect::summarise(&path).expect(name);
        assert_eq!(summary.n_sites, 6, "{name}");
    }
    let adapter = Adapter::read(&case("formats/mlx-unsloth")).expect("mlx-lm's");
    assert_eq!((adapter.format, adapter.sites[0].scaling), ("mlx", 2.0));
}

#[test]
fn the_remedy_for_a_missing_configuration_of_mlx_works() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let weights = dir.path().join("adapters.safetensors");
    fs::copy(
        case("formats/mlx-no-config").join("adapters.safetensors"),
        weights,
    )
    .expect("copied");
    let text = message(dir.path());
    let at = text.find('{').expect("the file to write");
    let end = text.rfind('}').expect("its end");
    let config = text[at..=end].replace("SCALE", "20.0");
    fs::write(dir.path().join("adapter_config.json"), config).expect("written");
    let adapter = Adapter::read(dir.path()).expect("complete now");
    assert_eq!((adapter.sites[0].rank, adapter.sites[0].scaling), (4, 20.0));
}

#[test]
fn adapters_inside_a_directory_are_pointed_at_the_newest_first() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let adapter = fixtures::small_adapter(41, false);
    for name in ["checkpoint-9", "checkpoint-100", "named", "best"] {
        adapter
            .write_peft(&dir.path().join(name), false)
            .expect("written");
    }
    fs::create_dir(dir.path().join("checkpoint-200")).expect("made");
    let text = message(dir.path());
    let places = ["/best`", "/checkpoint-100`", "/checkpoint-9`", "/named`"].map(|name| {
        text.find(name)
            .unwrap_or_else(|| panic!("{name} is not in: {text}"))
    });
    assert!(places.is_sorted(), "{text}");
    assert!(!text.contains("checkpoint-200"), "{text}");
    // From one directory above as well.
    let above = tempfile::tempdir().expect("temporary directory");
    adapter
        .write_peft(&above.path().join("run/checkpoint-3"), false)
        .expect("written");
    assert!(message(above.path()).contains("run/checkpoint-3`"));
    // What it points at can be read.
    let at = text.find('`').expect("the directory");
    let paths: Vec<&str> = text[at..].split('`').collect();
    for path in paths.iter().skip(3).step_by(2) {
        Adapter::read(Path::new(path)).expect(path);
    }
}

#[test]
fn files_that_are_something_else_are_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| dir.path().join(name);
    assert!(
        message(dir.path()).contains("adapter_config.json`: missing; an adapter's directory holds")
    );
    fs::write(at("config.json"), "{}").expect("written");
    assert!(message(dir.path()).contains("holds a model, not an adapter: give it with -m"));
    fs::remove_file(at("config.json")).expect("there");
    fixtures::small_adapter(42, false)
        .write_peft(dir.path(), true)
        .expect("written");
    let weights = at("adapter_model.safetensors");
    let sound = fs::read(&weights).expect("readable");
    for (bytes, expected) in [
        (&b""[..], "an empty file"),
        (&[0; 100], "zeros only"),
        (
            b"<!DOCTYPE html><title>Hugging Face</title>",
            "an HTML page",
        ),
        (
            b"{\"error\":\"Repository not found\"}",
            "begins \"{\"error\":\"Repository",
        ),
        (b"Entry not found", "begins \"Entry not found\""),
        (b"\x80\x02}q\0.", "a pickle"),
        (
            b"GGUF\x03\0\0\0\0\0\0\0",
            "a GGUF file, not a safetensors file",
        ),
        (&sound[..sound.len() - 8], "it is cut short"),
        (&sound[..40], "it is cut short"),
    ] {
        fs::write(&weights, bytes).expect("written");
        let text = message(dir.path());
        assert!(
            text.contains(expected) && text.contains("adapter_model.safetensors"),
            "{text}"
        );
    }
    fs::write(&weights, &sound).expect("written");
    // The configuration as a pointer, and weights under another name.
    let config = fs::read(at("adapter_config.json")).expect("readable");
    fs::write(
        at("adapter_config.json"),
        "version https://git-lfs.github.com/spec/v1\nsize 1\n",
    )
    .expect("written");
    assert!(message(dir.path()).contains("adapter_config.json`: a Git LFS pointer"));
    fs::write(at("adapter_config.json"), config).expect("written");
    fs::rename(&weights, at("last.safetensors")).expect("renamed");
    assert!(message(dir.path()).contains("last.safetensors`"));
    fs::rename(at("last.safetensors"), at("adapters.npz")).expect("renamed");
    fs::write(at("adapters.npz"), b"PK\x03\x04 a.npy").expect("written");
    assert!(message(dir.path()).contains("save_safetensors(\"adapter_model.safetensors\""));
    let gguf = at("adapter.gguf");
    fs::write(
        &gguf,
        "version https://git-lfs.github.com/spec/v1\nsize 1\n",
    )
    .expect("written");
    assert!(message(&gguf).contains("a Git LFS pointer"));
    let alone = tempfile::tempdir().expect("temporary directory");
    fs::rename(&gguf, alone.path().join("adapter.gguf")).expect("moved");
    assert!(message(alone.path()).contains("a Git LFS pointer"));
}

#[test]
fn a_file_that_cannot_be_opened_is_reported_once() {
    for name in [
        "formats/metadata-number",
        "formats/lfs-pointer",
        "formats/zero3-empty",
    ] {
        let problems = crate::validate_path(&case(name), None, &[]).expect("a report");
        assert_eq!(problems.len(), 1, "{name}: {problems:?}");
    }
}
