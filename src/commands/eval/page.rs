//! `eval --html`: the page of an evaluation.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use monteclora_converters::Error;

use super::{ROWS, Subject};
use crate::cli::EvalArgs;
use crate::eval::{EvalOptions, measures};
use crate::output::{name_of, write_named};
use crate::report::{EvaluationPage, Score, Shown};

/// Writes the HTML page with the scores of `subjects`.
pub(super) fn write(
    path: &Path,
    args: &EvalArgs,
    subjects: &[Subject],
    options: &EvalOptions,
) -> Result<()> {
    let shown = subjects.iter().map(|subject| {
        let outcomes = measures::outcomes(&subject.scored.predictions());
        // Each predictor lists every score that any predictor has, so that all have the same order.
        let told = ROWS
            .iter()
            .filter(|(_, value, _)| subjects.iter().any(|s| value(&s.scores).is_some()));
        let scores = told.map(|(label, value, interval)| -> Score {
            (label, value(&subject.scores), interval(&subject.scores))
        });
        Shown {
            name: subject.name.to_owned(),
            colour: colour(subject.key),
            outcomes: outcomes.iter().map(|o| (o.confidence, o.correct)).collect(),
            scores: scores.collect(),
        }
    });
    let model = name_of(Path::new(args.model.named()));
    let adapters: Vec<String> = args.adapter.iter().map(|path| name_of(path)).collect();
    let rows = subjects
        .first()
        .map_or(0, |subject| subject.scored.losses.len());
    let mut facts = vec![
        ("base".to_owned(), args.model.named().to_owned()),
        ("data".to_owned(), args.data.display().to_string()),
        ("rows".to_owned(), rows.to_string()),
    ];
    for adapter in &args.adapter {
        facts.push(("adapter".to_owned(), adapter.display().to_string()));
    }
    if let Some(n) = args.posterior_samples.filter(|n| *n > 0) {
        facts.push((
            "posterior draws".to_owned(),
            format!("{n}, seed {}", args.scoring.seed),
        ));
    }
    let mut notes = vec![
        "Below each score its 95 % interval, by the bootstrap over the rows.".to_owned(),
        "\u{201c}ECE floor\u{201d} is the ECE that a perfectly calibrated model of these confidences has on so few rows: an ECE near it says nothing against the model.".to_owned(),
    ];
    if subjects
        .iter()
        .any(|subject| subject.scores.calibrated.is_some())
    {
        notes.push("Diagrams and curves are without the temperature.".to_owned());
    }
    let page = EvaluationPage {
        title: format!(
            "{} on {}",
            [vec![model], adapters].concat().join(" + "),
            name_of(&args.data)
        ),
        facts,
        n_bins: options.ece_bins,
        shown: shown.collect(),
        notes,
    };
    let html = page.html()?;
    write_named(path, |file| {
        file.write_all(html.as_bytes())
            .map_err(Error::io("write", path))
    })?;
    Ok(())
}

fn colour(key: &str) -> u8 {
    match key {
        "base" => 5,
        "mean" => 1,
        "posterior" => 2,
        _ => 3,
    }
}
