//! Training through the library on the tiny fixtures: resume, accumulation, what is written.

mod traffic;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};
use monteclora::config::RunConfig;
use monteclora::data::{Dataset, Encoder};
use monteclora::distributed::Alone;
use monteclora::model::{AdapterGradients, Dropout, PassOptions, Sequences};
use monteclora::model::{Decoder, read_shape};
use monteclora::train::{
    AdapterState, Checkpoint, Event, Gradients, Identity, TrainSettings, Trainer,
};
use monteclora_adapters::methods::{
    Drawn, Export, Group, Kind, Method, Module, Owner, Parameter, Step, Storage, Value, Weighting,
};
use monteclora_adapters::noise::{Key, Noise, Purpose};
use monteclora_adapters::weights::BF16;
use monteclora_adapters::{LowRank, Precision, Update};
use monteclora_converters::{Adapter, AdapterConfig, SafetensorsFile, Site};

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
    let model_config = read_shape(&model).unwrap();
    let base = monteclora::hub::locate(model.to_str().unwrap(), &Default::default()).unwrap();
    let adapter_config = run.lora.adapter_config(&base);
    let sites = adapter_config
        .resolve_targets(&Decoder::linear_modules(&model_config))
        .unwrap();
    let encoder = Encoder::from_dir(&model, None, run.data.encode_options(256)).unwrap();
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
        TrainSettings::new(&self.run, 256)
    }

    fn state(&self) -> AdapterState {
        AdapterState::initial(
            self.run.lora.method().unwrap(),
            &self.adapter_config,
            &self.sites,
            self.decoder.config(),
            self.run.seed,
            &Device::Cpu,
        )
        .unwrap()
    }

    /// A trainer of one process, without validation rows.
    fn trainer<'a>(
        &'a self,
        settings: &'a TrainSettings,
        out: &'a Path,
        identity: &'a Identity,
    ) -> Trainer<'a> {
        Trainer {
            model: &self.decoder,
            train: &self.data,
            valid: None,
            settings,
            adapter_config: &self.adapter_config,
            output_dir: out,
            identity,
            interrupt: Arc::new(AtomicBool::new(false)),
            ranks: &Alone,
        }
    }

    fn train(&self, settings: &TrainSettings, out: &Path, resume: Option<Checkpoint>) -> Vec<f64> {
        std::fs::create_dir_all(out).unwrap();
        let identity = Identity::default();
        let trainer = self.trainer(settings, out, &identity);
        let mut losses = Vec::new();
        let fresh = Checkpoint::fresh(self.state()).unwrap();
        trainer
            .run(resume.unwrap_or(fresh), |event| {
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
    assert_eq!(adapter.format, "peft-monteclora");
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

    let read = Checkpoint::read(
        &whole.path().join("checkpoint-4"),
        &setup.state(),
        &Identity::default(),
        &Device::Cpu,
    )
    .unwrap();
    assert_eq!(read.progress.step, 4);
    setup.train(&settings, stopped.path(), Some(read));
    assert_eq!(bytes(whole.path()), bytes(stopped.path()));
}

/// Largest difference between any two tensors of the same name in two adapters.
fn largest_file_difference(a: &Path, b: &Path) -> f64 {
    let [a, b] =
        [a, b].map(|dir| SafetensorsFile::open(dir.join("adapter_model.safetensors")).unwrap());
    a.names()
        .map(|name| {
            let [x, y] = [&a, &b].map(|file| file.get(name).unwrap().to_f32().unwrap());
            crate::fixtures::largest_difference(&x, &y)
        })
        .fold(0.0, f64::max)
}

/// Micro-batches are the large batch, whatever the lengths of their rows, with packing, with dropout, and where the last
/// micro-batches of an epoch are too few: same losses (the divergence counted once), same adapter after five steps.
#[test]
fn accumulation_equals_the_large_batch() {
    for packing in ["true", "false"] {
        // AdamW's first steps are sign-like and would blow rounding up to the learning rate where a gradient is nearly
        // zero; an epsilon above the gradients' rounding (1e-8 or so) keeps the update a smooth function of them.
        let setup = setup(&[
            &format!("data.packing={packing}"),
            "data.max_seq_length=120",
            "lora.lora_dropout=0.1",
            "lora.monteclora.kl_loss_weight=1e-2",
            "train.adam_epsilon=1e-3",
            "train.max_steps=5",
        ]);
        let mut small = setup.settings();
        small.batches.pack_tokens = small.batches.pack_tokens.map(|_| 120);
        let mut large = small.clone();
        // Six rows: a step of four and one of two in every epoch.
        (small.batches.batch_size, small.micro_batches) = (1, 4);
        (large.batches.batch_size, large.micro_batches) = (4, 1);
        let [a, b] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let losses = [
            setup.train(&small, a.path(), None),
            setup.train(&large, b.path(), None),
        ];
        for (x, y) in losses[0].iter().zip(&losses[1]) {
            assert!((x - y).abs() < 1e-6, "packing {packing}: {losses:?}");
        }
        let difference = largest_file_difference(a.path(), b.path());
        assert!(difference < 1e-6, "packing {packing}: {difference}");
    }
}

/// The gradients themselves, of A, B and the variational parameters: one draw, dropout by row, rows of many lengths.
#[test]
fn gradients_of_micro_batches_sum_to_those_of_the_large_batch() {
    let setup = setup(&["lora.lora_dropout=0.3"]);
    let mut state = setup.state();
    for owner in &mut state.owners {
        // B is zero at first, which would hide the gradients of A and of the posterior.
        let Value::Tensor(b) = &owner.values[1] else {
            panic!("B is a matrix");
        };
        owner.values[1] = Value::Tensor((b.ones_like().unwrap() * 0.02).unwrap());
    }
    let drawn = state.draw(3, 7, &state.weighting(1.0, 100)).unwrap();
    let n_targets = setup.data.batch(&[0, 1, 2, 3, 4, 5]).unwrap().targets.len();
    let gradients = |batches: &[&[usize]]| -> Gradients {
        let mut sum = AdapterGradients::default();
        for rows in batches {
            let batch = setup.data.batch(rows).unwrap();
            let tokens: Vec<&[u32]> = batch
                .segments
                .iter()
                .map(|(start, len)| &batch.tokens[*start..start + len])
                .collect();
            let dropout = Dropout {
                probability: 0.3,
                seed: 3,
                step: 7,
                rows: rows.iter().map(|row| *row as u64).collect(),
            };
            let options = PassOptions {
                dropout: Some(&dropout),
                checkpointing: rows.len() == 2,
            };
            let loss = setup
                .decoder
                .loss_and_gradients(
                    &Sequences::new(&tokens),
                    &batch.targets,
                    &drawn.active,
                    1.0 / n_targets as f64,
                    options,
                )
                .unwrap();
            sum.add_all(loss.gradients.unwrap()).unwrap();
        }
        drawn.backward(&state, &sum).unwrap()
    };
    let large = gradients(&[&[0, 1, 2, 3, 4, 5]]);
    for cut in [
        &[&[3][..], &[0, 5], &[1, 2, 4]][..],
        &[&[5, 4], &[3, 2], &[1, 0]],
    ] {
        for (small, large) in gradients(cut).iter().zip(&large) {
            assert_eq!(small.len(), 4, "A, B and the variational parameters");
            for (small, large) in small.iter().zip(large) {
                let [x, y] = [small, large].map(|v| v.to_format().unwrap().to_f32().unwrap());
                assert!(y.iter().any(|g| g.abs() > 1e-5), "no gradient to compare");
                let difference = crate::fixtures::largest_difference(&x, &y);
                assert!(difference < 1e-6, "{difference}");
            }
        }
    }
}

/// LoRA+ moves B faster by its ratio; the divergences' weight and the learning rate warm up as they are told.
#[test]
fn rates_and_warm_ups_are_what_they_say() {
    let step = |ratio: &str| {
        let setup = setup(&["train.max_steps=1", ratio]);
        let out = tempfile::tempdir().unwrap();
        setup.train(&setup.settings(), out.path(), None);
        Adapter::read(out.path()).unwrap()
    };
    let (plain, plus) = (
        step("train.loraplus_lr_ratio=1"),
        step("train.loraplus_lr_ratio=4"),
    );
    for (plain, plus) in plain.sites.iter().zip(&plus.sites) {
        assert_eq!(
            plain.lora_a.to_f32().unwrap(),
            plus.lora_a.to_f32().unwrap()
        );
        let (x, y) = (
            plain.lora_b.to_f32().unwrap(),
            plus.lora_b.to_f32().unwrap(),
        );
        assert!(x.iter().any(|v| *v != 0.0));
        for (x, y) in x.iter().zip(&y) {
            assert!((4.0 * x - y).abs() <= 1e-6 * y.abs(), "{x} {y}");
        }
    }

    let lines = |overrides: &[&str]| -> Vec<serde_json::Value> {
        let setup = setup(&[&["train.logging_steps=1", "train.max_steps=4"], overrides].concat());
        let out = tempfile::tempdir().unwrap();
        setup.train(&setup.settings(), out.path(), None);
        std::fs::read_to_string(out.path().join("metrics.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|line| line["type"] == "train")
            .collect()
    };
    let warm = lines(&[
        "lora.monteclora.kl_warmup_ratio=1",
        "train.lr_scheduler_type=constant",
        "train.warmup_steps=2",
    ]);
    for (index, line) in warm.iter().enumerate() {
        let number = |key: &str| line[key].as_f64().unwrap();
        let divergence = number("kl_dirichlet") + number("kl_wishart") + number("kl_gaussian");
        let expected = 1e-5 * divergence * (index + 1) as f64 / 4.0;
        assert!((number("kl_loss") - expected).abs() < 1e-9, "{line}");
        let rate = [5e-3, 1e-2, 1e-2, 1e-2][index];
        assert_eq!(number("learning_rate"), rate, "{line}");
    }
}

/// Recomputed activations see the same noise and the same dropout: equal files.
#[test]
fn gradient_checkpointing_changes_nothing() {
    let run = |flag: &str| {
        let setup = setup(&["lora.lora_dropout=0.2", flag]);
        let out = tempfile::tempdir().unwrap();
        setup.train(&setup.settings(), out.path(), None);
        bytes(out.path())
    };
    assert_eq!(
        run("train.gradient_checkpointing=true"),
        run("train.gradient_checkpointing=false")
    );
}

/// Mixed precision trains to nearly the same losses, and not to the same bytes.
#[test]
fn bf16_products_train_alike() {
    let run = |precision: Precision| {
        let mut setup = setup(&["train.max_steps=12"]);
        let model = own().join("models/tiny-llama");
        setup.decoder = Decoder::load_as(&model, &Device::Cpu, &BF16)
            .unwrap()
            .with_precision(precision);
        let out = tempfile::tempdir().unwrap();
        let losses = setup.train(&setup.settings(), out.path(), None);
        (losses, bytes(out.path()))
    };
    let (exact, exact_bytes) = run(Precision::Single);
    let (narrow, narrow_bytes) = run(Precision::Bf16);
    assert_ne!(exact_bytes, narrow_bytes);
    let fall = exact[0] - exact[exact.len() - 1];
    for (exact, narrow) in exact.iter().zip(&narrow) {
        assert!(
            (exact - narrow).abs() < 0.05 * fall,
            "{exact} {narrow} {fall}"
        );
    }
}

/// `lora` writes plain LoRA; `lora-fa` leaves A at its initial value.
#[test]
fn the_controls_are_what_they_say() {
    let out = tempfile::tempdir().unwrap();
    let plain = setup(&["lora.method=lora"]);
    plain.train(&plain.settings(), out.path(), None);
    assert_eq!(Adapter::read(out.path()).unwrap().format, "peft-lora");

    let frozen = setup(&["lora.method=lora-fa"]);
    let out = tempfile::tempdir().unwrap();
    frozen.train(&frozen.settings(), out.path(), None);
    let adapter = Adapter::read(out.path()).unwrap();
    for owner in &frozen.state().owners {
        let written = adapter.sites.iter().find(|s| s.name == owner.name).unwrap();
        assert_eq!(
            written.lora_a.to_f32().unwrap(),
            owner.values[0].to_format().unwrap().to_f32().unwrap()
        );
    }
}

/// A method that needs everything the door offers: A keeps its initial value and PEFT has no place for it, a gate over the
/// ranks is shared by all modules, and each step also shrinks the gate without asking the gradient. `A = diag(gate) A_0`.
#[derive(Debug)]
struct Gated;

static GATED: Kind = Kind {
    name: "gated",
    about: "LoRA with a gate.",
    metrics: &[],
    export: Export::PlainLora,
    unread: &[],
    new: |_| Ok(Arc::new(Gated)),
};

#[derive(Debug)]
struct GatedDraw {
    update: Arc<dyn Update>,
    a: Tensor,
    gate: Vec<f64>,
}

fn gated(a: &Tensor, gate: &[f64]) -> candle_core::Result<Tensor> {
    let gate: Vec<f32> = gate.iter().map(|g| *g as f32).collect();
    a.broadcast_mul(&Tensor::from_vec(gate, (a.dim(0)?, 1), a.device())?)
}

impl Drawn for GatedDraw {
    fn update(&self) -> Arc<dyn Update> {
        self.update.clone()
    }

    fn pullback(
        &self,
        upstream: &[Tensor],
        _numbers: &[f64],
        _weight: f64,
    ) -> monteclora_adapters::Result<Vec<Value>> {
        let rows = (&upstream[0] * &self.a)?.sum(1)?.to_vec1::<f32>()?;
        Ok(vec![
            Value::Tensor(gated(&upstream[0], &self.gate)?),
            Value::Tensor(upstream[1].clone()),
            Value::Vector(rows.into_iter().map(f64::from).collect()),
        ])
    }
}

impl Method for Gated {
    fn kind(&self) -> &'static Kind {
        &GATED
    }

    fn parameters(&self, module: &Module) -> Vec<Parameter> {
        let parameter = |name, group, shape: [usize; 2], peft| Parameter {
            name,
            peft,
            shape: shape.to_vec(),
            storage: Storage::Tensor,
            group,
            reached: None,
        };
        let (rank, b) = (module.rank, Some("lora_B.weight"));
        vec![
            parameter("basis", Group::Frozen, [rank, module.in_features], None),
            parameter("lora_B", Group::Output, [module.out_features, rank], b),
        ]
    }

    fn initial(&self, module: &Module, key: Key) -> Vec<Vec<f32>> {
        let a = key.uniforms(Purpose::InitialA, module.rank * module.in_features);
        let b = key.uniforms(
            Purpose::InitialVariational,
            module.rank * module.out_features,
        );
        [a, b]
            .map(|values| values.into_iter().map(|u| 0.1 * u as f32).collect())
            .into()
    }

    fn shared(&self, modules: &[Module]) -> Vec<Parameter> {
        vec![Parameter {
            name: "gate",
            peft: None,
            shape: vec![modules[0].rank],
            storage: Storage::Vector,
            group: Group::Weight,
            reached: Some(0),
        }]
    }

    fn initial_shared(&self, modules: &[Module], _key: Key) -> Vec<Vec<f32>> {
        vec![vec![1.0; modules[0].rank]]
    }

    fn mean(
        &self,
        module: &Module,
        values: &[&Value],
    ) -> monteclora_adapters::Result<Arc<dyn Update>> {
        let [Value::Tensor(a), Value::Tensor(b), Value::Vector(gate)] = values else {
            panic!("basis, B and the shared gate: {values:?}");
        };
        Ok(Arc::new(LowRank {
            a: gated(a, gate)?,
            b: b.clone(),
            scaling: module.scaling,
        }))
    }

    fn export(&self, module: &Module, values: &[&Value]) -> monteclora_adapters::Result<Site> {
        let mean = self.mean(module, values)?;
        let factors = mean.factors();
        let matrix = |at: usize| Value::Tensor(factors[at].clone()).to_format();
        Ok(Site {
            name: module.name.clone(),
            rank: module.rank,
            alpha: module.alpha,
            scaling: module.scaling,
            lora_a: matrix(0)?,
            lora_b: matrix(1)?,
            posterior: None,
            beyond: None,
            triplets: None,
        })
    }

    fn draw(
        &self,
        module: &Module,
        values: &[&Value],
        _noise: &dyn Noise,
        _weighting: &Weighting,
    ) -> monteclora_adapters::Result<Box<dyn Drawn>> {
        let update = self.mean(module, values)?;
        match values {
            [Value::Tensor(a), _, Value::Vector(gate)] => Ok(Box::new(GatedDraw {
                update,
                a: a.clone(),
                gate: gate.clone(),
            })),
            _ => panic!("basis, B and the shared gate"),
        }
    }

    fn after_step(
        &self,
        _modules: &[Module],
        owners: &mut [Owner],
        gradients: &[Vec<Value>],
        step: Step,
    ) -> monteclora_adapters::Result<()> {
        let shared = owners.last_mut().expect("the shared gate");
        assert_eq!(gradients.last().map(Vec::len), Some(1));
        let Value::Vector(gate) = &mut shared.values[0] else {
            panic!("the gate is a vector");
        };
        for value in gate {
            *value = f64::from((*value * (1.0 - 0.01 / (step.index + 1) as f64)) as f32);
        }
        Ok(())
    }
}

/// What modules share gets the sum of their gradients, which is the slope of the loss; a run of such a method resumes to the
/// byte, and what it writes is the plain LoRA it computes with.
#[test]
fn a_method_may_share_parameters_and_step_without_a_gradient() {
    let setup = setup(&[
        "train.save_steps=3",
        "train.weight_decay=0.1",
        "lora.method=lora",
    ]);
    let state = || {
        AdapterState::initial(
            Arc::new(Gated),
            &setup.adapter_config,
            &setup.sites,
            setup.decoder.config(),
            setup.run.seed,
            &Device::Cpu,
        )
        .unwrap()
    };
    let batch = setup.data.batch(&[0, 3]).unwrap();
    let tokens: Vec<&[u32]> = batch
        .segments
        .iter()
        .map(|(start, len)| &batch.tokens[*start..start + len])
        .collect();
    let sequences = Sequences::new(&tokens);
    let fresh = state();
    let drawn = fresh.draw(1, 0, &fresh.weighting(1.0, 100)).unwrap();
    let loss = setup
        .decoder
        .loss_and_gradients(
            &sequences,
            &batch.targets,
            &drawn.active,
            1.0,
            PassOptions::default(),
        )
        .unwrap();
    let gradients = drawn.backward(&fresh, &loss.gradients.unwrap()).unwrap();
    assert_eq!(gradients.len(), fresh.modules.len() + 1);
    let Some([Value::Vector(slopes)]) = gradients.last().map(Vec::as_slice) else {
        panic!("one gradient of the gate");
    };
    for (rank, slope) in slopes.iter().enumerate() {
        let at = |delta: f64| {
            let mut moved = state();
            let Value::Vector(gate) = &mut moved.owners.last_mut().unwrap().values[0] else {
                panic!("the gate is a vector");
            };
            gate[rank] += delta;
            let mean = moved.mean().unwrap();
            let loss = setup.decoder.evaluate(&sequences, &batch.targets, &mean);
            loss.unwrap().total()
        };
        let numeric = (at(0.05) - at(-0.05)) / 0.1;
        let scale = slopes.iter().fold(0f64, |m, v| m.max(v.abs()));
        assert!((slope - numeric).abs() < 0.02 * scale, "{slope} {numeric}");
    }

    let settings = setup.settings();
    let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let train = |out: &Path, resume: Option<Checkpoint>| {
        let identity = Identity::default();
        let trainer = setup.trainer(&settings, out, &identity);
        let fresh = Checkpoint::fresh(state()).unwrap();
        trainer.run(resume.unwrap_or(fresh), |_| {}).unwrap();
    };
    train(whole.path(), None);
    let read = Checkpoint::read(
        &whole.path().join("checkpoint-3"),
        &state(),
        &Identity::default(),
        &Device::Cpu,
    )
    .unwrap();
    let Value::Vector(gate) = &read.state.owners.last().unwrap().values[0] else {
        panic!("the gate is a vector");
    };
    assert!(gate.iter().all(|value| *value != 1.0), "{gate:?}");
    let active = read.state.mean().unwrap();
    let written = Adapter::read(&whole.path().join("checkpoint-3")).unwrap();
    for (id, module) in &read.state.modules {
        let site = written.sites.iter().find(|site| site.name == module.name);
        let factors = active.get(*id).unwrap().factors();
        let a = Value::Tensor(factors[0].clone()).to_format().unwrap();
        let (ours, theirs) = (a.to_f32().unwrap(), site.unwrap().lora_a.to_f32().unwrap());
        assert_eq!(ours, theirs);
    }
    train(stopped.path(), Some(read));
    assert_eq!(bytes(whole.path()), bytes(stopped.path()));
}
