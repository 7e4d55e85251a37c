//! `eval`: base, posterior mean and the average over posterior draws side by side on a data file.

use anyhow::Result;
use serde::Serialize;

use super::opened::{Opened, require_positive};
use super::show;
use crate::cli::EvalArgs;
use crate::data::{Dataset, RowSchema, splits};
use crate::eval::{ChoiceRows, EvalOptions, LengthNormalisation, Predictor, Scores, score};
use crate::model::ActiveAdapter;
use crate::progress;

#[derive(Debug, Serialize)]
struct Report {
    rows: usize,
    choice_rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ece_bins: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length_normalised: Option<bool>,
    base: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    posterior: Option<Scores>,
}

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    require_positive(&[
        ("--batch-size", args.batch_size),
        ("--ece-bins", args.ece_bins),
    ])?;
    let opened = Opened::new(
        &args.model,
        args.adapter.as_deref(),
        args.posterior_samples,
        !args.no_chat_template,
        |config| {
            args.max_seq_length
                .unwrap_or(config.max_position_embeddings.min(1024))
        },
    )?;
    // Of a directory, what was kept for the end.
    let split = splits(&args.data)?.last().copied().unwrap_or_default();
    let encoder = opened.encoder.clone();
    let data = Dataset::open_split(&args.data, split, RowSchema::default(), encoder)?;
    let choices = ChoiceRows::read(&data)?;
    let loaded = opened.load(args.seed)?;
    let options = EvalOptions {
        batch_size: args.batch_size,
        ece_bins: args.ece_bins,
        normalisation: LengthNormalisation::per_token(args.length_normalised),
    };
    let scored = |name: &'static str, predictor: Predictor<'_>| {
        let bar = progress::items(name, data.len() as u64);
        let done = |rows| bar.inc(rows as u64);
        let scores = score(&loaded.decoder, predictor, &data, &choices, &options, done);
        bar.finish_and_clear();
        scores
    };
    let report = Report {
        rows: data.len(),
        choice_rows: choices.len(),
        ece_bins: (!choices.is_empty()).then_some(args.ece_bins),
        length_normalised: (!choices.is_empty()).then_some(args.length_normalised),
        base: scored("base", Predictor::One(&ActiveAdapter::default()))?,
        mean: (loaded.mean.as_ref())
            .map(|mean| scored("posterior mean", Predictor::One(mean)))
            .transpose()?,
        posterior: match loaded.draws.as_slice() {
            [] => None,
            draws => Some(scored("posterior draws", Predictor::Average(draws))?),
        },
    };
    show(args.json, &report, || table(&report))
}

/// One score a line, one model a column.
fn table(report: &Report) -> String {
    type Row = (&'static str, fn(&Scores) -> Option<f64>);
    const ROWS: [Row; 8] = [
        ("loss", |s| Some(s.loss)),
        ("perplexity", |s| Some(s.perplexity)),
        ("token accuracy", |s| Some(s.token_accuracy)),
        ("accuracy", |s| s.accuracy),
        ("NLL", |s| s.nll),
        ("ECE", |s| s.ece),
        ("Brier", |s| s.brier),
        ("AUROC", |s| s.auroc),
    ];
    let columns: Vec<(&str, &Scores)> = [
        ("base", Some(&report.base)),
        ("posterior mean", report.mean.as_ref()),
        ("draws averaged", report.posterior.as_ref()),
    ]
    .into_iter()
    .filter_map(|(name, scores)| scores.map(|scores| (name, scores)))
    .collect();
    let mut text = format!("{:<16}", "");
    for (name, _) in &columns {
        text.push_str(&format!(" {name:>14}"));
    }
    for (name, value) in ROWS {
        if columns.iter().all(|(_, scores)| value(scores).is_none()) {
            continue;
        }
        text.push_str(&format!("\n{name:<16}"));
        for (_, scores) in &columns {
            let value = value(scores).map_or("-".to_owned(), |v| format!("{v:.4}"));
            text.push_str(&format!(" {value:>14}"));
        }
    }
    if let Some(draws) = report.posterior.as_ref().and_then(|scores| scores.draws) {
        text.push_str(&format!(
            "\n\ndraws averaged: the mean of the probabilities of {draws}"
        ));
    }
    let plural = if report.rows == 1 { "" } else { "s" };
    text.push_str(&format!("\n\n{} row{plural}", report.rows));
    if let Some(bins) = report.ece_bins {
        let compared = match report.length_normalised {
            Some(true) => "log-likelihood a token",
            _ => "log-likelihood of the whole choice",
        };
        text.push_str(&format!(
            ", {} with choices, compared by {compared}; ECE over {bins} bins of equal width; AUROC of detecting errors by confidence",
            report.choice_rows
        ));
    }
    text
}
