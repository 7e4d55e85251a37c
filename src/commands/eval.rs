//! `eval`: compares base model, posterior mean and the average over posterior draws, or an ensemble, on a data file.

mod page;
mod per_row;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use monteclora_converters::Problem;
use serde::Serialize;

use super::opened::{
    Opened, Request, eval_options, open_held_out, open_rows, require_at_most, require_positive,
    row_limit,
};
use super::show;
use crate::cli::EvalArgs;
use crate::distributed::world;
use crate::eval::calibration::Judged;
use crate::eval::{ChoiceRows, Predictor, Scored, Scores, Selection, is_at_bound, score};
use crate::model::ActiveAdapter;
use crate::output::{name_of, require_file};
use crate::progress;

#[derive(Debug, Serialize)]
struct Report {
    /// Name of the data file.
    data: String,
    rows: usize,
    choice_rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ece_bins: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length_normalised: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    posterior: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ensemble: Option<Scores>,
    /// Seconds in the model.
    seconds: f64,
}

/// A scored predictor: its key in JSON, its name, its predictions for every row and its scores.
struct Subject {
    key: &'static str,
    name: &'static str,
    scored: Scored,
    scores: Scores,
}

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    /// More bins could not be distinguished in a diagram.
    const MOST_BINS: usize = 1000;
    require_positive(&[
        ("--ece-bins", args.ece_bins),
        ("--limit", args.limit.unwrap_or(1)),
    ])?;
    require_at_most("--ece-bins", args.ece_bins, MOST_BINS)?;
    let mut read: Vec<&Path> = vec![&args.data, Path::new(args.model.id()?)];
    read.extend(args.adapter.iter().map(PathBuf::as_path));
    for (flag, path) in [("--per-row", &args.per_row), ("--html", &args.html)] {
        if let Some(path) = path {
            require_file(flag, path, &read)?;
        }
    }
    if args.per_row.is_some() && args.per_row == args.html {
        bail!(Problem::usage("--per-row and --html name the same file"));
    }
    let request = Request {
        model: &args.model,
        adapters: &args.adapter,
        posterior_samples: args.posterior_samples,
        scoring: &args.scoring,
    };
    let opened = Opened::new(&request, row_limit)?;
    let data = match args.held_out {
        true => open_held_out(&args.data, &opened.encoder)?,
        false => open_rows(&args.data, &opened.encoder)?,
    };
    let choices = ChoiceRows::read(&data)?;
    let calibration = opened.calibration(&args.adapter)?.of(Judged::Choices);
    let options = eval_options(&args.scoring, args.ece_bins);
    opened.require_same(data.sha256(), (&options, args.limit, args.no_base))?;
    let loaded = opened.load()?;
    let base = ActiveAdapter::default();
    let mut predictors = Vec::new();
    if !args.no_base {
        predictors.push(("base", "base", Predictor::One(&base), calibration.base));
    }
    match loaded.means.as_slice() {
        [] => {}
        [mean] => {
            let mean = Predictor::One(mean);
            predictors.push(("mean", opened.name_of_mean(), mean, calibration.mean));
        }
        means => predictors.push(("ensemble", "ensemble", Predictor::Average(means), None)),
    }
    if !loaded.draws.is_empty() {
        let draws = Predictor::Average(&loaded.draws);
        predictors.push(("posterior", "draws averaged", draws, calibration.posterior));
    }
    let n_rows = args.limit.unwrap_or(usize::MAX).min(data.len());
    let rows: Vec<usize> = (0..n_rows).collect();
    let bar = progress::items("rows", n_rows as u64);
    let asked: Vec<_> = predictors
        .iter()
        .map(|(_, _, predictor, _)| *predictor)
        .collect();
    let began = std::time::Instant::now();
    let done = |n| {
        bar.inc(n as u64);
        Ok(())
    };
    let scored = score(
        &loaded.decoder,
        &asked,
        Selection {
            data: &data,
            rows: &rows,
            choices: &choices,
        },
        &options,
        world(),
        done,
    )?;
    let seconds = began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let subjects: Vec<Subject> = predictors
        .iter()
        .zip(scored)
        .map(|((key, name, _, scaling), scored)| Subject {
            key,
            name,
            scores: scored.scores(&options, scaling.as_ref().map(|s| s.temperature)),
            scored,
        })
        .collect();
    let is_first = world().is_first();
    if let Some(path) = args.per_row.as_ref().filter(|_| is_first) {
        per_row::write(path, &data, &rows, &choices, &subjects)?;
    }
    if let Some(path) = args.html.as_ref().filter(|_| is_first) {
        page::write(path, args, &subjects, &options)?;
    }
    let n_choice_rows = subjects
        .first()
        .map_or(0, |subject| subject.scored.choices.len());
    let of = |key: &str| {
        let found = subjects.iter().find(|subject| subject.key == key);
        found.map(|subject| subject.scores.clone())
    };
    let report = Report {
        data: name_of(&args.data),
        rows: n_rows,
        choice_rows: n_choice_rows,
        ece_bins: (n_choice_rows > 0).then_some(args.ece_bins),
        length_normalised: (n_choice_rows > 0).then_some(args.scoring.length_normalised),
        base: of("base"),
        mean: of("mean"),
        posterior: of("posterior"),
        ensemble: of("ensemble"),
        seconds,
    };
    show(args.json, &report, || table(&report, &subjects))
}

/// A score's label, its value, and its 95 % interval.
type Row = (
    &'static str,
    fn(&Scores) -> Option<f64>,
    fn(&Scores) -> Option<[f64; 2]>,
);

/// Every score, in the order in which it is shown.
const ROWS: [Row; 17] = [
    ("loss", |s| Some(s.loss), |s| s.intervals.loss),
    ("perplexity", |s| Some(s.perplexity), |_| None),
    ("token accuracy", |s| Some(s.token_accuracy), |_| None),
    ("loss, each alone", |s| s.draw_loss, |_| None),
    ("accuracy", |s| s.accuracy, |s| s.intervals.accuracy),
    ("NLL", |s| s.nll, |s| s.intervals.nll),
    ("ECE", |s| s.ece, |s| s.intervals.ece),
    ("ECE floor", |s| s.ece_floor, |_| None),
    ("Brier", |s| s.brier, |s| s.intervals.brier),
    ("AUROC", |s| s.auroc, |s| s.intervals.auroc),
    ("AUROC by entropy", |s| s.auroc_entropy, |_| None),
    (
        "AUROC by mutual information",
        |s| s.auroc_mutual_information,
        |_| None,
    ),
    ("AURC", |s| s.aurc, |s| s.intervals.aurc),
    ("temperature", |s| Some(s.calibrated?.temperature), |_| None),
    (
        "NLL with temperature",
        |s| Some(s.calibrated?.nll),
        |_| None,
    ),
    (
        "ECE with temperature",
        |s| Some(s.calibrated?.ece),
        |_| None,
    ),
    (
        "Brier with temperature",
        |s| Some(s.calibrated?.brier),
        |_| None,
    ),
];

/// One score per line, one model per column.
fn table(report: &Report, subjects: &[Subject]) -> String {
    let mut text = format!("{:<28}", "");
    for subject in subjects {
        text.push_str(&format!(" {:>14}", subject.name));
    }
    for (name, value, _) in ROWS {
        if subjects
            .iter()
            .all(|subject| value(&subject.scores).is_none())
        {
            continue;
        }
        text.push_str(&format!("\n{name:<28}"));
        for subject in subjects {
            let value = value(&subject.scores).map_or("-".to_owned(), |v| format!("{v:.4}"));
            text.push_str(&format!(" {value:>14}"));
        }
    }
    for subject in subjects {
        if let Some(n) = subject.scores.draws {
            let name = subject.name;
            text.push_str(&format!("\n\n{name}: the mean of the probabilities of {n}"));
        }
    }
    let plural = if report.rows == 1 { "" } else { "s" };
    text.push_str(&format!("\n\n{} row{plural}", report.rows));
    if let Some(bins) = report.ece_bins {
        let compared = match report.length_normalised {
            Some(true) => "log-likelihood per token",
            _ => "log-likelihood of the whole choice",
        };
        text.push_str(&format!(
            ", {} with choices, compared by {compared}; ECE over {bins} bins. docs/evaluate.md says what the scores are; 95 % intervals: --json, --html",
            report.choice_rows
        ));
    }
    let at_bound = |s: &Scores| s.calibrated.is_some_and(|c| is_at_bound(c.temperature));
    for subject in subjects.iter().filter(|subject| at_bound(&subject.scores)) {
        text.push_str(&format!(
            "\n{}: the temperature is at the end of its range; confidence says nothing about what is right, or all answers are",
            subject.name
        ));
    }
    text
}
