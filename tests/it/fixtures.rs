//! Where the recorded cases are, and how they are read.

mod devices;
mod walk;

use std::path::{Path, PathBuf};

use candle_core::Device;
use monteclora::model::Decoder;
use monteclora_converters::{Adapter, Format, LoraOptions, ReadOptions, SafetensorsFile};

pub(crate) use devices::devices;
pub(crate) use walk::{own, walk};

/// A recorded adapter.
pub(crate) struct AdapterCase {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) model: PathBuf,
    /// What was computed from both.
    pub(crate) expected: PathBuf,
}

impl AdapterCase {
    /// `root/adapters/NAME`, whose base is a model of the same root.
    fn new(dir: PathBuf) -> Self {
        let case = std::fs::read_to_string(dir.join("case.json")).unwrap();
        let case: serde_json::Value = serde_json::from_str(&case).unwrap();
        let root = dir.parent().and_then(Path::parent).unwrap();
        Self {
            name: dir.file_name().unwrap().to_str().unwrap().to_owned(),
            model: root.join("models").join(case["model"].as_str().unwrap()),
            expected: dir.join("expected.safetensors"),
            dir,
        }
    }

    /// `root/architectures/KIND`: a model and an adapter for it.
    fn of_architecture(dir: &Path) -> Self {
        Self {
            name: dir.file_name().unwrap().to_str().unwrap().to_owned(),
            dir: dir.join("adapter"),
            model: dir.join("model"),
            expected: dir.join("expected.safetensors"),
        }
    }

    /// Whether every consumer must refuse it.
    pub(crate) fn must_be_refused(&self) -> bool {
        self.name.starts_with("must-refuse") && !self.was_refused()
    }

    /// Whether the adapter is B A and no more.
    pub(crate) fn is_low_rank(&self) -> bool {
        let adapter = monteclora_converters::Adapter::read_dir(&self.dir).unwrap();
        adapter.sites.iter().all(|site| site.beyond.is_none())
    }

    /// A case from the time when DoRA was not read. Its updates are those of B A alone; the case `dora` has the whole.
    pub(crate) fn was_refused(&self) -> bool {
        self.name == "must-refuse-dora"
    }

    /// Allowed difference in logits: what was computed in bfloat16 has 8 bits of mantissa.
    pub(crate) fn tolerance(&self) -> f64 {
        if self.is_rounded() { 0.05 } else { 1e-4 }
    }

    /// Allowed difference in the weights' updates.
    pub(crate) fn delta_tolerance(&self) -> f64 {
        if self.is_rounded() { 1e-2 } else { 1e-5 }
    }

    /// Whether the reference was computed in bfloat16 and stored in float32.
    fn is_rounded(&self) -> bool {
        let expected = SafetensorsFile::open(&self.expected).unwrap();
        floats(&expected, "logits")
            .iter()
            .all(|value| value.to_bits() & 0xffff == 0)
    }
}

/// Each update of `adapter` is the one that PEFT recorded in `expected`.
pub(crate) fn assert_updates(label: &str, adapter: &Adapter, expected: &SafetensorsFile) {
    for site in &adapter.sites {
        let recorded = floats(expected, &format!("delta.{}", site.name));
        let difference = largest_difference(&site.delta_f32().unwrap(), &recorded);
        assert!(difference <= 1e-5, "{label}: {}: {difference}", site.name);
    }
}

/// What is read of `adapter` after it was written in `format`, for the base that `options` name.
pub(crate) fn written_and_read(
    format: &dyn Format,
    adapter: &Adapter,
    options: &ReadOptions<'_>,
) -> Adapter {
    let (about, dir) = (format.about(), tempfile::tempdir().unwrap());
    let output = dir.path().join(about.file_name.unwrap_or("adapter"));
    format
        .write(
            adapter,
            &output,
            &LoraOptions::default(),
            options.base_config,
        )
        .unwrap_or_else(|error| panic!("{}: {error}", about.name));
    format.read(&output, options).unwrap()
}

/// Every adapter that is there.
pub(crate) fn adapters() -> Vec<AdapterCase> {
    walk("adapters/")
        .into_iter()
        .map(AdapterCase::new)
        .collect()
}

/// Every adapter that is read and used; at least one.
pub(crate) fn usable() -> Vec<AdapterCase> {
    let mut cases = adapters();
    cases.retain(|case| !case.must_be_refused() && !case.was_refused());
    assert!(!cases.is_empty(), "every adapter is one to refuse");
    cases
}

/// The project's adapters that must be refused, and those of the folder that is walked.
pub(crate) fn must_be_refused() -> Vec<AdapterCase> {
    with_own(
        adapters()
            .into_iter()
            .filter(AdapterCase::must_be_refused)
            .collect(),
        &["must-refuse-modules-to-save"],
    )
}

/// `cases` and those of the project's copy with these names, each once.
pub(crate) fn with_own(mut cases: Vec<AdapterCase>, names: &[&str]) -> Vec<AdapterCase> {
    for case in names.iter().map(|name| named(name)) {
        if cases.iter().all(|other| other.dir != case.dir) {
            cases.push(case);
        }
    }
    cases
}

/// Every architecture that is there, whether it is supported or not.
pub(crate) fn architectures() -> Vec<AdapterCase> {
    let dirs = walk("architectures/");
    dirs.iter()
        .map(|dir| AdapterCase::of_architecture(dir))
        .collect()
}

/// The architectures that are there and supported, or the project's own.
pub(crate) fn supported_architectures() -> Vec<AdapterCase> {
    let mut cases = architectures();
    cases.retain(|case| Decoder::load(&case.model, &Device::Cpu).is_ok());
    if cases.is_empty() {
        cases = own_architectures();
    }
    cases
}

/// The architectures of the project's copy.
pub(crate) fn own_architectures() -> Vec<AdapterCase> {
    let dirs = subdirectories("architectures");
    dirs.iter()
        .map(|dir| AdapterCase::of_architecture(dir))
        .collect()
}

/// The folders in one of the project's copy; at least one.
fn subdirectories(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(own().join(folder)).unwrap();
    let found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    assert!(!found.is_empty(), "{folder}");
    found
}

/// Every usable adapter of the project's copy, those for architectures included.
pub(crate) fn own_usable() -> Vec<AdapterCase> {
    let adapters = subdirectories("adapters").into_iter();
    let adapters = adapters.map(AdapterCase::new);
    let mut cases: Vec<AdapterCase> = adapters.filter(|case| !case.must_be_refused()).collect();
    cases.extend(own_architectures());
    cases
}

/// An adapter of the project's copy.
pub(crate) fn named(name: &str) -> AdapterCase {
    AdapterCase::new(own().join("adapters").join(name))
}

/// A tensor's values.
pub(crate) fn floats(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.get(name)
        .unwrap_or_else(|| panic!("{name} in {}", file.path().display()))
        .to_f32()
        .unwrap()
}

/// Rows of an integer matrix.
pub(crate) fn integers(file: &SafetensorsFile, name: &str) -> Vec<Vec<i64>> {
    let tensor = file.get(name).unwrap();
    let values: Vec<i64> = tensor
        .bytes()
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    values
        .chunks_exact(tensor.shape()[1])
        .map(<[i64]>::to_vec)
        .collect()
}

/// Largest absolute difference; infinite where anything is NaN or lengths differ.
pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| {
        let d = f64::from((a - b).abs());
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}

/// `on_cpu` on the CPU, and `elsewhere` on an accelerator, whose library orders sums in another way for another shape.
pub(crate) fn tolerance(device: &Device, on_cpu: f64, elsewhere: f64) -> f64 {
    match device.is_cpu() {
        true => on_cpu,
        false => elsewhere,
    }
}

/// A client that waits as long as a slow machine takes.
#[cfg(feature = "mistralrs")]
pub(crate) fn client() -> reqwest::blocking::Client {
    let builder = reqwest::blocking::Client::builder().timeout(None);
    builder.build().unwrap()
}
