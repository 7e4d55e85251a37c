//! How sure a model is: `fit` and `calibrate`, ensembles, and the scores that come of them.

mod calibrate;
mod evidence;
mod fit;

use std::fs;
use std::path::Path;

use monteclora_converters::Adapter;
use serde_json::{Value, json};

use crate::cli::{copy, json, own_adapter, run, text, tiny};

/// `n` rows with two or three choices; `answer` says which is right.
fn rows(n: usize, answer: impl Fn(usize) -> usize) -> String {
    let row = |at: usize| {
        let choices = match at % 3 {
            0 => vec!["yes", "no", "who can tell"],
            _ => vec!["yes", "no"],
        };
        let answer = answer(at) % choices.len();
        json!({"prompt": format!("is thing {at} green"), "choices": choices, "answer": answer})
    };
    (0..n).map(|at| format!("{}\n", row(at))).collect()
}

/// A place with rows, and a base.
struct Place {
    dir: tempfile::TempDir,
    model: String,
}

impl Place {
    fn new(rows: &str) -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            model: tiny(),
        };
        fs::write(place.at("rows.jsonl"), rows).unwrap();
        place
    }

    fn at(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    /// A copy of an adapter, so that files may be written beside it.
    fn adapter(&self, name: &str) -> String {
        let to = self.dir.path().join(name);
        copy(Path::new(&own_adapter(name)), &to);
        text(&to).to_owned()
    }

    /// A command on the base, the rows and an adapter.
    fn on(&self, command: &str, adapter: &str, more: &[&str]) -> Vec<String> {
        let rows = self.at("rows.jsonl");
        let first = [command, "-m", &self.model, "-a", adapter, "--data", &rows];
        [&first, more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect()
    }

    fn json(&self, command: &str, adapter: &str, more: &[&str]) -> Value {
        let arguments = self.on(command, adapter, more);
        json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn run(&self, command: &str, adapter: &str, more: &[&str]) -> crate::cli::Run {
        let arguments = self.on(command, adapter, more);
        run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

fn close(found: &Value, expected: &Value, what: &str) {
    let (found, expected) = (number(found), number(expected));
    assert!(
        (found - expected).abs() < 1e-6 * (1.0 + expected.abs()),
        "{what}: {found} {expected}"
    );
}

#[test]
fn an_ensemble_is_the_average_of_its_members() {
    let place = Place::new(&rows(9, |at| at));
    let members = [
        own_adapter("plain-lora"),
        own_adapter("all-linear"),
        own_adapter("monteclora"),
    ];
    let per_row = |name: &str, adapters: &[String]| -> (Value, Vec<Value>) {
        let file = place.at(name);
        let (model, rows) = (tiny(), place.at("rows.jsonl"));
        let mut arguments = vec![
            "eval",
            "-m",
            &model,
            "--data",
            &rows,
            "--per-row",
            &file,
            "--no-base",
        ];
        for adapter in adapters {
            arguments.extend(["-a", adapter]);
        }
        let scores = json(&arguments);
        let lines = fs::read_to_string(&file).unwrap();
        (
            scores,
            lines
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect(),
        )
    };
    let (scores, rows) = per_row("all.jsonl", &members);
    assert!(scores.get("mean").is_none() && scores.get("base").is_none());
    assert_eq!(scores["ensemble"]["draws"], 3);
    let alone: Vec<_> = members
        .iter()
        .map(|m| per_row("one.jsonl", std::slice::from_ref(m)))
        .collect();
    let mut nll = 0.0;
    for (at, row) in rows.iter().enumerate() {
        let answer = row["answer"].as_u64().unwrap() as usize;
        let found = row["ensemble"]["probabilities"].as_array().unwrap();
        for (choice, p) in found.iter().enumerate() {
            let each = alone
                .iter()
                .map(|(_, rows)| number(&rows[at]["mean"]["probabilities"][choice]));
            let mean = each.sum::<f64>() / 3.0;
            assert!((number(p) - mean).abs() < 1e-5, "{p} {mean}");
        }
        nll -= number(&found[answer]).ln() / rows.len() as f64;
    }
    close(&scores["ensemble"]["nll"], &json!(nll), "NLL");
    let losses: f64 = alone
        .iter()
        .map(|(scores, _)| number(&scores["mean"]["loss"]))
        .sum();
    assert!((number(&scores["ensemble"]["draw_loss"]) - losses / 3.0).abs() < 1e-4);
    let (model, rows) = (tiny(), place.at("rows.jsonl"));
    let same = place.adapter("plain-lora");
    let twice = run(&[
        "eval",
        "-m",
        &model,
        "--data",
        &rows,
        "-a",
        &members[0],
        "-a",
        &same,
    ]);
    assert!(
        twice.code == 0 && twice.stderr.contains("have the same mean"),
        "{}",
        twice.stderr
    );
    let two = ["-a", &members[0], "-a", &members[1]];
    let several = [
        &["eval", "-m", &model, "--data", &rows][..],
        &two,
        &["--posterior-samples", "2"],
    ]
    .concat();
    let refused = run(&several);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("one adapter"), "{}", refused.stderr);
    let answers = json(&[&["predict", "-m", &model, "--data", &rows][..], &two].concat());
    for answer in answers["answers"].as_array().unwrap() {
        assert_eq!(answer["uncertainty"]["draws"], 2);
    }
}

#[test]
fn scores_come_with_intervals_a_floor_and_a_page() {
    let place = Place::new(&rows(40, |at| at));
    let adapter = place.adapter("monteclora");
    let page = place.at("page.html");
    let scores = place.json(
        "eval",
        &adapter,
        &["--posterior-samples", "2", "--html", &page],
    );
    for of in ["base", "mean", "posterior"] {
        let scores = &scores[of];
        for key in ["loss", "accuracy", "nll", "ece", "brier", "aurc"] {
            let ends = scores["intervals"][key]
                .as_array()
                .unwrap_or_else(|| panic!("{of} {key}"));
            let (low, high) = (number(&ends[0]), number(&ends[1]));
            assert!(low <= high, "{of} {key}");
            if key != "ece" {
                let value = number(&scores[key]);
                assert!(
                    low <= value && value <= high,
                    "{of} {key}: {low} {value} {high}"
                );
            }
        }
        assert!(number(&scores["ece_floor"]) > 0.0);
    }
    assert!(
        scores["posterior"]
            .get("auroc_mutual_information")
            .is_some()
    );
    assert!(scores["mean"].get("auroc_mutual_information").is_none());
    let html = fs::read_to_string(&page).unwrap();
    for part in [
        "<svg",
        "reliability",
        "posterior mean",
        "draws averaged",
        "AURC",
    ] {
        assert!(html.to_lowercase().contains(&part.to_lowercase()), "{part}");
    }
    for never in ["<script", "http://", "https://", "NaN"] {
        assert!(!html.contains(never), "{never}");
    }
    // What is read is not written over, and what cannot be written is said before the work.
    let rows = place.at("rows.jsonl");
    let before = fs::read(&rows).unwrap();
    let weights = Path::new(&adapter).join("adapter_model.safetensors");
    for more in [
        ["--per-row", &rows],
        ["--html", text(&weights)],
        ["--per-row", text(place.dir.path())],
        ["--html", "nowhere/page.html"],
        ["--ece-bins", "18446744073709551615"],
        ["--max-seq-length", "100000"],
    ] {
        let refused = place.run("eval", &adapter, &more);
        assert_eq!(refused.code, 2, "{more:?}: {}", refused.stderr);
        assert!(refused.stderr.contains(more[0]), "{}", refused.stderr);
    }
    let both = place.at("both");
    let refused = place.run("eval", &adapter, &["--html", &both, "--per-row", &both]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert_eq!(fs::read(&rows).unwrap(), before);
    Adapter::read(Path::new(&adapter)).unwrap();
    // A link stays one.
    #[cfg(unix)]
    {
        let (link, target) = (place.at("link"), place.at("target"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        place.json("eval", &adapter, &["--limit", "2", "--per-row", &link]);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap().lines().count(), 2);
    }
    let limited = place.json("eval", &adapter, &["--limit", "5"]);
    assert_eq!(
        (&limited["rows"], &limited["choice_rows"]),
        (&json!(5), &json!(5))
    );
    // Batches change no number.
    let whole = place.json("eval", &adapter, &["--batch-size", "7"]);
    close(
        &whole["mean"]["nll"],
        &scores["mean"]["nll"],
        "NLL in other batches",
    );
    let table = place
        .run("eval", &adapter, &["--posterior-samples", "2"])
        .stdout;
    for part in ["ECE floor", "AURC", "by entropy"] {
        assert!(table.contains(part), "{part}: {table}");
    }
}
