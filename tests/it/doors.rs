//! Everything in a registry has a fixture that makes it true, and a row in the documentation.
//!
//! These tests read the project's own `tests/data` and `docs`. The list of endpoints is held beside it, in
//! `adapters/mistralrs/src/server/endpoints/tests.rs`.

use std::path::{Path, PathBuf};

use candle_core::Device;
use monteclora_adapters::methods::METHODS;
use monteclora_adapters::weights::KINDS;
use monteclora_converters::architecture::{FAMILIES, WRAPPERS};
use monteclora_converters::{
    Adapter, FORMATS, ModelFiles, ReadOptions, SafetensorsFile, format_of,
};

use crate::cli::{ok, run_toml, tiny};
use crate::fixtures::{assert_updates, floats, named, own_architectures, written_and_read};

fn below_root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A row of a table in `page` begins with each of `names`, as code.
fn rows(page: &str, names: impl IntoIterator<Item = &'static str>) {
    let text = std::fs::read_to_string(below_root("docs").join(page)).unwrap();
    let mut n_names = 0;
    for name in names {
        n_names += 1;
        let row = format!("| `{name}` |");
        assert!(
            text.lines().any(|line| line.starts_with(&row)),
            "docs/{page} has no row that begins with {row}"
        );
    }
    assert!(n_names > 0, "{page}: nothing is registered");
}

#[test]
fn everything_registered_has_a_row_in_the_docs() {
    rows("models.md", FAMILIES.iter().map(|family| family.model_type));
    rows(
        "models.md",
        WRAPPERS.iter().map(|wrapper| wrapper.model_type),
    );
    rows("models.md", KINDS.iter().map(|kind| kind.name));
    rows("fine-tune.md", METHODS.iter().map(|method| method.name));
    rows(
        "convert.md",
        FORMATS.iter().map(|format| format.about().name),
    );
}

/// What can be done with a family, as the registry has it: the README's table.
fn capabilities() -> Vec<String> {
    let mark = |can: bool| if can { "yes" } else { "no" };
    FAMILIES
        .iter()
        .map(|family| {
            let in_llama_cpp = mark(!family.gguf.architecture.is_empty());
            let served = mark(family.runtime_keys.is_some());
            format!(
                "| `{}` | yes | yes | {in_llama_cpp} | {in_llama_cpp} | yes | {served} |",
                family.model_type
            )
        })
        .collect()
}

#[test]
fn the_readme_says_what_can_be_done_with_each_family() {
    let text = std::fs::read_to_string(below_root("README.md")).unwrap();
    let (_, rest) = text
        .split_once("\n## What works with which model\n")
        .unwrap();
    let rows = rest
        .lines()
        .skip_while(|line| !line.starts_with("| `llama`"));
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows, capabilities(), "{}", capabilities().join("\n"));
}

/// What the fixture of a family holds is tested in `architectures`.
#[test]
fn every_family_has_a_fixture() {
    let found: Vec<String> = own_architectures()
        .iter()
        .map(|case| {
            let config = ModelFiles::read_config(&case.model).unwrap();
            config["model_type"].as_str().unwrap().to_owned()
        })
        .collect();
    let families = FAMILIES.iter().map(|family| family.model_type);
    for wanted in families.chain(WRAPPERS.iter().map(|wrapper| wrapper.model_type)) {
        assert!(
            found.iter().any(|model_type| model_type == wanted),
            "{wanted}: no model of it in tests/data/fixtures/architectures"
        );
    }
}

/// `tests/data/methods/NAME.toml` is what a run.toml has in `[lora]`; equal runs give equal adapters.
#[test]
fn every_method_trains_by_its_fixture() {
    for method in METHODS {
        let fixture = below_root("tests/data/methods").join(format!("{}.toml", method.name));
        let settings = std::fs::read_to_string(&fixture)
            .unwrap_or_else(|error| panic!("{}: {error}", fixture.display()));
        assert!(
            settings.contains(&format!("method = {:?}", method.name)),
            "{settings}"
        );
        let adapters = [(); 2].map(|()| {
            let dir = tempfile::tempdir().unwrap();
            let config = run_toml(dir.path(), "", &settings, "learning_rate = 1e-2");
            ok(&["train", "-c", config.to_str().unwrap()]);
            let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).unwrap();
            assert!(metrics.lines().count() >= 3, "{}: {metrics}", method.name);
            Adapter::read(&dir.path().join("out")).unwrap()
        });
        assert!(!adapters[0].sites.is_empty(), "{}", method.name);
        assert_eq!(adapters[0].sites, adapters[1].sites, "{}", method.name);
    }
}

/// `tests/data/weights/KIND.safetensors`: a tensor as a model stores it, and the values that the weight computes with.
#[test]
fn every_weight_widens_to_the_values_of_its_fixture() {
    for kind in KINDS {
        let fixture = below_root("tests/data/weights").join(format!("{}.safetensors", kind.name));
        let file = SafetensorsFile::open(&fixture)
            .unwrap_or_else(|error| panic!("{}: {error}", fixture.display()));
        let (stored, values) = (file.get("stored").unwrap(), floats(&file, "values"));
        let weight = (kind.hold)(&stored, &Device::Cpu).unwrap();
        let (n_rows, n_columns) = weight.dims().unwrap();
        assert_eq!([n_rows, n_columns], *stored.shape(), "{}", kind.name);
        assert_eq!((kind.bytes)(n_rows * n_columns, None), weight.bytes());
        let mut widened = vec![f32::NAN; values.len()];
        weight.widen(0..n_rows, 0..n_columns, &mut widened);
        assert_eq!(widened, values, "{}", kind.name);
        // A part, and rows in any order, as the embedding reads them.
        let mut part = vec![f32::NAN; 2];
        weight.widen(1..2, 1..3, &mut part);
        assert_eq!(part, values[n_columns + 1..n_columns + 3], "{}", kind.name);
        let gathered = weight.gather(&[2, 0]).unwrap().flatten_all().unwrap();
        let expected = [&values[2 * n_columns..3 * n_columns], &values[..n_columns]].concat();
        assert_eq!(
            gathered.to_vec1::<f32>().unwrap(),
            expected,
            "{}",
            kind.name
        );
    }
}

/// A name in run.toml or after `--dtype` is all that it takes.
#[test]
fn every_weight_holds_the_tiny_model() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let config = run_toml(dir.path(), "", "", "learning_rate = 1e-2");
        let text = std::fs::read_to_string(&config).unwrap();
        let dtype = format!("dtype = {:?}\n[data]", kind.name);
        std::fs::write(&config, text.replace("[data]", &dtype)).unwrap();
        ok(&["train", "-c", config.to_str().unwrap()]);
        let rows = dir.path().join("rows.jsonl").display().to_string();
        ok(&["eval", "-m", &tiny(), "--data", &rows, "--dtype", kind.name]);
    }
}

/// `tests/data/formats/NAME/` holds the adapter `layers-to-transform`: it is recognised and read, and written if the format
/// can be written, with the updates that PEFT recorded.
#[test]
fn every_format_reads_its_fixture_and_what_it_writes() {
    let case = named("layers-to-transform");
    let expected = SafetensorsFile::open(&case.expected).unwrap();
    let base = ModelFiles::read_config(Path::new(&tiny())).unwrap();
    let options = ReadOptions {
        base_config: Some(&base),
        ..ReadOptions::default()
    };
    let hold = |name: &str, adapter: &Adapter| {
        assert_eq!(adapter.sites.len(), 3, "{name}");
        assert_updates(name, adapter, &expected);
    };
    for format in FORMATS {
        let name = format.about().name;
        let folder = below_root("tests/data/formats").join(name);
        let source = folder.join(format.about().file_name.unwrap_or("adapter"));
        assert!(source.exists(), "{} is not there", source.display());
        if format.about().reads.is_some() {
            assert_eq!(format_of(&source).about().name, name);
        }
        let adapter = format.read(&source, &options).unwrap();
        hold(name, &adapter);
        if format.about().writes.is_some() {
            hold(name, &written_and_read(format, &adapter, &options));
        }
    }
}
