//! Tests of runs with several ranks, which are threads here.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use candle_core::Device;
use monteclora_adapters::methods::Value;

use super::{Checkpoint, Event, Prepared, RunLock, Start, begin};
use crate::config::RunConfig;
use crate::data::test_support::{tiny_llama, write_temp};
use crate::data::{Batches, Cursor};
use crate::distributed::threads::Threads;
use crate::distributed::{Alone, Communicator};

/// 23 rows of unlike lengths: the last step of an epoch has fewer rows than there are ranks, or than a batch has.
fn rows() -> String {
    let row = |n: usize| {
        let (question, answer) = (
            "what is it? ".repeat(n % 5 + 1),
            "so ".repeat(n * n % 11 + 1),
        );
        format!(
            "{}\n",
            serde_json::json!({"prompt": question, "completion": answer})
        )
    };
    (0..23).map(row).collect()
}

struct Case {
    _dir: tempfile::TempDir,
    text: String,
}

impl Case {
    fn new() -> Self {
        let (dir, rows) = write_temp(&rows());
        let text = format!(
            "seed = 5\n[model]\nmodel_id = {:?}\n[data]\ntrain = {rows:?}\nvalid = {rows:?}\n[lora]\nr = 4\n[train]\nmax_steps = 3\nlearning_rate = 1e-3\nper_device_train_batch_size = 2\nlogging_steps = 1\neval_steps = 2\nsave_steps = 2\n",
            tiny_llama(),
        );
        Self { _dir: dir, text }
    }

    /// The run with `keys`, as one of several ranks that make steps of `micro_batches` together.
    fn prepared(&self, out: &Path, keys: &[&str], micro_batches: usize) -> Prepared {
        let mut keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
        keys.push(format!("train.output_dir={:?}", out.display().to_string()));
        let run = RunConfig::from_toml(&self.text, "run.toml", &keys).expect("resolves");
        Prepared::at_time(run, None, SystemTime::UNIX_EPOCH, micro_batches).expect("prepares")
    }
}

/// What a run made: the bytes of its adapter and of its metrics without times.
#[derive(Debug, PartialEq)]
struct Made {
    values: Vec<Vec<f32>>,
    losses: Vec<f64>,
}

fn train(prepared: &Prepared, resume: Option<&str>, ranks: &dyn Communicator) -> Made {
    let device = Device::Cpu;
    let begun = begin(prepared, resume, false, &device, ranks).expect("begins");
    let super::Begin::Run(start) = begun else {
        panic!("steps are left");
    };
    let mut losses = Vec::new();
    let interrupt = Arc::new(AtomicBool::new(false));
    let watch = |event: &Event| match event {
        Event::Step(_, loss) => losses.push(*loss),
        Event::Eval(record) => losses.push(record.loss),
        _ => {}
    };
    prepared
        .train(*start, &device, interrupt, ranks, watch)
        .expect("trains");
    let adapter = monteclora_converters::Adapter::read_dir(&prepared.run.train.output_dir);
    let values = adapter.map(|adapter| {
        let tensors = adapter
            .sites
            .iter()
            .flat_map(|site| [&site.lora_a, &site.lora_b]);
        tensors
            .map(|tensor| tensor.to_f32().expect("reads"))
            .collect()
    });
    Made {
        // Only rank 0 writes, and the others may be here earlier.
        values: values.unwrap_or_default(),
        losses,
    }
}

const PACKED: [&str; 2] = ["data.packing=true", "data.max_seq_length=120"];
const PLAIN: [&str; 2] = ["data.packing=false", "data.max_seq_length=256"];

fn furthest(one: &[Vec<f32>], other: &[Vec<f32>]) -> f32 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().flatten().zip(other.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn several_ranks_make_the_steps_of_one() {
    let case = Case::new();
    for (method, packing) in [("monteclora", PLAIN), ("lora", PACKED), ("dora", PLAIN)] {
        let method = format!("lora.method={method:?}");
        let keys = [&method, "lora.lora_dropout=0.1", packing[0], packing[1]];
        // Six batches per step: twice the epoch ends within three steps.
        let out = tempfile::tempdir().expect("a directory");
        let alone = train(
            &case.prepared(&out.path().join("1"), &keys, 6),
            None,
            &Alone,
        );
        for n_ranks in [2, 3, 5] {
            let run = |name: String| {
                let dir = out.path().join(name);
                let made = Threads::run(n_ranks, |ranks| {
                    train(&case.prepared(&dir, &keys, 6), None, ranks)
                });
                made.into_iter().next().expect("rank 0")
            };
            let made = run(format!("{n_ranks}"));
            let distance = furthest(&alone.values, &made.values);
            assert!(distance < 2e-5, "{method}, {n_ranks} ranks: {distance}");
            for (one, many) in alone.losses.iter().zip(&made.losses) {
                assert!(
                    (one - many).abs() < 1e-5,
                    "{:?} {:?}",
                    alone.losses,
                    made.losses
                );
            }
            assert_eq!(made.losses.len(), alone.losses.len());
            assert_eq!(made, run(format!("{n_ranks} again")));
        }
    }
}

#[test]
fn gradients_do_not_depend_on_the_ranks() {
    let case = Case::new();
    for packing in [PLAIN, PACKED] {
        let out = tempfile::tempdir().expect("a directory");
        let prepared = case.prepared(
            out.path(),
            &[packing[0], packing[1], "lora.lora_dropout=0.2"],
            3,
        );
        let decoder = prepared.decoder(&Device::Cpu).expect("loads");
        let lock = RunLock::take(out.path(), "wait").expect("free");
        let from: Checkpoint = Start::new(&prepared, &Device::Cpu, lock)
            .expect("starts")
            .from;
        let gradients = |ranks: &dyn Communicator| {
            let trainer = prepared.trainer(&decoder, Arc::default(), ranks);
            let mut batches = Batches::new(
                &prepared.train,
                prepared.settings.batches,
                Cursor::default(),
            );
            let examples = (0..3).map(|_| batches.next_examples()).collect();
            let drawn = from
                .state
                .draw(5, 0, &from.state.weighting(1.0, 100))
                .expect("draws");
            let passed = trainer
                .pass(examples, &drawn.active, 0, 0.01)
                .expect("passes");
            drawn
                .backward(&from.state, &passed.gradients)
                .expect("pulls back")
        };
        let values = |gradients: Vec<Vec<Value>>| -> Vec<Vec<f32>> {
            let tensors = gradients.into_iter().flatten();
            let numbers = tensors.map(|value| value.to_format().and_then(|t| Ok(t.to_f32()?)));
            numbers.map(|found| found.expect("reads")).collect()
        };
        let alone = values(gradients(&Alone));
        for n_ranks in [2, 3, 11] {
            let all = Threads::run(n_ranks, |ranks| values(gradients(ranks)));
            assert!(all.iter().all(|of_rank| *of_rank == all[0]));
            for (one, many) in alone.iter().zip(&all[0]) {
                let largest = one.iter().fold(0f32, |most, v| most.max(v.abs()));
                let distance = furthest(std::slice::from_ref(one), std::slice::from_ref(many));
                assert!(
                    distance <= 1e-6 * largest,
                    "{n_ranks} ranks: {distance} of {largest}"
                );
            }
        }
    }
}

/// A checkpoint of two ranks continues on three and on one.
#[test]
fn a_checkpoint_continues_on_any_number_of_ranks() {
    let case = Case::new();
    // A run of another length has another schedule.
    let keys = [
        "data.packing=false",
        "lora.lora_dropout=0.1",
        "lora.method=\"lora\"",
        "train.lr_scheduler_type=\"constant\"",
        "train.warmup_ratio=0.0",
    ];
    let out = tempfile::tempdir().expect("a directory");
    let whole = Threads::run(2, |ranks| {
        train(
            &case.prepared(&out.path().join("whole"), &keys, 4),
            None,
            ranks,
        )
    });
    for n_ranks in [1, 2, 3] {
        let dir = out.path().join(format!("{n_ranks}"));
        let short: Vec<&str> = keys.iter().copied().chain(["train.max_steps=2"]).collect();
        Threads::run(2, |ranks| {
            train(&case.prepared(&dir, &short, 4), None, ranks)
        });
        let ended = Threads::run(n_ranks, |ranks| {
            train(&case.prepared(&dir, &keys, 4), Some("auto"), ranks)
        });
        let distance = furthest(&whole[0].values, &ended[0].values);
        assert!(distance < 2e-5, "{n_ranks} ranks: {distance}");
        if n_ranks == 2 {
            assert_eq!(distance, 0.0);
        }
    }
}

#[test]
fn ranks_with_other_rows_are_refused() {
    let case = Case::new();
    let out = tempfile::tempdir().expect("a directory");
    let (_dir, other) = write_temp(&rows().replace("so ", "no "));
    let other = format!("data.train={:?}", other.display().to_string());
    let errors = Threads::run(2, |ranks| {
        let keys: &[&str] = match ranks.rank() {
            0 => &["train.learning_rate=2e-3"],
            _ => &["train.learning_rate=1e-3", &other],
        };
        let prepared = case.prepared(out.path(), keys, 2);
        prepared
            .require_same(ranks)
            .err()
            .map(|error| format!("{error:#}"))
    });
    assert_eq!(errors[0], errors[1]);
    let error = errors[0].as_deref().expect("refused");
    assert!(
        error.contains("train.learning_rate is 0.002 on rank 0, 0.001 there"),
        "{error}"
    );
    assert!(error.contains("data.train has another content"), "{error}");
    assert!(!error.contains("data.valid"), "{error}");
}
