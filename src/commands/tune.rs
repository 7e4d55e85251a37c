//! `tune`: searches for settings by trials, each an ordinary run.

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Problem, files, shell_word};
use serde_json::json;

use super::opened::{open_held_out, open_rows, require_positive};
use super::train::stop_on_signals;
use super::{interrupted, print, print_json, program};
use crate::cli::TuneArgs;
use crate::config::{DataConfig, RunConfig};
use crate::data::{EncodeOptions, Encoder, Overlong, RowFormat, RowSchema, Source, Survey, splits};
use crate::eval::ChoiceRows;
use crate::train::Prepared;
use crate::tune::{
    self, Commands, Event, LOG, Log, Objective, Options, Outcome, Range, SPACE, Space, Study,
    name_of, rungs,
};

pub(super) fn run(args: &TuneArgs) -> Result<()> {
    require_positive(&[
        ("--trials", args.trials),
        ("--jobs", args.jobs),
        ("--limit", args.limit.unwrap_or(1)),
    ])?;
    let space_text = Space::text(&args.space)?;
    let space = Space::parse(&space_text, &args.space.display().to_string())?;
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read `{}`", args.config.display()))?;
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let objective = Objective::named(&args.objective)?;
    let Some(data) = args.data.clone().or_else(|| config.data.valid.clone()) else {
        let message = format!(
            "{}: trials are compared on validation rows, and there are none; set [data] valid, or give --data",
            args.config.display()
        );
        bail!(Problem::usage(message));
    };
    // Every key of the space must be one of run.toml, at both ends of its range.
    for u in [0.0, 1.0] {
        let ends = space.values(&vec![u; space.parameters.len()]);
        let mut keys = args.overrides.clone();
        keys.extend(space.settings(&ends));
        load(args, &space, &keys)?;
    }
    require_searchable(&space, &config)?;
    require_format(&config, &data)?;
    let prepared = Prepared::new(config.clone(), None)?;
    require_trainable(args, &space, &prepared)?;
    let max_seq_length = config
        .data
        .max_seq_length_for(prepared.model_config.max_position_embeddings);
    let changes_length = space
        .parameters
        .iter()
        .find(|parameter| LENGTHS.contains(&parameter.key.as_str()));
    if let (Some(parameter), false) = (changes_length, args.no_early_stopping) {
        tracing::warn!(
            "`{}` changes the length of a run, so trials are not stopped early: their steps cannot be compared",
            parameter.key
        );
    }
    let has_rungs =
        !args.no_early_stopping && config.data.valid.is_some() && changes_length.is_none();
    let steps = prepared.total_steps;
    if has_rungs && rungs(steps, config.train.eval_steps).is_empty() {
        tracing::info!(
            "no trial is stopped early: a trial has {steps} steps, and train.eval_steps is {}",
            config.train.eval_steps
        );
    }
    let eval_steps = if has_rungs {
        config.train.eval_steps
    } else {
        0
    };
    let judged = judged_rows(args, &prepared, &data, max_seq_length, &objective)?;
    let options = Options {
        run_sha256: Options::hash(&text, &args.overrides),
        space_sha256: Options::hash(&space_text, &[]),
        strategy: args.strategy,
        seed: args.seed,
        objective,
        rungs: rungs(prepared.total_steps, eval_steps),
        train: prepared.train.sha256(),
        data: judged,
        limit: args.limit,
    };
    drop(prepared);
    let interrupt = stop_on_signals(" after these trials have written their checkpoints")?;
    let study = Study {
        dir: args.output.clone(),
        space: &space,
        start: start(&space, &config)?,
        commands: commands(args, &config, &data, max_seq_length)?,
        options,
        interrupt: &interrupt,
    };
    let (mut log, _lock) = study.open()?;
    files::write_text(&args.output.join(SPACE), &space_text)?;
    let objective = study.options.objective.clone();
    let show = |event: &Event<'_>| match event {
        Event::Started(index, settings, false) => {
            tracing::info!("{}: {}", name_of(*index), settings.join("  "));
        }
        Event::Started(index, settings, true) => {
            tracing::info!("{} goes on: {}", name_of(*index), settings.join("  "));
        }
        Event::Waiting(index) => {
            tracing::warn!(
                "{} is still run by an earlier process: waiting for its end",
                name_of(*index)
            );
        }
        Event::Ended(index, outcome, n_ended, best) => {
            let best = best.map_or(String::new(), |best| {
                format!("; best {} {:.4}", objective.metric, objective.shown(best))
            });
            let what = match outcome {
                Outcome::Finished {
                    objective: value,
                    seconds,
                    ..
                } => {
                    format!(
                        "{} {:.4} in {seconds:.0} s",
                        objective.metric,
                        objective.shown(*value)
                    )
                }
                Outcome::Stopped { step } => {
                    format!("stopped at step {step}, where the validation loss of others is lower")
                }
                Outcome::Failed { reason } => format!("failed: {reason}"),
            };
            let text = format!(
                "{}: {what} ({n_ended} of {} ended{best})",
                name_of(*index),
                args.trials
            );
            match outcome {
                Outcome::Failed { .. } => tracing::warn!("{text}"),
                _ => tracing::info!("{text}"),
            }
        }
    };
    let has_ended = study.run(&mut log, args.trials, args.jobs, show)?;
    let best = study.write_best(&log, &text, &args.overrides)?;
    if !has_ended && interrupt.load(Ordering::Relaxed) {
        return Err(interrupted(format!(
            "interrupted; the same command goes on with the study in `{}`",
            args.output.display()
        )));
    }
    tell(args, &study, &log, best.as_deref())
}

/// The configuration of run.toml with `keys`. What is wrong with a key of the space is told of space.toml.
fn load(args: &TuneArgs, space: &Space, keys: &[String]) -> Result<RunConfig> {
    let found = RunConfig::load(&args.config, keys);
    Ok(found.map_err(|problems| {
        let mut text = problems.to_string();
        for parameter in &space.parameters {
            let key = &parameter.key;
            let ours = format!("{}: \"{key}\":", args.space.display());
            text = text.replace(&format!("--set {key}:"), &ours);
        }
        Problem::usage(text)
    })?)
}

/// Reads the rows of the objective as `eval` will, so that what is wrong with them is known before the first trial. Returns their
/// SHA-256.
fn judged_rows(
    args: &TuneArgs,
    prepared: &Prepared,
    data: &Path,
    max_seq_length: usize,
    objective: &Objective,
) -> Result<String> {
    let run = &prepared.run;
    let options = EncodeOptions {
        overlong: Overlong::Error,
        ..run.data.encode_options(max_seq_length)
    };
    let template = run.model.chat_template.as_deref();
    let encoder = Encoder::from_dir(&prepared.base.dir, template, options)?;
    let rows = match args.data {
        Some(_) => open_rows(data, &encoder)?,
        None => open_held_out(data, &encoder)?,
    };
    if objective.is_of_choices() && ChoiceRows::read(&rows)?.is_empty() {
        bail!(Problem::usage(format!(
            "--objective {}: no row of `{}` has `choices`, from which it is measured; give rows with choices, or --objective loss",
            objective.metric,
            data.display()
        )));
    }
    Ok(rows.sha256())
}

/// Keys that change how many steps a run has, or when it is evaluated.
const LENGTHS: [&str; 7] = [
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.num_train_epochs",
    "train.max_steps",
    "train.eval_steps",
    "data.packing",
    "data.max_seq_length",
];

/// Refuses keys under which trials could not be compared, and rows that `eval` reads in another way than the run.
fn require_searchable(space: &Space, config: &RunConfig) -> Result<()> {
    const OF_DATA: [&str; 3] = ["data.packing", "data.max_seq_length", "data.train_on"];
    let is_other = |key: &str| {
        key.starts_with("model.")
            || (key.starts_with("data.") && !OF_DATA.contains(&key))
            || key == "train.output_dir"
    };
    if let Some(parameter) = space.parameters.iter().find(|p| is_other(&p.key)) {
        bail!(Problem::usage(format!(
            "`{}` cannot be searched: trials would be evaluated on another base or on other rows; search keys of [lora] and [train]",
            parameter.key
        )));
    }
    let plain = DataConfig::default();
    if config.data.fields != plain.fields {
        bail!(Problem::usage(
            "[data] fields are not known to `eval`, which judges the trials; rename the columns of the rows"
        ));
    }
    Ok(())
}

/// Refuses a format that `eval`, which detects the format, would not find in the rows.
fn require_format(config: &RunConfig, rows: &Path) -> Result<()> {
    let Some(format) = config.data.row_schema().format else {
        return Ok(());
    };
    let split = splits(rows)?.last().copied().unwrap_or_default();
    let source = Source::open(rows, split)?;
    let survey = Survey::take(&source, &RowSchema::default(), None, |_| {})?;
    match survey.format(&source)? {
        Some(found) if found == format => Ok(()),
        found => bail!(Problem::usage(format!(
            "[data] format is \"{}\", and `eval`, which judges the trials, takes the rows of `{}` for \"{}\"; write them in that format and leave the key out",
            format.name(),
            rows.display(),
            found.map_or("none", RowFormat::name),
        ))),
    }
}

/// Checks that every method and choice of the space can be trained on the base: at both ends of the other ranges.
fn require_trainable(args: &TuneArgs, space: &Space, prepared: &Prepared) -> Result<()> {
    for (at, parameter) in space.parameters.iter().enumerate() {
        let n_choices = match &parameter.range {
            Range::Categorical { values } => values.len(),
            _ => continue,
        };
        for (choice, end) in (0..n_choices).flat_map(|choice| [(choice, 0.0), (choice, 1.0)]) {
            let mut point = vec![end; space.parameters.len()];
            point[at] = (choice as f64 + 0.5) / n_choices as f64;
            let settings = space.settings(&space.values(&point));
            let mut keys = args.overrides.clone();
            keys.extend(settings.iter().cloned());
            let config = load(args, space, &keys)?;
            prepared.require_fitting(&config).map_err(|error| {
                Problem::usage(format!(
                    "trials with {} cannot be trained: {error:#}",
                    settings.join(", ")
                ))
            })?;
        }
    }
    Ok(())
}

/// The point of run.toml itself, if it lies in the space: what is known to work is tried first.
fn start(space: &Space, config: &RunConfig) -> Result<Option<Vec<f64>>> {
    let config = toml::Value::try_from(config).context("the configuration as TOML")?;
    let value = |key: &str| {
        key.split('.')
            .try_fold(&config, |at, part| at.get(part))
            .cloned()
    };
    let values = space
        .parameters
        .iter()
        .map(|parameter| value(&parameter.key));
    let values: Option<Vec<toml::Value>> = values.collect();
    Ok(values.and_then(|values| space.point(&values)))
}

fn commands(
    args: &TuneArgs,
    config: &RunConfig,
    data: &Path,
    max_seq_length: usize,
) -> Result<Commands> {
    let mut train: Vec<OsString> = vec!["-c".into(), args.config.clone().into()];
    for setting in &args.overrides {
        train.extend(["--set".into(), setting.into()]);
    }
    let model = &config.model;
    let mut eval: Vec<OsString> = vec!["-m".into(), model.model_id.clone().into()];
    eval.extend([
        "--data".into(),
        data.into(),
        "--json".into(),
        "--no-base".into(),
        "--max-seq-length".into(),
        max_seq_length.to_string().into(),
    ]);
    if args.data.is_none() {
        eval.push("--held-out".into());
    }
    let mut option = |flag: &str, value: Option<OsString>| {
        if let Some(value) = value {
            eval.extend([flag.into(), value]);
        }
    };
    option("--revision", model.revision.clone().map(Into::into));
    option(
        "--chat-template",
        model.chat_template.clone().map(Into::into),
    );
    option("--limit", args.limit.map(|n| n.to_string().into()));
    if model.dtype != Default::default() {
        option("--dtype", Some(model.dtype.0.into()));
    }
    if !config.data.apply_chat_template {
        eval.push("--no-chat-template".into());
    }
    for arguments in [&mut train, &mut eval] {
        if args.cpu {
            arguments.push("--cpu".into());
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(Commands {
        program: std::env::current_exe().context("the program's own path")?,
        train,
        eval,
        threads: (cores / args.jobs).max(1),
    })
}

fn tell(args: &TuneArgs, study: &Study<'_>, log: &Log, best: Option<&Path>) -> Result<()> {
    let objective = &study.options.objective;
    let winner = log.best();
    let out = &args.output;
    if args.json {
        print_json(&json!({
            "output_dir": out,
            "trials": log.trials.len(),
            "finished": log.trials.iter().filter(|trial| trial.objective().is_some()).count(),
            "objective": objective.metric,
            "best": winner.map(|(index, value)| json!({
                "trial": name_of(index),
                "value": objective.shown(value),
                "settings": study.settings(&log.trials[index]).unwrap_or_default(),
            })),
            "best_toml": best,
        }))?;
    }
    let (Some((index, value)), Some(best)) = (winner, best) else {
        bail!(
            Problem::sentence(
                "tune",
                format!(
                    "no trial was trained to its end; see {}",
                    out.join(LOG).display()
                )
            )
            .exit(1)
        );
    };
    if args.json {
        return Ok(());
    }
    let program = program();
    let word = |path: &Path| shell_word(&path.display().to_string());
    let n_failed = (log.trials.iter())
        .filter(|trial| matches!(trial.outcome, Some(Outcome::Failed { .. })))
        .count();
    let failed = match n_failed {
        0 => String::new(),
        n => format!(" ({n} failed)"),
    };
    print(&format!(
        "best of {} trials{failed}: {} with {} {:.4}\n  {}\nwrote {}\nnext\n  {program} report {}               # all trials, and what decides\n  {program} train -c {}   # train with the best settings\n  {program} eval -a {} --data TEST",
        log.trials.len(),
        name_of(index),
        objective.metric,
        objective.shown(value),
        study.settings(&log.trials[index])?.join("\n  "),
        best.display(),
        word(out),
        word(best),
        word(&tune::dir_of(out, index)),
    ))
}
