//! Training through the library on the tiny fixtures: resume, accumulation, what is written.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use monteclora::config::RunConfig;
use monteclora::data::Dataset;
use monteclora::model::{Decoder, ModelConfig};
use monteclora::session;
use monteclora::train::{
    AdapterState, Checkpoint, Event, TrainSettings, Trainer, latest_checkpoint,
};
use monteclora_converters::{Adapter, AdapterConfig, Format, SafetensorsFile};

use crate::fixtures::own;

const ROWS: [(&str, &str); 6] = [
    ("what is red", "a rose"),
    ("what is blue", "the sky"),
    ("what is green", "grass, and leaves"),
    ("what is white", "snow"),
    ("what is black", "coal in the dark"),
    ("what is yellow", "a lemon"),
];

pub(crate) fn write_rows(path: &Path) {
    let lines: String = ROWS
        .iter()
        .map(|(prompt, completion)| {
            format!(
                "{}\n",
                serde_json::json!({ "prompt": prompt, "completion": completion })
            )
        })
        .collect();
    std::fs::write(path, lines).unwrap();
}

struct Setup {
    _dir: tempfile::TempDir,
    decoder: Decoder,
    data: Dataset,
    adapter_config: AdapterConfig,
    sites: Vec<String>,
    run: RunConfig,
}

fn setup(overrides: &[&str]) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows);
    let model = own().join("models/tiny-llama");
    let text = format!(
        "seed = 3\n[model]\nmodel_id = {model:?}\n[data]\ntrain = {rows:?}\npacking = false\n[lora]\nr = 4\n\
         [train]\noutput_dir = {:?}\nmax_steps = 6\nper_device_train_batch_size = 3\nlearning_rate = 1e-2\n",
        dir.path().join("out")
    );
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    let run = RunConfig::from_toml(&text, "run.toml", &overrides).unwrap();
    let model_config = ModelConfig::read(&model).unwrap();
    let base = monteclora::hub::locate(model.to_str().unwrap(), &Default::default()).unwrap();
    let adapter_config = session::adapter_config(&run.lora, &base);
    let sites = adapter_config
        .resolve_targets(&Decoder::linear_modules(&model_config))
        .unwrap();
    let encoder = session::encoder(&model, None, run.data.encode_options(256)).unwrap();
    Setup {
        decoder: Decoder::load(&model, &Device::Cpu).unwrap(),
        data: Dataset::open(&rows, None, encoder).unwrap(),
        _dir: dir,
        adapter_config,
        sites,
        run,
    }
}

impl Setup {
    fn settings(&self) -> TrainSettings {
        session::train_settings(&self.run, 256)
    }

    fn state(&self) -> AdapterState {
        let objective = session::objective(&self.run.lora);
        AdapterState::initial(
            &self.adapter_config,
            &self.sites,
            self.decoder.config(),
            objective,
            self.run.seed,
            &Device::Cpu,
        )
        .unwrap()
    }

    fn train(&self, settings: &TrainSettings, out: &Path, resume: Option<Checkpoint>) -> Vec<f64> {
        std::fs::create_dir_all(out).unwrap();
        let trainer = Trainer {
            model: &self.decoder,
            train: &self.data,
            valid: None,
            settings,
            adapter_config: &self.adapter_config,
            output_dir: out,
            interrupt: Arc::new(AtomicBool::new(false)),
        };
        let mut losses = Vec::new();
        trainer
            .run(self.state(), resume, |event| {
                if let Event::Step(_, loss) = event {
                    losses.push(*loss);
                }
            })
            .unwrap();
        losses
    }
}

fn bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn training_learns_and_writes_a_whole_posterior() {
    let setup = setup(&["train.max_steps=60"]);
    let out = tempfile::tempdir().unwrap();
    let losses = setup.train(&setup.settings(), out.path(), None);
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    let adapter = Adapter::read(out.path()).unwrap();
    assert_eq!(adapter.format, Format::PeftMonteclora);
    assert_eq!(adapter.sites.len(), setup.sites.len());
    assert!(adapter.has_effect().unwrap());
    let metrics = std::fs::read_to_string(out.path().join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = metrics
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines[0]["event"], "started");
    assert_eq!(lines.last().unwrap()["event"], "finished");
    assert_eq!(lines.iter().filter(|l| l["type"] == "train").count(), 6);
}

/// Equal seeds give equal files; N steps, a stop and M steps give what N + M steps give, to the byte.
#[test]
fn runs_are_reproducible_and_resume_exactly() {
    let setup = setup(&["train.save_steps=4", "lora.lora_dropout=0.2"]);
    let settings = setup.settings();
    let [whole, again, stopped] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    setup.train(&settings, whole.path(), None);
    setup.train(&settings, again.path(), None);
    assert_eq!(bytes(whole.path()), bytes(again.path()));

    let checkpoint = latest_checkpoint(whole.path()).unwrap().unwrap();
    assert!(checkpoint.ends_with("checkpoint-4"));
    let read = Checkpoint::read(
        &checkpoint,
        &setup.state(),
        setup.decoder.config(),
        settings.adamw,
    )
    .unwrap();
    assert_eq!(read.progress.step, 4);
    setup.train(&settings, stopped.path(), Some(read));
    assert_eq!(bytes(whole.path()), bytes(stopped.path()));
}

/// Two micro-batches of three rows are one batch of six: same loss, same update, whatever their lengths.
#[test]
fn accumulation_equals_the_large_batch() {
    let setup = setup(&[]);
    let mut small = setup.settings();
    small.max_steps = Some(3);
    let mut large = small.clone();
    (small.batch_size, small.gradient_accumulation_steps) = (3, 2);
    (large.batch_size, large.gradient_accumulation_steps) = (6, 1);
    let [a, b] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (losses_small, losses_large) = (
        setup.train(&small, a.path(), None),
        setup.train(&large, b.path(), None),
    );
    for (x, y) in losses_small.iter().zip(&losses_large) {
        assert!((x - y).abs() < 1e-5, "{losses_small:?} {losses_large:?}");
    }
    let files = [&a, &b]
        .map(|dir| SafetensorsFile::open(dir.path().join("adapter_model.safetensors")).unwrap());
    for name in files[0].names() {
        let [x, y] = [0, 1].map(|i: usize| files[i].get(name).unwrap().to_f32().unwrap());
        let difference = crate::fixtures::largest_difference(&x, &y);
        // Adam's first steps are sign-like: a gradient near zero may round to either sign.
        assert!(difference < 2e-3, "{name}: {difference}");
    }
}

/// `lora` writes plain LoRA; `lora-fa` leaves A at its initial value.
#[test]
fn the_controls_are_what_they_say() {
    let out = tempfile::tempdir().unwrap();
    let plain = setup(&["lora.method=lora"]);
    plain.train(&plain.settings(), out.path(), None);
    assert_eq!(Adapter::read(out.path()).unwrap().format, Format::PeftLora);

    let frozen = setup(&["lora.method=lora-fa"]);
    let out = tempfile::tempdir().unwrap();
    frozen.train(&frozen.settings(), out.path(), None);
    let adapter = Adapter::read(out.path()).unwrap();
    for site in &frozen.state().sites {
        let written = adapter.sites.iter().find(|s| s.name == site.name).unwrap();
        assert_eq!(
            written.lora_a.to_f32().unwrap(),
            site.a.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }
}
