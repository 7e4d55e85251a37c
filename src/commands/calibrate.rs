//! `calibrate`: fits a temperature, and a confidence below which no answer is given.

use anyhow::{Result, bail};
use monteclora_converters::Problem;
use serde::Serialize;

use super::opened::{
    Loaded, Opened, Request, eval_options, open_held_out, require_one_kind, require_positive,
    row_limit,
};
use super::show;
use crate::cli::CalibrateArgs;
use crate::config::ECE_BINS;
use crate::data::Dataset;
use crate::distributed::world;
use crate::eval::abstention::{self, Abstention};
use crate::eval::calibration::{self, Calibration, Fit, Judged, Rows, Scaling};
use crate::eval::{ChoiceRows, Prediction, Predictor, Recital, Selection, is_at_bound, score};
use crate::model::{ActiveAdapter, Generation};
use crate::output::require_writable;
use crate::progress;

/// With fewer rows, the fitted temperature is mostly chance.
const FEW: usize = 50;

#[derive(Debug, Serialize)]
struct Report<'a> {
    temperature: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    threshold: Option<f64>,
    rows: usize,
    judged: Judged,
    /// Share of right answers.
    accuracy: f64,
    before: Fit,
    after: Fit,
    #[serde(skip_serializing_if = "Option::is_none")]
    answered: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_bound: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    least_bound: Option<f64>,
    #[serde(flatten)]
    written: &'a Calibration,
}

/// The predictions of base model, mean and average over the draws for the rows.
struct Said {
    judged: Judged,
    base: Vec<Prediction>,
    mean: Vec<Prediction>,
    posterior: Option<Vec<Prediction>>,
}

pub(super) fn run(args: &CalibrateArgs) -> Result<()> {
    require_positive(&[("--max-tokens", args.max_tokens)])?;
    if let Some(target) = args.target_error
        && !(target > 0.0 && target < 1.0)
    {
        let problem = format!("--target-error {target}: expected a share between 0 and 1");
        bail!(Problem::usage(problem));
    }
    let path = calibration::path_of(&args.adapter)?;
    require_writable("-a", &args.adapter)?;
    let adapters = std::slice::from_ref(&args.adapter);
    let request = Request {
        model: &args.model,
        adapters,
        posterior_samples: args.posterior_samples,
        scoring: &args.scoring,
    };
    let opened = Opened::new(&request, row_limit)?;
    let data = open_held_out(&args.data, &opened.encoder)?;
    let choices = ChoiceRows::read(&data)?;
    require_one_kind(&data, &choices)?;
    if let Some(target) = args.target_error {
        // Fail before the long computation.
        abstention::require_rows(data.len(), target)?;
    }
    if data.len() < FEW {
        tracing::warn!(
            "{} rows say little about a temperature; give {FEW} or more that were not trained on",
            data.len()
        );
    }
    let [adapter] = opened.adapters.as_slice() else {
        bail!("one adapter is read");
    };
    let circumstances = opened.circumstances(adapter)?;
    let options = eval_options(&args.scoring, ECE_BINS);
    opened.require_same(data.sha256(), (options, args.max_tokens, args.target_error))?;
    let loaded = opened.load()?;
    let mean_name = opened.name_of_mean();
    let said = match choices.is_empty() {
        false => of_choices(args, &loaded, &data, &choices)?,
        true => of_answers(args, (&loaded, mean_name), &data)?,
    };
    let scaling = |predictions: &Vec<Prediction>| -> Result<Scaling> {
        let mut found = Scaling::fit(predictions, ECE_BINS)?;
        if let Some(target) = args.target_error {
            let outcomes = found.outcomes(predictions);
            found.abstention = Some(abstention::choose(&outcomes, target, args.scoring.seed)?);
        }
        Ok(found)
    };
    let rows = Rows {
        rows: said.mean.len(),
        sha256: data.sha256(),
        judged: said.judged,
        system: common_system(&data, 0..data.len())?,
    };
    let base = Scaling::fit(&said.base, ECE_BINS)?;
    let posterior = said.posterior.as_ref().map(&scaling).transpose()?;
    let written = Calibration::new(
        circumstances,
        rows,
        [base, scaling(&said.mean)?],
        opened.draws().zip(posterior),
    );
    if world().is_first() {
        written.write(&path)?;
    }
    let (main, predictions) = match (&written.posterior_scaling, &said.posterior) {
        (Some(scaling), Some(predictions)) => (scaling, predictions),
        _ => (&written.mean_scaling, &said.mean),
    };
    if is_at_bound(main.temperature) {
        tracing::warn!(
            "the temperature is at the end of what is searched: all answers are right, or confidence says nothing about them"
        );
    }
    let share = |predictions: &[Prediction]| {
        let right = predictions.iter().filter(|p| p.correct()).count();
        right as f64 / predictions.len().max(1) as f64
    };
    let posterior = said.posterior.as_deref().map(share);
    let shares = [Some(share(&said.base)), Some(share(&said.mean)), posterior];
    let abstention = main.abstention;
    let report = Report {
        temperature: main.temperature,
        threshold: abstention.and_then(|a| a.threshold),
        rows: written.data.rows,
        judged: said.judged,
        accuracy: share(predictions),
        before: main.before,
        after: main.after,
        answered: abstention.and_then(|a| a.answered),
        error: abstention.and_then(|a| a.error),
        error_bound: abstention.and_then(|a| a.error_bound),
        least_bound: abstention.map(|a| a.least_bound),
        written: &written,
    };
    show(args.json, &report, || {
        describe(&report, mean_name, &shares, &path)
    })
}

/// The value of [`Rows::system`] for these rows.
pub(super) fn common_system(
    data: &Dataset,
    rows: impl IntoIterator<Item = usize>,
) -> Result<Option<String>> {
    let systems = rows.into_iter().map(|at| {
        let (_, row) = data.row(at)?;
        Ok(row.system().map(str::to_owned))
    });
    Ok(Rows::common_system(systems.collect::<Result<Vec<_>>>()?))
}

fn of_choices(
    args: &CalibrateArgs,
    loaded: &Loaded,
    data: &Dataset,
    choices: &ChoiceRows,
) -> Result<Said> {
    let options = eval_options(&args.scoring, ECE_BINS);
    let base = ActiveAdapter::default();
    let mut predictors = vec![Predictor::One(&base)];
    predictors.extend(loaded.means.iter().map(Predictor::One));
    if !loaded.draws.is_empty() {
        predictors.push(Predictor::Average(&loaded.draws));
    }
    let rows: Vec<usize> = (0..data.len()).collect();
    let bar = progress::items("rows", rows.len() as u64);
    let done = |n| {
        bar.inc(n as u64);
        Ok(())
    };
    let scored = score(
        &loaded.decoder,
        &predictors,
        Selection {
            data,
            rows: &rows,
            choices,
        },
        &options,
        world(),
        done,
    )?;
    bar.finish_and_clear();
    let mut said = scored.iter().map(|scored| scored.predictions());
    Ok(Said {
        judged: Judged::Choices,
        base: said.next().unwrap_or_default(),
        mean: said.next().unwrap_or_default(),
        posterior: said.next(),
    })
}

/// Predictions for generated answers. An answer is right if it equals the row's; its confidence is the product of its
/// tokens' probabilities.
fn of_answers(
    args: &CalibrateArgs,
    (loaded, mean_name): (&Loaded, &'static str),
    data: &Dataset,
) -> Result<Said> {
    let batch_size = args.scoring.batch_size.unwrap_or(16);
    let questions = Recital::new(data, args.max_tokens, batch_size)?;
    if questions.prompts.is_empty() {
        let message = "no row has a question and an answer";
        let fix = "give rows with a prompt and a completion, or with messages";
        bail!(
            Problem::new(
                "no-answers",
                format!("`{}`", args.data.display()),
                message,
                fix
            )
            .exit(3)
        );
    }
    let answer = |name: &'static str, adapter: &ActiveAdapter| -> Result<Vec<Generation>> {
        let bar = progress::items(name, questions.prompts.len() as u64);
        let answers =
            questions.answers(&loaded.decoder, adapter, |n| bar.set_position(n as u64))?;
        bar.finish_and_clear();
        Ok(answers)
    };
    let base = answer("base", &ActiveAdapter::default())?;
    let Some(mean) = loaded.means.first() else {
        bail!("one adapter is read");
    };
    let answers = answer(mean_name, mean)?;
    let posterior = match loaded.draws.as_slice() {
        [] => None,
        draws => Some(questions.average_predictions(&loaded.decoder, &answers, draws)?),
    };
    Ok(Said {
        judged: Judged::Answers,
        base: questions.own_predictions(&base)?,
        mean: questions.own_predictions(&answers)?,
        posterior,
    })
}

fn describe(
    report: &Report<'_>,
    mean_name: &str,
    shares: &[Option<f64>; 3],
    path: &std::path::Path,
) -> String {
    let written = report.written;
    let mut text = format!(
        "wrote {}\n{} rows; NLL and ECE are on the same rows",
        path.display(),
        report.rows,
    );
    let average = written
        .draws
        .map(|draws| format!("average of {} draws", draws.n));
    let all = [
        ("base", Some(&written.base_scaling)),
        (mean_name, Some(&written.mean_scaling)),
        (
            average.as_deref().unwrap_or_default(),
            written.posterior_scaling.as_ref(),
        ),
    ];
    for ((name, scaling), share) in all.into_iter().zip(shares) {
        let share = 100.0 * share.unwrap_or_default();
        let Some(scaling) = scaling else { continue };
        let (before, after) = (scaling.before, scaling.after);
        text.push_str(&format!(
            "\n\n{name}\n  {share:.1} % right\n  temperature {:.3}{}: NLL {:.4} -> {:.4}, ECE {:.4} -> {:.4}",
            scaling.temperature,
            if is_at_bound(scaling.temperature) {
                ", the end of what is searched"
            } else {
                ""
            },
            before.nll,
            after.nll,
            before.ece,
            after.ece
        ));
        if let Some(abstention) = &scaling.abstention {
            text.push_str(&format!("\n  {}", of_abstention(abstention)));
        }
    }
    text
}

/// The result about the threshold as a sentence.
fn of_abstention(found: &Abstention) -> String {
    let percent =
        |share: Option<f64>| share.map_or("-".to_owned(), |s| format!("{:.1} %", 100.0 * s));
    let target = percent(Some(found.target_error));
    match (found.threshold, found.error_bound) {
        (Some(threshold), bound) => format!(
            "no answer below a confidence of {threshold:.4}: of the {} rows of the check {} are answered, {} of these wrong; with 95 % confidence at most {}",
            found.checked_on,
            percent(found.answered),
            percent(found.error),
            percent(bound)
        ),
        (None, Some(bound)) => format!(
            "abstention stays off: of the {} rows of the check {} are answered, {} of these wrong; up to {} cannot be ruled out, more than {target}; give more rows or a larger --target-error",
            found.checked_on,
            percent(found.answered),
            percent(found.error),
            percent(Some(bound)),
        ),
        (None, None) => format!(
            "abstention stays off: whatever the threshold, more than {target} wrong answers cannot be ruled out on the {} rows it is chosen on, at best {}; give more rows or a larger --target-error",
            found.chosen_on,
            percent(Some(found.least_bound)),
        ),
    }
}
