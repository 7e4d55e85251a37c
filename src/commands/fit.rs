//! `fit`: fits a posterior around any LoRA.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_adapters::methods::monteclora::Geometry;
use monteclora_converters::{
    Adapter, Beside, Error, LoraOptions, Problem, files, format_named, training_record,
};

use super::export::{beside_lines, require_apart};
use super::opened::{
    MOST_DRAWS, Opened, Request, eval_options, open_held_out, require_at_most, require_one_kind,
    require_positive, row_limit,
};
use super::train::stop_on_signals;
use super::{interrupted, show};
use crate::cli::{CriterionArg, FitArgs, GeometryArg};
use crate::config::ECE_BINS;
use crate::data::epoch_order;
use crate::distributed::world;
use crate::eval::ChoiceRows;
use crate::fit::{self, Criterion, Evaluation, FitRecord, Search, Stopped};
use crate::output::{require_empty, require_writable};
use crate::progress;

/// With fewer rows, the fitted scale is mostly chance.
const FEW: usize = 50;

pub(super) fn run(args: &FitArgs) -> Result<()> {
    require_positive(&[("--draws", args.draws), ("--rows", args.rows)])?;
    require_at_most("--draws", args.draws, MOST_DRAWS)?;
    let criterion = match args.criterion {
        CriterionArg::Nll => Criterion::Nll,
        CriterionArg::Tolerance => Criterion::Tolerance(args.tolerance),
    };
    if !(args.tolerance > 0.0 && args.tolerance.is_finite()) {
        let problem = format!("--tolerance {}: expected a number above 0", args.tolerance);
        bail!(Problem::usage(problem));
    }
    require_apart(&args.adapter, &args.output)?;
    require_empty(&args.output, args.force)?;
    require_writable("-o", &args.output)?;
    let adapters = std::slice::from_ref(&args.adapter);
    let request = Request {
        model: &args.model,
        adapters,
        posterior_samples: None,
        scoring: &args.scoring,
    };
    let opened = Opened::new(&request, row_limit)?;
    let [adapter] = opened.adapters.as_slice() else {
        bail!("one adapter is read");
    };
    if !adapter.has_effect()? {
        let message = "changes nothing: B A is zero at every site, and so a posterior around it would change nothing";
        let fix = "was it saved before training?";
        bail!(Problem::new(
            "no-effect",
            format!("`{}`", args.adapter.display()),
            message,
            fix
        ));
    }
    let data = open_held_out(&args.data, &opened.encoder)?;
    let choices = ChoiceRows::read(&data)?;
    require_one_kind(&data, &choices)?;
    let mut rows = epoch_order(data.len(), args.scoring.seed, 0);
    rows.truncate(args.rows);
    rows.sort_unstable();
    if rows.len() < FEW {
        tracing::warn!(
            "{} rows say little about the scale; give {FEW} or more that were not trained on",
            rows.len()
        );
    }
    let beside = Beside::of(&args.adapter)?.nothing_measured();
    let options = eval_options(&args.scoring, ECE_BINS);
    let search = (
        criterion,
        &rows,
        args.draws,
        args.scoring.seed,
        args.geometry,
    );
    opened.require_same(data.sha256(), (options, search))?;
    let loaded = opened.load()?;
    let interrupt = stop_on_signals("")?;
    let geometries: &[Geometry] = match args.geometry {
        GeometryArg::Auto => &[Geometry::Rows, Geometry::Svd],
        GeometryArg::Rows => &[Geometry::Rows],
        GeometryArg::Svd => &[Geometry::Svd],
    };
    let n_passes = Search::n_evaluations(geometries.len(), criterion) as u64;
    let bar = progress::items("scales", n_passes);
    let watch = |found: &Evaluation| {
        bar.inc(1);
        tell(found);
    };
    let search = Search {
        decoder: &loaded.decoder,
        adapter,
        data: &data,
        rows: &rows,
        choices: &choices,
        options,
        n_draws: args.draws,
        seed: args.scoring.seed,
        criterion,
        interrupt: &interrupt,
        ranks: world(),
        watch: &watch,
    };
    let fitted = search
        .run(geometries)
        .map_err(|error| match error.is::<Stopped>() {
            true => interrupted("interrupted; nothing was written"),
            false => error,
        })?;
    bar.finish_and_clear();
    let base = opened.base_fingerprint()?;
    let record = FitRecord::new(&search, &fitted, base, training(&args.adapter));
    let output = args.output.as_path();
    if world().is_first() {
        write(output, &fitted.adapter, &record, &beside)?;
    }
    show(args.json, &record, || {
        let geometry = match record.geometry {
            Geometry::Rows => "the same noise on all rows of A",
            Geometry::Svd => "noise over the singular values of B",
        };
        let mut text = format!(
            "wrote {}: PEFT MonteCLoRA, {geometry}, sigma {:.2e}\n  {}",
            output.display(),
            record.sigma,
            record.verdict()
        );
        if record.rounding > 0.0 {
            text.push_str(&format!(
                "\n  the mean is the adapter's, to {:.0e} of each update: another basis rounds",
                record.rounding
            ));
        }
        if !record.zero_modules.is_empty() {
            text.push_str(&format!(
                "\n  no noise where B is zero: {}",
                record.zero_modules.join(", ")
            ));
        }
        text + &beside_lines(&beside, "with the adapter")
    })
}

/// The adapter's run.json, without its list of modules.
pub(super) fn training(path: &Path) -> Option<serde_json::Value> {
    let mut record = training_record(path).ok()??;
    record.as_object_mut()?.remove("sites");
    Some(record)
}

/// Writes a fitted adapter, its record and the files carried along. A new directory appears only when it is complete.
pub(super) fn write(
    output: &Path,
    adapter: &Adapter,
    record: &FitRecord,
    beside: &Beside,
) -> Result<()> {
    let peft = format_named("peft").context("a format that is registered")?;
    let write_into = |dir: &Path| -> Result<(), Error> {
        let options = LoraOptions {
            overwrite: true,
            carried: beside.carried.clone(),
            ..LoraOptions::default()
        };
        peft.write(adapter, dir, &options, None)?;
        files::write_json(&dir.join(fit::FILE), record)
    };
    match files::is_occupied(output)? {
        true => write_into(output)?,
        false => files::write_new_dir(output, write_into)?,
    }
    Ok(())
}

/// Logs the evaluation of a scale.
pub(super) fn tell(found: &Evaluation) {
    let accuracy = found
        .accuracy
        .map_or_else(String::new, |a| format!(", accuracy {a:.4}"));
    match (found.geometry, found.sigma) {
        (Some(geometry), Some(sigma)) => {
            let geometry = format!("{geometry:?}").to_lowercase();
            tracing::info!(
                "{geometry}, sigma {sigma:.5}: NLL {:.4}{accuracy}",
                found.nll
            );
        }
        _ => tracing::info!("without noise: NLL {:.4}{accuracy}", found.nll),
    }
}
