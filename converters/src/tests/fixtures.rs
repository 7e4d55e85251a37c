//! Adapters for tests: the recorded cases on disk, and small random ones.

#[path = "../../../tests/it/fixtures/walk.rs"]
mod walk;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::adapter::{Adapter, Site, SitePosterior};
use crate::architecture::{FAMILIES, WRAPPERS};
use crate::config::{AdapterConfig, MonteCloraSettings, TargetModules};
use crate::model_files::ModelFiles;
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::tensor::Tensor;

/// One recorded adapter.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) model_dir: PathBuf,
    expected: PathBuf,
}

impl Case {
    /// `root/adapters/NAME`, whose base is a model of the same root.
    fn of_adapter(dir: PathBuf) -> Self {
        let text = std::fs::read_to_string(dir.join("case.json")).expect("every case has one");
        let case: Value = serde_json::from_str(&text).expect("JSON");
        let root = dir.parent().and_then(Path::parent).expect("two above");
        Self {
            model_dir: root
                .join("models")
                .join(case["model"].as_str().expect("a model's name")),
            expected: dir.join("expected.safetensors"),
            name: name(&dir),
            dir,
        }
    }

    /// `root/architectures/KIND`.
    fn of_architecture(dir: &Path) -> Self {
        Self {
            name: name(dir),
            dir: dir.join("adapter"),
            model_dir: dir.join("model"),
            expected: dir.join("expected.safetensors"),
        }
    }

    fn must_refuse(&self) -> bool {
        self.name.starts_with("must-refuse-") && !self.was_refused()
    }

    /// A case from the time when DoRA was not read. Its updates are those of B A alone; the case `dora` has the whole.
    fn was_refused(&self) -> bool {
        self.name == "must-refuse-dora"
    }
}

fn name(dir: &Path) -> String {
    let name = dir.file_name().expect("a directory's name");
    name.to_string_lossy().into_owned()
}

/// An architecture of the project's copy.
pub(crate) fn architecture(kind: &str) -> Case {
    Case::of_architecture(&walk::own().join("architectures").join(kind))
}

/// An adapter of the project's copy.
pub(crate) fn named(name: &str) -> Case {
    Case::of_adapter(walk::own().join("adapters").join(name))
}

/// Every adapter that is there to be used, those for architectures that the converters know included.
pub(crate) fn usable() -> Vec<Case> {
    let mut cases: Vec<Case> = walk::walk("adapters/")
        .into_iter()
        .map(Case::of_adapter)
        .collect();
    cases.retain(|case| !case.must_refuse() && !case.was_refused());
    assert!(!cases.is_empty(), "every adapter is one to refuse");
    let architectures = walk::walk("architectures/");
    cases.extend(
        architectures
            .iter()
            .map(|dir| Case::of_architecture(dir))
            .filter(|case| {
                let config = ModelFiles::read_config(&case.model_dir).expect("a model");
                let families = FAMILIES.iter().map(|family| family.model_type);
                let mut known = families.chain(WRAPPERS.iter().map(|wrapper| wrapper.model_type));
                known.any(|model_type| config["model_type"] == model_type)
            }),
    );
    cases
}

/// Those of [`usable`] that are B A and no more, so that every format holds them.
pub(crate) fn low_rank() -> Vec<Case> {
    let mut cases = usable();
    cases.retain(|case| {
        let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
        adapter.sites.iter().all(|site| site.beyond.is_none())
    });
    assert!(!cases.is_empty(), "no adapter is a plain LoRA");
    cases
}

/// The project's adapters that must be refused, and those of the folder that is walked.
pub(crate) fn must_be_refused() -> Vec<Case> {
    let own = ["must-refuse-modules-to-save"].map(named);
    let walked = walk::walk("adapters/").into_iter().map(Case::of_adapter);
    own.into_iter()
        .chain(walked.filter(Case::must_refuse))
        .collect()
}

/// Asserts that the adapter's updates are the recorded ones, all of them and no others.
pub(crate) fn assert_deltas(case: &Case, adapter: &Adapter) {
    let expected = SafetensorsFile::open(&case.expected).expect("recorded");
    let recorded: Vec<&str> = expected
        .names()
        .filter_map(|name| name.strip_prefix("delta."))
        .collect();
    let sites: Vec<&str> = adapter
        .sites
        .iter()
        .map(|site| site.name.as_str())
        .collect();
    assert_eq!(sites, recorded, "{}", case.name);
    let base = ModelFiles::open(&case.model_dir).expect("a model");
    // A case computed in bfloat16 recorded rounded updates.
    let logits = expected.get("logits").expect("recorded");
    let logits = logits.to_f32().expect("float");
    let is_rounded = logits.iter().all(|value| value.to_bits() & 0xffff == 0);
    let tolerance = if is_rounded { 1e-2 } else { 1e-5 };
    for site in &adapter.sites {
        let delta = expected
            .get(&format!("delta.{}", site.name))
            .expect("listed");
        assert_eq!(delta.shape(), [site.out_features(), site.in_features()]);
        let delta = delta.to_f32().expect("float");
        let weight = base.weight(&format!("{}.weight", site.name));
        let ours = match weight {
            Some(weight) => site.delta_on(&weight).expect("float"),
            None => site.delta_f32().expect("float"),
        };
        let worst = delta
            .iter()
            .zip(&ours)
            .map(|(x, y)| (x - y).abs())
            .fold(0.0, f32::max);
        assert!(worst <= tolerance, "{} {}: {worst}", case.name, site.name);
    }
}

/// A splitmix64 stream, so that small adapters depend on the seed alone.
pub(crate) struct Stream(pub(crate) u64);

impl Stream {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> usize {
        usize::try_from(self.next() % limit).expect("small")
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let n_values = shape.iter().product();
        let values: Vec<f32> = (0..n_values)
            .map(|_| (self.next() % 256) as f32 / 128.0 - 1.0)
            .collect();
        Tensor::from_f32_as(shape, &values, dtype).expect("sized")
    }
}

/// A small adapter on layers of 3 to 6 features, with patterns, of any float type that is exported.
pub(crate) fn small_adapter(seed: u64, monteclora: bool) -> Adapter {
    let mut stream = Stream(seed);
    let settings = MonteCloraSettings {
        num_samples: 1 + stream.below(4),
        ..MonteCloraSettings::default()
    };
    let mut config = AdapterConfig {
        r: 1 + stream.below(4),
        lora_alpha: if stream.below(2) == 0 { 8.0 } else { 2.5 },
        target_modules: TargetModules::List(vec!["k_proj".into(), "q_proj".into()]),
        use_rslora: stream.below(2) == 0,
        monteclora: monteclora.then_some(settings.clone()),
        inference_mode: true,
        task_type: Some("CAUSAL_LM".into()),
        ..AdapterConfig::default()
    };
    if stream.below(2) == 0 {
        config
            .rank_pattern
            .insert("layers.1.self_attn.q_proj".into(), 1 + stream.below(5));
        config.alpha_pattern.insert("k_proj".into(), 3.0);
    }
    let dtype = [DType::F32, DType::BF16, DType::F16][stream.below(3)];
    let mut sites = Vec::new();
    for layer in 0..2 {
        for (leaf, n_out) in [("k_proj", 3), ("q_proj", 6)] {
            let name = format!("model.layers.{layer}.self_attn.{leaf}");
            let rank = config.rank_for(&name).expect("plain names");
            sites.push(Site {
                rank,
                alpha: config.alpha_for(&name).expect("plain names"),
                scaling: config.scaling_for(&name).expect("plain names"),
                lora_a: stream.tensor(&[rank, 5], dtype),
                lora_b: stream.tensor(&[n_out, rank], dtype),
                beyond: None,
                triplets: None,
                posterior: monteclora.then(|| SitePosterior {
                    log_std: stream.tensor(&[rank], DType::F32),
                    log_concentration: stream.tensor(&[settings.num_samples], DType::F32),
                }),
                name,
            });
        }
    }
    Adapter {
        format: config.peft_format(),
        config,
        sites,
        metadata: BTreeMap::from([("format".into(), "pt".into())]),
        notes: Vec::new(),
    }
}
