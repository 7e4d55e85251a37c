//! Training with an evidence bound.

use std::fs;
use std::path::Path;

use monteclora_converters::{Adapter, SafetensorsFile};
use serde_json::Value;

use super::number;
use crate::cli::{ok, own_adapter, run, text};

/// The noise of a posterior under training with an evidence bound moves, in steps of its own, and a resumed run is the same.
#[test]
fn an_evidence_bound_moves_the_posterior() {
    let dir = tempfile::tempdir().unwrap();
    let toml = crate::cli::run_toml(
        dir.path(),
        "",
        "[lora.monteclora]\nobjective = \"elbo\"\nprior_std = 0.1\n",
        "save_steps = 6\nlogging_steps = 3\nlearning_rate = 1e-2",
    );
    let out = |name: &str| dir.path().join(name);
    let train = |to: &Path, more: &[&str]| {
        let set = format!("train.output_dir={:?}", text(to));
        let steps = "train.max_steps=12";
        run(&[
            &["train", "-c", text(&toml), "--set", &set, "--set", steps][..],
            more,
        ]
        .concat())
    };
    let done = train(&out("whole"), &[]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let lines = fs::read_to_string(out("whole").join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let trained: Vec<&Value> = lines
        .iter()
        .filter(|line| line["type"] == "train")
        .collect();
    let std: Vec<f64> = trained
        .iter()
        .map(|line| number(&line["posterior_std"]))
        .collect();
    assert!(
        std.windows(2).all(|pair| pair[1] < pair[0]) && std[0] <= 0.1 + 1e-9,
        "{std:?}"
    );
    let last = trained.last().unwrap();
    assert!(number(&last["posterior_log_spread"]) > 0.0);
    assert!(number(&last["kl_gaussian"]) > 0.0 && number(&last["kl_loss"]) > 0.0);
    assert_eq!(
        (number(&last["kl_dirichlet"]), number(&last["entropy_loss"])),
        (0.0, 0.0)
    );
    let adapter = Adapter::read(&out("whole")).unwrap();
    let settings = adapter.config.monteclora.as_ref().unwrap();
    assert_eq!(
        (
            settings.num_samples,
            settings.use_entropy,
            settings.kl_loss_weight
        ),
        (1, false, 0.0)
    );
    let widths = adapter.sites.iter().flat_map(|site| {
        let s = site.posterior.as_ref().unwrap().log_std.to_f32().unwrap();
        s.into_iter()
            .map(|s| settings.sample_scaler * f64::from(s).exp() * (site.rank as f64).sqrt())
    });
    assert!(
        widths.clone().all(|width| width < 0.1 + 1e-6)
            && widths.clone().any(|width| width < 0.0999)
    );
    // What is written is what the metrics say.
    let mean = widths.map(|width| width * width).sum::<f64>();
    let n: usize = adapter.sites.iter().map(|site| site.rank).sum();
    assert!(((mean / n as f64).sqrt() / std.last().unwrap() - 1.0).abs() < 0.05);

    let first = train(&out("again"), &[]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    let weights = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights(&out("whole")), weights(&out("again")));
    fs::remove_dir_all(out("again").join("checkpoint-12")).unwrap();
    let resumed = train(&out("again"), &["--resume", "auto"]);
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    assert_eq!(weights(&out("whole")), weights(&out("again")));
    SafetensorsFile::open(out("again").join("adapter_model.safetensors")).unwrap();

    for (setting, what) in [
        ("lora.monteclora.num_samples=4", "num_samples"),
        ("lora.monteclora.sample_scaler=0.01", "sample_scaler"),
        ("lora.monteclora.kl_loss_weight=1e-3", "kl_loss_weight"),
        (
            "train.variational_learning_rate=1e-3",
            "variational_learning_rate",
        ),
        ("lora.monteclora.prior_std=0", "prior_std"),
        ("lora.monteclora.objective=exact", "prior_std"),
    ] {
        let refused = train(&out("none"), &["--set", setting]);
        assert_eq!(refused.code, 2, "{setting}: {}", refused.stderr);
        assert!(
            refused.stderr.contains(what),
            "{setting}: {}",
            refused.stderr
        );
    }
    // From an adapter whose posterior has four components there is no way into the family.
    let set = format!("lora.init_from={:?}", own_adapter("monteclora"));
    let refused = train(&out("none"), &["--set", &set]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("monteclora collapse"),
        "{}",
        refused.stderr
    );
    ok(&[
        "collapse",
        &own_adapter("monteclora"),
        "-o",
        text(&out("mean")),
    ]);
    let set = format!("lora.init_from={:?}", text(&out("mean")));
    let from_mean = train(&out("from-mean"), &["--set", &set]);
    assert_eq!(from_mean.code, 0, "{}", from_mean.stderr);
    let set = format!("lora.init_from={:?}", own_adapter("plain-lora"));
    let from_plain = train(&out("plain"), &["--set", &set]);
    assert_eq!(from_plain.code, 0, "{}", from_plain.stderr);
}
